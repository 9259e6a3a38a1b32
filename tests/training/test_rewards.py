"""Rewards with hand-worked numbers, live terms by kind, and everything that may go wrong in one."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import r1kernels
from training import rewards
from training.errors import UserError
from training.response import parse
from training.rewards import Reward, Sample, errors, preferences_live, rl_all, score
from training.tasks.problem import Problem


class Exact:
    """A task whose answers must be the reference, letter by letter."""

    name = "exact"

    def problems(self, split):
        return []

    def check(self, problem, answer):
        return answer == problem.reference

    def worked_examples(self, language):
        return []


class Raising(Exact):
    """A task whose verifier breaks."""

    def check(self, problem, answer):
        raise ValueError(f"cannot read {answer}")


EXACT = Exact()
ALL = {"accuracy": 1.0, "format": 1.0, "language_consistency": 1.0, "helpful": 1.0, "harmless": 1.0}
# Four English words of five in the thinking, so a consistency of 4/5.
MIXED = "<think> we check the sum wir 5 </think> the sum is <answer> 5 </answer>"


def problem(kind="reasoning", reference="5", thinking=True, language="en", name="exact", identifier="p"):
    return Problem(identifier, name, kind, language, "what is 2 plus 3", reference, thinking=thinking)


def sample(text, ids=(1, 2, 3), **of_problem):
    return Sample(problem(**of_problem), text, parse(text), tuple(ids))


def total(text, terms=ALL, task=EXACT, **of_problem):
    return score([sample(text, **of_problem)], terms, task)[0].total


# ---------------------------------------------------------------------------------------------------- rule rewards


@pytest.mark.parametrize(
    ("text", "accuracy", "format"),
    [
        ("<think> a </think> <answer> 5 </answer>", 1, 1),
        ("<think> a </think> <answer> 6 </answer>", 0, 1),
        ("<answer> 5 </answer>", 1, 0),
        ("<think> a </think> 5", 0, 0),
        ("5", 0, 0),
        # Exploits: the second block, what follows the answer, the thinking, several values, nothing.
        ("<think> a </think> <think> b </think> <answer> 5 </answer>", 1, 0),
        ("<think> a </think> <answer> 6 </answer> <answer> 5 </answer>", 0, 0),
        ("<think> a </think> <answer> 6 </answer> 5", 0, 0),
        ("<think> a <answer> 5 </answer> </think>", 0, 0),
        ("<think> the sum is 5 </think> <answer> 6 </answer>", 0, 1),
        ("<think> a <answer> 5 </answer> </think> <answer> 6 </answer>", 0, 0),
        ("<think> a </think> <answer> 5 or 6 </answer>", 0, 1),
        ("<think> a </think> <answer> 5 6 </answer>", 0, 1),
        ("<think> a </think> <answer> </answer>", 0, 0),
        ("<think> a </think> <answer> 5 </answer> </answer>", 1, 0),
        ("<think> a </think> <answer> 5", 0, 0),
    ],
)
def test_accuracy_and_format(text, accuracy, format):
    one = sample(text)
    assert rewards.accuracy(one, EXACT).value == accuracy
    assert rewards.format(one).value == format
    # rule = accuracy + format, with equal weight (equation 4)
    assert total(text, {"accuracy": 1.0, "format": 1.0}) == accuracy + format


def test_format_without_thinking_where_none_is_needed():
    greeting = "hello <answer> hello </answer>"
    assert rewards.format(sample(greeting, thinking=False)).value == 1.0
    assert rewards.format(sample(greeting, thinking=True)).value == 0.0
    assert rewards.format(sample(greeting + " and more", thinking=False)).value == 0.0
    assert rewards.format(sample("hello", thinking=False)).value == 0.0


def test_reasons_say_why():
    assert (
        "several_answers"
        in rewards.accuracy(sample("<answer> 5 </answer> <answer> 6 </answer>"), EXACT).reason
    )
    assert "'6' is not '5'" in rewards.accuracy(sample("<answer> 6 </answer>"), EXACT).reason
    assert rewards.format(sample("<think> </think> <answer> 6 </answer>")).reason == "empty_think"


# --------------------------------------------------------------------------------------------- language consistency


def test_language_consistency_reads_the_thinking_alone():
    assert rewards.language_consistency(sample(MIXED)).value == pytest.approx(4 / 5)
    foreign_summary = "<think> we check the sum </think> die summe ist <answer> 5 </answer>"
    assert rewards.language_consistency(sample(foreign_summary)).value == 1.0
    assert (
        rewards.language_consistency(sample("<think> 2 + 3 = 5 </think> <answer> 5 </answer>")).value == 0.0
    )
    assert rewards.language_consistency(sample("the sum is <answer> 5 </answer>")).value == 0.0


def test_language_of_a_response_that_needs_no_thinking():
    greeting = "we and you wir <answer> yes </answer>"
    assert rewards.language_consistency(sample(greeting, thinking=False)).value == pytest.approx(4 / 5)
    assert rewards.language_consistency(sample(greeting, thinking=True)).value == 0.0


# ------------------------------------------------------------------------------------------------------- the totals


def helpful_scorer(entries):
    return [0.25 for _ in entries]


def harmless_scorer(entries):
    return [0.5 for _ in entries]


SCORERS = {"helpful": helpful_scorer, "harmless": harmless_scorer}


def test_total_has_only_the_live_terms_of_the_kind():
    samples = [sample(MIXED, kind=kind) for kind in ("reasoning", "helpful", "unsafe")]
    reasoning, helpful, unsafe = score(samples, ALL, EXACT, preferences=SCORERS)
    # Equations 8 to 10: accuracy + format + language; reward model + format + language.
    assert reasoning.total == pytest.approx(1 + 1 + 0.8)
    assert helpful.total == pytest.approx(0.25 + 1 + 0.8)
    assert unsafe.total == pytest.approx(0.5 + 1 + 0.8)
    assert list(reasoning.parts) == ["accuracy", "format", "language_consistency"]
    assert list(helpful.parts) == ["helpful", "format", "language_consistency"]
    assert list(unsafe.parts) == ["harmless", "format", "language_consistency"]


def test_weights():
    weights = {"accuracy": 2.0, "format": 0.5, "language_consistency": 0.25, "harmless": 4.0, "helpful": 0.0}
    samples = [sample(MIXED, kind=kind) for kind in ("reasoning", "helpful", "unsafe")]
    reasoning, helpful, unsafe = score(samples, weights, EXACT, preferences=SCORERS)
    assert reasoning.total == pytest.approx(2 * 1 + 0.5 * 1 + 0.25 * 0.8)
    assert helpful.total == pytest.approx(0.5 * 1 + 0.25 * 0.8)
    assert unsafe.total == pytest.approx(4 * 0.5 + 0.5 * 1 + 0.25 * 0.8)


def test_preference_terms_are_live_in_the_last_400_of_1700_steps():
    live = [step for step in range(1700) if preferences_live(step, 1700)]
    assert live == list(range(1300, 1700))
    assert [preferences_live(step, 17) for step in (12, 13, 16)] == [False, True, True]
    # 20 steps * 400 / 1700 = 4.7, rounded up to 5.
    assert [step for step in range(20) if preferences_live(step, 20)] == [15, 16, 17, 18, 19]
    assert [step for step in range(10) if preferences_live(step, 10, 0.5)] == [5, 6, 7, 8, 9]
    # In floating point 100 * 0.07 is more than 7, which is still 7 steps.
    assert sum(preferences_live(step, 100, 0.07) for step in range(100)) == 7
    assert not any(preferences_live(step, 10, 0.0) for step in range(10))


def test_rl_all_switches_the_preference_terms_on():
    samples = [sample(MIXED, kind=kind) for kind in ("reasoning", "helpful", "unsafe")]
    early = rl_all(samples, ALL, EXACT, SCORERS, step=12, steps=17)
    late = rl_all(samples, ALL, EXACT, SCORERS, step=13, steps=17)
    assert [one.total for one in early] == pytest.approx([2.8, 1.8, 1.8])
    assert [one.total for one in late] == pytest.approx([2.8, 2.05, 2.3])
    assert "helpful" not in early[1].parts and "harmless" not in early[2].parts


def test_the_helpful_model_sees_the_summary_and_the_safety_model_everything():
    seen = {}

    def watch(name):
        def scorer(entries):
            seen[name] = [text for _, text in entries]
            return [1.0] * len(entries)

        return scorer

    samples = [sample(MIXED, kind="helpful"), sample(MIXED, kind="unsafe"), sample(MIXED)]
    score(samples, ALL, EXACT, preferences={"helpful": watch("helpful"), "harmless": watch("harmless")})
    assert seen == {"helpful": ["the sum is 5"], "harmless": [MIXED]}


def test_a_response_without_summary_helps_nobody():
    (scored,) = score([sample("<think> a", kind="helpful")], ALL, EXACT, preferences=SCORERS)
    assert scored.parts["helpful"] == Reward(0.0, "no summary")


# --------------------------------------------------------------------------------------------------- what goes wrong


def test_a_verifier_that_raises_is_counted_and_skips_the_sample():
    samples = [sample("<think> we </think> <answer> 5 </answer>"), sample("<think> we </think> 5")]
    broken, without_answer = score(samples, ALL, Raising())
    assert broken.total is None
    assert broken.parts["accuracy"] == Reward(None, "error: ValueError: cannot read 5")
    assert broken.parts["format"].value == 1.0
    assert without_answer.total == pytest.approx(0 + 0 + 1)  # no answer, so the verifier was not asked
    assert errors([broken, without_answer]) == {"accuracy: error: ValueError: cannot read 5": 1}


def test_a_verifier_in_threads_gives_the_same():
    texts = [f"<think> we </think> <answer> {n % 7} </answer>" for n in range(200)]
    samples = [sample(text) for text in texts]
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda one: score([one], ALL, EXACT)[0].total, samples))
    assert parts == [one.total for one in score(samples, ALL, EXACT)]
    assert sum(total == 3.0 for total in parts) == sum(n % 7 == 5 for n in range(200))


def raise_memory_error(entries):
    raise MemoryError("no memory")


@pytest.mark.parametrize(
    ("scorer", "reason"),
    [
        (raise_memory_error, "MemoryError: no memory"),
        (lambda entries: [0.5], "1 scores for 2 responses"),
        (lambda entries: [float("nan")] * 2, "score nan is not between 0 and 1"),
        (lambda entries: [1.5] * 2, "score 1.5 is not between 0 and 1"),
        (lambda entries: ["good"] * 2, "could not convert"),
    ],
)
def test_a_preference_model_that_fails_is_counted(scorer, reason):
    samples = [sample(MIXED, kind="helpful"), sample(MIXED, kind="helpful"), sample(MIXED)]
    first, second, reasoning = score(samples, ALL, EXACT, preferences={"helpful": scorer})
    assert first.total is None and second.total is None
    assert reason in first.parts["helpful"].reason
    assert reasoning.total == pytest.approx(2.8)
    assert sum(errors([first, second, reasoning]).values()) == 2


def test_an_unknown_language_is_an_error_of_the_reward():
    (scored,) = score([sample(MIXED, language="xx")], ALL, EXACT)
    assert scored.total is None
    assert "'xx' has no word list" in scored.parts["language_consistency"].reason


def test_a_problem_of_a_task_that_is_not_there():
    one, other = score([sample(MIXED), sample(MIXED, name="other")], ALL, {"exact": EXACT})
    assert one.total == pytest.approx(2.8)
    assert other.total is None and "KeyError" in other.parts["accuracy"].reason


def test_unknown_terms_and_bad_weights_name_themselves():
    with pytest.raises(UserError, match="'acuracy'.*'accuracy'"):
        score([], {"acuracy": 1.0}, EXACT)
    with pytest.raises(UserError, match=r"rewards\.format.*nan"):
        score([], {"format": float("nan")}, EXACT)
    with pytest.raises(UserError, match=r"rewards\.format.*'1'"):
        score([], {"format": "1"}, EXACT)
    with pytest.raises(UserError, match="overlong"):
        score([], {"overlong": 1.0}, EXACT)


# ---------------------------------------------------------------------------------------------- group normalisation


def test_a_group_is_normalised_without_its_skipped_samples():
    class RaisesOnNine(Exact):
        def check(self, problem, answer):
            if answer == "9":
                raise RuntimeError("broken")
            return super().check(problem, answer)

    # Rewards of accuracy + format: 2, 0, skipped, 1. Valid mean 1, unbiased standard deviation 1.
    texts = ["<think> a </think> <answer> 5 </answer>", "5", "<answer> 9 </answer>", "<answer> 5 </answer>"]
    scored = score([sample(text) for text in texts], {"accuracy": 1.0, "format": 1.0}, RaisesOnNine())
    assert [one.total for one in scored] == [2.0, 0.0, None, 1.0]
    values = torch.tensor([0.0 if one.total is None else one.total for one in scored])
    valid = torch.tensor([one.total is not None for one in scored])
    advantages = r1kernels.group_advantages(values, group_size=4, valid=valid)
    expected = torch.tensor([1.0, -1.0, 0.0, 0.0]) / (1 + 1e-4)
    torch.testing.assert_close(advantages, expected)


# --------------------------------------------------------------------------------------------------------- shaping


@pytest.mark.parametrize(
    ("length", "expected"), [(0, 0.0), (80, 0.0), (85, -0.25), (90, -0.5), (100, -1.0), (130, -1.0)]
)
def test_overlong_is_a_ramp_over_the_last_fifth(length, expected):
    one = sample(MIXED, ids=range(length))
    assert rewards.overlong(one, 100).value == pytest.approx(expected)


def test_repetition_counts_token_ngrams():
    # 8 tokens have 5 windows of 4: (1,2,1,2) (2,1,2,1) (1,2,1,2) (2,1,2,1) (1,2,1,2); 2 are distinct.
    assert rewards.repetition(sample(MIXED, ids=(1, 2) * 4)).value == pytest.approx(2 / 5 - 1)
    assert rewards.repetition(sample(MIXED, ids=range(20))).value == 0.0
    assert rewards.repetition(sample(MIXED, ids=(7, 7))).value == 0.0
    # 2 windows of 3 in (7, 7, 7, 7), one distinct.
    assert rewards.repetition(sample(MIXED, ids=(7,) * 4), size=3).value == pytest.approx(1 / 2 - 1)


def test_shaping_is_off_unless_the_recipe_names_it():
    one = sample(MIXED, ids=(1, 2) * 45)
    assert score([one], ALL, EXACT)[0].total == pytest.approx(2.8)
    shaped = score([one], {**ALL, "overlong": 1.0, "repetition": 0.5}, EXACT, length_limit=100)[0]
    # 90 of 100 tokens: -0.5; 87 windows of 4, 2 distinct: 2/87 - 1.
    assert shaped.total == pytest.approx(2.8 - 0.5 + 0.5 * (2 / 87 - 1))
