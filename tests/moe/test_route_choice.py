"""Which experts route chooses, on every backend, against a choice by hand."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from r1kernels.moe import route
from tests.support.routing_cases import families, normal

pytestmark = pytest.mark.usefixtures("backend")


def chosen_by_hand(selection, top_k, two_best, n_group=1, topk_group=1):
    """The experts of one token in plain Python: best first, the lowest index among equals."""
    size = len(selection) // n_group
    groups = [selection[start : start + size] for start in range(0, len(selection), size)]
    # the sum, like each of its terms, is a float32
    best = [np.float32(sum(sorted(group, reverse=True)[:2])) if two_best else max(group) for group in groups]
    kept = sorted(range(n_group), key=lambda group: (-best[group], group))[:topk_group]
    eligible = [expert for expert in range(len(selection)) if expert // size in kept]
    return sorted(eligible, key=lambda expert: (-selection[expert], expert))[:top_k]


def check_choice(logits, bias, options):
    routing = route(logits, bias=bias, **options)
    # rounded once: see test_equal_logits_tie_wherever_they_stand
    wide, score = logits.double(), options["score"]
    if score == "sqrt_softplus":
        scores = F.softplus(wide, threshold=1e3).sqrt().float()
    else:
        scores = (wide.sigmoid() if score == "sigmoid" else wide.softmax(-1)).float()
    if options.get("choose_by") == "logits":
        scores = logits
    two_best = options.get("group_score", "best" if score == "softmax" else "two_best") == "two_best"
    selection = (scores if bias is None else scores + bias).double().tolist()
    groups = {name: options[name] for name in ("n_group", "topk_group") if name in options}
    expected = [chosen_by_hand(row, options["top_k"], two_best, **groups) for row in selection]
    assert routing.indices.tolist() == expected
    assert routing.indices.dtype == torch.int64
    counts = [sum(row.count(expert) for row in expected) for expert in range(logits.shape[1])]
    assert routing.tokens_per_expert.tolist() == counts
    assert routing.tokens_per_expert.dtype == torch.int32


@families
@pytest.mark.parametrize("with_bias", [False, True])
def test_choice(options, with_bias):
    bias = normal(8, seed=1) - 2 if with_bias else None  # negative: a dropped group must not win with 0
    check_choice(normal(50, 8), bias, options)


@families
def test_ties_go_to_the_lowest_index(options):
    # two score levels in every row: ties inside groups, between groups and at the edge of the choice
    check_choice((normal(50, 8) > 0).float(), None, options)
    check_choice(torch.zeros(3, 8), None, options)
    check_choice(torch.full((3, 8), 50.0), None, options)  # saturated: sigmoid is 1 in float32
    check_choice((normal(50, 8) > 0).float(), torch.tensor([0.0, 0.25] * 4), options)


def test_ties_at_many_experts():
    # beyond 16 experts, torch's unstable sorts leave the order of equals open
    check_choice((normal(20, 96) > 0.5).float(), None, {"top_k": 20, "score": "sigmoid"})
    check_choice(torch.zeros(5, 256), None, {"top_k": 8, "score": "sigmoid", "n_group": 8, "topk_group": 4})


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_a_near_logit_behind_equal_ones_at_the_edge_of_the_choice(score):
    # all scores are equal in float32, so expert 1 comes before the experts 2, 3 and 4 of a larger logit
    logits = torch.tensor([[0.0, -1e-10, 0.0, 0.0, 0.0], [0.0, -1e-10, 0.0, 1e-10, 0.0]])
    check_choice(logits, None, {"top_k": 2, "score": score})
    assert route(logits, 2, score=score).indices.tolist() == [[0, 1], [0, 1]]


def test_equal_logits_tie_wherever_they_stand():
    # torch's float32 sigmoid gives some values another last bit at the end of a tensor than in its middle
    for value in normal(100).tolist():
        check_choice(torch.full((13, 3), value), None, {"top_k": 3, "score": "sigmoid"})


def test_groups_of_one_expert():
    check_choice(normal(20, 8), None, {"top_k": 2, "score": "sigmoid", "n_group": 8, "topk_group": 3})


def test_an_eligible_expert_at_minus_infinity_comes_before_those_of_other_groups():
    logits = normal(6, 8)
    logits[:, [0, 1, 5, 6]] = -torch.inf
    options = {"top_k": 4, "score": "sigmoid", "choose_by": "logits", "n_group": 2, "topk_group": 1}
    check_choice(logits, None, options)


@pytest.mark.parametrize("experts", [1, 7, 16, 17, 48, 100, 256, 1000])
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("top_k", [1, 3, 16, 40])
def test_choice_among_many(experts, score, top_k):
    options = {"top_k": min(top_k, experts), "score": score}
    check_choice(normal(5, experts, seed=experts), None, options)
    check_choice((2 * normal(5, experts)).round(), normal(experts, seed=1).round() / 4, options)  # many ties
    for groups in (2, 4):
        if experts % groups == 0:
            grouped = {**options, "n_group": groups, "topk_group": groups // 2}
            grouped["top_k"] = min(top_k, experts // 2)
            check_choice((2 * normal(5, experts)).round(), None, grouped)


def nearly_tied(start):
    """Logits a few bits apart: some have the same score in float32, some do not; so do sums of two scores."""
    logits = normal(60, 64, seed=1).sign() * 2.0**-22 * normal(60, 64).mul(3).round() + start
    logits[::2] += 4 * normal(30, 64, seed=2)[:, :1] * (normal(30, 64, seed=3) > 1.5)
    return logits


STARTS = (0.0, 1.0, -3.0, 12.0, 20.0, -90.0)


@families
def test_scores_that_nearly_tie(options):
    ungrouped = {name: value for name, value in options.items() if "group" not in name}
    for start in STARTS:
        check_choice(nearly_tied(start), None, ungrouped)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@families
def test_scores_that_nearly_tie_are_chosen_as_by_the_reference(options):
    near = (normal(64, seed=4) / 100).round(decimals=2)
    for start, lift in product(STARTS, (None, 0.0, 15.0, 1e4)):
        logits, bias = nearly_tied(start), None if lift is None else lift + near
        expected = route(logits, bias=bias, **options, backend="reference")
        assert torch.equal(route(logits, bias=bias, **options).indices, expected.indices), (start, lift)


def test_extreme_selection_scores():
    bias = torch.tensor([0.0, -torch.inf, torch.inf, 1e30, -1e30, -0.0, 2.0, -2.0])
    check_choice(normal(20, 8), bias, {"top_k": 8, "score": "sigmoid"})
    check_choice(
        torch.tensor([[0.0, -torch.inf, 90.0, -200.0, 3e38]]), None, {"top_k": 5, "score": "softmax"}
    )
