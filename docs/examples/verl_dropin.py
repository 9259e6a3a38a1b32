"""What verl calls once r1kernels.integrations.verl is in place, beside the formulas that it computes without it.

Run it: ``python docs/examples/verl_dropin.py``. It needs no verl: it calls the replacements as verl's workers do. In a
worker, ``patch()`` and ``register_policy_losses()`` put them there (shown at the end; without verl that says so).
"""

from __future__ import annotations

from types import SimpleNamespace

import torch

from r1kernels.integrations import verl as r1


def main() -> float:
    torch.manual_seed(0)
    responses, tokens, hidden_size, vocabulary = 4, 16, 32, 128
    hidden = torch.randn(responses, tokens, hidden_size)
    weight = torch.randn(vocabulary, hidden_size) * 0.2
    labels = torch.randint(vocabulary, (responses, tokens))

    # verl.utils.kernel.linear_cross_entropy(hidden, weight, labels, temperature, reduction)
    logp, entropy = r1.linear_cross_entropy(hidden, weight, labels, 0.8, "none")
    z = (hidden @ weight.T / 0.8).log_softmax(-1)
    eager = z.gather(-1, labels.unsqueeze(-1)).flatten()
    difference = (logp - eager).abs().max().item()
    print(f"mean log-prob {logp.mean().item():+.5f}, mean entropy {entropy.mean().item():.5f}")

    # the policy loss that loss_mode=r1kernels_vanilla names
    config = SimpleNamespace(
        clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=3.0, global_batch_info={}
    )
    x = logp.view(responses, tokens)
    old, mask = x + 0.3 * torch.randn_like(x), torch.ones_like(x, dtype=torch.bool)
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5]).unsqueeze(1).expand_as(x)
    loss, metrics = r1.policy_loss("vanilla")(old, x, advantages, mask, "token-mean", config)
    ratio = (x - old).exp()
    worse = torch.max(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.28))
    eager_loss = torch.where(advantages < 0, torch.min(worse, -3.0 * advantages), worse).mean()
    difference = max(difference, abs(loss - eager_loss).item())
    print(f"loss {loss.item():+.6f} (eager {eager_loss.item():+.6f})", metrics)
    print(f"largest difference {difference:.2e}")

    try:
        with r1.patch():
            print("in verl:", *r1.register_policy_losses())
    except ImportError as error:
        print(f"verl is not installed here: {error}")
    return difference


if __name__ == "__main__":
    main()
