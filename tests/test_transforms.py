"""Derivatives by torch.func, forward mode and torch.export, of every public op in every argument that has one.

No kernel is seen by them, so the reference serves such calls; what they give is compared with autograd's own backward.
T tokens, H hidden, I intermediate, E experts, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import r1kernels
from r1kernels import BackendError, extension

T, H, I, E, V = 6, 8, 4, 4, 11  # noqa: E741
GENERATOR = torch.Generator().manual_seed(0)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR)


TARGETS = torch.randint(0, V, (2, T), generator=GENERATOR)
MASK = torch.ones(2, T, dtype=torch.bool)
EXPERTS = torch.stack((torch.arange(T) % E, (torch.arange(T) + 1) % E), -1)
# every token's target with one or two others, and two tokens that keep everything
SETS = [[int(y), (int(y) + 3) % V, (int(y) + n) % V][: n % 4] for n, y in enumerate(TARGETS.flatten())]
KEPT = (torch.tensor([v for ids in SETS for v in ids]), torch.tensor([0, *map(len, SETS)]).cumsum(0))
HEAD = {"hidden": noise(2, T, H), "weight": noise(V, H), "bias": noise(V)}
TEACHER = noise(2, T, I), noise(V, I)
STORED = torch.stack((TARGETS, (TARGETS + 1) % V), -1), torch.full((2, T, 2), -1.0)


def _linear(op: str, **options: Any):
    def call(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        result = getattr(r1kernels, op)(hidden, weight, TARGETS, bias=bias, **options)
        return result if isinstance(result, Tensor) else result[0]

    return call


def _divergence(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return r1kernels.linear_divergence(hidden, weight, *TEACHER, kind="jsd", bias=bias)


def _topk(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return r1kernels.linear_topk_divergence(hidden, weight, *STORED, kind="reverse_kl", bias=bias)


def _several(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return r1kernels.linear_logprobs(hidden, weight, STORED[0], bias=bias)


def _linear_grpo(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    advantages = torch.tensor([1.0, -1.0])
    return r1kernels.linear_grpo_loss(hidden, weight, TARGETS, None, advantages, MASK, bias=bias).loss


def _grpo(logp: Tensor, entropy: Tensor) -> Tensor:
    advantages = torch.tensor([1.0, -1.0])
    return r1kernels.grpo_loss(logp, None, advantages, MASK, entropy=entropy, entropy_coef=0.1).loss


def _experts(hidden: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return r1kernels.moe_experts(hidden, EXPERTS, weights, gate_up, down)


CALLS = {
    "token_logprobs": (lambda logits: r1kernels.token_logprobs(logits, TARGETS), {"logits": noise(2, T, V)}),
    "entropy": (
        lambda logits: r1kernels.token_logprobs(logits, TARGETS, return_entropy=True)[1],
        {"logits": noise(2, T, V)},
    ),
    "linear_logprobs": (_linear("linear_logprobs"), HEAD),
    "linear_divergence": (_divergence, HEAD),
    "linear_topk_divergence": (_topk, HEAD),
    "several targets": (_several, HEAD),
    "topk_divergence": (
        lambda logits: r1kernels.topk_divergence(logits, *STORED, tail="ignore"),
        {"logits": noise(2, T, V)},
    ),
    "recomputed": (_linear("linear_logprobs", save_logits=False), HEAD),
    "kept tokens": (
        lambda logits: r1kernels.token_logprobs(logits, TARGETS, kept=KEPT),
        {"logits": noise(2, T, V)},
    ),
    "kept rows": (_linear("linear_logprobs", kept=KEPT), HEAD),
    "grouped_logprobs": (
        lambda logits: r1kernels.grouped_logprobs(logits, TARGETS, mask=MASK, group_size=2).logp,
        {"logits": noise(2, T, V)},
    ),
    "linear_grouped_logprobs": (_linear("linear_grouped_logprobs", mask=MASK, group_size=2), HEAD),
    "grpo_loss": (_grpo, {"logp": -noise(2, T).abs(), "entropy": noise(2, T).abs()}),
    "linear_grpo_loss": (_linear_grpo, HEAD),
    "route": (lambda logits: r1kernels.route(logits, 2, score="softmax").weights, {"logits": noise(T, E)}),
    "grouped_gemm": (
        lambda x, weight: r1kernels.grouped_gemm(x, weight, torch.tensor([0, 2, T])),
        {"x": noise(T, H), "weight": noise(2, I, H)},
    ),
    "moe_experts": (
        _experts,
        {
            "hidden": noise(T, H),
            "weights": noise(T, 2),
            "gate_up": noise(E, 2 * I, H),
            "down": noise(E, H, I),
        },
    ),
}
ARGUMENTS = [(op, name) for op, (_, values) in CALLS.items() for name in values]


def alone(op: str, name: str):
    """(the op as a function of one argument, that argument)"""
    function, values = CALLS[op]
    return lambda value: function(**{**values, name: value}), values[name]


def backward(function: Any, value: Tensor, upstream: Tensor) -> Tensor:
    """Autograd's gradient of <function(value), upstream>, by the backend that is chosen in eager mode."""
    leaf = value.clone().requires_grad_()
    (grad,) = torch.autograd.grad((function(leaf) * upstream).sum(), leaf)
    return grad


