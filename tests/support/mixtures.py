"""Tiny mixtures of experts of transformers, and one training step of them."""

from __future__ import annotations

import torch
import transformers
from torch import nn

VOCABULARY = 50
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {
    "kv_lora_rank": 8,
    "q_lora_rank": None,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
MODELS = {
    "DeepseekV3": {
        "n_routed_experts": 8,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        **LATENT,
    },
    "DeepseekV2": {
        "n_routed_experts": 8,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 1.5,
        "first_k_dense_replace": 0,
        **LATENT,
    },
    "DeepseekV2-greedy": {
        "n_routed_experts": 8,
        "topk_method": "greedy",
        "first_k_dense_replace": 0,
        **LATENT,
    },
    "Glm4Moe": {
        "n_routed_experts": 8,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "head_dim": 8,
    },
    "Qwen2Moe": {"num_experts": 8, "shared_expert_intermediate_size": 16, "norm_topk_prob": False},
    "Qwen3Moe": {"num_experts": 8, "norm_topk_prob": True, "head_dim": 8},
    "Mixtral": {"num_local_experts": 8, "intermediate_size": 16},  # 2 * I == H
    "Olmoe": {"num_experts": 8, "norm_topk_prob": False},
}


def build(name, **changes):
    family = name.split("-")[0]
    config_class = getattr(transformers, f"{family}Config")
    config = config_class(**{**SMALL, **MODELS[name], **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).train()
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):
            nn.init.normal_(module.e_score_correction_bias, std=0.1)
    return model


def tokens(batch=3, length=11):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


def step(model, ids, **arguments):
    """Logits and gradients of one training step."""
    model.zero_grad()
    out = model(input_ids=ids, labels=ids, **arguments)
    out.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return out, {name: None if grad is None else grad.clone() for name, grad in gradients.items()}


def assert_same_step(first, second):
    torch.testing.assert_close(first[0].logits, second[0].logits, rtol=1e-4, atol=1e-5)
    for name, grad in second[1].items():
        torch.testing.assert_close(
            first[1][name], grad, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )
