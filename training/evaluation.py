"""The mathematics of evaluation: pass@1, unbiased pass@k, maj@k and the Wilson interval. Pure functions."""

import math
from collections import Counter
from collections.abc import Sequence

from training.notation import undecorated


def pass_at_1(correct: Sequence[Sequence[bool]]) -> float:
    """Mean over the problems of the share of right samples, (1/k) * sum_i p_i (DeepSeek-R1, evaluation setup).

    correct: for each problem, whether each of its samples is right. No problem or an empty one: ValueError.
    """
    _check_not_empty(correct)
    return math.fsum(sum(samples) / len(samples) for samples in correct) / len(correct)


def pass_at_k(correct: Sequence[Sequence[bool]], k: int) -> float:
    """Mean over the problems of the unbiased chance that one of k samples is right (Codex, arXiv 2107.03374).

    1 - C(n - c, k) / C(n, k) for c right ones among n samples: the share of the subsets of size k that hold a
    right one. ValueError unless 1 <= k <= n for every problem.
    """
    _check_not_empty(correct)
    chances = []
    for samples in correct:
        n, c = len(samples), sum(map(bool, samples))
        if not 1 <= k <= n:
            raise ValueError(f"k: expected 1 to {n}, the number of samples, got {k}")
        chances.append(1 - math.comb(n - c, k) / math.comb(n, k))
    return math.fsum(chances) / len(chances)


def reach(correct: Sequence[Sequence[bool]], most: int) -> dict[str, float]:
    """pass@k for k = 1, 2, 4, ... up to `most`, the samples of each problem: k as text -> share of the problems."""
    return {
        str(k): pass_at_k(correct, k) for k in (2**power for power in range(most.bit_length())) if k <= most
    }


def majority(answers: Sequence[str | None]) -> str | None:
    """The answer that was given most often; None where it is not one alone, for a tie is not a majority.

    answers: the texts of the answers; None for a sample without an answer, which has no vote. Runs of white
    space are equal, as are upper and lower case; what decorates an answer ("**72.**") has no vote of its own.
    """
    votes = Counter(vote for vote in map(_vote, answers) if vote is not None)
    ranked = votes.most_common(2)
    if not ranked or (len(ranked) == 2 and ranked[0][1] == ranked[1][1]):
        return None
    return ranked[0][0]


def maj_at_k(answers: Sequence[Sequence[str | None]], correct: Sequence[Sequence[bool]]) -> float:
    """Share of the problems whose majority answer is right. The vote is on answers, never on verdicts.

    answers, correct: for each problem the answer of each sample, and whether it is right; ValueError where their
    lengths differ. The same answer has the same verdict, so the first sample that gave it decides.
    """
    _check_not_empty(correct)
    right = 0
    for given, verdicts in zip(answers, correct, strict=True):
        if len(given) != len(verdicts):
            raise ValueError(f"answers: expected {len(verdicts)} of them, one a verdict, got {len(given)}")
        winner = majority(given)
        right += winner is not None and bool(verdicts[[_vote(answer) for answer in given].index(winner)])
    return right / len(correct)


def _vote(answer: str | None) -> str | None:
    return None if answer is None else undecorated(answer).casefold()


def wilson(successes: int, trials: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson score interval of a share, (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n).

    successes, trials: counts; no trials give (0, 1). z: quantile of the normal distribution; the default is for
    95 %. Wilson, J. Am. Stat. Assoc. 22 (1927).
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"successes: expected 0 to {trials}, the number of trials, got {successes}")
    if trials == 0:
        return 0.0, 1.0
    share = successes / trials
    scale = 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def _check_not_empty(correct: Sequence[Sequence[bool]]) -> None:
    if not correct or not all(correct):
        raise ValueError("correct: expected at least one problem, each with at least one sample")
