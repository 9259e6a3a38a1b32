"""Replace an eager GRPO loss by r1kernels.grpo_loss: the same loss and gradient, with metrics and without host syncs.

Run it: ``python docs/examples/grpo_dropin.py``. It builds a small batch of log-probs, computes the loss both ways and
prints the difference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1kernels.grpo import group_advantages, grpo_loss


def eager_loss(logp: Tensor, old: Tensor, ref: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """What a training script usually holds: clipped ratios, k3, mean over tokens and then over answers."""
    ratio = torch.exp(logp - old)
    gain = torch.min(ratio * advantages[:, None], ratio.clamp(0.8, 1.2) * advantages[:, None])
    kl = torch.exp(ref - logp) - (ref - logp) - 1
    per_token = (-gain + 0.04 * kl) * mask
    return (per_token.sum(1) / mask.sum(1).clamp(min=1)).mean()


def main() -> float:
    torch.manual_seed(0)
    questions, answers, tokens = 4, 8, 256
    shape = (questions * answers, tokens)
    old = -torch.rand(shape) * 3
    logp = (old + 0.1 * torch.randn(shape)).requires_grad_()
    ref = old + 0.1 * torch.randn(shape)
    lengths = torch.randint(tokens // 4, tokens + 1, (shape[0], 1))
    mask = torch.arange(tokens) < lengths
    rewards = (torch.rand(shape[0]) > 0.5).float()

    advantages = group_advantages(rewards, group_size=answers)
    before = eager_loss(logp, old, ref, advantages, mask)
    (gradient_before,) = torch.autograd.grad(before, logp)

    # The drop-in: one call, and the metrics come with it.
    after, metrics = grpo_loss(logp, old, advantages, mask, ref_logp=ref, kl_coef=0.04)
    (gradient_after,) = torch.autograd.grad(after, logp)

    difference = max(abs(after - before).item(), (gradient_after - gradient_before).abs().max().item())
    print(f"eager loss         {before.item():+.8f}")
    print(f"r1kernels loss     {after.item():+.8f}")
    print(f"largest difference {difference:.2e} (loss and gradient)")
    for name, value in metrics.floats().items():
        print(f"  {name:<24} {value:.6f}")
    return difference


if __name__ == "__main__":
    main()
