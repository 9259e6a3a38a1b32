"""shared_prefix_logprobs and shared_prefix_states against the repeated form: transformers' own forward of each sequence."""

from __future__ import annotations

import pytest
import torch

from r1kernels.integrations import transformers as r1
from tests.support import prefix_models as models


def assert_parity(model, prompts, completions, values, gradients):
    tree = r1.prefix_tree(prompts, completions)
    logp, entropy = r1.shared_prefix_logprobs(
        model, tree, temperature=models.TEMPERATURE, return_entropy=True
    )
    found = models.gradients(model, logp, entropy)
    expected = models.repeated(model, prompts, completions)
    assert logp.shape == expected[0].shape
    assert models.difference(logp, expected[0]) < values
    assert models.difference(entropy, expected[1]) < values
    of_repeated = models.gradients(model, *expected)
    assert found.keys() == of_repeated.keys()
    worst = max(of_repeated, key=lambda name: models.difference(found[name], of_repeated[name]))
    assert models.difference(found[worst], of_repeated[worst]) < gradients, worst


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Qwen3"])
def test_float32_is_the_repeated_form_to_rounding(name):
    assert_parity(models.build(name), *models.sequences(), values=1e-6, gradients=1e-5)


@pytest.mark.parametrize("name", models.MODELS)
def test_float64_is_the_repeated_form(name):
    model = models.build(name, torch.float64)
    exact = name == "GPTNeoX"  # norms, rotations and eager softmaxes of the others run in float32
    assert_parity(model, *models.sequences(), *((1e-12, 1e-12) if exact else (1e-7, 1e-6)))
