"""shared_prefix_states of every causal language model of transformers that a tiny configuration builds."""

from __future__ import annotations

import pytest
import torch

from r1kernels.integrations import transformers as r1
from tests.support import causal_models, prefix_models


@torch.no_grad()
def outcome(name, model_class):
    """(what happened, details): "not built", "no states" of its own for text, "refused", "wrong" or "served"."""
    try:
        model = causal_models.build(name, model_class)
    except Exception as error:
        return "not built", repr(error)
    prompts, completions = (rows[:4] for rows in prefix_models.sequences())
    prompts = [prompt[:30] for prompt in prompts]  # within what the tiny ones have positions for
    tree = r1.prefix_tree(
        *([[token % 50 for token in row] for row in rows] for rows in (prompts, completions))
    )
    try:
        expected = torch.cat(
            [r1.head_inputs(model, tree.input_ids[path].unsqueeze(0))[0] for path in tree.paths()]
        )
    except Exception as error:
        return "no states", repr(error)
    try:
        states = r1.shared_prefix_states(model, tree)
    except ValueError as error:
        return "refused", str(error)
    rows = torch.cat([path[len(prompt) - 1 : -1] for path, prompt in zip(tree.paths(), prompts, strict=True)])
    assert torch.equal(rows, tree.predicts)
    at = torch.cat(
        [
            torch.arange(start + len(prompt) - 1, end - 1)
            for start, end, prompt in zip(tree.cu_seqlens, tree.cu_seqlens[1:], prompts, strict=False)
        ]
    )
    difference = prefix_models.difference(states, expected[at])
    return "served" if difference < 1e-4 else "wrong", f"{difference:.1e}"


@pytest.mark.slow
def test_every_causal_language_model():
    names, table = causal_models.sweep(outcome)
    print(table)
    assert not names["wrong"], table
    assert {"Llama4ForCausalLM", "Qwen3NextForCausalLM"} <= {*names["refused"]}, table
    assert len(names["served"]) > 85, table
