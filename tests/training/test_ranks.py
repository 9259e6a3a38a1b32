"""Several ranks: what they exchange, and that an optimizer step of any kind is that of one rank to rounding.

The ranks of the everyday tests are forked once and do one work after another; so does this process alone.
"""

import math
import shutil
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from r1kernels.grpo.reductions import REDUCTIONS
from tests.support.ranks import on_ranks, ranks_for
from tests.support.restored import cloned, restored
from tests.training.test_loops import share_of_even_ids, without_times
from training import adapters, checkpoint, files, notices, prompts, responses, reward_model, student
from training.context import StageContext
from training.document import Document
from training.engines import EngineError, Output, Request, SamplingParams
from training.engines.shared import SharedEngine
from training.errors import UserError
from training.loops import grpo, next_token, on_policy
from training.loops.optim import Optimizer
from training.loops.sample import Prompt
from training.loops.token_loss import OfTeacher
from training.model import build_model, check_head
from training.own_rewards import OwnReward
from training.parallel import ranks
from training.parallel.shard import whole
from training.parts import run_parts
from training.placement import placed
from training.progress import Progress
from training.recipe import load
from training.response import parse
from training.responses import Source
from training.reward_model import Pair, Point
from training.rewards import Sample
from training.run_dir import StageDir
from training.sections import Distill, Grpo, Lora, Model, NextToken, RewardModels, Student
from training.tasks import get_task
from training.tasks.arithmetic import make_problem
from training.tokenizer import build_tokenizer

TOKENIZER = build_tokenizer()
SIZES = Model(hidden_size=32, layers=2, heads=2, intermediate_size=32, moe_intermediate_size=16, experts=4)
TEXTS = [Document(f"{a} plus {b} makes {a + b} .") for a in range(1, 5) for b in range(1, 5)]
ANSWERS = [Document(f"makes {a + b}", prompts.ask(f"{a} plus 3")) for a in (1, 2, 3) for b in range(4)]
PROBLEMS = [make_problem(a, 7, 9, "en") for a in (3, 5, 8)]
CAPITALS = [p for p in get_task("general").problems("train") if p.level == "capital" and p.language == "en"]
GRPO = Grpo(
    steps=1, prompts=3, group_size=4, minibatches=2, lr=1e-4, max_new_tokens=8, kl_coef=0.1, bias_rate=2e-3,
    micro_batch_tokens=160,
)  # fmt: skip
STEP = NextToken(steps=1, batch_size=11, lr=2e-4, bias_rate=2e-3, micro_batch_tokens=64)


words = []  # settings of the recipe


# that most kinds begin with
mixture = restored(lambda: build_model(SIZES, TOKENIZER, 0))


def context(folder, config, name="stage"):
    stage = StageDir(folder)
    ranks.once(lambda: stage.begin({}, {}))
    return StageContext(name, load("smoke", words), config, stage, {}, Progress(quiet=True))


def after_next_token(folder, documents, config=STEP, build=mixture):
    at = context(folder, config)
    with placed(at.recipe):
        model = build()
        next_token.train(model, TOKENIZER, documents, config, at)
    return model.state_dict(), without_times(at.stage.metrics())


def after_grpo(folder, build=mixture, **changes):
    config = replace(GRPO, **changes)
    at, model = context(folder, config), build()
    grpo.train(model, TOKENIZER, lambda step: PROBLEMS, prompts.chat, share_of_even_ids, config, at)
    return model.state_dict(), without_times(at.stage.metrics())


def after_reward_model(folder, data):
    config = RewardModels(steps=1, batch_size=7, lr=2e-4, micro_batch_tokens=64)
    at = context(folder, config)
    model = reward_model.from_language_model(mixture())
    generator = torch.Generator().manual_seed(1)
    torch.nn.init.normal_(model.score.weight, std=0.1, generator=generator)
    reward_model.train(model, TOKENIZER, data, config, at)
    row = {"accuracy": reward_model.accuracy(model, TOKENIZER, data), "offset": model.config.reward_offset}
    return model.state_dict(), [*without_times(at.stage.metrics()), row]


