"""Estimators of KL(policy || reference) from the log-probs of sampled tokens.

x: log-prob under the policy, r: under the reference, c: the importance ratio of the loss; d = r - x.
"""

from __future__ import annotations

import torch
from torch import Tensor

ESTIMATORS = ("k1", "abs", "k2", "k3", "k3_plus", "unbiased")


def kl_estimate(name: str, logp: Tensor, ref_logp: Tensor, ratio: Tensor) -> Tensor:
    """The estimator ``name`` for each token, differentiable in ``logp`` (and in ``ratio``, for "unbiased")."""
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
    # unbiased, dx: c (1 - e^d) + k3 dc/dx, which is exactly c (x - r) where c = e^(x - o)
    return ratio * k3
