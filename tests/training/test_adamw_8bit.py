"""AdamW with moments in 8 bits, by bitsandbytes: what it keeps, that it learns, and what is said of it before a run."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from training.check import check
from training.cli import main
from training.errors import UserError
from training.estimate import count, estimate, parameters
from training.loops.optim import Optimizer
from training.model import deepseek_config
from training.recipe import load
from training.sections import Model


@pytest.fixture
def bitsandbytes():
    return pytest.importorskip(
        "bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes"
    )


def moments_of(optimizer):
    """Bytes of each parameter's two moments, without the table of 256 numbers that all share."""
    return [
        sum(
            value.nbytes
            for name, value in state.items()
            if isinstance(value, torch.Tensor) and not name.startswith("qmap")
        )
        for state in optimizer.adamw.state.values()
    ]


def test_the_moments_of_large_tensors_take_a_quarter(bitsandbytes):
    """Those that the dry run counts."""
    sizes = Model(hidden_size=72, layers=2, heads=2, moe_intermediate_size=16, experts=4)
    config = deepseek_config(sizes, 300)
    model = AutoModelForCausalLM.from_config(config)
    optimizer = Optimizer(model, weight_decay=0.1, grad_clip=1.0, kind="adamw_8bit")
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step(1.0, 1e-3)
    counted = count(config)
    assert sum(moments_of(optimizer)) == counted.moments("adamw_8bit")
    assert counted.moments("adamw_8bit") < 0.4 * counted.moments("adamw") == 0.4 * 8 * counted.total
    states = optimizer.adamw.state.values()
    assert {state["state1"].dtype for state in states} == {torch.uint8, torch.float32}


def test_it_follows_adamw(bitsandbytes):
    """Both lower the same loss, and go the same way."""
    torch.manual_seed(0)
    x, wanted = torch.randn(64, 80), torch.randn(64, 80)

    def trained(kind):
        layer = torch.nn.Linear(80, 80)
        torch.nn.init.zeros_(layer.weight)
        optimizer = Optimizer(layer, weight_decay=0.01, grad_clip=0.0, kind=kind)
        for _ in range(60):
            loss = (layer(x) - wanted).square().mean()
            loss.backward()
            optimizer.step(loss.item(), 1e-2)
        return loss.item(), layer.weight.detach().flatten()

    torch.manual_seed(0)
    (loss, weight), (exact_loss, exact) = trained("adamw_8bit"), trained("adamw")
    assert loss == pytest.approx(exact_loss, rel=0.1)
    assert torch.nn.functional.cosine_similarity(weight, exact, 0) > 0.99


def test_the_dry_run_counts_its_bytes_and_names_its_stages(bitsandbytes, capsys):
    words = ["stages=[base, zero]", "zero.optimizer=adamw_8bit"]
    plain, changed = load("smoke", words[:1]), load("smoke", words)
    model = parameters(plain)
    (before,), (after,) = (
        [row.memory_bytes for row in estimate(recipe) if row.stage == "zero"] for recipe in (plain, changed)
    )
    assert before - after == model.moments("adamw") - model.moments("adamw_8bit") > 0
    assert main(["run", "smoke", "--dry-run", *words]) == 0
    assert "of these 6 less in zero: moments in 8 bits" in capsys.readouterr().out


def test_a_missing_package_is_one_line_before_the_first_stage(monkeypatch):
    monkeypatch.setattr("training.optional.importlib.util.find_spec", lambda name: None)
    text = "sft1.optimizer: adamw_8bit needs the package bitsandbytes: pip install bitsandbytes"
    with pytest.raises(UserError, match=f"^{text}$"):
        check(load("smoke", ["sft1.optimizer=adamw_8bit"]), data=False)


def test_divided_models_and_names_of_no_optimizer_are_refused(bitsandbytes):
    with pytest.raises(UserError, match="^zero.optimizer: expected adamw with parallel.shard = 2"):
        check(
            load("smoke", ["zero.optimizer=adamw_8bit", "parallel.shard=2", "parallel.processes=2"]),
            data=False,
        )
    with pytest.raises(UserError, match="^zero.optimizer: expected one of adamw, adamw_8bit, got 'adam'"):
        load("smoke", ["zero.optimizer=adam"])
