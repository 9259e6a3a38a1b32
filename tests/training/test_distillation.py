"""What students of the distillation learn from: text, a teacher's distribution, stored log-probs, or what they answer themselves."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.support.own_models import write_folder
from training import pipeline, prompts, student, traces
from training.check import check
from training.checkpoint import load_model, read_style, save_model
from training.context import StageContext
from training.document import Document, Stored
from training.errors import UserError
from training.estimate import estimate
from training.loops import next_token, on_policy
from training.loops.batch import lay_out, states
from training.loops.sample import Prompt
from training.loops.token_loss import OfStored, OfTeacher, OfText
from training.model import build_model
from training.progress import Progress
from training.recipe import load, make
from training.report import students, write_report
from training.run_dir import RunDir, StageDir
from training.sections import Distill, Model, NextToken, Student
from training.tasks.arithmetic import make_problem
from training.tokenizer import build_tokenizer

TOKENIZER = build_tokenizer()
SIZES = Model(hidden_size=32, layers=2, heads=2, intermediate_size=32, moe_intermediate_size=16, experts=4)
DOCUMENTS = [Document(f"makes {n}", prompts.ask("check check plus")) for n in range(1, 9)]
PROBLEMS = [make_problem(a, 7, 9, "en") for a in (3, 5, 8, 9)]


def pupil():
    sizes = Student(hidden_size=16, heads=2, intermediate_size=32, layers=1)
    return student.build(sizes, TOKENIZER, 0, 64)[0]


def teacher():
    """A mixture of experts that is surer than random weights are."""
    model = build_model(SIZES, TOKENIZER, 1).requires_grad_(False).eval()
    model.lm_head.weight *= 20
    return model


def context(folder, config):
    stage = StageDir(folder)
    stage.begin({}, {})
    return StageContext("distill", load("smoke"), config, stage, {}, Progress(quiet=True))


def rows_of(model, documents=DOCUMENTS):
    return next_token._encode(next_token.Encoder(model, TOKENIZER), documents, 0, "distill")[0]


def log_probs(model, row):
    """(tokens, V) in float64, of the tokens of the response, by the model's own logits."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row.ids])).logits[0].double()
    return logits[row.prompt - 1 : row.prompt - 1 + len(row.targets)].log_softmax(-1)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_the_loss_of_a_token_is_its_divergence_from_the_teacher(kind, shared):
    """Padded and as a tree of shared prompts, against kl_div of both models' own logits."""
    small, large = pupil(), teacher()
    rows = rows_of(small)
    batch = lay_out(rows, 0, torch.device("cpu"), shared)
    found = OfTeacher(large, kind, 0.3)(small, batch, states(small, batch), rows)
    p, q = (torch.cat([log_probs(model, row) for row in rows]) for model in (large, small))
    if kind == "jsd":
        mean = (0.3 * p.exp() + 0.7 * q.exp()).log()
        parts = (F.kl_div(mean, each, log_target=True, reduction="none").sum(-1) for each in (p, q))
        expected = sum(share * part for share, part in zip((0.3, 0.7), parts, strict=True))
    else:
        of, to = (q, p) if kind == "forward_kl" else (p, q)
        expected = F.kl_div(of, to, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    assert found.requires_grad and not any(each.requires_grad for each in large.parameters())


def stored_of(model, row, count):
    logp, ids = log_probs(model, row).float().topk(count)
    return Stored(ids.tolist(), logp.tolist())


def test_log_probs_of_all_ids_are_the_teacher_and_those_of_some_a_lower_bound():
    small, large = pupil(), teacher()
    rows = rows_of(small)
    batch = lay_out(rows, 0, torch.device("cpu"))
    hidden = states(small, batch)
    whole = OfTeacher(large, "forward_kl", 0.5)(small, batch, hidden, rows)
    for count in (3, len(TOKENIZER)):
        given = [row._replace(stored=stored_of(large, row, count)) for row in rows]
        given[0] = rows[0]._replace(stored=stored_of(large, rows[0], 2 if count == 3 else count))
        found = OfStored("forward_kl", 0.5)(small, batch, hidden, given)
        assert (found <= whole + 1e-4).all() and (found >= 0).all()
    torch.testing.assert_close(found, whole, rtol=1e-3, atol=1e-4)


def test_a_student_comes_nearer_to_the_teacher_and_stored_log_probs_follow_the_cut(tmp_path):
    large = teacher()
    config = NextToken(steps=20, batch_size=4, lr=1e-2, lr_end=1e-3, max_length=0)
    rows = rows_of(pupil())
    stored = [
        replace(document, stored=stored_of(large, row, 8))
        for document, row in zip(DOCUMENTS, rows, strict=True)
    ]
    for name, documents, loss in (
        ("teacher", DOCUMENTS, OfTeacher(large, "forward_kl", 0.5)),
        ("stored", stored, OfStored("forward_kl", 0.5)),
    ):
        at = context(tmp_path / name, config)
        metrics = next_token.train(pupil(), TOKENIZER, documents, config, at, token_loss=loss)
        losses = [row["loss"] for row in at.stage.metrics()]
        assert losses[-1] < 0.7 * losses[0]
        assert metrics["learnt"] == sum(
            len(rows[i].targets)
            for step in range(20)
            for i in next_token.batch_of_step(8, 4, step, (0, "distill", ""))
        )
    cut = next_token._encode(next_token.Encoder(pupil(), TOKENIZER), stored, len(rows[0].ids) - 1, "distill")[
        0
    ]
    assert cut[0].stored.ids == stored[0].stored.ids[: len(cut[0].targets)]
    with pytest.raises(
        UserError, match="teacher_ids: expected a list for each of the .* tokens of the response"
    ):
        short = replace(DOCUMENTS[0], stored=Stored([[1]], [[0.0]]))
        rows_of(pupil(), [short])


def on_policy_run(folder, amount, save_every=0, kill=None):
    """(the student, the lines of its metrics) after on-policy training; `kill`: ends the first try there."""
    config = Distill(max_new_tokens=8, batch_size=4)
    sizes = Student(batch_size=4, lr=3e-2, lr_end=3e-3, save_every=save_every)
    prompts_of = [Prompt(problem, prompts.chat(problem)) for problem in PROBLEMS]
    at = context(folder, config)
    loss = OfTeacher(teacher(), "reverse_kl", 0.5)
    for stop in [kill, None] if kill else [None]:
        model = pupil()
        if stop:
            at.stage.log = _stopping(at.stage.log, stop)
        try:
            metrics = on_policy.train(model, TOKENIZER, prompts_of, loss, sizes, config, amount, at)
        except Stop:
            at.stage = StageDir(folder)
    lines = [
        {key: value for key, value in row.items() if not key.endswith(("_seconds", "_per_second"))}
        for row in at.stage.metrics()
    ]
    return model, metrics, lines


class Stop(Exception):
    """A kill in the middle of a run."""


def _stopping(log, step):
    def stopping(**metrics):
        if metrics["step"] == step:
            raise Stop
        log(**metrics)

    return stopping


def test_on_policy_the_student_comes_nearer_and_learns_as_many_tokens_as_it_is_told(tmp_path):
    amount = next_token.Amount(steps=24, tokens=600)
    _, metrics, lines = on_policy_run(tmp_path / "a", amount)
    first, last = lines[0], lines[-1]
    assert 600 <= metrics["learnt"] == last["learnt"] < 600 + 4 * 8
    assert last["learnt"] - lines[-2]["learnt"] == 4 * last["length"]
    losses = [row["loss"] for row in lines]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert last["lr"] < 0.2 * first["lr"]  # the cosine runs over the tokens


def test_an_on_policy_run_that_was_killed_ends_as_if_it_had_not_been(tmp_path):
    amount = next_token.Amount(steps=6)
    whole, _, lines = on_policy_run(tmp_path / "a", amount)
    resumed, _, others = on_policy_run(tmp_path / "b", amount, save_every=2, kill=3)
    assert lines == others
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.fixture
def brought(tmp_path):
    """(the folder of a teacher, a file of questions)"""
    folder = write_folder(tmp_path / "own", "qwen2", template="chatml")
    rows = [{"question": f"What is {n} plus 3?", "answer": str(n + 3)} for n in range(16)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder, tmp_path / "q.jsonl"


def recipe_of(brought, **distill):
    folder, questions = brought
    sizes = {
        "hidden_size": 16,
        "heads": 2,
        "layers": 1,
        "intermediate_size": 32,
        "batch_size": 8,
        "epochs": 2,
    }
    given = {
        name: {**sizes, "method": name.replace("policy", "_policy")} for name in ("sft", "logits", "onpolicy")
    }
    given["later"] = {**sizes, "start": "sft"}
    return make(
        {
            "stages": ["distill"],
            "model": {"pretrained": str(folder)},
            "task": [f"jsonl:{questions}"],
            "distill": {
                "teacher": str(folder),
                "samples": 1,
                "max_new_tokens": 6,
                "filters": [],
                "students": given,
                **distill,
            },
        }
    )


def test_a_run_with_all_three_methods_reports_them_at_equal_tokens(brought, tmp_path):
    recipe = recipe_of(brought)
    check(recipe)
    run_dir = RunDir(tmp_path / "run")
    pipeline.run(recipe, run_dir, progress=Progress(quiet=True))
    metrics = run_dir.stage("distill").record()["metrics"]
    assert [metrics[f"{name}/method"] for name in ("sft", "logits", "onpolicy")] == [
        "sft",
        "logits",
        "on_policy",
    ]
    told = [metrics[f"{name}/learnt"] for name in ("sft", "logits", "onpolicy")]
    assert max(told) - min(told) < 8 * 7  # those of a step
    page = write_report(run_dir).read_text()
    assert "learns from" in page and "<td>on_policy</td>" in page and f"<td>{told[0]:,}</td>" in page
    every, equal = page.split("<h3>Methods at equal tokens</h3>")
    assert "<tr><th>later</th><td>sft</td>" in every
    for name in ("sft", "logits", "onpolicy"):
        assert f"<tr><th>{name}</th>" in equal
    assert "<tr><th>later</th>" not in equal  # the only one that begins so
    for each in students.learnt(run_dir):
        rows = [row for row in run_dir.stage("distill").metrics() if row["part"] == each.name]
        assert each.seconds > 0 and len(rows) == each.steps and rows[-1]["learnt"] == each.tokens


def test_students_answer_the_prompt_that_their_teacher_was_trained_with(brought, tmp_path):
    """Here that of R1-Zero with worked examples, by every method; and as many problems are asked as the recipe says."""
    model, tokenizer = load_model(brought[0])
    noted = {"prompt": "zero", "examples": [["What is 1 plus 1?", "2"]], "response_format": "answer_tags"}
    save_model(model, tokenizer, tmp_path / "zero", style=noted)
    sizes = {"pretrained": str(brought[0]), "steps": 1, "batch_size": 4, "lr": 0.0, "lr_end": 0.0}
    given = {name: {**sizes, "method": name} for name in ("sft", "logits", "on_policy")}
    given = {name.replace("_", ""): values for name, values in given.items()}
    recipe = recipe_of(brought, teacher=str(tmp_path / "zero"), students=given, prompts=5)
    run_dir = RunDir(tmp_path / "run")
    pipeline.run(recipe, run_dir, progress=Progress(quiet=True))
    rows = run_dir.stage("distill").read_data("data.jsonl")
    assert len({row["problem_id"] for row in rows}) == 5 and estimate(recipe)[0].work == "5 responses"
    assert all(" 1 plus 1" in tokenizer.decode(row["prompt_ids"]) for row in rows)
    for name in given:
        assert read_style(run_dir.stage("distill").path / f"checkpoint-{name}") == noted
    # with equal weights both distributions are one, if both models read the same prompt
    losses = {row["part"]: row["loss"] for row in run_dir.stage("distill").metrics()}
    assert losses["sft"] > 0.1 > 1e-4 > abs(losses["logits"]) and abs(losses["onpolicy"]) < 1e-4


def test_a_student_goes_on_from_another_one(brought, tmp_path):
    """With a learning rate of 0 it stays what that one was."""
    sizes = {"hidden_size": 16, "heads": 2, "layers": 1, "intermediate_size": 32, "steps": 1}
    given = {
        "first": {**sizes, "lr": 0.1},
        "still": {"start": "first", "steps": 1, "lr": 0.0, "lr_end": 0.0, "method": "on_policy"},
        "moved": {"start": "still", "steps": 1, "lr": 0.1},
    }
    recipe = recipe_of(brought, students=given)
    assert recipe.distill.beginning_of("moved") is recipe.distill.students["first"]
    assert [row.stage.strip() for row in estimate(recipe)] == ["distill", *given]
    run_dir = RunDir(tmp_path / "run")
    pipeline.run(recipe, run_dir, progress=Progress(quiet=True))
    first, still, moved = (
        load_model(run_dir.stage("distill").path / f"checkpoint-{name}")[0].state_dict() for name in given
    )
    assert all(torch.equal(first[name], still[name]) for name in first)
    assert not all(torch.equal(first[name], moved[name]) for name in first)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"a": {"start": "a"}}, r"distill.students.a.start: expected a student listed before \(none is\), got 'a'"),
        ({"a": {}, "b": {"start": "c"}, "c": {}}, r"b.start: expected a student listed before \(a\), got 'c'"),
        ({"a": {}, "b": {"start": "a", "pretrained": "x"}}, "b.pretrained: expected none with start, .*, got 'x'"),
    ],
)  # fmt: skip
def test_a_student_from_which_another_goes_on_stands_before_it(brought, given, said):
    with pytest.raises(UserError, match=said):
        check(recipe_of(brought, students=given))


