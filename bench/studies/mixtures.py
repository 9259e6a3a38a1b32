"""Every mixture of experts of the installed transformers, as a tiny model with and without r1kernels.

A tiny model of each family takes one step with transformers' own code (eager experts) and one patched; logits and the
gradients of all parameters are compared, and what ``explain`` finds is kept.
"""

import importlib
import inspect
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from r1kernels.integrations import transformers as integration
from r1kernels.integrations.transformers_experts import computed_by
from r1kernels.integrations.transformers_match import Match
from r1kernels.integrations.transformers_routers import Block, find_blocks

from ..table import Cell, Table

DECORATOR = "@use_experts_implementation"
# Mixtures whose experts do not go through transformers' experts interface.
OUTSIDE = {
    "dbrx": "its router returns logits alone, and its experts are one matrix of (E I, H) that a loop cuts up",
    "jetmoe": "its router returns the sorted rows of its own experts, in attention too",
    "llama4": "its router returns scores of all experts, every one of which computes every token, and the scores multiply the "
    "inputs of the experts, not their outputs",
    "longcat_flash": "some of its experts return the token as it is, next to a list of others",
    "step3p7": "its experts are a module of its own, with a limit in some layers",
}
TOKENS = (2, 9)
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "intermediate_size"), 32),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "top_k_experts", "moe_k", "num_hidden_layers"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **{"vocab_size": 64, "max_position_embeddings": 64, "head_dim": 8, "initializer_range": 0.3},
    **{"kv_lora_rank": 8, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8},
    **{"n_group": 2, "topk_group": 1, "first_k_dense_replace": 0},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
# What a family needs besides, or instead.
_SPARSE = {"mlp_layer_types": ["sparse", "sparse"]}
_FULL = {"layer_types": ["full_attention"] * 2}
_NO_LAYER_INPUT = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 64}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}


def _rope(sections: list[int]) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections}


OWN: dict[str, dict[str, Any]] = {
    "beam": _SPARSE,
    "deepseek_ocr2": {**_SPARSE, "n_group": 2, "topk_group": 1},
    "diffusion_gemma": {**_FULL, "global_head_dim": 8},
    "ernie4_5_vl_moe": {"moe_intermediate_size": [24, 24], "rope_parameters": _rope([1, 1, 2])},
    "flint": {"mlp_only_layers": []},
    "gemma4": {**_FULL, "enable_moe_block": True, "global_head_dim": 8, **_NO_LAYER_INPUT},
    "glm4v_moe": {"rope_parameters": _rope([1, 1, 0])},
    "glm5_next": {**_SPARSE, "qk_rope_head_dim": 0, "head_dim": 0},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_state": 8, "mamba_chunk_size": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": _LINEAR,
    "lfm2_moe": {**_FULL, "num_dense_layers": 0},
    "mimo_v2_flash": _FULL,
    "qwen3_next": _LINEAR,
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}


def files() -> dict[str, str]:
    """The families of transformers whose experts go through its experts interface: name -> module."""
    folder = Path(transformers.__file__).parent / "models"
    return {
        path.parent.name: f"transformers.models.{path.parent.name}.{path.stem}"
        for path in sorted(folder.glob("*/modeling_*.py"))
        if f"\n{DECORATOR}" in path.read_text(encoding="utf-8")
    }


def model_class(family: str) -> Any:
    """The model of a family that has experts and the fewest other parts: without images and sound where there is one."""
    module = importlib.import_module(files()[family])
    models: list[Any] = [
        one
        for name, one in vars(module).items()
        if inspect.isclass(one)
        and issubclass(one, transformers.PreTrainedModel)
        and one.__module__ == module.__name__
        and getattr(one, "config_class", None) is not None
        and not any(word in name for word in ("Vision", "Audio", "PreTrained"))
    ]
    endings = ("ForCausalLM", "ForTokenClassification", "TextModel", "ForConditionalGeneration", "Model")

    def rank(one: Any) -> tuple[bool, int]:
        place = next((n for n, end in enumerate(endings) if one.__name__.endswith(end)), len(endings))
        return bool(getattr(one.config_class, "sub_configs", None)), place

    return min((one for one in models if rank(one)[1] < len(endings)), key=rank)


