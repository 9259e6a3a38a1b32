"""Replace the log-prob code of an RL trainer by one call, and see that nothing changes but the memory and the error.

python docs/examples/logprob_dropin.py
"""

import torch

import r1kernels


def eager(hidden, weight, targets, temperature):
    """What most trainers do: all logits, all log-probs, a gather, and the entropy by the textbook formula."""
    logp = torch.log_softmax(hidden @ weight.T / temperature, dim=-1)
    return logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1), -(logp.exp() * logp).sum(-1)


def ours(hidden, weight, targets, temperature):
    """The drop-in: never all logits at once, any temperature, exact for leading logits."""
    return r1kernels.linear_logprobs(hidden, weight, targets, temperature=temperature, return_entropy=True)


def main() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(256, 64, requires_grad=True)
    weight = torch.randn(4096, 64, requires_grad=True)
    targets = torch.randint(0, 4096, (256,))
    exact = eager(hidden.double(), weight.double(), targets, 0.9)
    for function in (eager, ours):
        logp, entropy = function(hidden, weight, targets, 0.9)
        gradients = torch.autograd.grad(logp.mean() + 0.01 * entropy.mean(), (hidden, weight))
        pairs = zip((logp, entropy), exact, strict=True)
        error = max((mine - truth).abs().max().item() for mine, truth in pairs)
        norms = ", ".join(f"{gradient.norm().item():.6f}" for gradient in gradients)
        print(f"{function.__name__:>5}: largest error {error:.1e}, gradient norms of hidden and head {norms}")
    print()
    print(r1kernels.explain(r1kernels.linear_logprobs, hidden, weight, targets))


if __name__ == "__main__":
    main()
