"""The mixture-of-experts ops: inputs, exact results in float64, and everyone who computes them.

T tokens, H hidden, I intermediate size of an expert, E experts, K experts per token, R rank of a low-rank addition.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import GROUPS, GROUPS_PER_TOKEN, SCALE, Case
from .numerics import Exact, spread, wide
from .peers import EAGER, OURS, Call, Draw, Inputs, Op, Ours, Outputs, Peer, Plain, Unavailable, needs, theirs

CHECKED_EXPERTS = 16
EXPERTS_OF = "hidden,indices,weights,gate_up,down"
FACTORS = ("A up", "B up", "A down", "B down")
LORA_SCALE = 2.0


# --- inputs ---


def expert_inputs(case: Case, device: torch.device) -> Inputs:
    """Tokens, weights that keep their size, K different experts per token with weights that sum to 1."""
    s, dtype, draw = case.sizes, case.torch_dtype, Draw(device)
    scores, indices = draw.normal(s["T"], s["E"]).topk(s["K"], dim=-1)
    tensors = {
        "hidden": draw.normal(s["T"], s["H"], dtype=dtype),
        "indices": indices,
        "weights": scores.softmax(-1),
        "gate_up": draw.normal(s["E"], 2 * s["I"], s["H"], dtype=dtype).mul_(s["H"] ** -0.5),
        "down": draw.normal(s["E"], s["H"], s["I"], dtype=dtype).mul_(s["I"] ** -0.5),
    }
    above = {"out": draw.normal(s["T"], s["H"], dtype=dtype)}
    return Inputs(tensors, ("hidden", "weights", "gate_up", "down"), above)


def lora_inputs(case: Case, device: torch.device) -> Inputs:
    """Those of moe_experts, whose weights are frozen, and two factors of rank R for each of them."""
    given, s, draw = expert_inputs(case, device), case.sizes, Draw(device, 1)
    shapes = (s["R"], s["H"]), (2 * s["I"], s["R"]), (s["R"], s["I"]), (s["H"], s["R"])
    factors = {
        name: draw.normal(s["E"], *shape, dtype=case.torch_dtype).mul_(shape[1] ** -0.5)
        for name, shape in zip(FACTORS, shapes, strict=True)
    }
    return replace(given, tensors={**given.tensors, **factors}, leaves=("hidden", "weights", *FACTORS))


def route_inputs(case: Case, device: torch.device) -> Inputs:
    """Router logits, a selection bias, and a gradient for every expert, of which each call gets those it chose."""
    t, e, draw = case.sizes["T"], case.sizes["E"], Draw(device)
    tensors = {"logits": draw.normal(t, e), "bias": draw.normal(e) * 0.02}
    table = draw.normal(t, e)
    return Inputs(tensors, ("logits",), {}, lambda found: {"weights": table.gather(1, found["indices"])})


def gemm_inputs(case: Case, device: torch.device) -> Inputs:
    """Rows in the order of their experts, which have uneven shares, and weights that keep their size."""
    s, dtype, draw = case.sizes, case.torch_dtype, Draw(device)
    counts = draw.below(s["E"], s["T"]).bincount(minlength=s["E"])
    tensors = {
        "x": draw.normal(s["T"], s["H"], dtype=dtype),
        "weight": draw.normal(s["E"], s["I"], s["H"], dtype=dtype).mul_(s["H"] ** -0.5),
        "offsets": F.pad(counts.cumsum(0), (1, 0)).int(),
    }
    return Inputs(tensors, ("x", "weight"), {"out": draw.normal(s["T"], s["I"], dtype=dtype)})


def gate_inputs(case: Case, device: torch.device) -> Inputs:
    """Hidden states and the matrix of a router."""
    s, dtype, draw = case.sizes, case.torch_dtype, Draw(device)
    tensors = {
        "hidden": draw.normal(s["T"], s["H"]).to(dtype),
        "weight": (draw.normal(s["E"], s["H"]) * s["H"] ** -0.5).to(dtype),
    }
    return Inputs(tensors, ("hidden", "weight"), {"logits": draw.normal(s["T"], s["E"])})


# --- exact, in float64 ---


def expert_exact(case: Case, inputs: Inputs) -> dict[str, Exact]:
    """Expert by expert, differentiated by autograd; weight gradients of up to CHECKED_EXPERTS experts."""
    checked = spread(case.sizes["E"], CHECKED_EXPERTS, inputs["hidden"].device)
    owned = inputs.leaves[2:]  # what each expert has of its own
    out, d_hidden, d_weights = (
        torch.zeros_like(inputs[name], dtype=torch.float64) for name in ("hidden", "hidden", "weights")
    )
    kept = {name: torch.zeros_like(inputs[name][checked], dtype=torch.float64) for name in owned}
    for expert in inputs["indices"].unique().tolist():
        token, place = torch.where(inputs["indices"] == expert)
        parts = (
            inputs["hidden"][token],
            inputs["weights"][token, place],
            *(inputs[name][expert] for name in owned),
        )
        x, weight, *own = leaves = [part.detach().double().requires_grad_() for part in parts]
        gate_up, down = own if owned[0] == "gate_up" else _with_factors(inputs, expert, own)
        gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
        part = F.linear(F.silu(gate) * up, down) * weight.unsqueeze(1)
        dx, dw, *d_own = torch.autograd.grad(part, leaves, inputs.upstream["out"][token].double())
        out.index_add_(0, token, part.detach())
        d_hidden.index_add_(0, token, dx)
        d_weights[token, place] = dw
        for name, gradient in zip(owned, d_own, strict=True):
            kept[name][checked == expert] = gradient
    found = {"out": out, "d hidden": d_hidden, "d weights": d_weights}
    return {name: Exact(value) for name, value in found.items()} | {
        f"d {name}": Exact(value, checked) for name, value in kept.items()
    }


def _with_factors(inputs: Inputs, expert: int, factors: list[Tensor]) -> tuple[Tensor, Tensor]:
    a_up, b_up, a_down, b_down = factors
    gate_up, down = (inputs[name][expert].detach().double() for name in ("gate_up", "down"))
    return gate_up + LORA_SCALE * b_up @ a_up, down + LORA_SCALE * b_down @ a_down


def route_exact(case: Case, inputs: Inputs) -> dict[str, Exact]:
    """Weights as a dense (T, E), so that the order of the chosen does not matter."""
    found = {name: exact.values for name, exact in _PLAIN_ROUTE.exact(case, inputs).items()}
    return {name: Exact(value) for name, value in dense_weights(found).items()}


def dense_weights(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights (T, K) at their experts (T, E)."""
    weights = torch.zeros_like(found["d logits"], dtype=found["weights"].dtype)
    return {"weights": weights.scatter(1, found["indices"], found["weights"]), "d logits": found["d logits"]}


