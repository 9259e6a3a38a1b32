"""Bytes that a step keeps: counted without memory as they are with it, and what the dry run makes of them."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bench.memory import counting_saved
from r1kernels.integrations import transformers as integration
from r1kernels.integrations.transformers_prefix_attention import packed
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


@pytest.mark.parametrize("family", ["qwen2", "deepseek_v3"])
def test_the_attention_of_shared_prefixes_keeps_what_is_counted(folder, family):
    own = folder(family)
    model = AutoModelForCausalLM.from_pretrained(own)
    if has_experts(model):
        integration.patch(model)
    tree = integration.prefix_tree([[1]], [[2] * 59])
    with packed(model, tree), counting_saved([*model.parameters()]) as saved:
        model.base_model(input_ids=tree.input_ids.unsqueeze(0), use_cache=False)
    found = kept_bytes(AutoConfig.from_pretrained(own), 1, 60, lora=Lora(), recomputes=False, tree=True)
    assert found == pytest.approx(saved.bytes, rel=0.02)


@pytest.mark.parametrize("divided", [False, True])
def test_passes_in_bfloat16_keep_copies_of_weights_unless_these_are_gathered(folder, divided):
    own = folder("qwen2")
    model = AutoModelForCausalLM.from_pretrained(own, dtype=torch.bfloat16 if divided else torch.float32)
    with (
        torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
        counting_saved([*model.parameters()]) as saved,
    ):
        model.base_model(input_ids=torch.zeros(3, 20, dtype=torch.int64), use_cache=False)
    config, options = AutoConfig.from_pretrained(own), {"lora": Lora(), "recomputes": False}
    found = kept_bytes(config, 3, 20, dtype=torch.bfloat16, divided=divided, **options)
    assert found == pytest.approx(saved.bytes, rel=0.02)


def test_a_response_that_is_longer_than_a_micro_batch_is_a_pass_of_its_own(folder):
    words = [f"model.pretrained={folder('qwen2')}", "stages=[base, zero]", "zero.micro_batch_tokens=64"]
    words += ["zero.prompts=2", "zero.group_size=2", "zero.examples=[]"]
    (short, long) = (
        next(
            row
            for row in estimate(load("smoke", [*words, f"zero.max_new_tokens={longest}"]))
            if row.stage == "zero"
        )
        for longest in (8, 1000)
    )
    assert long.step_bytes > 5 * short.step_bytes


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