def test_methods_stand_side_by_side_where_they_begin_alike_and_learn_as_much():
    def one(name, method, beginning, epochs):
        return students.Learnt(name, method, beginning, epochs, 500, 1, 1.0, 1.0, 0.5, None, None)

    given = [
        one("a", "sft", "random", 9),
        one("b", "on_policy", "a", 5),
        one("c", "sft", "a", 5),
        one("d", "logits", "a", 5),
        one("e", "logits", "a", 8),
        one("f", "sft", "c", 5),
        one("g", "sft", "c", 5),
        one("h", "sft", "d", 0),
        one("i", "logits", "d", 0),
    ]
    assert [[each.name for each in group] for group in students.at_equal_tokens(given)] == [["b", "c", "d"]]


def test_stored_log_probs_from_a_file_need_no_teacher(brought, tmp_path):
    folder, _ = brought
    tokens = len(next_token.Encoder(None, traces_tokenizer(folder)).response("so"))
    line = {
        "question": "why?",
        "response": "so",
        "teacher_ids": [[n, n + 1] for n in range(tokens)],
        "teacher_logp": [[-0.5, -2.0]] * tokens,
    }
    path = tmp_path / "stored.jsonl"
    path.write_text(json.dumps(line) + "\n")
    given = {"own": {"pretrained": str(folder), "steps": 1}}
    recipe = recipe_of(brought, data=str(path), teacher="", method="logits", students=given)
    check(recipe)
    run_dir = RunDir(tmp_path / "run")
    pipeline.run(recipe, run_dir, progress=Progress(quiet=True))
    assert run_dir.stage("distill").record()["metrics"]["own/method"] == "logits"
    path.write_text(json.dumps({"question": "why?", "response": "so"}) + "\n")
    with pytest.raises(
        UserError, match="distill.teacher: expected one, since not all traces have stored log-probs"
    ):
        pipeline.run(recipe, RunDir(tmp_path / "other"), progress=Progress(quiet=True))


