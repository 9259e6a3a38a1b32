"""The bare products of a mixture: inputs, exact results in float64, and whoever computes them.

T tokens or rows, H hidden, I outputs of an expert, E experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import Case
from .logprob import spread
from .moe import CHECKED_EXPERTS
from .numerics import Exact
from .peers import COMPILED, EAGER, Call, Inputs, Ours, Outputs, Peer, compiled


def gemm_inputs(case: Case, device: torch.device) -> Inputs:
    """Rows in the order of their experts, which have uneven shares, and weights that keep their size."""
    s, dtype = case.sizes, case.torch_dtype
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    counts = torch.randint(s["E"], (s["T"],), generator=generator, device=device).bincount(minlength=s["E"])
    tensors = {
        "x": normal(s["T"], s["H"]),
        "weight": normal(s["E"], s["I"], s["H"]).mul_(s["H"] ** -0.5),
        "offsets": F.pad(counts.cumsum(0), (1, 0)).int(),
    }
    return Inputs(tensors, ("x", "weight"), {"out": normal(s["T"], s["I"])})


def gemm_exact(case: Case, inputs: Inputs) -> dict[str, Exact]:
    """Expert by expert; the gradients of up to CHECKED_EXPERTS matrices."""
    checked = spread(case.sizes["E"], CHECKED_EXPERTS, inputs["x"].device)
    x, weight, above = (
        one.detach().double() for one in (inputs["x"], inputs["weight"], inputs.upstream["out"])
    )
    rows = [slice(*bounds) for bounds in inputs["offsets"].unfold(0, 2, 1).tolist()]
    return {
        "out": Exact(torch.cat([x[some] @ matrix.T for some, matrix in zip(rows, weight, strict=True)])),
        "d x": Exact(torch.cat([above[some] @ matrix for some, matrix in zip(rows, weight, strict=True)])),
        "d weight": Exact(torch.stack([above[rows[e]].T @ x[rows[e]] for e in checked.tolist()]), checked),
    }


def gate_inputs(case: Case, device: torch.device) -> Inputs:
    """Hidden states and the matrix of a router."""
    s = case.sizes
    generator = torch.Generator(device).manual_seed(0)
    hidden, weight, above = (
        torch.randn(shape, generator=generator, device=device)
        for shape in ((s["T"], s["H"]), (s["E"], s["H"]), (s["T"], s["E"]))
    )
    tensors = {
        "hidden": hidden.to(case.torch_dtype),
        "weight": (weight * s["H"] ** -0.5).to(case.torch_dtype),
    }
    return Inputs(tensors, ("hidden", "weight"), {"logits": above})


def gate_exact(case: Case, inputs: Inputs) -> dict[str, Exact]:
    """In float64."""
    hidden, weight, above = (
        one.detach().double() for one in (inputs["hidden"], inputs["weight"], inputs.upstream["logits"])
    )
    return {
        "logits": Exact(hidden @ weight.T),
        "d hidden": Exact(above @ weight),
        "d weight": Exact(above.T @ hidden),
    }


def _by_expert(inputs: Inputs) -> Outputs:
    rows = inputs["x"].split(inputs["offsets"].diff().tolist())
    return {"out": torch.cat([F.linear(some, one) for some, one in zip(rows, inputs["weight"], strict=True)])}


def _grouped_mm(inputs: Inputs) -> Outputs:
    return {"out": F.grouped_mm(inputs["x"], inputs["weight"].mT, offs=inputs["offsets"][1:])}


def _wide_linear(hidden: Tensor, weight: Tensor) -> Tensor:
    return F.linear(hidden.float(), weight.float())


def _torch_gate(function: Callable[[Tensor, Tensor], Tensor]) -> Call:
    return lambda inputs: {"logits": function(inputs["hidden"], inputs["weight"])}


OURS_GEMM = Ours(
    "grouped_gemm",
    lambda case, inputs: ((inputs["x"], inputs["weight"], inputs["offsets"]), {}),
    lambda found: {"out": found},
)
OURS_GATE = Ours(
    "router_logits",
    lambda case, inputs: ((inputs["hidden"], inputs["weight"]), {}),
    lambda found: {"logits": found},
)
GEMM = (
    Peer(EAGER, lambda case, inputs: _by_expert),
    OURS_GEMM.peer(),
    Peer("F.grouped_mm", lambda case, inputs: _grouped_mm),
)
GATE = (
    Peer(EAGER, lambda case, inputs: _torch_gate(_wide_linear)),
    OURS_GATE.peer(),
    Peer(COMPILED, lambda case, inputs: _torch_gate(compiled(_wide_linear)), compiles=True),
)
