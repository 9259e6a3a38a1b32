"""R1's own objective, at output level, with numbers worked by hand.

Two answers. The first has two tokens with probabilities 1/2 and 1/2 under the old policy and 1/2 and 3/4 now, so the
whole output is 3/2 times as likely as it was. The second has one token, 1/4 before and 1/8 now: 1/2 as likely.
"""

from __future__ import annotations

import math

import pytest
import torch

from r1kernels.grpo import grpo_loss, grpo_preset

LOGP = [[math.log(1 / 2), math.log(3 / 4)], [math.log(1 / 8), 0.0]]
OLD = [[math.log(1 / 2), math.log(1 / 2)], [math.log(1 / 4), 0.0]]
# Under the reference: 1/4 x 3/4 = 3/16, half of what the policy gives; 1/2, four times of it.
REF = [[math.log(1 / 4), math.log(3 / 4)], [math.log(1 / 2), 0.0]]
MASK = [[1, 1], [1, 0]]


def loss_of(advantages, **changes):
    logp = torch.tensor(LOGP, dtype=torch.float64, requires_grad=True)
    loss = grpo_loss(
        logp,
        torch.tensor(OLD, dtype=torch.float64),
        torch.tensor(advantages, dtype=torch.float64),
        torch.tensor(MASK),
        ref_logp=torch.tensor(REF, dtype=torch.float64),
        **{**grpo_preset("r1"), **changes},
    ).loss
    return loss.item(), torch.autograd.grad(loss, logp)[0].tolist()


def test_preset_is_the_published_setting():
    preset = grpo_preset("r1")
    assert (preset["clip_low"], preset["clip_high"], preset["kl_coef"], preset["ratio"]) == (
        10,
        10,
        0.001,
        "output",
    )


def test_loss_and_gradient():
    loss, gradient = loss_of([1.0, -1.0])
    # 1/2 [ -(3/2)(1) - (1/2)(-1) ] = -1/2, and the KL of each output: e^R - R - 1 with R = ln(1/2) and ln 4
    kl = ((1 / 2 - math.log(1 / 2) - 1) + (4 - math.log(4) - 1)) / 2
    assert loss == pytest.approx(-1 / 2 + 0.001 * kl, rel=1e-12)
    # dL/dx_t = m_t / 2 (-c A + 0.001 (1 - e^R)), the same for every token of an output
    first = (-(3 / 2) + 0.001 * (1 - 1 / 2)) / 2
    second = (1 / 2 + 0.001 * (1 - 4)) / 2
    assert gradient[0] == pytest.approx([first, first], rel=1e-12)
    assert gradient[1] == pytest.approx([second, 0.0], rel=1e-12)


def test_the_wide_clip_holds_a_rewarded_output_at_eleven():
    logp = torch.tensor([[0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[-2.0, -2.0]], dtype=torch.float64)
    keywords = {**grpo_preset("r1"), "kl_coef": 0.0, "kl": None}
    for advantage, expected, slope in ((2.0, -22.0, 0.0), (-2.0, 2 * math.exp(4), 2 * math.exp(4))):
        advantages = torch.tensor([advantage], dtype=torch.float64)
        loss = grpo_loss(logp, old, advantages, torch.ones(1, 2, dtype=torch.bool), **keywords).loss
        assert loss.item() == pytest.approx(expected, rel=1e-12)
        assert torch.autograd.grad(loss, logp)[0].tolist() == [[pytest.approx(slope)] * 2]


def test_the_ratio_of_an_output_is_bounded():
    logp = torch.tensor([[-0.5, -0.5]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[-30.0, -30.0]], dtype=torch.float64)
    keywords = {**grpo_preset("r1"), "kl_coef": 0.0, "kl": None}
    loss = grpo_loss(
        logp, old, -torch.ones(1, dtype=torch.float64), torch.ones(1, 2, dtype=torch.bool), **keywords
    ).loss
    assert loss.item() == pytest.approx(math.exp(20), rel=1e-12)
    assert torch.autograd.grad(loss, logp)[0].tolist() == [[0.0, 0.0]]