@pytest.mark.parametrize(("op", "name"), ARGUMENTS)
def test_forward_mode_agrees_with_the_backward(op, name):
    function, value = alone(op, name)
    direction = torch.randn_like(value)
    out, tangent = torch.func.jvp(function, (value,), (direction,))
    upstream = torch.randn_like(out)
    expected = (backward(function, value, upstream) * direction).sum()
    assert expected != 0
    # torch makes a float64 tangent of a 0-d product with a number
    ours = (tangent * upstream).sum().to(expected.dtype)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("op", "name"), ARGUMENTS)
def test_torch_func_grad_is_the_backward(op, name):
    function, value = alone(op, name)
    grad = torch.func.grad(lambda value: function(value).sum())(value)
    expected = backward(function, value, torch.ones_like(function(value)))
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("op", "name"), ARGUMENTS)
def test_vmap_keeps_values_and_gradients(op, name):
    function, value = alone(op, name)
    stacked = torch.stack((value, 0.5 * value)).requires_grad_()
    one_by_one = torch.stack([function(one) for one in stacked])
    at_once = torch.vmap(function)(stacked)
    torch.testing.assert_close(at_once, one_by_one, rtol=1e-4, atol=1e-5)
    upstream = torch.randn_like(one_by_one)
    (expected,) = torch.autograd.grad((one_by_one * upstream).sum(), stacked)
    (grad,) = torch.autograd.grad((at_once * upstream).sum(), stacked)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)


class Module(torch.nn.Module):
    """The arguments of an op as parameters."""

    def __init__(self, op: str) -> None:
        super().__init__()
        self.function, values = CALLS[op]
        self.values = torch.nn.ParameterDict({name: value.clone() for name, value in values.items()})

    def forward(self, scale: Tensor) -> Tensor:
        return self.function(**{name: value * scale for name, value in self.values.items()})


@pytest.mark.parametrize("op", CALLS)
def test_an_exported_module_has_the_gradients_of_the_module(op):
    module, scale = Module(op), torch.tensor(0.9)
    expected = torch.autograd.grad(module(scale).sum(), list(module.parameters()))
    exported = torch.export.export(module, (scale,)).module()
    grads = torch.autograd.grad(exported(scale).sum(), list(exported.parameters()))
    for grad, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))
class TestAKernel:
    @pytest.mark.parametrize("transform", ["jvp", "grad", "vmap"])
    def test_says_why_it_cannot_serve_a_transform(self, transform):
        logits, targets = noise(2, V), torch.tensor([0, 1])

        def call(logits):
            return r1kernels.token_logprobs(logits, targets, backend="cpu")

        expected = "forward-mode derivative" if transform == "jvp" else "torch.func"
        with pytest.raises(BackendError, match=expected):
            if transform == "jvp":
                torch.func.jvp(call, (logits,), (logits,))
            elif transform == "grad":
                torch.func.grad(lambda logits: call(logits).sum())(logits)
            else:
                torch.vmap(lambda row: call(row.unsqueeze(0).expand(2, V)))(logits)

    def test_is_exported_where_no_gradient_is_asked_for(self):
        module, scale = Module("moe_experts"), torch.tensor(0.9)
        with torch.no_grad():
            program = torch.export.export(module, (scale,))
        assert "moe_experts_cpu" in str(program.graph)
        torch.testing.assert_close(program.module()(scale).detach(), module(scale).detach())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kept": (torch.tensor([1, 2, 0, 3]), torch.tensor([0, 2, 4]))},
        {"targets": torch.tensor([[1, 2], [3, 0]])},
    ],
    ids=["masked", "kept", "several"],
)
def test_entropies_where_logits_are_left_out_have_gradients_under_torch_func(options):
    logits = torch.tensor([[0.5, 1.0, -1.0, -torch.inf], [2.0, -torch.inf, 0.0, 1.0]])
    options = {"targets": torch.tensor([1, 3]), "return_entropy": True} | options

    def entropy(z):
        return r1kernels.token_logprobs(z, **options)[1].sum()

    leaf = logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(entropy(leaf), leaf)
    assert expected.isfinite().all() and expected.abs().amax(1).gt(0).all()
    torch.testing.assert_close(torch.func.grad(entropy)(logits), expected)
