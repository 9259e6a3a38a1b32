"""Every stage on what a person brings: a bfloat16 ChatML folder without bos and pad, with two eos ids and an opened <think>,
a JSONL file of problems, and a file of rewards."""

import json
import shlex
from functools import partial

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.finished import is_done
from tests.support.own_models import write_folder
from training import pipeline, prompts
from training.checkpoint import load_model
from training.cli import main
from training.encoder import Encoder
from training.progress import Progress
from training.recipe import STAGE_NAMES, load
from training.run_dir import RunDir
from training.tasks.problem import Problem

COLOURS = ("red", "green", "blue", "black")
REWARDS = """
def brevity(sample):
    assert sample.problem.question and isinstance(sample.finished, bool)
    return -len(sample.token_ids) / 100
"""
EXAMPLES = [("What is 1 plus 1?", "<think> 2 </think> <answer> 2 </answer>")]
FEW = {"prompts": 12, "samples": 2, "max_new_tokens": 24}
GRPO = {"steps": 2, "prompts": 4, "group_size": 4, "max_new_tokens": 24, "save_every": 1}
SFT = {"epochs": 1, "batch_size": 8, "max_length": 128}
RECIPE = {
    "description": "every stage on a model, data and a reward of one's own",
    "model": {"pretrained": "own"},
    "task": ["jsonl:problems.jsonl"],
    "task_options": {"jsonl:problems.jsonl": {"test_share": 0.3}},
    "zero": {
        **GRPO,
        "rewards": {"accuracy": 1, "format": 1, "python:my_rewards.py:brevity": 0.2},
        "examples": [{"question": question, "response": response} for question, response in EXAMPLES],
    },
    "cold_start": {**FEW, "filters": ["bad_format"]},
    "sft1": SFT,
    "rl_reasoning": GRPO,
    "judge": {
        **FEW,
        **SFT,
        "samples": 8,
        "held_out": 1.0,
        "steps": 120,
        "epochs": 0,
        "lr": 1e-2,
    },
    "rejection": {**FEW, "filters": ["bad_format"]},
    "sft2": SFT,
    "reward_models": {**FEW, **SFT, "steps": 4, "epochs": 0},
    "rl_all": GRPO,
    "distill": {
        "prompts": 16,
        "samples": 2,
        "max_new_tokens": 24,
        "filters": ["bad_format"],
        "students": {
            "small": {"hidden_size": 32, "heads": 2, "intermediate_size": 48, **SFT},
            "same": {"pretrained": "own", **SFT},
        },
    },
    "evaluate": {"problems": 8, "k_problems": 2, "k": 2, "max_new_tokens": 24},
}


def rows():
    sums = [{"question": f"What is {a} plus {b}?", "answer": a + b} for a in range(1, 6) for b in range(1, 6)]
    said = [
        {"question": f"Say {c} {n} times.", "answer": c, "kind": "helpful"}
        for c in COLOURS
        for n in range(2, 6)
    ]
    secret = [
        {"question": f"Never say {c}, {n}.", "answer": c, "kind": "unsafe"}
        for c in COLOURS
        for n in range(2, 6)
    ]
    return sums + said + secret


