"""moe_experts with low-rank additions to frozen weights: inputs, exact results in float64, and whoever computes them.

T tokens, H hidden, I intermediate size of an expert, E experts, K experts per token, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import r1kernels

from . import moe
from .cases import Case
from .numerics import Exact
from .peers import EAGER, OURS, Call, Inputs, Ours, Outputs, Peer

FACTORS = ("A up", "B up", "A down", "B down")
SCALE = 2.0


def inputs(case: Case, device: torch.device) -> Inputs:
    """Those of moe_experts, whose weights are frozen, and two factors of rank R for each of them."""
    given, s = moe.expert_inputs(case, device), case.sizes
    generator = torch.Generator(device).manual_seed(1)
    shapes = (s["R"], s["H"]), (2 * s["I"], s["R"]), (s["R"], s["I"]), (s["H"], s["R"])
    factors = {
        name: torch.randn(s["E"], *shape, generator=generator, device=device, dtype=case.torch_dtype).mul_(
            shape[1] ** -0.5
        )
        for name, shape in zip(FACTORS, shapes, strict=True)
    }
    return replace(given, tensors={**given.tensors, **factors}, leaves=("hidden", "weights", *FACTORS))


def exact(case: Case, inputs: Inputs) -> dict[str, Exact]:
    """Expert by expert, differentiated by autograd."""
    names = ("hidden", "weights", *FACTORS)
    wide = {name: inputs[name].detach().double().requires_grad_() for name in names}
    out = torch.zeros_like(wide["hidden"])
    for expert in inputs["indices"].unique().tolist():
        token, place = torch.where(inputs["indices"] == expert)
        a_up, b_up, a_down, b_down = (wide[name][expert] for name in FACTORS)
        gate_up = inputs["gate_up"][expert].double() + SCALE * b_up @ a_up
        down = inputs["down"][expert].double() + SCALE * b_down @ a_down
        gate, up = F.linear(wide["hidden"][token], gate_up).chunk(2, dim=-1)
        rows = F.linear(F.silu(gate) * up, down) * wide["weights"][token, place, None]
        out = out.index_add(0, token, rows)
    gradients = torch.autograd.grad(out, list(wide.values()), inputs.upstream["out"].double())
    found = {f"d {name}": Exact(grad) for name, grad in zip(wide, gradients, strict=True)}
    return {"out": Exact(out.detach()), **found}


def _whole(inputs: Inputs) -> Inputs:
    """The weights that a method multiplies with which forms W + c B A."""
    a_up, b_up, a_down, b_down = (inputs[name] for name in FACTORS)
    weights = {
        "gate_up": torch.baddbmm(inputs["gate_up"], b_up, a_up, alpha=SCALE),
        "down": torch.baddbmm(inputs["down"], b_down, a_down, alpha=SCALE),
    }
    return replace(inputs, tensors={**inputs.tensors, **weights})


def _formed(make: Callable[[Case, Inputs], Any]) -> Callable[[Case, Inputs], Call]:
    """An implementation of moe_experts behind W + c B A."""

    def made(case: Case, inputs: Inputs) -> Call:
        call = make(case, inputs)
        return lambda inputs: call(_whole(inputs))

    return made


def _ours_formed(case: Case, inputs: Inputs) -> Call:
    def call(inputs: Inputs) -> Outputs:
        names = ("hidden", "indices", "weights", "gate_up", "down")
        return {"out": r1kernels.moe_experts(*(inputs[name] for name in names))}

    return call


def _dense_gemms(case: Case, inputs: Inputs) -> Any:
    """GEMMs of the FLOPs that frozen weights leave, with one weight for all rows, and nothing between them."""
    s = case.sizes
    rows = s["T"] * s["K"]

    def ones(size: int) -> Tensor:
        return torch.ones(rows, size, device=inputs["hidden"].device, dtype=case.torch_dtype)

    x, y, both, a = ones(s["H"]), ones(s["H"]), ones(2 * s["I"]), ones(s["I"])
    gate_up, down = inputs["gate_up"].detach()[0], inputs["down"].detach()[0]
    return {
        "forward": lambda: (x @ gate_up.T, a @ down.T),
        "backward": lambda: (y @ down, both @ gate_up),
    }


OURS_LORA = Ours(
    "moe_experts",
    lambda case, inputs: (
        tuple(inputs[name] for name in ("hidden", "indices", "weights", "gate_up", "down")),
        {"lora": (*(inputs[name] for name in FACTORS), SCALE)},
    ),
    lambda found: {"out": found},
)
LORA = (
    Peer(EAGER, _formed(moe.transformers_experts("eager")), package="transformers"),
    OURS_LORA.peer(),
    OURS_LORA.peer(f"{OURS}, nothing saved", save="nothing"),
    Peer(f"{OURS}, W + BA formed", _formed(_ours_formed), kind="ours"),
    Peer("transformers, grouped_mm", _formed(moe.transformers_experts("grouped_mm")), package="transformers"),
    Peer("dense GEMMs of the same FLOPs", _dense_gemms, kind="floor"),
)
