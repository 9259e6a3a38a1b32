"""What ops keep for their backward is autograd's: hooks may take it away, and are asked once for each tensor.

N tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import r1kernels
from tests.support.sample_calls import differentiable_call, first

OPS = (
    "token_logprobs",
    "grouped_logprobs",
    "linear_logprobs",
    "linear_grouped_logprobs",
    "topk_divergence",
    "linear_topk_divergence",
    "linear_divergence",
    "grpo_loss",
    "linear_grpo_loss",
    "route",
    "grouped_gemm",
    "moe_experts",
)
KEPT = (torch.tensor([3, 0, 9, 1, 5]), torch.tensor([0, 2, 2, 5, 5, 5, 5]))
OPTIONS = {
    "token_logprobs": [{}, {"kept": KEPT}],
    "linear_grouped_logprobs": [{}, {"kept": KEPT}],
    "linear_logprobs": [
        {},
        {"kept": KEPT},
        {"return_entropy": False, "save_logits": True},
        {"save_logits": False},
    ],
    "linear_topk_divergence": [{"save_logits": True}, {"save_logits": False}],
    "linear_divergence": [{"save_logits": True}, {"save_logits": False}],
    "grpo_loss": [{}, {"variant": "gmpo"}, {"ratio": "sequence"}],
    "linear_grpo_loss": [{}, {"ratio": "sequence"}],
    "moe_experts": [{}, {"save": "nothing"}],
}
CALLS = [(op, options) for op in OPS for options in OPTIONS.get(op, [{}])]


def problem(op: str, options: dict):
    """(the op as a function of its differentiable arguments that gives one tensor, these arguments)"""
    function, leaves = differentiable_call(op, **options)
    return lambda *given: first(function(*given)), leaves


@pytest.mark.parametrize(("op", "options"), CALLS)
def test_a_checkpointed_call_has_the_gradients_of_the_call(op, options):
    function, leaves = problem(op, options)
    expected = torch.autograd.grad(function(*leaves).sum(), leaves)
    out = checkpoint(function, *leaves, use_reentrant=False)
    for grad, other in zip(torch.autograd.grad(out.sum(), leaves), expected, strict=True):
        torch.testing.assert_close(grad, other)


@pytest.mark.parametrize(("op", "options"), CALLS)
def test_hooks_on_saved_tensors_are_asked_once(op, options):
    """A hook may give a copy, as save_on_cpu does, and the copy may be its own for that one time."""
    function, leaves = problem(op, options)
    expected = torch.autograd.grad(function(*leaves).sum(), leaves)
    asked: list[int] = []

    def unpack(packed: tuple[int, Tensor]) -> Tensor:
        assert packed[0] not in asked
        asked.append(packed[0])
        return packed[1]

    number = iter(range(1000))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (next(number), tensor.clone()), unpack):
        out = function(*leaves)
    for grad, other in zip(torch.autograd.grad(out.sum(), leaves), expected, strict=True):
        torch.testing.assert_close(grad, other)


def test_checkpointing_frees_the_logits_that_a_call_would_keep():
    tokens, width, vocabulary = 64, 8, 1024
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    targets = torch.randint(0, vocabulary, (tokens,))

    def logp(hidden: Tensor) -> Tensor:
        return r1kernels.linear_logprobs(hidden, weight, targets, save_logits=True)

    def kept() -> int:
        """How many tensors of the shape of the logits are alive."""
        return sum(type(one) is Tensor and one.shape == (tokens, vocabulary) for one in gc.get_objects())

    checkpointed = [checkpoint(logp, hidden, use_reentrant=False) for _ in range(3)]
    assert kept() == 0
    plain = logp(hidden)
    assert kept() == 1
    (expected,) = torch.autograd.grad(plain.sum(), hidden)
    torch.testing.assert_close(torch.autograd.grad(sum(checkpointed).sum(), hidden)[0], 3 * expected)
