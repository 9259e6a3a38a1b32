"""The families of routers that the tests of route run, and random logits."""

from __future__ import annotations

import pytest
import torch

FAMILIES = {
    "deepseek-v3": {"top_k": 3, "score": "sigmoid", "n_group": 4, "topk_group": 2, "scale": 2.5},
    "sigmoid": {"top_k": 2, "score": "sigmoid", "normalize": False},
    "deepseek-v2": {
        "top_k": 3,
        "score": "softmax",
        "n_group": 4,
        "topk_group": 2,
        "normalize": False,
        "scale": 1.5,
    },
    "qwen3": {"top_k": 4, "score": "softmax"},
    "olmoe": {"top_k": 4, "score": "softmax", "normalize": False},
}
families = pytest.mark.parametrize("options", FAMILIES.values(), ids=FAMILIES)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))
