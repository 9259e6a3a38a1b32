"""Replace a model's logits and log_softmax by r1kernels.integrations.transformers.fused_logprobs: no logits in memory.

Run it: ``python docs/examples/fused_logprobs_dropin.py``. It builds a tiny Gemma 2 with random weights (tied head, soft
cap), computes the log-probs of a response both ways and prints the difference.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM

from r1kernels.integrations.transformers import fused_logprobs


def eager_logprobs(model: Gemma2ForCausalLM, ids: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """What a training script usually holds: all logits, log_softmax, gather."""
    logits = model(input_ids=ids).logits[:, :-1].float() / temperature
    targets = labels[:, 1:]
    chosen = logits.log_softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return chosen * (targets != -100)


def main() -> float:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=512, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, final_logit_softcapping=5.0, pad_token_id=0,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    ids = torch.randint(1, 512, (2, 24))
    labels = ids.clone()
    labels[:, :8] = -100  # the prompt

    before = eager_logprobs(model, ids, labels, temperature=0.9)
    after = fused_logprobs(model, ids, labels=labels, temperature=0.9)  # the drop-in
    (gradient_before,) = torch.autograd.grad(before.sum(), model.lm_head.weight)
    (gradient_after,) = torch.autograd.grad(after.sum(), model.lm_head.weight)

    difference = max(
        (after - before).abs().max().item(), (gradient_after - gradient_before).abs().max().item()
    )
    print(f"eager, mean log-prob      {before.sum().item() / (labels[:, 1:] != -100).sum().item():+.6f}")
    print(f"r1kernels, mean log-prob  {after.sum().item() / (labels[:, 1:] != -100).sum().item():+.6f}")
    print(f"largest difference {difference:.2e} (log-probs and the gradient of the head)")
    return difference


if __name__ == "__main__":
    main()
