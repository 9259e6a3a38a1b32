"""Estimators of KL(policy || reference) from the log-probs of sampled tokens.

x: log-prob under the policy, r: under the reference, o: under the policy that made the sample; c: the importance ratio of the
loss; d = r - x.
"""

from __future__ import annotations

import torch
from torch import Tensor

ESTIMATORS = ("k1", "abs", "k2", "k3", "k3_plus", "unbiased")


def kl_estimate(name: str, logp: Tensor, ref_logp: Tensor, ratio: Tensor, of_token: bool) -> Tensor:
    """The estimator ``name`` for each token, differentiable in ``logp`` (and in ``ratio``, for "unbiased").

    of_token: the ratio is that of the token, c = e^(x - o), and not that of its sequence.
    """
    difference = ref_logp - logp
    if name == "k1":  # dx: 1
        return -difference
    if name == "abs":  # dx: sign(x - r)
        return difference.abs()
    if name == "k2":  # dx: x - r
        return difference.square() / 2
    # k3 = e^d - d - 1, dx: 1 - e^d; expm1 keeps the digits that e^d - 1 loses for small d
    k3 = torch.expm1(difference) - difference
    if name == "k3":
        return k3
    if name == "k3_plus":  # the value of k3 with the gradient of k2
        k2 = difference.square() / 2
        return k3.detach() + (k2 - k2.detach())
    # unbiased, dx: c (1 - e^d) + k3 dc/dx
    return _unbiased(difference, ratio) if of_token else ratio * k3


def _unbiased(difference: Tensor, ratio: Tensor) -> Tensor:
    """c k3 for c = e^(x - o), dx: c (x - r), without terms that cancel or overflow in the derivative."""
    overflows = ratio.isinf()
    c = torch.where(overflows, 1.0, ratio)
    far = difference > 1
    close = torch.where(far, 0.0, difference)
    # d <= 1, dx: c k3 + c (1 - e^d)
    near = c * (torch.expm1(close) - close)
    # d > 1: c e^d = e^(r - o) does not depend on x, dx: -c (1 + d) + c
    beyond = (c * difference.exp()).detach() - c * (1 + difference)
    return torch.where(overflows, ratio.detach() * difference.square() / 2, torch.where(far, beyond, near))
