"""One call of moe_experts with random arguments, its exact result in float64, and eager PyTorch beside it.

T tokens, H hidden size, I intermediate size, E experts, K experts per token, R rank of a low-rank addition.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from r1kernels.moe import route

NAMES = ("output", "hidden", "weights", "gate_up", "down")
LORA_NAMES = (*NAMES, "A_up", "B_up", "A_down", "B_down")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """The same values on every device; on the default one."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, dtype=torch.float64, generator=generator, device="cpu")
    return values.to(torch.get_default_device(), dtype)


def chosen(indices: Tensor, experts: int) -> list[int]:
    """The experts that a token goes to, sentinels left out; the first one in any case, by which gradients have a graph."""
    return sorted({0, *indices.flatten().tolist()} & set(range(experts)))


class Case:
    """Arguments of one call, leaves with gradient, with a gradient of the output."""

    def __init__(
        self,
        tokens: int,
        hidden: int,
        intermediate: int,
        experts: int,
        top_k: int,
        dtype: torch.dtype = torch.float64,
        indices: Tensor | None = None,
        draw: int = 0,
    ) -> None:
        """draw: which of many random calls of these sizes."""
        self.hidden = normal(tokens, hidden, seed=1 + 10 * draw, dtype=dtype).requires_grad_()
        routing = route(
            normal(tokens, experts, seed=2 + 10 * draw, dtype=torch.float32), top_k, backend="reference"
        )
        self.indices = routing.indices if indices is None else indices
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.weights = routing.weights.to(wide).requires_grad_()
        self.gate_up = (
            (normal(experts, 2 * intermediate, hidden, seed=3 + 10 * draw) / hidden**0.5)
            .to(dtype)
            .requires_grad_()
        )
        self.down = (
            (normal(experts, hidden, intermediate, seed=4 + 10 * draw) / intermediate**0.5)
            .to(dtype)
            .requires_grad_()
        )
        self.grad = normal(tokens, hidden, seed=5 + 10 * draw, dtype=dtype)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.hidden, self.weights, self.gate_up, self.down

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.hidden, self.indices, self.weights, self.gate_up, self.down

    def run(self, function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        """Output and gradients of hidden, weights, gate_up and down."""
        out = function(*self.arguments())
        return out.detach(), *torch.autograd.grad(out, self.leaves, self.grad.to(out.dtype))

    def exact(
        self, activation: Callable[[Tensor], Tensor] = F.silu, limit: float = math.inf, shift: float = 0.0
    ) -> tuple[Tensor, ...]:
        """The same in float64, by a loop over the experts and their tokens."""
        wide = [leaf.detach().double().requires_grad_() for leaf in self.leaves]
        hidden, weights, gate_up, down = self.whole(*wide)
        out = torch.zeros_like(hidden)
        for expert in chosen(self.indices, len(gate_up)):
            token, place = torch.where(self.indices == expert)
            gate, up = (hidden[token] @ gate_up[expert].T).chunk(2, dim=-1)
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit) + shift
            rows = (activation(gate) * up) @ down[expert].T * weights[token, place, None]
            out = out.index_add(0, token, rows)
        grads = torch.autograd.grad(out, wide, self.grad.double(), allow_unused=True)
        zeros = [
            torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(wide, grads, strict=True)
        ]
        return out.detach(), *zeros

    def whole(self, *leaves: Tensor) -> tuple[Tensor, ...]:
        """hidden, weights, gate_up and down, as the experts multiply with them."""
        return leaves