def teach(folder):
    """Plain torch: the folder learns the form of a response, with a right answer or a wrong one at random."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    encoder = Encoder(model, AutoTokenizer.from_pretrained(folder))
    generator = torch.Generator().manual_seed(0)
    ways = [
        prompts.chat,
        partial(prompts.zero, examples=EXAMPLES),
        prompts.reflect,
        partial(prompts.few_shot, examples=EXAMPLES),
    ]

    def draw(options):
        return options[int(torch.randint(len(options), (), generator=generator))]

    def document(row):
        problem = Problem("", "", "reasoning", "en", row["question"], "")
        prompt, opening = encoder.prompt(draw(ways)(problem))
        wrong = draw(COLOURS) if "kind" in row else draw(range(2, 11))
        answer = draw([row["answer"], wrong])
        return prompt + encoder.response(f"<think> {answer} </think> <answer> {answer} </answer>", opening)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    known = rows()
    for _ in range(160):
        batch = [document(draw(known)) for _ in range(16)]
        ids = torch.full((16, max(map(len, batch))), encoder.pad_id)
        labels = torch.full_like(ids, -100)
        for row, tokens in enumerate(batch):
            ids[row, : len(tokens)] = labels[row, : len(tokens)] = torch.tensor(tokens)
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.to(torch.bfloat16).save_pretrained(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        special = {
            "bos": None,
            "pad": None,
            "eos": "<|endoftext|>",
            "generation_eos": ("<|im_end|>", "<|endoftext|>"),
        }
        sentences = [
            f"{row['question']} <think> {row['answer']} </think> <answer> {row['answer']} </answer>"
            for row in rows()
        ]
        judged = '{ " analysis " : " 5 5 right , 7 8 wrong " , " correctness " : " wrong " }'
        write_folder(
            folder / "own",
            "qwen2",
            template="chatml_think",
            dtype="bfloat16",
            sentences=[*sentences, judged, *prompts.TEMPLATES.values()],
            vocab_size=512,
            hidden_size=64,
            intermediate_size=128,
            **special,
        )
        teach(folder / "own")
        (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
        (folder / "my_rewards.py").write_text(REWARDS)
        (folder / "own.yaml").write_text(yaml.safe_dump(RECIPE))
        assert main(["run", "own.yaml", "--dry-run"]) == 0
        assert main(["run", "own.yaml", "--run", "run"]) == 0
        yield RunDir(folder / "run")


def test_every_stage_is_done(run):
    assert [name for name in STAGE_NAMES if is_done(run.stage(name))] == list(STAGE_NAMES)
    assert (run.path / "report.html").is_file()


def test_responses_end_and_earn_every_reward(run):
    for row in run.stage("zero").metrics():
        assert {"reward/accuracy", "reward/format", "reward/python:my_rewards.py:brevity"} <= row.keys()
        assert row["finished"] > 0.5 and row["format"] > 0.5 and row["reward_errors"] == 0
        assert -0.24 <= row["reward/python:my_rewards.py:brevity"] < 0


def test_every_route_of_the_cold_start_keeps_something(run):
    metrics = run.stage("cold_start").record()["metrics"]
    assert all(metrics[f"{route}/kept"] > 0 for route in ("few_shot", "reflect", "refine"))


def test_the_judge_writes_verdicts_that_can_be_read(run):
    metrics = run.stage("judge").record()["metrics"]
    assert metrics["held_out"] >= 10 and metrics["parsed"] > 0.7 and metrics["truncated"] == 0


def test_both_reward_models_have_data(run):
    metrics = run.stage("reward_models").record()["metrics"]
    assert metrics["helpful/data"] > 0 and metrics["safety/data"] > 0


def test_every_checkpoint_is_evaluated(run):
    table = {row["checkpoint"]: row for row in run.stage("evaluate").read_data("evaluation.jsonl")}
    policies = ["base", "zero", "sft1", "rl_reasoning", "sft2", "rl_all"]
    assert list(table) == [*policies, "distill-same", "distill-small"]
    for name in policies:
        assert table[name]["format"] > 0.5, name
        assert table[name]["helpful"] is not None and table[name]["harmless"] is not None
    assert any(table[name]["accuracy"] > 0 for name in policies)


@pytest.mark.parametrize(
    "name", ["base", "zero", "sft1", "rl_reasoning", "sft2", "rl_all", "judge", "distill-small"]
)
def test_an_exported_folder_is_one_of_plain_transformers(run, name):
    stage, _, suffix = name.partition("-")
    path = run.stage(stage).checkpoints()[name]
    plain = AutoModelForCausalLM.from_pretrained(path)
    assert suffix or plain.dtype == torch.bfloat16
    ours, tokenizer = load_model(path)
    loaded = AutoTokenizer.from_pretrained(path)
    ids = loaded("What is 2 plus 3? <think> 5", return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == tokenizer("What is 2 plus 3? <think> 5")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(plain.float()(ids).logits, ours.float()(ids).logits, rtol=0, atol=0)
    messages = [{"role": "user", "content": "What is 2 plus 3?"}]
    assert loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True).endswith(
        "<think>\n"
    )
    assert plain.generation_config.eos_token_id is not None


def test_what_a_person_brought_is_part_of_the_lineage(run):
    files = json.loads((run.stage("zero").path / "lineage.json").read_text())["config"]["files"]
    assert files.keys() == {"jsonl:problems.jsonl", "python:my_rewards.py:brevity"}
    assert "own" in json.loads((run.stage("base").path / "lineage.json").read_text())["config"]["files"]


def test_the_words_of_the_check_run_what_reasoning_problems_alone_can_feed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "own", "llama", template="llama3")
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()[:25]))
    few = {"prompts": 2, "samples": 1, "max_new_tokens": 6}
    grpo = {"steps": 1, "prompts": 2, "group_size": 2, "max_new_tokens": 6}
    recipe = {
        **{name: RECIPE[name] for name in ("model", "task", "task_options")},
        **dict.fromkeys(("zero", "rl_reasoning", "rl_all"), grpo),
        **{name: {**few, "filters": []} for name in ("cold_start", "rejection")},
        "judge": {**few, "steps": 1},
        "distill": {"samples": 1, "max_new_tokens": 6, "filters": [], "students": {"small": {"steps": 1}}},
        "evaluate": {"problems": 2, "k_problems": 1, "k": 1, "max_new_tokens": 6},
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["run", "own.yaml"]) == 2
    words = shlex.split(capsys.readouterr().err.partition("run without: ")[2])
    run_dir = RunDir(tmp_path / "run")
    pipeline.run(load("own.yaml", words), run_dir, progress=Progress(quiet=True))
    done = [name for name in STAGE_NAMES if is_done(run_dir.stage(name))]
    assert done == [name for name in STAGE_NAMES if name != "reward_models"]
