"""Tiny models of transformers for shared prefixes, sequences that share tokens, and the repeated form of their log-probs."""

from __future__ import annotations

import random

import torch
import transformers

VOCABULARY = 61
TEMPERATURE = 1.3
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "initializer_range": 0.3,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
LATENT = {"kv_lora_rank": 8, "q_lora_rank": None, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
          "moe_intermediate_size": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
          "n_shared_experts": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4, "head_dim": 4}  # fmt: skip
WINDOW = {"sliding_window": 8}  # shorter than most sequences
MIXED = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
MODELS = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {},
    "Mistral": WINDOW,
    "Gemma2": {**MIXED, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "Gemma3": MIXED,
    "GptOss": {**MIXED, **EXPERTS, "num_local_experts": 4},
    "Mixtral": {**EXPERTS, "num_local_experts": 4},
    "Qwen3Moe": {**EXPERTS, "num_experts": 4},
    "DeepseekV3": LATENT,  # heads of values are smaller than those of keys
    "Phi3": WINDOW,
    "GPTNeoX": {},  # LayerNorm, which float64 models compute in float64
}
CONFIGS = {"Gemma3": "Gemma3TextConfig", "Llama4": "Llama4TextConfig"}
EAGER = ("Gemma2", "GptOss")  # transformers gives these no other attention


def build(name: str, dtype: torch.dtype = torch.float32, **options: object):
    config_class = getattr(transformers, CONFIGS.get(name, f"{name}Config"))
    config = config_class(**{**SMALL, **MODELS.get(name, {}), **options})
    config._attn_implementation = "eager" if name in EAGER else "sdpa"
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    if dtype == torch.float64 and hasattr(config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")  # the only experts in float64
    return model.to(dtype)


def sequences(seed: int = 0) -> tuple[list[list[int]], list[list[int]]]:
    """Ten prompts and completions: four prompts in no order, three of them with a common head, one of a single token."""
    draw = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(3, VOCABULARY) for _ in range(count)]

    head = tokens(16)
    prompts = [head + tokens(20), head + tokens(7), head + tokens(70), tokens(1)]
    chosen = [prompts[index] for index in (0, 1, 2, 0, 3, 2, 1, 0, 3, 0)]
    return chosen, [tokens(draw.choice([1, 3, 9, 17])) for _ in chosen]


def repeated(
    model, prompts, completions, temperature: float = TEMPERATURE
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probs, entropies) (B, R) in float64, from the logits of transformers' own forward of each sequence alone."""
    rows = []
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([prompt + completion], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].double() / temperature
        logp = logits.log_softmax(-1)
        rows.append(
            torch.stack([logp[torch.arange(len(completion)), completion], -(logp.exp() * logp).sum(-1)], 1)
        )
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return padded[..., 0], padded[..., 1]


def gradients(model, *outputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradient of every parameter for one upstream gradient of the outputs, the same for the same shapes."""
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out) * out).sum()
        for out in outputs
    )
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, over the whole tensor."""
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))
