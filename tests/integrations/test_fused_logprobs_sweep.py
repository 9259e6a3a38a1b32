"""fused_logprobs of every causal language model of transformers that a tiny configuration builds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from r1kernels.integrations import transformers as r1
from tests.support import causal_models

REFUSED = {"ProphetNetForCausalLM"}  # its head makes logits of several tokens ahead


@torch.no_grad()
def outcome(name, model_class):
    """(what happened, details): "not built", "no logits" of its own for text, "refused", "wrong" or "served"."""
    try:
        model = causal_models.build(name, model_class)
    except Exception as error:
        return "not built", repr(error)
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear):
        head.weight.mul_(10)  # logits of a few nats
    ids = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    try:
        logits = model(input_ids=ids, use_cache=False).logits
        expected = logits[:, :-1].double().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    except Exception as error:
        return "no logits", repr(error)
    try:
        logp = r1.fused_logprobs(model, ids)
    except ValueError as error:
        return "refused", str(error)
    difference = float((logp - expected).abs().max())
    return "served" if difference < 1e-3 else "wrong", f"{difference:.1e}"


@pytest.mark.slow
def test_every_causal_language_model():
    names, table = causal_models.sweep(outcome)
    print(table)
    assert not names["wrong"], table
    assert set(names["refused"]) == REFUSED, table
    assert len(names["served"]) > 150, table
