"""Several ranks: what they exchange, and that an optimizer step of any kind is that of one rank to rounding.

The ranks of the everyday tests are forked once, do everything that is compared, and so does this process alone.
"""

import math
from dataclasses import replace

import pytest
import torch

from r1kernels.grpo.reductions import REDUCTIONS
from tests.support.ranks import on_ranks
from training import prompts, reward_model
from training.context import StageContext
from training.document import Document
from training.engines import EngineError
from training.errors import UserError
from training.loops import grpo, next_token
from training.loops.optim import Optimizer
from training.model import build_model
from training.own_rewards import OwnReward
from training.parallel import ranks
from training.parts import run_parts
from training.progress import Progress
from training.recipe import load
from training.response import parse
from training.reward_model import Pair, Point
from training.rewards import Reward, Sample, Scored
from training.run_dir import StageDir
from training.sections import Grpo, Model, NextToken, RewardModels
from training.tasks import get_task
from training.tasks.arithmetic import make_problem
from training.tokenizer import build_tokenizer

TOKENIZER = build_tokenizer()
SIZES = Model(hidden_size=32, layers=2, heads=2, intermediate_size=32, moe_intermediate_size=16, experts=4)
TEXTS = [Document(f"{a} plus {b} makes {a + b} .") for a in range(1, 5) for b in range(1, 5)]
ANSWERS = [Document(f"makes {a + b}", prompts.ask(f"{a} plus 3")) for a in (1, 2, 3) for b in range(4)]
PROBLEMS = [make_problem(a, 7, "en") for a in (3, 5, 8)]
CAPITALS = [p for p in get_task("general").problems("train") if p.level == "capital" and p.language == "en"]
GRPO = Grpo(
    steps=1, prompts=3, group_size=4, minibatches=2, lr=1e-4, max_new_tokens=8, kl_coef=0.1, bias_rate=2e-3,
    micro_batch_tokens=160,
)  # fmt: skip
STEP = NextToken(steps=2, batch_size=11, lr=2e-4, bias_rate=2e-3, micro_batch_tokens=64)


def context(folder, config, name="stage"):
    stage = StageDir(folder)
    ranks.once(lambda: stage.begin({}, {}))
    return StageContext(name, load("smoke"), config, stage, {}, Progress(quiet=True))


def without_times(rows):
    return [{k: v for k, v in row.items() if not k.endswith(("_seconds", "_per_second"))} for row in rows]


def share_of_even_ids(step, samples):
    values = [sum(each % 2 == 0 for each in sample.token_ids) / len(sample.token_ids) for sample in samples]
    return [Scored(s, v, {"format": Reward(v, "")}) for s, v in zip(samples, values, strict=True)]


def after_next_token(folder, documents, config=STEP):
    at, model = context(folder, config), build_model(SIZES, TOKENIZER, 0)
    next_token.train(model, TOKENIZER, documents, config, at)
    return model.state_dict(), without_times(at.stage.metrics())


def after_grpo(folder, **changes):
    config = replace(GRPO, **changes)
    at, model = context(folder, config), build_model(SIZES, TOKENIZER, 0)
    grpo.train(model, TOKENIZER, lambda step: PROBLEMS, prompts.chat, share_of_even_ids, config, at)
    return model.state_dict(), without_times(at.stage.metrics())


def after_reward_model(folder, data):
    config = RewardModels(steps=2, batch_size=7, lr=2e-4, micro_batch_tokens=64)
    at = context(folder, config)
    model = reward_model.from_language_model(build_model(SIZES, TOKENIZER, 0))
    generator = torch.Generator().manual_seed(1)
    torch.nn.init.normal_(model.score.weight, std=0.1, generator=generator)
    reward_model.train(model, TOKENIZER, data, config, at)
    row = {"accuracy": reward_model.accuracy(model, TOKENIZER, data), "offset": model.config.reward_offset}
    return model.state_dict(), [*without_times(at.stage.metrics()), row]