# with each reduction something else that does not depend on it
REDUCED = {
    "sequence": {},
    "token": {"fused_loss": True},
    "constant": {"top_p": 0.9, "old_logprobs": "sampler"},
    "sequence-sum": {"replay": False, "kl_coef": 0.0, "keep_groups": "spread"},
}
KINDS = {
    "next token": lambda path: after_next_token(path, TEXTS, replace(STEP, steps=2)),
    "responses that share prompts": lambda path: after_next_token(path, ANSWERS),
    "a document for one rank alone": lambda path: after_next_token(path, TEXTS, replace(STEP, batch_size=1)),
    **{
        f"grpo, {each}": lambda path, each=each: after_grpo(path, reduction=each, **REDUCED[each])
        for each in REDUCTIONS
    },
    "pairs": lambda path: after_reward_model(
        path, [Pair(p, f"it is {p.reference} {p.reference}", "i cannot tell it") for p in CAPITALS[:9]]
    ),
    "points": lambda path: after_reward_model(
        path, [Point(p, "it is here", i % 2 == 0) for i, p in enumerate(CAPITALS[:9])]
    ),
}


def tied():
    """A dense model whose head is its embeddings."""
    return student.build(
        Student(architecture="llama", hidden_size=32, layers=2, heads=2, intermediate_size=32),
        TOKENIZER,
        0,
        64,
    )[0]


@cache
def teacher():
    return build_model(SIZES, TOKENIZER, 0).requires_grad_(False).eval()


def adapted():
    """A mixture with adapters, those of its experts too."""
    model = build_model(SIZES, TOKENIZER, 0)
    adapters.attach(model, Lora(rank=2, experts=True), 0)
    check_head(model)  # as the stages do
    return model


def after_distillation(folder, own_responses=False):
    """A student with a tied head, from the divergence of a mixture that reads what it reads."""
    at, model = context(folder, STEP), tied()
    loss = OfTeacher(teacher(), "forward_kl", 0.5)
    if own_responses:
        asked = [Prompt(problem, prompts.chat(problem)) for problem in PROBLEMS]
        how = Distill(max_new_tokens=8)
        on_policy.train(model, TOKENIZER, asked, loss, STEP, how, next_token.Amount(2), at)
    else:
        next_token.train(model, TOKENIZER, ANSWERS, STEP, at, token_loss=loss)
    return model.state_dict(), without_times(at.stage.metrics())


KINDS["adapters"] = lambda path: after_next_token(path, ANSWERS, build=adapted)
KINDS["grpo, adapters"] = lambda path: after_grpo(path, build=adapted)
KINDS["distillation"] = after_distillation
KINDS["distillation on policy"] = partial(after_distillation, own_responses=True)
KINDS["a tied head"] = lambda path: after_next_token(path, ANSWERS, build=tied)
DIVIDED = (
    "next token",
    "a document for one rank alone",
    "grpo, sequence",
    "pairs",
    "distillation",  # of a student with a tied head
    "distillation on policy",
)


def everything(folder, settings=(), kinds=KINDS):
    words[:] = settings
    found = {}
    for name in kinds:
        with noted_gradients() as gradients:
            state, rows = KINDS[name](folder / name)
        found[name] = cloned(state), rows, gradients
    words.clear()
    return found


@contextmanager
def noted_gradients():
    """A list of the whole gradients of all parameters, as AdamW gets them, of each optimizer step in the block."""
    found = []

    def note(optimizer, args, kwargs):
        parameters = [each for group in optimizer.param_groups for each in group["params"]]
        found.append([whole(each.grad).clone() for each in parameters if each.grad is not None])

    hook = register_optimizer_step_pre_hook(note)
    try:
        yield found
    finally:
        hook.remove()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Kind of step -> what one rank has after it."""
    return everything(tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two ranks that do what is named."""
    works = (everything, resumed, exchanged, calls_apart, students)
    meeting = tmp_path_factory.mktemp("two") / "meeting"
    with ranks_for(2, meeting, {each.__name__: each for each in works}) as does:
        yield does