# --- plain PyTorch ---


def _router(case: Case) -> Callable[..., tuple[Tensor, Tensor]]:
    """The router of a case, by its layout."""
    top_k = case.sizes["K"]

    def deepseek(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        scores = logits.sigmoid()
        grouped = (scores + bias).unflatten(1, (GROUPS, -1))
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(GROUPS_PER_TOKEN, dim=-1).indices
        dropped = torch.ones_like(grouped[:, :, 0], dtype=torch.bool).scatter(1, best, False)
        indices = (
            grouped.masked_fill(dropped.unsqueeze(-1), -torch.inf).flatten(1).topk(top_k, dim=-1).indices
        )
        weights = scores.gather(1, indices)
        return weights / (weights.sum(-1, keepdim=True) + 1e-20) * SCALE, indices

    def softmax(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        weights, indices = logits.softmax(-1).topk(top_k, dim=-1)
        return (weights / weights.sum(-1, keepdim=True) if case.layout == "softmax" else weights), indices

    return softmax if case.layout else deepseek


def _wide_linear(hidden: Tensor, weight: Tensor) -> Tensor:
    return F.linear(wide(hidden), wide(weight))


def _by_expert(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    rows = x.split(offsets.diff().tolist())
    return torch.cat([F.linear(some, one) for some, one in zip(rows, weight, strict=True)])


# --- others ---


def transformers_experts(implementation: str) -> Callable[[Case, Inputs], Call]:
    """The experts module of Qwen3-MoE by one of transformers' implementations."""

    def make(case: Case, inputs: Inputs) -> Call:
        s = case.sizes
        if implementation == "batched_mm" and s["T"] * s["K"] > s["E"]:
            raise Unavailable("batched_mm copies the weights for every row: it is for decoding")
        if implementation == "sonicmoe":  # its CuTe kernels, by the door that transformers has for them
            if case.device != "cuda":
                raise Unavailable("SonicMoE (CuTe) runs on a GPU only")
            needs("kernels")
        module = needs("transformers.models.qwen3_moe.modeling_qwen3_moe", "transformers")
        config = SimpleNamespace(num_experts=s["E"], hidden_size=s["H"], moe_intermediate_size=s["I"], hidden_act="silu",
                                 _experts_implementation=implementation)  # fmt: skip
        with torch.device("meta"):
            experts = module.Qwen3MoeExperts(config)
        del experts.gate_up_proj, experts.down_proj

        def call(inputs: Inputs) -> Outputs:
            experts.gate_up_proj, experts.down_proj = inputs["gate_up"], inputs["down"]
            return {"out": experts(inputs["hidden"], inputs["indices"], inputs["weights"])}

        return call

    return make


def _transformers_route(case: Case, inputs: Inputs) -> Call:
    """The forward of a model's router without the GEMM that makes the logits: its ``F.linear`` gives them."""
    name, family = ("DeepseekV3TopkRouter", "deepseek_v3")
    if case.layout:
        name, family = ("Qwen3MoeTopKRouter", "qwen3_moe")
    module = needs(f"transformers.models.{family}.modeling_{family}", "transformers")
    original = getattr(module, name).forward
    given = SimpleNamespace(linear=lambda hidden, weight: hidden)
    seen = {**original.__globals__, "F": given}
    forward = FunctionType(original.__code__, seen, closure=original.__closure__)
    router = SimpleNamespace(
        hidden_dim=case.sizes["E"], num_experts=case.sizes["E"], top_k=case.sizes["K"], num_group=GROUPS,
        topk_group=GROUPS_PER_TOKEN, norm_topk_prob=case.layout != "softmax-plain", routed_scaling_factor=SCALE,
        weight=torch.zeros(0),
    )  # fmt: skip

    def call(inputs: Inputs) -> Outputs:
        router.e_score_correction_bias = inputs["bias"]
        _, weights, indices = forward(router, inputs["logits"])
        return {"weights": weights, "indices": indices}

    return call


def _liger(module: Any, inputs: Inputs, case: Case) -> Outputs:
    hidden, indices, weights, gate_up, down = inputs.of(EXPERTS_OF)
    return {"out": module.LigerFusedMoEFunction.apply(hidden, gate_up, down, indices.int(), weights)}


def _formed(make: Callable[[Case, Inputs], Any]) -> Callable[[Case, Inputs], Call]:
    """An implementation of moe_experts behind W + c B A, which it multiplies with."""

    def made(case: Case, inputs: Inputs) -> Call:
        experts = make(case, inputs)

        def call(inputs: Inputs) -> Outputs:
            a_up, b_up, a_down, b_down = (inputs[name] for name in FACTORS)
            gate_up = torch.baddbmm(inputs["gate_up"], b_up, a_up, alpha=LORA_SCALE)
            down = torch.baddbmm(inputs["down"], b_down, a_down, alpha=LORA_SCALE)
            found: Outputs = experts(
                replace(inputs, tensors={**inputs.tensors, "gate_up": gate_up, "down": down})
            )
            return found

        return call

    return made


def _dense_gemms(case: Case, inputs: Inputs) -> Any:
    """GEMMs of the same FLOPs with one weight for all rows, and nothing between them; frozen weights get no gradient."""
    s, device, frozen = case.sizes, inputs["hidden"].device, "R" in case.sizes
    ones = partial(torch.ones, device=device, dtype=case.torch_dtype)
    x, y, both, a = (ones(s["T"] * s["K"], size) for size in (s["H"], s["H"], 2 * s["I"], s["I"]))
    gate_up, down = inputs["gate_up"].detach()[0], inputs["down"].detach()[0]
    return {
        "forward": lambda: (x @ gate_up.T, a @ down.T),
        "backward": lambda: (y @ down, both @ gate_up, *(() if frozen else (y.T @ a, both.T @ x))),
    }


# --- who computes them ---


def _route_options(case: Case, inputs: Inputs) -> dict[str, Any]:
    if case.layout:
        return {"top_k": case.sizes["K"], "score": "softmax", "normalize": case.layout == "softmax"}
    groups = {"n_group": GROUPS, "topk_group": GROUPS_PER_TOKEN}
    return {"top_k": case.sizes["K"], "bias": inputs["bias"], "scale": SCALE, **groups}


def _lora_options(case: Case, inputs: Inputs) -> dict[str, Any]:
    return {"lora": (*(inputs[name] for name in FACTORS), LORA_SCALE)}


_EXPERTS = Ours("moe_experts", EXPERTS_OF, "out")
_LORA = Ours("moe_experts", EXPERTS_OF, "out", _lora_options)
_ROUTE = Ours("route", "logits", "weights,indices", _route_options)
_GEMM = Ours("grouped_gemm", "x,weight,offsets", "out")
_GATE = Ours("router_logits", "hidden,weight", "logits")
_PLAIN_ROUTE = Plain(_router, "logits,bias", "weights,indices")
_PLAIN_GEMM = Plain(lambda case: _by_expert, "x,weight,offsets", "out")
_PLAIN_GATE = Plain(lambda case: _wide_linear, "hidden,weight", "logits")
_DENSE = Peer("dense GEMMs of the same FLOPs", _dense_gemms, kind="floor")
EXPERTS = (
    Peer(EAGER, transformers_experts("eager"), package="transformers"),
    _EXPERTS.peer(),
    _EXPERTS.peer("nothing saved", save="nothing"),
    _EXPERTS.peer("batch-invariant", batch_invariant=True),
    Peer("transformers, grouped_mm", transformers_experts("grouped_mm"), package="transformers"),
    Peer("transformers, batched_mm", transformers_experts("batched_mm"), package="transformers"),
    Peer("transformers, SonicMoE", transformers_experts("sonicmoe"), package="kernels"),
    theirs("Liger, Triton", "liger-kernel", "liger_kernel.ops.fused_moe", _liger, gpu=True),
    _DENSE,
)
LORA = (
    Peer(EAGER, _formed(transformers_experts("eager")), package="transformers"),
    _LORA.peer(),
    _LORA.peer("nothing saved", save="nothing"),
    Peer(f"{OURS}, W + BA formed", _formed(_EXPERTS.peer().make), kind="ours", package=OURS),
    Peer("transformers, grouped_mm", _formed(transformers_experts("grouped_mm")), package="transformers"),
    _DENSE,
)
ROUTE = (
    *_PLAIN_ROUTE.around(_ROUTE.peer()),
    Peer("transformers", _transformers_route, package="transformers"),
)
GEMM = (
    _PLAIN_GEMM.peer(),
    _GEMM.peer(),
    Peer(
        "F.grouped_mm",
        lambda case, inputs: lambda x: {"out": F.grouped_mm(x["x"], x["weight"].mT, offs=x["offsets"][1:])},
    ),
)
OPS = {
    "moe_experts": Op(_EXPERTS, expert_inputs, expert_exact, EXPERTS),
    "lora_experts": Op(_LORA, lora_inputs, expert_exact, LORA),
    "route": Op(_ROUTE, route_inputs, route_exact, ROUTE, dense_weights),
    "grouped_gemm": Op(_GEMM, gemm_inputs, _PLAIN_GEMM.exact, GEMM),
    "router_logits": Op(_GATE, gate_inputs, _PLAIN_GATE.exact, _PLAIN_GATE.around(_GATE.peer())),
}
