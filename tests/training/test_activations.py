"""Bytes that a step keeps: counted without memory as they are with it, and what the dry run makes of them."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bench.memory import counting_saved
from r1kernels.integrations import transformers as integration
from tests.support.own_models import write_folder
from training import adapters
from training.activations import DEPTH, kept_bytes
from training.cli import main
from training.estimate import count, estimate, parameters
from training.model import has_experts
from training.pretrained import pretrained_config
from training.recipe import load
from training.sections import Lora


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = {}

    def of(family, **sizes):
        key = (family, *sizes.items())
        if key not in made:
            made[key] = write_folder(tmp_path_factory.mktemp("own") / family, family, **sizes)
        return made[key]

    return of


def really_kept(folder, rows, length, lora):
    """Bytes that autograd saves of a forward pass with memory."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    if has_experts(model):
        integration.patch(model)
    if lora.rank:
        adapters.attach(model, lora, 0)
    with counting_saved([*model.parameters()]) as saved:
        model.base_model(input_ids=torch.zeros(rows, length, dtype=torch.int64), use_cache=False)
    return saved.bytes


@pytest.mark.parametrize("lora", [Lora(), Lora(rank=2)], ids=["all", "lora"])
@pytest.mark.parametrize("family", ["qwen2", "gpt2", "qwen3_moe", "deepseek_v3"])
def test_what_is_counted_is_what_is_kept(folder, family, lora):
    own = folder(family)
    config = AutoConfig.from_pretrained(own)
    found = kept_bytes(config, 3, 20, lora=lora, recomputes=False)
    assert found == pytest.approx(really_kept(own, 3, 20, lora), rel=0.02)
    assert kept_bytes(config, 3, 20, lora=lora, recomputes=True) < found


def test_layers_beyond_those_that_are_run_are_like_the_last(folder):
    own = folder("qwen2", num_hidden_layers=DEPTH + 3)
    config = AutoConfig.from_pretrained(own)
    found = kept_bytes(config, 2, 16, lora=Lora(), recomputes=False)
    assert found == pytest.approx(really_kept(own, 2, 16, Lora()), rel=0.01)
    assert config.num_hidden_layers == DEPTH + 3


def test_the_memory_of_lora_by_hand(folder, capsys):
    """Float32 weights once, 16 bytes for each weight of the adapters, no reference."""
    own = str(folder("qwen2"))
    words = [f"model.pretrained={own}", "model.lora={rank: 2}", "stages=[base, zero]"]
    words += ["zero.prompts=2", "zero.group_size=2", "zero.max_new_tokens=8", "zero.examples=[]"]
    recipe = load("smoke", words)
    model, whole = parameters(recipe), count(pretrained_config(own))
    real = AutoModelForCausalLM.from_pretrained(own)
    adapters.attach(real, Lora(rank=2), 0)
    trained = sum(each.numel() for each in real.parameters() if each.requires_grad)
    assert (model.total, model.trained) == (whole.total, trained)
    (row,) = [each for each in estimate(recipe) if each.stage == "zero"]
    assert row.memory_bytes == 4 * model.total + 16 * trained
    assert row.step_bytes > 0
    assert main(["run", "smoke", "--dry-run", *words]) == 0
    assert "the reference is the model without them" in capsys.readouterr().out