KINDS = {
    "next token": lambda path: after_next_token(path, TEXTS),
    "responses that share prompts": lambda path: after_next_token(path, ANSWERS),
    "a document for one rank alone": lambda path: after_next_token(
        path, TEXTS, replace(STEP, steps=1, batch_size=1)
    ),
    **{
        f"grpo, {each}": lambda path, each=each: after_grpo(path, reduction=each, fused_loss=each == "token")
        for each in REDUCTIONS
    },
    "grpo, cut, by the sampler": lambda path: after_grpo(path, top_p=0.9, old_logprobs="sampler"),
    "grpo without replay": lambda path: after_grpo(path, replay=False, kl_coef=0.0, keep_groups="spread"),
    "pairs": lambda path: after_reward_model(
        path, [Pair(p, f"it is {p.reference} {p.reference}", "i cannot tell it") for p in CAPITALS[:9]]
    ),
    "points": lambda path: after_reward_model(
        path, [Point(p, "it is here", i % 2 == 0) for i, p in enumerate(CAPITALS[:9])]
    ),
}


def everything(folder):
    return {name: work(folder / name) for name, work in KINDS.items()}


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Kind of step -> what one rank, and each of two, have after it."""
    folder = tmp_path_factory.mktemp("ranks")
    alone = everything(folder / "one")
    two = on_ranks(2, lambda: everything(folder / "two"), folder / "meeting")
    return {name: (alone[name], two[0][name], two[1][name]) for name in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_two_ranks_is_that_of_one(compared, kind):
    (alone, rows), (first, rows_of_two), (second, _) = compared[kind]
    start = build_model(SIZES, TOKENIZER, 0).state_dict()
    moved = 0
    for name, expected in alone.items():
        assert torch.equal(first[name], second[name]), f"{name} is not the same on both ranks"
        apart = (first[name] - expected).norm() / expected.norm().clamp(min=1e-3)
        assert apart <= 1e-6, f"{name} differs by {apart:.1e}"
        moved += name in start and not torch.equal(expected, start[name])
    assert moved > len(start) / 2
    assert [row.keys() for row in rows] == [row.keys() for row in rows_of_two]
    for one, two in zip(rows, rows_of_two, strict=True):
        for name, value in one.items():
            # the share of replayed choices is one of computed tokens, of which there are fewer where more is shared
            near = 0.02 if name.startswith("replay_agreement") else 2e-6
            assert two[name] == pytest.approx(value, rel=1e-4, abs=near), name


def test_the_bias_follows_the_load_of_all_ranks(compared):
    for kind in ("next token", "grpo, sequence"):
        (alone, _), (first, _), _ = compared[kind]
        bias = [name for name in alone if name.endswith("e_score_correction_bias")]
        assert bias and all(torch.equal(alone[name], first[name]) and alone[name].any() for name in bias)


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
    _, taken = optimizer.step(1.0, 0.1)
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


def test_what_two_ranks_exchange(tmp_path):
    def work():
        return exchanges(tmp_path / "stage"), skipped(tmp_path), own_reward(tmp_path)

    found = on_ranks(2, work, tmp_path / "meeting")
    (first, skip, _), (second, skip_too, _) = found
    same = ("once", "sums", "spread", "has", "rows", "state")
    assert {name: first[name] for name in same} == {name: second[name] for name in same}
    assert first["once"] == (1, 0)  # rank 0 does it as if it were alone
    assert first["sums"] == {"a": 2.0, "b": 5.0}
    assert first["share"] == [[0, 1], [0], [], [], [0, 1], [0, 1]]
    assert second["share"] == [[2, 3], [1, 2, 3], [0], [], [], [2, 3]]
    assert first["spread"] == [(0, 0), (0, 1), (1, 2), (1, 3), (1, 4)]
    assert (first["together"], second["together"]) == ([3], [13, 13])
    assert first["has"] == (True, False)
    assert first["rows"] == ([{"step": 0}], [{"rank": 0}])
    assert first["state"]["finished"] == {"a": {"value": 0}, "b": {"value": 0}}
    assert skip == skip_too == (False, 1, True, None)
    assert [own for _, _, own in found] == [[5, 5], [5, 5, 5]]


def test_one_process_exchanges_nothing():
    def fail():
        raise UserError("as it is")

    assert ranks.world() == 1 and ranks.main() and ranks.gather(3) == [3]
    assert list(ranks.share([1, 2, 3])) == [0, 1, 2]
    assert ranks.spread(lambda own: [2 * each for each in own], [1, 2]) == [2, 4]
    with pytest.raises(UserError, match="as it is"):
        ranks.once(fail)
