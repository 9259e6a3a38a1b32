"""Every causal language model of transformers that a tiny configuration builds."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

SMALL = {
    "vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "is_decoder": True,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "intermediate_size", "ffn_dim", "n_inner", "embedding_size",
                     "decoder_ffn_dim", "encoder_ffn_dim", "word_embed_proj_dim", "attention_hidden_size", "lru_width"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "decoder_layers", "num_decoder_layers", "num_heads",
                     "num_attention_heads", "n_head", "num_key_value_heads", "decoder_attention_heads",
                     "encoder_attention_heads", "num_experts_per_tok", "num_global_key_value_heads", "top_k_experts",
                     "linear_num_value_heads", "linear_num_key_heads", "index_n_heads"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 64),
    **dict.fromkeys(("head_dim", "v_head_dim", "head_size", "global_head_dim", "linear_key_head_dim", "linear_value_head_dim",
                     "index_head_dim", "mamba_d_head", "mamba_head_dim", "sliding_window", "attention_window_size",
                     "shared_expert_intermediate_size", "chunk_size", "mamba_chunk_size"), 16),
    **dict.fromkeys(("moe_intermediate_size", "kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim",
                     "rotary_dim", "state_size", "ssm_state_size", "mamba_d_state", "index_topk",
                     "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("n_routed_experts", "num_experts", "num_local_experts", "mamba_n_heads", "mamba_num_heads",
                     "time_step_rank", "conv_kernel"), 4),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "encoder_layers", "n_groups",
                     "mamba_n_groups"), 1),
    **dict.fromkeys(("expand", "mamba_expand"), 2),
    "mamba_d_ssm": 64, "vocab_size_per_layer_input": 61, "num_kv_shared_layers": 0, "enable_moe_block": False,
}  # fmt: skip
# what a model needs besides; None: its own default
BESIDES = {
    "big_bird": {"attention_type": "original_full"},
    "codegen": {"n_head": 4, "n_embd": 64},
    "deepseek_v3": {"head_dim": None},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"ffn_hidden_size": 32, "expert_ffn_hidden_size": 8},
    "mamba2": {"num_heads": 4},
    "reformer": {"axial_pos_embds_dim": (16, 16), "axial_pos_shape": (8, 8)},
    "xlm": {"n_words": 61, "emb_dim": 32, "n_layers": 2, "n_heads": 2},
}
TOO_LARGE = {"blt": "it has five models in it", "phi4_multimodal": "it has encoders of images and speech"}
LARGEST = 60_000_000


def build(name: str, model_class: type):
    """The model with random weights; an exception where no tiny one can be built."""
    if name in TOO_LARGE:
        raise ValueError(TOO_LARGE[name])
    config_class = model_class.config_class
    known = inspect.signature(config_class).parameters
    options = {**SMALL, **BESIDES.get(name, {})}
    config = config_class(
        **{key: value for key, value in options.items() if key in known and value is not None}
    )
    with torch.device("meta"):
        parameters = sum(one.numel() for one in model_class(config).parameters())
    if parameters > LARGEST:
        raise ValueError(f"{parameters} parameters")
    torch.manual_seed(0)
    return model_class(config).eval()


def classes() -> Iterator[tuple[str, type]]:
    """(model type, class) of all of them."""
    for config_class, found in MODEL_FOR_CAUSAL_LM_MAPPING.items():
        for model_class in found if isinstance(found, tuple) else (found,):
            yield config_class.model_type, model_class


def sweep(outcome: Callable[[str, type], tuple[str, str]]) -> tuple[dict[str, list[str]], str]:
    """``outcome(model type, class)``, (what, details), of all of them: names of classes by what, and a table to print."""
    found = {model_class.__name__: outcome(name, model_class) for name, model_class in classes()}
    names: dict[str, list[str]] = {"refused": [], "wrong": [], "served": []}
    for name, (what, _) in found.items():
        names.setdefault(what, []).append(name)
    return names, "\n".join(f"{name:45} {what:10} {details[:160]}" for name, (what, details) in found.items())
