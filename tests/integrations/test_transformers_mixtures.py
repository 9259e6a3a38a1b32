"""Tiny models of the mixtures of the installed transformers, patched, against transformers' own code."""

from __future__ import annotations

import pytest
import torch

from bench.studies import mixtures
from r1kernels.integrations import transformers as r1

# One of each kind: the bias comes from the block, 3-d hidden states, logits with a bias, a soft cap, a factor, groups, softmax
# with a bias, experts by the ids of tokens, normed hidden states, a choice by logits, another eps, groups by two of a softmax; experts that lie transposed, that are clamped, that are not gated, with a norm.
SOME = (
    "afmoe",
    "deepseek_v4",
    "gemma4",
    "kolibri1",
    "lfm2_moe",
    "mistral4",
    "gpt_oss",
    "laguna",
    "muse_spark",
    "deepseek_v2",
    "ernie4_5_moe",
    "aria",
    "minimax_m3_vl",
    "nemotron_h",
)


def assert_agrees(row):
    assert mixtures.agrees(row), {
        key: row[key] for key in ("family", "logits", "gradients", "same_parameters", "reached")
    }


@pytest.mark.parametrize("family", SOME)
def test_some_mixtures_compute_what_transformers_computes(family):
    row = mixtures.compare(family)
    assert_agrees(row)
    assert row["routes"] and "transformers" not in row["computed"]


@pytest.mark.slow
def test_every_mixture_computes_what_transformers_computes():
    rows = [mixtures.compare(family) for family in mixtures.files()]
    for row in rows:
        assert_agrees(row)
    assert sum(row["routes"] for row in rows) >= 61
    assert sum(row["computed"].startswith("moe_experts") for row in rows) >= 58


@pytest.mark.parametrize("family", ["hy_v3", "laguna", "ernie4_5_moe"])
def test_the_selection_bias_is_found_wherever_it_lies(family):
    model = mixtures.build(family)
    (bias,) = (
        tensor
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if name.endswith("e_score_correction_bias")
    )
    before = bias.clone()
    with r1.patch(model):
        with r1.collect_load(model) as load:
            mixtures.step(model)
        r1.update_bias(model, load, rate=0.5)
    direction = (load.counts[0].float().mean() - load.counts[0]).sign()
    expected = before.reshape(-1) + 0.5 * (direction - direction.mean())
    assert (bias.reshape(-1) - expected).abs().max() < 1e-6


@pytest.mark.parametrize("family", ["minimax_m3_vl", "nemotron_h"])
def test_experts_found_by_what_they_do_compile(family):
    model = mixtures.build(family)
    experts = next(module for module in model.modules() if hasattr(module, "_apply_gate"))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 32, generator=generator)
    arguments = hidden, torch.randint(8, (6, 2), generator=generator), torch.rand(6, 2, generator=generator)

    def call(*arguments):
        return r1.experts_forward(experts, *arguments)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), call(*arguments))
