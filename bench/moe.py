"""The mixture-of-experts ops: inputs, exact results in float64, and everyone who computes them.

T tokens, H hidden, I intermediate size of an expert, E experts, K experts per token, S = T * K routed rows.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import GROUPS, GROUPS_PER_TOKEN, SCALE, Case
from .logprob import spread
from .numerics import Exact
from .peers import (
    COMPILED,
    EAGER,
    OURS,
    Call,
    Inputs,
    Ours,
    Outputs,
    Peer,
    Unavailable,
    compiled,
    needs,
    only_on_cuda,
)

CHECKED_EXPERTS = 16


# --- inputs ---


def expert_inputs(case: Case, device: torch.device) -> Inputs:
    """Tokens, weights that keep their size, K different experts a token with weights that sum to 1."""
    s, dtype = case.sizes, case.torch_dtype
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    scores, indices = normal(s["T"], s["E"], dtype=torch.float32).topk(s["K"], dim=-1)
    tensors = {
        "hidden": normal(s["T"], s["H"]),
        "indices": indices,
        "weights": scores.softmax(-1),
        "gate_up": normal(s["E"], 2 * s["I"], s["H"]).mul_(s["H"] ** -0.5),
        "down": normal(s["E"], s["H"], s["I"]).mul_(s["I"] ** -0.5),
    }
    return Inputs(tensors, ("hidden", "weights", "gate_up", "down"), {"out": normal(s["T"], s["H"])})


def route_inputs(case: Case, device: torch.device) -> Inputs:
    """Router logits, a selection bias, and a gradient for every expert, of which each call gets those it chose."""
    s = case.sizes
    generator = torch.Generator(device).manual_seed(0)
    normal = torch.randn(2, s["T"], s["E"], generator=generator, device=device)
    bias = torch.randn(s["E"], generator=generator, device=device) * 0.02
    table = normal[1].clone()
    return Inputs(
        {"logits": normal[0].clone(), "bias": bias},
        ("logits",),
        {},
        lambda outputs: {"weights": table.gather(1, outputs["indices"])},
    )


# --- exact, in float64 ---


def expert_exact(case: Case, inputs: Inputs) -> dict[str, Exact]:
    """Expert by expert, differentiated by autograd; weight gradients of up to CHECKED_EXPERTS experts."""
    upstream = inputs.upstream["out"]
    hidden, weights = inputs["hidden"].detach(), inputs["weights"].detach()
    checked = spread(case.sizes["E"], CHECKED_EXPERTS, hidden.device)
    chosen = {int(expert): position for position, expert in enumerate(checked)}
    out, d_hidden = (
        torch.zeros_like(hidden, dtype=torch.float64),
        torch.zeros_like(hidden, dtype=torch.float64),
    )
    d_weights = torch.zeros_like(weights, dtype=torch.float64)
    shapes = (inputs["gate_up"].shape[1:], inputs["down"].shape[1:])
    kept = [torch.zeros(len(checked), *shape, dtype=torch.float64, device=hidden.device) for shape in shapes]
    for expert in inputs["indices"].unique().tolist():
        token, place = torch.where(inputs["indices"] == expert)
        leaves = [
            value.detach().double().requires_grad_()
            for value in (
                hidden[token],
                weights[token, place],
                inputs["gate_up"][expert],
                inputs["down"][expert],
            )
        ]
        x, weight, gate_up, down = leaves
        gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
        found = F.linear(F.silu(gate) * up, down) * weight.unsqueeze(1)
        gradients = torch.autograd.grad(found, leaves, upstream[token].double())
        out.index_add_(0, token, found.detach())
        d_hidden.index_add_(0, token, gradients[0])
        d_weights[token, place] = gradients[1]
        if expert in chosen:
            kept[0][chosen[expert]], kept[1][chosen[expert]] = gradients[2:]
    return {
        "out": Exact(out),
        "d hidden": Exact(d_hidden),
        "d weights": Exact(d_weights),
        "d gate_up": Exact(kept[0], checked),
        "d down": Exact(kept[1], checked),
    }


def route_exact(case: Case, inputs: Inputs) -> dict[str, Exact]:
    """The router in float64; weights as a dense (T, E), so that the order of the chosen does not matter."""
    logits = inputs["logits"].detach().double().requires_grad_()
    weights, indices = _router(case)(logits, inputs["bias"].double(), case.sizes["K"])
    assert inputs.upstream_of is not None
    above = inputs.upstream_of({"indices": indices})["weights"]
    (gradient,) = torch.autograd.grad(weights, logits, above.double())
    dense = dense_weights({"weights": weights, "indices": indices, "d logits": gradient})
    return {name: Exact(value.detach()) for name, value in dense.items()}


def dense_weights(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights (T, K) at their experts (T, E)."""
    gradient = found["d logits"]
    weights = torch.zeros_like(gradient, dtype=found["weights"].dtype)
    return {"weights": weights.scatter(1, found["indices"], found["weights"]), "d logits": gradient}


