"""group_advantages against the definitions, worked by hand or by the statistics module, and its edges."""

from __future__ import annotations

import math
import re
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r1kernels.grpo import group_advantages

REWARDS = [1.0, 0.0, 0.5, 0.0, 2.0, 2.5, -1.0, 0.25]


def expected(rewards, groups, valid, scale, eps):
    """The definition, group by group, in Python floats."""
    everything = [r for r, v in zip(rewards, valid, strict=True) if v]
    result = []
    for reward, group, is_valid in zip(rewards, groups, valid, strict=True):
        members = [r for r, g, v in zip(rewards, groups, valid, strict=True) if g == group and v]
        if not is_valid or len(members) < 2 or len(set(members)) == 1:
            result.append(0.0)
        elif scale == "leave_one_out":
            result.append(reward - (sum(members) - reward) / (len(members) - 1))
        else:
            deviation = {
                "group": lambda members=members: statistics.stdev(members) + eps,
                "batch": lambda: statistics.stdev(everything) + eps,
                "none": lambda: 1.0,
            }[scale]()
            result.append((reward - statistics.fmean(members)) / deviation)
    return result


def test_by_hand():
    """Rewards 1, 0, 0, 0: mean 1/4, squared deviations 9/16 + 3/16 = 3/4, unbiased variance 1/4, std 1/2."""
    advantages = group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), group_size=4, eps=0.0)
    assert advantages.tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5])
    assert advantages.dtype == torch.float32
    others = group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), group_size=4, leave_one_out=True)
    assert others.tolist() == pytest.approx([1.0, -1 / 3, -1 / 3, -1 / 3])
    pair = group_advantages(torch.tensor([3.0, 1.0]), group_size=2, eps=0.0)
    assert pair.tolist() == pytest.approx([math.sqrt(1 / 2), -math.sqrt(1 / 2)])


@settings(max_examples=60, deadline=None)
@given(
    entries=st.lists(
        st.tuples(st.sampled_from([-1.0, 0.0, 0.1, 0.5, 1.0, 7.0]), st.integers(-2, 2), st.booleans()),
        max_size=14,
    ),
    scale=st.sampled_from(["group", "batch", "none", "leave_one_out"]),
)
def test_definition(entries, scale):
    rewards, groups, valid = ([entry[i] for entry in entries] for i in range(3))
    options = {"leave_one_out": True} if scale == "leave_one_out" else {"scale": scale}
    advantages = group_advantages(
        torch.tensor(rewards, dtype=torch.float64),
        group_ids=torch.tensor(groups, dtype=torch.int64),
        valid=torch.tensor(valid, dtype=torch.bool),
        **options,
    )
    assert advantages.tolist() == pytest.approx(expected(rewards, groups, valid, scale, 1e-4), abs=1e-12)


def test_group_size_and_ids_say_the_same():
    rewards = torch.tensor(REWARDS)
    by_size = group_advantages(rewards, group_size=4)
    by_ids = group_advantages(rewards, group_ids=torch.tensor([7, 7, 7, 7, -3, -3, -3, -3]))
    assert torch.equal(by_size, by_ids)
    order = torch.tensor([5, 0, 7, 2, 1, 6, 3, 4])
    mixed = group_advantages(rewards[order], group_ids=(order // 4) * 1_000_000_007)
    torch.testing.assert_close(mixed, by_size[order])


@pytest.mark.parametrize("options", [{}, {"scale": "batch"}, {"scale": "none"}, {"leave_one_out": True}])
def test_equal_rewards_give_exactly_zero(options):
    """0.1 three times has a mean that is not 0.1 in binary; no advantage may come from that."""
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.0, 1.0, 0.0])
    assert group_advantages(rewards, group_size=3, **options)[:3].tolist() == [0.0, 0.0, 0.0]
    assert group_advantages(torch.tensor([0.1, 5.0]), group_size=1, **options).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("options", [{}, {"scale": "batch"}, {"scale": "none"}, {"leave_one_out": True}])