@pytest.fixture(scope="module")
def compared(alone, two, tmp_path_factory):
    """Kind of step -> what one rank, and each of two, have after it."""
    first, second = two("everything", tmp_path_factory.mktemp("two"))
    return {name: (alone[name], first[name], second[name]) for name in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_two_ranks_is_that_of_one(compared, kind):
    assert_same(*compared[kind])


def test_a_step_of_a_model_that_two_ranks_divide_is_that_of_one(alone, two, tmp_path):
    settings = ["parallel.shard=2", "gradient_checkpointing=true"]
    first, second = two("everything", tmp_path, settings, DIVIDED)
    for kind in DIVIDED:
        assert_same(alone[kind], first[kind], second[kind])


class Stop(Exception):
    """A kill in the middle of a run."""


def resumed(folder, settings, steps, stop_at=None):
    """The weights and the last loss after `steps` steps, or what is on the disk where all ranks end at `stop_at`."""
    words[:] = settings
    config = NextToken(steps=steps, batch_size=8, lr=1e-3, save_every=2)
    at, model = context(folder, config), build_model(SIZES, TOKENIZER, 0)
    log = at.stage.log

    def until(**row):
        log(**row)
        if row["step"] == stop_at:
            raise Stop

    at.stage.log = until
    try:
        next_token.train(model, TOKENIZER, ANSWERS, config, at)
    except Stop:
        return None
    finally:
        words.clear()
    return model.state_dict(), without_times(at.stage.metrics())


@pytest.fixture(scope="module")
def unstopped(tmp_path_factory):
    """What one rank has after four steps."""
    return resumed(tmp_path_factory.mktemp("whole"), ["parallel.shard=1"], 4)


def in_layout(two, layout, *arguments):
    """`resumed` on so many ranks, so many of which divide a model."""
    count, shard = layout
    given = (arguments[0], [f"parallel.shard={shard}"], *arguments[1:])
    return resumed(*given) if count == 1 else two("resumed", *given)[0]


@pytest.fixture(scope="module")
def cut(two, tmp_path_factory):
    """Layout -> the folder of a run that ended behind its resume point of step 2; each is made once."""

    @cache
    def of(layout):
        folder = tmp_path_factory.mktemp("cut") / "cut"
        in_layout(two, layout, folder, 4, 2)
        return folder

    return of


@pytest.mark.parametrize(
    ("before", "after"), [((1, 1), (2, 2)), ((2, 2), (2, 2)), ((2, 2), (1, 1)), ((2, 1), (2, 2))]
)
def test_a_run_goes_on_with_another_number_of_ranks_and_another_division(
    unstopped, cut, two, tmp_path, before, after
):
    """before, after: ranks and how many of them divide a model."""
    expected, rows = unstopped
    shutil.copytree(cut(before), tmp_path / "cut")
    assert len(list((tmp_path / "cut").glob("state-*/*.safetensors"))) == before[0]
    found, rows_after = in_layout(two, after, tmp_path / "cut", 4)
    assert [row["step"] for row in rows_after] == [0, 1, 2, 3]
    assert [row["loss"] for row in rows_after] == pytest.approx([row["loss"] for row in rows], rel=1e-4)
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= 2e-5 * tensor.norm().clamp(min=1e-3), name
    if before == after:
        same, _ = in_layout(two, before, tmp_path / "same", 4)
        assert all(torch.equal(found[name], tensor) for name, tensor in same.items())


@pytest.mark.slow
@pytest.mark.parametrize("settings", [["parallel.shard=2"], ["parallel.shard=4"]])
def test_a_step_of_four_ranks_is_that_of_one(alone, tmp_path, settings):
    """Of two models with two ranks each, and of one with four."""
    kinds = [kind for kind in KINDS if "adapters" not in kind]  # with which models are not divided
    four = on_ranks(4, lambda: everything(tmp_path / "four", settings, kinds), tmp_path / "meeting")
    for kind in kinds:
        assert_same(alone[kind], four[0][kind], four[3][kind], within=3e-6, moved=0.5)


@pytest.mark.slow
def test_a_divided_model_computes_in_bfloat16_and_learns_in_float32(alone, tmp_path):
    settings = ["parallel.shard=2", "dtype=bfloat16"]
    two = on_ranks(2, lambda: everything(tmp_path / "two", settings, ["next token"]), tmp_path / "meeting")
    (expected, rows, _), (found, rows_of_two, _) = alone["next token"], two[0]["next token"]
    assert all(tensor.dtype == expected[name].dtype for name, tensor in found.items())
    for name, tensor in found.items():
        assert (tensor - expected[name]).norm() <= 1e-2 * expected[name].norm().clamp(min=1e-3), name
    assert rows_of_two[0]["grad_norm"] == pytest.approx(rows[0]["grad_norm"], rel=2e-2)
    assert rows_of_two[0]["grad_norm"] != rows[0]["grad_norm"]


def assert_same(one, first_of_several, last_of_several, within=1e-6, moved=0.1):
    """Gradients of the first step to rounding, those of later ones near; weights to `within` and `moved` of the learning rate:
    AdamW moves an element whose gradient is near its epsilon, 1e-8, by a part of the rate that is rounding."""
    (alone, rows, gradients), (first, rows_of_two, gradients_of_two), (second, _, _) = (
        one,
        first_of_several,
        last_of_several,
    )
    assert len(gradients) == len(gradients_of_two) > 0
    for step, (expected, found) in enumerate(zip(gradients, gradients_of_two, strict=True)):
        for number, (known, sum_of_ranks) in enumerate(zip(expected, found, strict=True)):
            apart = (sum_of_ranks - known).norm() / known.norm().clamp(min=1e-8)
            assert apart <= (1e-4 if step else 1e-5), (
                f"gradient {number}, {list(known.shape)}, differs by {apart:.1e}"
            )
    for name, expected in alone.items():
        assert torch.equal(first[name], second[name]), f"{name} is not the same on all ranks"
        apart = (first[name] - expected).norm()
        assert apart <= within * expected.norm() + moved * STEP.lr, f"{name} differs by {apart:.1e}"
    assert all(row["grad_norm"] > 1e-4 for row in rows if "grad_norm" in row)
    assert [row.keys() for row in rows] == [row.keys() for row in rows_of_two]
    for one, two in zip(rows, rows_of_two, strict=True):
        for name, value in one.items():
            # the share of replayed choices is one of computed tokens, of which there are fewer where more is shared
            near = 0.02 if name.startswith("replay_agreement") else 2e-6
            assert two[name] == pytest.approx(value, rel=1e-4, abs=near), name


def test_the_bias_follows_the_load_of_all_ranks(compared):
    for kind in ("next token", "grpo, sequence"):
        (alone, *_), (first, *_), _ = compared[kind]
        bias = [name for name in alone if name.endswith("e_score_correction_bias")]
        assert bias and all(torch.equal(alone[name], first[name]) and alone[name].any() for name in bias)


class NamesRank:
    """An engine whose outputs are the key of the request and the rank that drew it."""

    encoder, version = None, 0

    def sample(self, requests, params):
        return [Output((each.key, ranks.rank()), (0.0, 0.0), True, 0) for each in requests]


def exchanges(folder):
    """What the functions of training.parallel.ranks give on a rank."""
    number = ranks.rank()

    def fail():
        raise EngineError("only once")

    def asked(whole):
        return [value * 10 + len(whole) for value in whole]

    with pytest.raises(EngineError, match="only once"):
        ranks.once(fail)
    at = context(folder, None)
    at.stage.log(step=number)
    at.stage.write_data("data.jsonl", [{"rank": number}])
    rows = at.stage.metrics() if number == 0 else [{"step": 0}]  # which this rank may look for too early
    run_parts(at, ["a", "b"], lambda part, name: {"value": number})
    return {
        "once": ranks.once(lambda: (ranks.world(), number)),
        "sums": ranks.sums({"a": 1.0, **({"b": 5.0} if number else {})}),
        "share": [
            list(ranks.share(weights))
            for weights in ([1, 1, 1, 1], [6, 1, 1, 1], [1], [], [0, 0], [0, 1, 1, 0])
        ],
        "spread": ranks.spread(lambda own: [(number, each) for each in own], range(5)),
        "even": [ranks.even(weights) for weights in ([2, 1.5], [5, 1], [3, 2, 2], [1])],
        "apart": ranks.apart(lambda each: (each, ranks.world()), "abc", [3, 1, 2]),
        "drawn": SharedEngine(NamesRank()).sample(
            [Request((prompt,), key, 1) for key, prompt in enumerate([5, 5, 6, 6, 7, 7])], SamplingParams()
        ),
        "together": ranks.together(asked, [number] * (1 + number)),
        "has": (at.stage.has_data("data.jsonl"), at.stage.has_data("none.jsonl")),
        "rows": (rows, at.stage.read_data("data.jsonl")),
        "state": at.stage.load_state().counters,
    }


def skipped(folder):
    """A gradient that is not finite on rank 1 alone."""
    layer = torch.nn.Linear(2, 2)
    before = layer.weight.clone()
    optimizer = Optimizer(layer, weight_decay=0.0, grad_clip=1.0)
    layer.weight.grad = torch.full_like(before, math.nan if ranks.rank() else 1.0)
    *_, taken = optimizer.step(1.0, 0.1)
    return taken, optimizer.skipped, torch.equal(before, layer.weight), layer.bias.grad


def own_reward(folder):
    """A reward that wants all responses of a step at once."""
    ranks.once(
        lambda: (folder / "mine.py").write_text("def rank(samples): return [len(samples)] * len(samples)")
    )
    reward = OwnReward(f"python:{folder / 'mine.py'}:rank", 60.0)
    text = "<think> a </think> <answer> 6 </answer>"
    samples = [Sample(PROBLEMS[0], text, parse(text, "answer_tags"), (1, 2))] * (2 + ranks.rank())
    found = [each.value for each in reward(samples)]
    reward.close()
    return found


def exchanged(folder):
    return exchanges(folder / "stage"), skipped(folder), own_reward(folder)


def test_what_two_ranks_exchange(two, tmp_path):
    found = two("exchanged", tmp_path)
    (first, skip, _), (second, skip_too, _) = found
    same = ("once", "sums", "spread", "apart", "has", "rows", "state")
    assert {name: first[name] for name in same} == {name: second[name] for name in same}
    assert first["once"] == (1, 0)  # rank 0 does it as if it were alone
    assert first["sums"] == {"a": 2.0, "b": 5.0}
    assert first["share"] == [[0, 1], [0], [], [], [0, 1], [0, 1]]
    assert second["share"] == [[2, 3], [1, 2, 3], [0], [], [], [2, 3]]
    assert first["spread"] == [(0, 0), (0, 1), (1, 2), (1, 3), (1, 4)]
    assert first["even"] == second["even"] == [True, False, True, False]
    assert first["apart"] == [("a", 1), ("b", 1), ("c", 1)]
    assert first["drawn"] == second["drawn"]
    # prompts by turns: 5 here, 6 there, the last one divided
    assert [each.token_ids for each in first["drawn"]] == [(0, 0), (1, 0), (2, 1), (3, 1), (4, 0), (5, 1)]
    assert (first["together"], second["together"]) == ([3], [13, 13])
    assert first["has"] == (True, False)
    assert first["rows"] == ([{"step": 0}], [{"rank": 0}])
    assert first["state"]["finished"] == {"a": {"value": 0}, "b": {"value": 0}}
    assert skip == skip_too == (False, 1, True, None)
    assert [own for _, _, own in found] == [[5, 5], [5, 5, 5]]


def calls_apart(folder):
    """Responses of three calls, two of which are as much as the third; what is warned of, and the pieces that are kept; how many
    ranks made a call, and that where it is too long to be made apart."""
    at = context(folder, None)
    source = Source("zero", build_model(SIZES, TOKENIZER, 0), TOKENIZER, "hash", prompts.chat)
    asked = ((PROBLEMS, 2), (PROBLEMS, 4), (PROBLEMS[::-1], 2))
    calls = [{"source": source, "asked": problems, "samples": samples} for problems, samples in asked]
    heard, worlds = [], set()
    draw, how = responses.draw, {"temperature": 1.0, "max_new_tokens": 6, "seed_parts": (0,), "batch_size": 4}

    def noted(**call):
        worlds.add(ranks.world())
        return draw(**call)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(responses, "draw", noted)
        with notices.listening(lambda kind, text: heard.append(text)):
            drawn = responses.draw_each(calls, context=at, **how)
        pieces = sorted(each.name for each in at.stage.piece("").iterdir())
        apart = worlds.copy()
        worlds.clear()
        patch.setattr(responses, "APART", 60)  # the second call may be of 72 tokens
        responses.draw_each(calls, context=None, **how)
    return (drawn, heard, pieces), (apart, worlds)


def test_calls_that_ranks_make_apart_are_those_of_one(two, tmp_path):
    found = two("calls_apart", tmp_path / "two")
    alone, _ = calls_apart(tmp_path / "one")
    assert [drawn for drawn, _ in found] == [alone, alone]
    assert [made_by for _, made_by in found] == [({1}, {2})] * 2
    drawn, heard, pieces = alone
    assert [len(each) for each in drawn] == [6, 12, 6]
    assert len(heard) == 1 and "did not end within 6 tokens" in heard[0]
    assert len(pieces) == 3


def students(folder, operations=(3.0, 2.0), steps=4, stop_at=None):
    """Two students of a stage, what they are warned of and where they are saved: metrics, lines, warnings, hashes, and the parts
    that were begun here; None where one ends at `stop_at`, a part and a step, and the other rank with it."""
    at, began = context(folder, replace(STEP, steps=steps, save_every=2)), []

    def work(part, name):
        log = part.stage.log

        def until(**row):
            log(**row)
            if (name, row["step"]) == stop_at:
                raise Stop

        part.stage.log = until
        began.append(name)
        model = tied()
        metrics = next_token.train(model, TOKENIZER, ANSWERS, at.config, part)
        part.stage.add_samples([{"text": name}])
        notices.warn(f"kind {name}", f"{name} warned")
        checkpoint.save_model(model, TOKENIZER, folder / name)
        return without_times([metrics])[0] | {"world": ranks.world()}

    try:
        with notices.listening(at.stage.add_warning):
            found = run_parts(at, ["a", "b"], work, dict(zip("ab", operations, strict=True)).get)
    except (Stop, RuntimeError):  # what gloo raises where the other rank has ended
        return None
    written = [files.folder_hashes(folder / name) for name in "ab"]
    lines = [without_times(at.stage.metrics()), at.stage.samples(), at.stage.warnings()]
    return found, lines, written, began


@pytest.fixture(scope="module")
def students_of_one(tmp_path_factory):
    return students(tmp_path_factory.mktemp("students") / "one")


def test_parts_that_ranks_do_apart_are_those_of_one(two, students_of_one, tmp_path):
    found = two("students", tmp_path / "two")
    *alone, began = students_of_one
    assert began == ["a", "b"] and sorted(name for *_, began in found for name in began) == ["a", "b"]
    assert [list(each) for *each, _ in found] == [alone, alone]
    _, (rows, samples, warned), written = alone
    assert [(row["part"], row["step"]) for row in rows] == [
        (name, step) for name in "ab" for step in range(4)
    ]
    assert [row["text"] for row in samples] == ["a", "b"]
    assert [row["text"] for row in warned] == ["a warned", "b warned"]
    assert all("model.safetensors" in each for each in written) and not (tmp_path / "two/parts/a").exists()


@pytest.mark.parametrize("operations", [(3.0, 1.0), (2.0**43, 2.0**43)])
def test_parts_of_which_one_is_too_large_are_done_together(two, tmp_path, operations):
    found = two("students", tmp_path / "two", operations, 1)
    assert [began for *_, began in found] == [["a", "b"]] * 2
    assert all(metrics[name]["world"] == 2 for metrics, *_ in found for name in "ab")


def test_parts_that_were_cut_off_apart_go_on(two, students_of_one, tmp_path):
    """On one rank and on two: one has ended, the other is behind its resume point of step 2."""

    def cut():
        return students(tmp_path / "cut", stop_at=("b", 3))

    assert on_ranks(2, cut, tmp_path / "meeting") == [None, None]
    assert (tmp_path / "cut/parts/a/ended.json").is_file()
    *alone, _ = students_of_one
    for again in (1, 2):
        run = tmp_path / f"run on {again}"
        shutil.copytree(tmp_path / "cut", run)
        found = [students(run)] if again == 1 else two("students", run)
        assert [list(each) for *each, _ in found] == [alone] * again
        assert [name for *_, began in found for name in began] == ["b"]


def test_one_process_exchanges_nothing():
    def fail():
        raise UserError("as it is")

    assert ranks.world() == 1 and ranks.main() and ranks.gather(3) == [3]
    assert list(ranks.share([1, 2, 3])) == [0, 1, 2]
    assert ranks.spread(lambda own: [2 * each for each in own], [1, 2]) == [2, 4]
    with pytest.raises(UserError, match="as it is"):
        ranks.once(fail)