# --- plain PyTorch ---


def _route(logits: Tensor, bias: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    scores = logits.sigmoid()
    selection = scores + bias
    grouped = selection.unflatten(1, (GROUPS, -1))
    best = grouped.topk(2, dim=-1).values.sum(-1).topk(GROUPS_PER_TOKEN, dim=-1).indices
    dropped = torch.ones_like(grouped[:, :, 0], dtype=torch.bool).scatter(1, best, False)
    indices = grouped.masked_fill(dropped.unsqueeze(-1), -torch.inf).flatten(1).topk(top_k, dim=-1).indices
    weights = scores.gather(1, indices)
    return weights / (weights.sum(-1, keepdim=True) + 1e-20) * SCALE, indices


def _softmax(logits: Tensor, bias: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    weights, indices = _softmax_plain(logits, bias, top_k)
    return weights / weights.sum(-1, keepdim=True), indices


def _softmax_plain(logits: Tensor, bias: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    weights, indices = logits.softmax(-1).topk(top_k, dim=-1)
    return weights, indices


def _router(case: Case) -> Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]:
    """The router of a case, by its layout."""
    return {"": _route, "softmax": _softmax, "softmax-plain": _softmax_plain}[case.layout]


def _same(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _torch_route(case: Case, wrap: Callable[..., Any]) -> Call:
    function = wrap(_router(case))

    def call(inputs: Inputs) -> Outputs:
        weights, indices = function(inputs["logits"], inputs["bias"], case.sizes["K"])
        return {"weights": weights, "indices": indices}

    return call


# --- ours ---


OURS_EXPERTS = Ours(
    "moe_experts",
    lambda case, inputs: (
        tuple(inputs[name] for name in ("hidden", "indices", "weights", "gate_up", "down")),
        {},
    ),
    lambda found: {"out": found},
)


def _route_arguments(case: Case, inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    options = {"bias": inputs["bias"], "n_group": GROUPS, "topk_group": GROUPS_PER_TOKEN, "scale": SCALE}
    if case.layout:
        options = {"score": "softmax", "normalize": case.layout == "softmax"}
    return (inputs["logits"], case.sizes["K"]), options


OURS_ROUTE = Ours(
    "route",
    _route_arguments,
    lambda found: {"weights": found.weights, "indices": found.indices},
)


# --- others ---


def transformers_experts(implementation: str) -> Callable[[Case, Inputs], Call]:
    """The experts module of Qwen3-MoE by one of transformers' implementations."""

    def make(case: Case, inputs: Inputs) -> Call:
        module = needs("transformers.models.qwen3_moe.modeling_qwen3_moe", "transformers")
        config = SimpleNamespace(
            num_experts=case.sizes["E"],
            hidden_size=case.sizes["H"],
            moe_intermediate_size=case.sizes["I"],
            hidden_act="silu",
            _experts_implementation=implementation,
        )
        with torch.device("meta"):
            experts = module.Qwen3MoeExperts(config)
        del experts.gate_up_proj, experts.down_proj

        def call(inputs: Inputs) -> Outputs:
            experts.gate_up_proj, experts.down_proj = inputs["gate_up"], inputs["down"]
            return {"out": experts(inputs["hidden"], inputs["indices"], inputs["weights"])}

        return call

    return make


def _batched_mm(case: Case, inputs: Inputs) -> Call:
    if case.sizes["T"] * case.sizes["K"] > case.sizes["E"]:
        raise Unavailable("batched_mm copies the weights for every row: it is for decoding")
    return transformers_experts("batched_mm")(case, inputs)


def _sonic(case: Case, inputs: Inputs) -> Call:
    """SonicMoE's CuTe kernels, by the door that transformers has for them."""
    only_on_cuda(case, "SonicMoE (CuTe)")
    needs("kernels")
    return transformers_experts("sonicmoe")(case, inputs)


def _transformers_route(case: Case, inputs: Inputs) -> Call:
    """The forward of a model's router without the GEMM that makes the logits: its ``F.linear`` gives them."""
    if case.layout:
        module = needs("transformers.models.qwen3_moe.modeling_qwen3_moe", "transformers")
        original = module.Qwen3MoeTopKRouter.forward
    else:
        module = needs("transformers.models.deepseek_v3.modeling_deepseek_v3", "transformers")
        original = module.DeepseekV3TopkRouter.forward
    given = SimpleNamespace(linear=lambda hidden, weight: hidden)
    forward = FunctionType(
        original.__code__, {**original.__globals__, "F": given}, closure=original.__closure__
    )
    router = SimpleNamespace(
        hidden_dim=case.sizes["E"],
        num_experts=case.sizes["E"],
        top_k=case.sizes["K"],
        num_group=GROUPS,
        topk_group=GROUPS_PER_TOKEN,
        norm_topk_prob=case.layout != "softmax-plain",
        routed_scaling_factor=SCALE,
        weight=torch.zeros(0),
    )

    def call(inputs: Inputs) -> Outputs:
        router.e_score_correction_bias = inputs["bias"]
        _, weights, indices = forward(router, inputs["logits"])
        return {"weights": weights, "indices": indices}

    return call


def _liger_experts(case: Case, inputs: Inputs) -> Call:
    only_on_cuda(case, "Liger's fused MoE (Triton)")
    function = needs("liger_kernel.ops.fused_moe", "liger-kernel").LigerFusedMoEFunction

    def call(inputs: Inputs) -> Outputs:
        indices = inputs["indices"].int()
        arguments = (inputs["hidden"], inputs["gate_up"], inputs["down"], indices, inputs["weights"])
        return {"out": function.apply(*arguments)}

    return call


def _dense_gemms(case: Case, inputs: Inputs) -> Any:
    """GEMMs of the same FLOPs with one weight for all rows, and nothing between them."""
    s = case.sizes
    device, dtype = inputs["hidden"].device, case.torch_dtype
    rows = s["T"] * s["K"]
    x, y = (torch.ones(rows, s["H"], device=device, dtype=dtype) for _ in range(2))
    both, a = (torch.ones(rows, size, device=device, dtype=dtype) for size in (2 * s["I"], s["I"]))
    gate_up, down = inputs["gate_up"].detach()[0], inputs["down"].detach()[0]

    def forward() -> object:
        return x @ gate_up.T, a @ down.T

    def backward() -> object:
        return y @ down, y.T @ a, both @ gate_up, both.T @ x

    return {"forward": forward, "backward": backward}


EXPERTS = (
    Peer(EAGER, transformers_experts("eager"), package="transformers"),
    OURS_EXPERTS.peer(),
    OURS_EXPERTS.peer(f"{OURS}, nothing saved", save="nothing"),
    OURS_EXPERTS.peer(f"{OURS}, batch-invariant", batch_invariant=True),
    Peer("transformers, grouped_mm", transformers_experts("grouped_mm"), package="transformers"),
    Peer("transformers, batched_mm", _batched_mm, package="transformers"),
    Peer("transformers, SonicMoE", _sonic, package="kernels"),
    Peer("Liger, Triton", _liger_experts, package="liger-kernel"),
    Peer("dense GEMMs of the same FLOPs", _dense_gemms, kind="floor"),
)
ROUTE = (
    Peer(EAGER, lambda case, inputs: _torch_route(case, _same)),
    OURS_ROUTE.peer(),
    Peer(COMPILED, lambda case, inputs: _torch_route(case, compiled), compiles=True),
    Peer("transformers", _transformers_route, package="transformers"),
)
