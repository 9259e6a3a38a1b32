"""`export`: a folder that transformers or PEFT reads, in the dtype and the shards that are asked for, with its model card."""

import json

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.own_models import write_folder, write_sums
from training import pipeline
from training.checkpoint import read_style, verify
from training.cli import main
from training.progress import Progress
from training.recipe import make
from training.run_dir import RunDir

IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with SFT by LoRA and its marks."""
    folder = tmp_path_factory.mktemp("run")
    own = write_folder(folder / "own", "qwen2", dtype="bfloat16")
    write_sums(folder)
    recipe = make(
        {
            "name": "mine",
            "description": "SFT on my model",
            "model": {"pretrained": str(own), "lora": {"rank": 2}},
            "task": [f"jsonl:{folder / 'data.jsonl'}"],
            "stages": ["base", "sft1", "evaluate"],
            "sft1": {"steps": 2, "batch_size": 4, "lr": 1e-2, "data": str(folder / "traces.jsonl")},
            "evaluate": {"problems": 2, "k": 1, "k_problems": 1, "max_new_tokens": 4, "splits": ["test"]},
        }
    )
    pipeline.run(recipe, RunDir(folder / "run"), progress=Progress(quiet=True))
    return folder / "run"


def test_a_checkpoint_in_another_dtype_and_in_shards(run, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["export", "--run", str(run), "sft1", str(out), "--dtype", "float32", "--shard-size", "50KB"]
    assert main(words) == 0
    assert str(out) in capsys.readouterr().out
    assert len(list(out.glob("*.safetensors"))) > 1
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    mine = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    source = AutoModelForCausalLM.from_pretrained(run / "sft1" / "checkpoint", dtype="auto")
    assert mine.dtype == torch.float32 and source.dtype == torch.bfloat16
    for name, tensor in source.state_dict().items():
        assert torch.equal(mine.state_dict()[name], tensor.float())
    assert AutoTokenizer.from_pretrained(out).encode("12 plus") == AutoTokenizer.from_pretrained(
        run / "sft1" / "checkpoint"
    ).encode("12 plus")
    assert read_style(out) == read_style(run / "sft1" / "checkpoint")
    verify(out)


def test_adapters_are_read_by_peft(run, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    assert main(["export", "sft1", str(tmp_path / "lora"), "--run", str(run), "--adapters"]) == 0
    model = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora", dtype=torch.float32)
    before = load_file(run / "base" / "checkpoint" / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    merged = model.merge_and_unload().state_dict()[name]
    after = load_file(run / "sft1" / "checkpoint" / "model.safetensors")[name]
    assert not torch.equal(merged, before[name].float())
    torch.testing.assert_close(merged, after.float(), rtol=1e-2, atol=1e-3)  # the checkpoint is bfloat16
    assert ModelCard.load(tmp_path / "lora" / "README.md").data.library_name == "peft"


def test_the_card_tells_lineage_marks_and_files(run, tmp_path):
    assert main(["export", "--run", str(run), str(tmp_path / "out")]) == 0  # the last policy
    card = ModelCard.load(tmp_path / "out" / "README.md")
    marks = [
        json.loads(line)
        for line in (run / "evaluate" / "evaluation.jsonl").read_text().splitlines()
        if '"sft1"' in line
    ]
    (test,) = [row for row in marks if row["language"] == "all"]
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found["accuracy"] == test["accuracy"] and found["format"] == test["format"]
    assert card.data.base_model == str(run.parent / "own")
    for stage in ("base", "sft1"):
        digest = json.loads((run / stage / "done.json").read_text())["hash"]
        assert f"| {digest[:12]} |" in card.text
    assert "traces.jsonl (" in card.text and "SFT on my model" in card.text
    settings = yaml.safe_load(card.text.split("```yaml\n")[1].split("```")[0])
    assert settings["sft1"]["batch_size"] == 4 and settings["lora"]["rank"] == 2
    assert all(f"{name} " in card.text.split("## Versions")[1] for name in ("transformers", "peft"))


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["sft1", "there"], "there exists already"),
        (["rl_all", "new"], "unknown checkpoint 'rl_all'"),
        (["base", "new", "--adapters"], "base has no adapters"),
        (["sft1", "new", "--adapters", "--dtype", "bfloat16"], "--dtype: adapters are float32"),
        (["a", "b", "new"], "expected one checkpoint and the folder"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(run, tmp_path, monkeypatch, capsys, words, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    assert main(["export", "--run", str(run), *words]) == 2
    assert text in capsys.readouterr().err
    assert [each.name for each in tmp_path.iterdir()] == ["there"]


def test_a_size_that_is_none_is_refused_before_anything_is_written(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["export", "--run", str(run), "sft1", str(tmp_path / "out"), "--shard-size", "2XB"])
    assert "as in 500MB, got '2XB'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