def test_entries_that_are_not_valid_do_not_count(options):
    nan = float("nan")
    valid = torch.tensor([True, False, True, True, False, False, True, False])
    rewards = torch.tensor([1.0, nan, 0.0, 4.0, nan, float("inf"), 3.0, nan])
    advantages = group_advantages(rewards, group_size=4, valid=valid, **options)
    assert advantages[[1, 4, 5, 6, 7]].tolist() == [0.0] * 5
    if options.get("scale") != "batch":
        alone = group_advantages(torch.tensor([1.0, 0.0, 4.0]), group_size=3, **options)
        torch.testing.assert_close(advantages[[0, 2, 3]], alone)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_dtypes(dtype):
    rewards = torch.tensor([1, 0, 0, 1, 1, 0], dtype=dtype)
    advantages = group_advantages(rewards, group_size=3)
    assert advantages.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(advantages.float(), group_advantages(rewards.float(), group_size=3))


def test_nothing_to_do():
    empty = torch.zeros(0)
    assert group_advantages(empty, group_size=4).shape == (0,)
    assert group_advantages(empty, group_ids=torch.zeros(0, dtype=torch.int64)).shape == (0,)
    none_valid = group_advantages(torch.ones(2), group_size=2, valid=torch.zeros(2, dtype=torch.bool))
    assert none_valid.tolist() == [0.0, 0.0]


def test_a_nan_that_can_not_be_checked_shows(monkeypatch):
    """On a GPU values are not read: the group of a NaN becomes NaN, the others stay what they are."""
    monkeypatch.setattr("r1kernels.checks.values_visible", lambda *tensors: False)
    advantages = group_advantages(torch.tensor([1.0, float("nan"), 0.0, 1.0]), group_size=2)
    assert advantages[:2].isnan().all()
    torch.testing.assert_close(advantages[2:], group_advantages(torch.tensor([0.0, 1.0]), group_size=2))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({}, ValueError, "group_size: expected either group_size or group_ids, got neither"),
        (
            {"group_size": 2, "group_ids": torch.zeros(8, dtype=torch.int64)},
            ValueError,
            "group_size: expected either group_size or group_ids, got both",
        ),
        ({"group_size": 3}, ValueError, "group_size: expected a divisor of the 8 rewards, got 3"),
        ({"group_size": 0}, ValueError, "group_size: expected at least 1, got 0"),
        ({"group_size": 2.0}, TypeError, "group_size: expected an int, got float"),
        (
            {"group_ids": torch.zeros(7, dtype=torch.int64)},
            ValueError,
            "group_ids: expected shape (8), got (7,)",
        ),
        ({"group_ids": torch.zeros(8)}, TypeError, "group_ids: expected dtype int64, got torch.float32"),
        (
            {"group_size": 2, "valid": torch.ones(8)},
            TypeError,
            "valid: expected dtype bool, got torch.float32",
        ),
        (
            {"group_size": 2, "scale": "std"},
            ValueError,
            "scale: expected one of 'group', 'batch', 'none', got 'std'",
        ),
        ({"group_size": 2, "eps": -1.0}, ValueError, "eps: expected at least 0, got -1.0"),
        ({"group_size": 2, "leave_one_out": 1}, TypeError, "leave_one_out: expected a bool, got int"),
        (
            {"group_size": 2, "leave_one_out": True, "scale": "batch"},
            ValueError,
            "scale: not used with leave_one_out",
        ),
        (
            {"group_size": 2, "leave_one_out": True, "eps": 0.1},
            ValueError,
            "eps: not used with leave_one_out",
        ),
        ({"group_size": 2, "scale": "none", "eps": 0.1}, ValueError, "eps: not used by scale none, got 0.1"),
        ({"group_size": 2, "backend": "cpu2"}, ValueError, "backend: expected one of"),
    ],
)
def test_bad_arguments(options, error, text):
    with pytest.raises(error, match=re.escape(text)):
        group_advantages(torch.tensor(REWARDS), **options)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_valid_reward_must_be_a_number(bad):
    with pytest.raises(ValueError, match=f"rewards: expected finite numbers, got {bad} at position 2"):
        group_advantages(torch.tensor([0.0, 1.0, bad, 0.0]), group_size=2)
    with pytest.raises(ValueError, match="rewards: expected 1 dimensions"):
        group_advantages(torch.zeros(2, 2), group_size=2)
