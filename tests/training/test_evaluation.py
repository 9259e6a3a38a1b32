"""pass@1, unbiased pass@k, maj@k and the Wilson interval, by hand and by brute force."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.evaluation import maj_at_k, majority, pass_at_1, pass_at_k, reach, wilson


def test_pass_at_1_is_the_mean_over_problems():
    # Problems count alike, however many samples they have: (1/4 + 1) / 2.
    assert pass_at_1([[True, False, False, False], [True]]) == pytest.approx(0.625)
    assert pass_at_1([[False]]) == 0.0


def test_pass_at_k_by_hand():
    # n 4, c 1, k 2: 1 - C(3,2)/C(4,2) = 1 - 3/6.
    assert pass_at_k([[True, False, False, False]], 2) == pytest.approx(0.5)
    # n 5, c 2, k 3: 1 - C(3,3)/C(5,3) = 1 - 1/10.
    assert pass_at_k([[True, True, False, False, False]], 3) == pytest.approx(0.9)
    # Fewer wrong ones than k: every subset holds a right one.
    assert pass_at_k([[True, True, False]], 2) == 1.0
    assert pass_at_k([[True, False], [False, False]], 1) == pytest.approx(0.25)


def test_reach_doubles_k_up_to_the_samples_of_a_problem():
    correct = [[True, False, False, False, False], [False] * 5]
    assert reach(correct, 5) == {"1": pytest.approx(0.1), "2": pytest.approx(0.2), "4": pytest.approx(0.4)}


@given(st.lists(st.booleans(), min_size=1, max_size=7), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(samples, data):
    k = data.draw(st.integers(1, len(samples)))
    subsets = list(combinations(samples, k))
    assert pass_at_k([samples], k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=5))
def test_pass_at_one_sample_is_pass_at_1(correct):
    assert pass_at_k(correct, 1) == pytest.approx(pass_at_1(correct))


@pytest.mark.parametrize(
    ("answers", "winner"),
    [
        (["5", "5", "6"], "5"),
        (["5", "6"], None),  # a tie is not a majority
        (["5", "5", "6", "6", "7"], None),
        (["5", "5", "6", "7"], "5"),
        (["5"], "5"),
        ([None, None, "5"], "5"),  # no answer has no vote
        ([None, None], None),
        ([], None),
        ([" The  Sum", "the sum", "x"], "the sum"),
    ],
)
def test_majority(answers, winner):
    assert majority(answers) == winner


def test_maj_at_k_votes_on_answers():
    answers = [["5", "5", "6"], ["5", "6", "7"], ["5", "5", "6", "6"], [None, "5", None]]
    right = [[answer == "5" for answer in given] for given in answers]
    # Right by 2 of 3; a tie of three; a tie of two; right by the only vote.
    assert maj_at_k(answers, right) == pytest.approx(2 / 4)
    # Three wrong answers that differ do not outvote two right ones that agree, as votes on verdicts would.
    assert maj_at_k([["5", "5", "1", "2", "3"]], [[True, True, False, False, False]]) == 1.0
    # A wrong majority is wrong, though one sample is right.
    assert maj_at_k([["6", "6", "5"]], [[False, False, True]]) == 0.0


def test_wilson_by_hand():
    # p 0.8, n 10, z^2 3.8415: centre (0.8 + 0.19207)/1.38415, half 1.95996/1.38415 * sqrt(0.016 + 0.0096036).
    assert wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    # No successes: (0, z^2 / (n + z^2)); all: its mirror image.
    assert wilson(0, 10) == pytest.approx((0.0, 3.8414588 / 13.8414588))
    assert wilson(10, 10) == pytest.approx((10 / 13.8414588, 1.0))
    assert wilson(0, 0) == (0.0, 1.0)
    # z = 1, p 1/2, n 4: centre 1/2, half (1/1.25) * sqrt(1/16 + 1/64) = 0.2236.
    assert wilson(2, 4, z=1.0) == pytest.approx((0.2763932, 0.7236068))


@given(st.integers(0, 200), st.integers(0, 200))
def test_wilson_holds_the_share_and_mirrors(successes, failures):
    trials = successes + failures
    low, high = wilson(successes, trials)
    assert 0.0 <= low <= high <= 1.0
    if trials:
        assert low - 1e-12 <= successes / trials <= high + 1e-12
    mirrored_low, mirrored_high = wilson(failures, trials)
    assert (1 - mirrored_high, 1 - mirrored_low) == pytest.approx((low, high))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="k: expected 1 to 2"):
        pass_at_k([[True, False]], 3)
    with pytest.raises(ValueError, match="k: expected"):
        pass_at_k([[True, False]], 0)
    with pytest.raises(ValueError, match="at least one problem"):
        pass_at_1([])
    with pytest.raises(ValueError, match="at least one sample"):
        pass_at_1([[True], []])
    with pytest.raises(ValueError, match="successes"):
        wilson(3, 2)
    with pytest.raises(ValueError, match="expected 1 of them.*got 2"):
        maj_at_k([["5", "5"]], [[True]])
    with pytest.raises(ValueError, match="shorter"):
        maj_at_k([["5"], ["5"]], [[True]])


def test_what_decorates_an_answer_has_no_vote_of_its_own():
    assert majority(["72", "**72**", r"\\boxed{72.}", "71", "71"]) == "72"
