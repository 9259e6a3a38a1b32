"""What the recipe's device, dtype and experts implementation mean for a stage."""

import pytest
import torch

from training.errors import UserError
from training.model import build_model, frozen_copy
from training.placement import current_device, device_of, placed
from training.recipe import load
from training.tokenizer import build_tokenizer


def test_a_gpu_that_is_not_there_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="device: expected auto or cpu.*got cuda"):
        device_of(load("tiny", ["device=cuda"]))
    assert device_of(load("tiny")).type == "cpu"


def test_auto_takes_the_gpu_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_of(load("tiny")).type == "cuda"
    assert device_of(load("tiny", ["device=cpu"])).type == "cpu"


def test_bfloat16_computes_in_bfloat16_and_sees_an_updated_weight():
    layer = torch.nn.Linear(4, 4)
    x = torch.randn(2, 4)
    with placed(load("tiny", ["dtype=bfloat16", "device=cpu"])):
        before = layer(x)
        with torch.no_grad():
            layer.weight.add_(1.0)
        after = layer(x)
        assert current_device().type == "cpu"
    assert before.dtype == torch.bfloat16 and layer.weight.dtype == torch.float32
    assert not torch.equal(before, after)
    assert layer(x).dtype == torch.float32


@pytest.mark.parametrize("experts", ["r1kernels", "grouped_mm", "eager"])
def test_experts_are_those_of_the_recipe(experts):
    recipe = load("smoke", [f"experts_implementation={experts}"])
    tokenizer = build_tokenizer()
    with placed(recipe):
        model = build_model(recipe.model, tokenizer, seed=0)
        assert frozen_copy(model).get_experts_implementation()[""] == experts
    assert model.get_experts_implementation()[""] == experts
    plain = build_model(recipe.model, tokenizer, seed=0)
    assert plain.get_experts_implementation()[""] == "r1kernels"
    ids = torch.arange(5, 35).view(3, 10)
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=1e-4, atol=1e-5
        )


def test_experts_that_do_not_exist_are_refused():
    with pytest.raises(UserError, match="experts_implementation: expected .*r1kernels"):
        load("smoke", ["experts_implementation=fast"])


def test_a_small_model_learns_in_bfloat16(tmp_path):
    from training import pipeline
    from training.progress import Progress
    from training.run_dir import RunDir

    overrides = ["dtype=bfloat16", "device=cpu", "stages=[base,zero]", "base.steps=3", "zero.steps=1"]
    recipe = load("smoke", overrides)
    run_dir = RunDir(tmp_path / "run")
    assert pipeline.run(recipe, run_dir, progress=Progress()) == ["base", "zero"]
    lines = run_dir.stage("base").path.joinpath("metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3
