"""The router's C++ kernel for CPUs where its vectors and its four tokens at a time have edges.

T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import pytest
import torch

from r1kernels import extension
from r1kernels.moe import route
from tests.support.numerics import assert_as_exact_as

pytestmark = pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))

# experts, groups, groups of a token, K: groups of one expert, of less and more than a vector, more groups than its lanes
LAYOUTS = [
    (17, 17, 5, 5),
    (40, 8, 5, 3),
    (64, 2, 1, 9),
    (96, 32, 8, 4),
    (160, 8, 3, 6),
    (300, 2, 1, 150),
    (512, 16, 4, 10),
]


def logits_of(kind: str, tokens: int, experts: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(experts)
    logits = torch.randn(tokens, experts, generator=generator)
    if kind == "ties":
        return (4 * logits).round() / 4
    if kind == "close":
        return 1e-6 * logits
    if kind == "special":
        pick = torch.rand(tokens, experts, generator=generator)
        for low, value in ((0.0, torch.nan), (0.05, torch.inf), (0.1, -torch.inf), (0.15, -0.0), (0.25, 0.0)):
            logits[(pick >= low) & (pick < low + 0.05)] = value
    return logits


@pytest.mark.parametrize("kind", ["plain", "ties", "close", "special"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("biased", [False, True])
def test_choice_in_groups(layout, score, kind, biased):
    experts, groups, kept, top_k = layout
    logits = logits_of(kind, 17, experts)
    bias = torch.randn(experts, generator=torch.Generator().manual_seed(1)) if biased else None
    options = {"score": score, "n_group": groups, "topk_group": kept, "bias": bias}
    ours = route(logits, top_k, backend="cpu", **options)
    assert torch.equal(ours.indices, route(logits, top_k, backend="reference", **options).indices)


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7F800001], ids=hex)
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("normalize", [False, True])
def test_a_nan_of_any_bits_makes_weights_and_gradient_nan(score, normalize, bits):
    logits = logits_of("plain", 5, 40)
    logits.view(torch.int32)[1, 5] = bits
    options = {"score": score, "normalize": normalize, "indices": torch.tensor([[5, 7]] * 5)}
    leaf = logits.requires_grad_()
    weights = route(leaf, 2, backend="cpu", **options).weights
    (grad,) = torch.autograd.grad(weights[:, 0].sum(), leaf)
    assert weights[1, 0].isnan() and grad[1, 5].isnan()
    assert weights[1, 1].isnan() == (normalize or score == "softmax")
    assert weights[[0, 2, 3, 4]].isfinite().all() and grad[[0, 2, 3, 4]].isfinite().all()


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 5, 2), (6, 16, 3), (7, 40, 17)])
def test_gradient_where_only_some_tokens_chose_an_expert_twice(score, normalize, tokens, experts, top_k):
    logits = logits_of("plain", tokens, experts)
    indices = torch.stack([torch.arange(top_k) % (top_k - token % 2) for token in range(tokens)])
    above = torch.randn(tokens, top_k, generator=torch.Generator().manual_seed(2))

    def gradient(logits: torch.Tensor, backend: str) -> torch.Tensor:
        leaf = logits.clone().requires_grad_()
        options = {"score": score, "normalize": normalize, "scale": 2.5, "indices": indices}
        weights = route(leaf, top_k, backend=backend, **options).weights
        return torch.autograd.grad(weights, leaf, above.to(weights.dtype))[0]

    ours, eager, exact = (
        gradient(logits, "cpu"),
        gradient(logits, "reference"),
        gradient(logits.double(), "reference"),
    )
    assert_as_exact_as(ours, eager, exact, torch.float32)