def tiny_config(family: str) -> Any:
    """Its config in small."""
    config_class = model_class(family).config_class
    known = set(getattr(config_class, "attribute_map", None) or {})
    for one in config_class.__mro__:
        known |= {*getattr(one, "__annotations__", {}), *inspect.signature(one.__init__).parameters}
    return config_class(
        **{name: value for name, value in SIZES.items() if name in known} | OWN.get(family, {})
    )


def build(family: str) -> Any:
    """A tiny model of random weights in float32, in evaluation mode: some draw random numbers in training."""
    torch.manual_seed(0)
    model = model_class(family)(tiny_config(family)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for block in find_blocks(model):
            # biases, scales and tables of zeros, as models begin with, tell nothing
            module = model.get_submodule(block.name)
            for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                if name.endswith(("bias", "scale")):
                    tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
                elif not tensor.is_floating_point() and tensor.ndim == 2:
                    order = torch.rand(len(tensor), block.experts.num_experts, generator=generator).argsort()
                    tensor.copy_(order[:, : tensor.shape[1]])
    return model


def step(model: Any, seed: int = 2) -> tuple[Tensor, dict[str, Tensor]]:
    """The first output for random tokens, and the gradients of a random sum of it."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, SIZES["vocab_size"], TOKENS, generator=generator)
    model.zero_grad()
    out = model(input_ids=ids, use_cache=False)
    logits = out.logits if hasattr(out, "logits") else out.last_hidden_state
    (logits * torch.randn(logits.shape, generator=generator)).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), gradients


def compare(family: str) -> dict[str, Any]:
    """What r1kernels serves of a family, and how far logits and gradients are from transformers' own."""
    model = build(family)
    block = find_blocks(model)[-1]
    model.set_experts_implementation("eager")
    logits, gradients = step(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with integration.patch(model):
            ours, our_gradients = step(model)
    served = [name for name in _served_parameters(block) if name in gradients]
    return {
        "family": family,
        "model": type(model).__name__,
        "router": type(block.router).__name__ if block.router is not None else "",
        "routes": isinstance(block.match, Match),
        "route": str(block.match),
        "experts": type(block.experts).__name__,
        "computed": computed_by(block.experts),
        "logits": _difference(ours, logits),
        "gradients": max(_difference(our_gradients[name], grad) for name, grad in gradients.items()),
        "same_parameters": gradients.keys() == our_gradients.keys(),
        "reached": all(bool(gradients[name].any()) for name in served),  # or the comparison would say nothing
    }


def _served_parameters(block: Block) -> list[str]:
    """The parameters of the experts, and of the router where it is served, by their names in the model."""
    modules = {block.experts_name: block.experts}
    if isinstance(block.match, Match):
        modules[block.router_name] = block.router
    names = ((prefix, name) for prefix, module in modules.items() for name, _ in module.named_parameters())
    return [f"{block.name}.{prefix}.{name}" for prefix, name in names]


def _difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-6))


def measure(only: Sequence[str] = ()) -> dict[str, Any]:
    """What ``compare`` finds for all families, or for those named."""
    return {"families": [compare(family) for family in only or files()]}


def agrees(row: dict[str, Any]) -> bool:
    """Whether the patched model gives the logits and gradients of transformers' own code, in float32."""
    return row["logits"] < 1e-4 and row["gradients"] < 1e-3 and row["same_parameters"] and row["reached"]


def tables(found: dict[str, Any]) -> list[Table]:
    """A row for each family: what serves it and why not."""
    rows = found["families"]
    fused, products = (
        sum(row["computed"].startswith(op) for row in rows) for op in ("moe_experts", "grouped_gemm")
    )
    note = (
        f"transformers {found['environment']['packages']['transformers']}: of {len(rows)} families, `route` serves the routers of "
        f"{sum(row['routes'] for row in rows)}; `moe_experts` computes the experts of {fused} and `grouped_gemm` those of {products}."
    )
    shown = Table("Mixtures", ("family", "its router", "its experts", "same logits and gradients"), note=note)
    for row in rows:
        router = row["route"] if row["routes"] else f"transformers: {row['route']}"
        same = "yes" if agrees(row) else Cell("NO", "failed")
        shown.rows.append([row["family"], router, row["computed"], same])
    shown.rows += [(family, f"not patched: {why}", "", "") for family, why in OUTSIDE.items()]
    return [shown]
