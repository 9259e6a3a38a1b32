"""r1kernels under a transformers mixture-of-experts model: the same numbers, and what RL on such a model needs.

Run it with `python docs/examples/moe_dropin.py`. The model is tiny and random; nothing is downloaded.
"""

from __future__ import annotations

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from r1kernels.integrations import transformers as r1

torch.manual_seed(0)
config = DeepseekV3Config(
    vocab_size=100, hidden_size=64, intermediate_size=96, moe_intermediate_size=32,
    num_hidden_layers=3, first_k_dense_replace=1, num_attention_heads=4, num_key_value_heads=4,
    kv_lora_rank=16, q_lora_rank=None, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
    n_routed_experts=8, num_experts_per_tok=2, n_group=4, topk_group=2, initializer_range=0.1,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
model = DeepseekV3ForCausalLM(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
prompts = torch.randint(3, 100, (4, 8))

# 1. One line: the router and the experts run on r1kernels, and the logits stay what they were.
before = model(prompts).logits
patch = r1.patch(model)
after = model(prompts).logits
print(f"largest difference of the logits: {(after - before).abs().max():.1e}")

# 2. A rollout, with the experts that every token went through.
with r1.record_routing(model) as record:
    sequences = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=True, min_new_tokens=8, max_new_tokens=8
    )
mask = torch.ones_like(sequences)
routing = r1.pad_routing(record.sequences(mask), mask)

# 3. Training steps that replay these experts, count their load and move the selection bias towards an even one.
for _ in range(3):
    with r1.replay_routing(model, routing) as replay, r1.collect_load(model, attention_mask=mask) as load:
        loss = model(input_ids=sequences, attention_mask=mask, labels=sequences).loss
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    r1.update_bias(model, load, rate=1e-3)
    print(
        f"loss {loss.item():.3f}, agreement of the live router with the rollout {replay.agreement:.1%}, "
        f"load of the busiest expert {load.max_over_mean().mean():.2f} times the mean"
    )

# 4. Back to transformers' own code.
patch.undo()