class LoraCase(Case):
    """A call with low-rank additions, which are leaves too; ``run`` and ``exact`` have their gradients behind the others."""

    def __init__(
        self, *sizes: int, ranks: tuple[int, int] = (3, 5), scale: float = 0.6, **options: Any
    ) -> None:
        super().__init__(*sizes, **options)
        (experts, outputs, hidden), width, dtype = self.gate_up.shape, self.down.shape[2], self.hidden.dtype
        up, down = ranks
        shapes = (
            (experts, up, hidden),
            (experts, outputs, up),
            (experts, down, width),
            (experts, hidden, down),
        )
        self.matrices = tuple(
            (normal(*shape, seed=100 + place) / shape[2] ** 0.5).to(dtype).requires_grad_()
            for place, shape in enumerate(shapes)
        )
        self.scale = scale

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return *super().leaves, *self.matrices

    @property
    def lora(self) -> tuple[Any, ...]:
        return *self.matrices, self.scale

    def whole(self, *leaves: Tensor) -> tuple[Tensor, ...]:
        hidden, weights, gate_up, down, up_a, up_b, down_a, down_b = leaves
        return hidden, weights, gate_up + self.scale * (up_b @ up_a), down + self.scale * (down_b @ down_a)

    def with_lora(self, experts: Callable[..., Tensor], **options: Any) -> tuple[Tensor, ...]:
        return self.run(lambda *arguments: experts(*arguments, lora=self.lora, **options))

    def in_eager(self) -> tuple[Tensor, ...]:
        """W + c B A in the dtype of W, as PEFT makes it, in eager experts."""
        hidden, weights, gate_up, down = self.whole(*self.leaves)
        return self.run(lambda *_: in_eager(hidden, self.indices, weights, gate_up, down))


def check_clamped_gates(experts: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """Output and gradients of gates that are clamped, and shifted with a slope of their own, against float64."""
    case = Case(8, 24, 19, 3, 2, dtype=dtype)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    for alpha, limit, shift in ((1.0, 0.5, 0.0), (1.702, 0.5, 1.0)):
        results = case.run(
            lambda *arguments, a=alpha, m=limit, s=shift: experts(*arguments, alpha=a, limit=m, shift=s)
        )
        exact = case.exact(lambda gate, a=alpha: gate * (a * gate).sigmoid(), limit, shift)
        for ours, expected in zip(results, exact, strict=True):
            torch.testing.assert_close(ours.double(), expected, **tolerance)


def check_gates_of_any_size(experts: Callable[..., Tensor], activation: str) -> None:
    # H = I = 1 and weights of 1: the output is act(x) x
    x = torch.tensor([-200.0, -90.0, -20.0, -1.0, -1e-10, 0.0, 1e-10, 1.0, 20.0, 90.0, 200.0, 1e15])
    hidden = x[:, None].clone().requires_grad_()
    ones = torch.ones(1, 2, 1), torch.ones(1, 1, 1)
    indices, weights = torch.zeros(12, 1, dtype=torch.int64), torch.ones(12, 1)
    out = experts(hidden, indices, weights, *ones, activation=activation)
    out.sum().backward()
    wide = x.double().requires_grad_()
    act = F.silu(wide) if activation == "silu" else F.gelu(wide, approximate="tanh")
    (act * wide).sum().backward()
    assert hidden.grad is not None and wide.grad is not None
    torch.testing.assert_close(out[:, 0].double(), (act * wide).detach(), rtol=1e-5, atol=1e-34)
    torch.testing.assert_close(hidden.grad[:, 0].double(), wide.grad, rtol=1e-5, atol=1e-34)


def check_no_tokens(experts: Callable[..., Tensor], dtype: torch.dtype) -> None:
    case = Case(0, 6, 5, 3, 2, dtype=dtype)
    out, *grads = case.run(experts)
    assert out.shape == (0, 6)
    assert [grad.shape for grad in grads] == [leaf.shape for leaf in case.leaves]
    assert all((grad == 0).all() for grad in grads)


def in_eager(hidden: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """A loop over the experts as transformers' modules have it: gather, two linears, index_add in the tokens' dtype."""
    out = torch.zeros_like(hidden)
    for expert in chosen(indices, len(gate_up)):
        token, place = torch.where(indices == expert)
        gate, up = F.linear(hidden[token], gate_up[expert]).chunk(2, -1)
        rows = F.linear(F.silu(gate) * up, down[expert]) * weights[token, place, None]
        out = out.index_add(0, token, rows.to(out.dtype))
    return out