def traces_tokenizer(folder):
    from training.checkpoint import load_tokenizer

    return load_tokenizer(folder)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"teacher_ids": [[1]]}, "fields 'teacher_ids' and 'teacher_logp'"),
        ({"teacher_ids": [[1, 2]], "teacher_logp": [[-1.0]]}, "one of as many log-probs for each token"),
        ({"teacher_ids": [[1, 1]], "teacher_logp": [[-1.0, -2.0]]}, "each once, for token 0"),
        ({"teacher_ids": [[1]], "teacher_logp": [[0.5]]}, "expected log-probs, at most 0, for token 0"),
        ({"teacher_ids": [1], "teacher_logp": [-1.0]}, "a list of ids"),
    ],
)
def test_broken_stored_log_probs_are_named(tmp_path, fields, said):
    path = tmp_path / "stored.jsonl"
    path.write_text(json.dumps({"question": "a", "response": "b", **fields}) + "\n")
    with pytest.raises(UserError, match=f"line 1: .*{said}"):
        traces.read(path)


def test_what_does_not_go_together_is_refused(brought, tmp_path):
    data = tmp_path / "traces.jsonl"
    data.write_text(json.dumps({"question": "why?", "response": "so"}) + "\n")
    with pytest.raises(UserError, match="distill.data: expected none with the method on_policy"):
        check(recipe_of(brought, data=str(data)))
    with pytest.raises(UserError, match="distill.teacher: expected one where distill.students.sft"):
        check(recipe_of(brought, teacher=""))
    other = write_folder(tmp_path / "other", "llama", template="llama3")
    given = {"own": {"pretrained": str(other), "steps": 1, "method": "logits"}}
    with pytest.raises(UserError, match="distill.students.own: its tokenizer is not the teacher's"):
        pipeline.run(
            recipe_of(brought, students=given), RunDir(tmp_path / "run"), progress=Progress(quiet=True)
        )


def test_the_text_alone_is_the_default():
    assert Distill().method == "sft" and Distill().method_of("qwen2") == "sft"
    assert list(OfText().readers) == []
