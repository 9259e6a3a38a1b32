"""The families of routers that the tests of route run, and random logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.support.numerics import same_bits

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
    "deepseek-v4": {"top_k": 3, "score": "sqrt_softplus", "scale": 1.5},
    "mistral4": {"top_k": 3, "score": "softmax", "n_group": 4, "topk_group": 2, "group_score": "two_best"},
    "kolibri": {"top_k": 2, "choose_by": "logits", "score": "sigmoid", "eps": 1e-3},
}
families = pytest.mark.parametrize("options", FAMILIES.values(), ids=FAMILIES)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def weights_of(logits, indices, *, score, normalize=True, scale=1.0, eps=1e-20, **_):
    """The weights by the formula of a model's router, in float64: the scores of all experts come first."""
    logits = logits.double()
    if score == "sqrt_softplus":
        scores = F.softplus(logits, threshold=1e3).sqrt()
    else:
        scores = logits.sigmoid() if score == "sigmoid" else logits.softmax(-1)
    weights = scores.gather(1, indices)
    if normalize:
        weights = weights / (weights.sum(1, keepdim=True) + eps)
    return scale * weights


SPECIAL = (  # experts and their logits, a token each; those of no special logit stand between them
    {7: torch.nan},
    {0: torch.nan},
    {},
    {6: torch.inf},
    {1: -torch.inf, 4: torch.inf},
    {},
    {2: -torch.inf, 3: -torch.inf},
    dict.fromkeys(range(8), torch.nan),
    {},
)


def check_special_logits(run, options):
    """NaN and infinite logits give what the formula gives, live and in replay, and leave the other tokens alone.

    ``run(logits, **options)`` gives weights, indices and the gradient of the logits.
    """
    clean = normal(len(SPECIAL), 8)
    logits = clean.clone()
    for token, row in enumerate(SPECIAL):
        for expert, logit in row.items():
            logits[token, expert] = logit
    alone = [token for token, row in enumerate(SPECIAL) if not row]
    recorded = torch.stack([torch.arange(options["top_k"]) + token % 2 for token in range(len(SPECIAL))])
    for more in ({}, {"bias": normal(8, seed=1) - 2}, {"indices": recorded}):
        weights, indices, grad = run(logits, **options, **more)
        expected = weights_of(logits, indices, **options)
        torch.testing.assert_close(weights.double(), expected, rtol=1e-6, atol=0, equal_nan=True)
        if options["score"] == "softmax":
            undefined = (logits.isnan() | (logits == torch.inf)).any(1)
            assert weights[undefined].isnan().all() and weights[~undefined].isfinite().all()
        elif "indices" not in more:
            assert (indices[0, 0], indices[1, 0]) == (7, 0)  # NaN comes first
        for ours, other in zip((weights, indices, grad), run(clean, **options, **more), strict=True):
            assert same_bits(ours[alone], other[alone])
