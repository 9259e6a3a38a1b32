"""Rewards of one's own: what they see, what they may return, and every way in which they break without a word lost."""

import time

import pytest

from training.errors import UserError
from training.own_rewards import MOST_FAULTS, OwnReward, own_rewards
from training.response import parse
from training.rewards import Sample, check_terms, errors, score
from training.tasks.problem import Problem

REWARDS = """
import os, time
from beside import SCALE

def brevity(sample):
    return -len(sample.token_ids) * SCALE

def sees(sample):
    return (sample.question, sample.reference, sample.response.answer, sample.finished, sample.problem.meta["source"]) == (
        "what is 2 plus 3", "5", "6", True, "file")

def rank(samples, ascending=True):
    order = sorted(range(len(samples)), key=lambda i: len(samples[i].token_ids))
    return [order.index(i) for i in range(len(samples))]

def too_few(samples):
    return [1.0]

def by_length(sample):
    match len(sample.token_ids):
        case 1: raise ValueError("one token")
        case 2: return None
        case 3: return float("nan")
        case 4: return "5"
        case 5: return [1]
        case 6: time.sleep(60)
        case 7: os._exit(3)
    return 1

def always_hangs(sample):
    time.sleep(60)

def of_two(first, second):
    return 0

by_lambda = lambda sample: 0

class Scorer:
    def __call__(self, sample):
        return 0

scorer: Scorer = Scorer()
"""


@pytest.fixture
def path(tmp_path):
    (tmp_path / "beside.py").write_text("SCALE = 0.5\n")
    path = tmp_path / "my_rewards.py"
    path.write_text(REWARDS)
    return path


def sample(length):
    text = "<think> we add </think> <answer> 6 </answer>"
    problem = Problem("p", "t", "reasoning", "en", "what is 2 plus 3", "5", meta={"source": "file"})
    return Sample(problem, text, parse(text), tuple(range(length)))


def called(path, name, lengths, seconds=30.0):
    with own_rewards({f"python:{path}:{name}": 1.0}, seconds) as own:
        (reward,) = own.values()
        return reward([sample(length) for length in lengths])


def test_a_function_of_one_sample_and_one_of_all(path):
    assert [reward.value for reward in called(path, "brevity", [4, 2])] == [-2.0, -1.0]
    assert [reward.value for reward in called(path, "rank", [9, 8, 10])] == [1, 0, 2]
    assert [reward.value for reward in called(path, "sees", [1])] == [1.0]


def test_every_fault_is_counted_and_the_next_sample_is_rewarded(path):
    found = called(path, "by_length", [1, 2, 3, 4, 5, 6, 7, 8], seconds=2.0)
    assert [reward.value for reward in found] == [None] * 7 + [1.0]
    reasons = [reward.reason for reward in found]
    for reason, expected in zip(
        reasons,
        [
            "error: ValueError: one token",
            "left out",
            "error: expected a finite number or None, got nan",
            "error: expected a finite number or None, got '5'",
            "error: expected a finite number or None, got [1]",
            "error: it took longer than 2 s",
            "error: its process died",
            "by by_length",
        ],
        strict=True,
    ):
        assert reason == expected


def test_a_batch_of_the_wrong_size_gives_no_reward_to_any(path):
    assert {reward.reason for reward in called(path, "too_few", [1, 2])} == {
        "error: ValueError: expected 2 rewards, one for each sample, got 1"
    }


def test_a_reward_that_always_hangs_does_not_stop_the_step_for_long(path):
    began = time.monotonic()
    found = called(path, "always_hangs", [1] * 50, seconds=0.2)
    assert time.monotonic() - began < 50 * 0.2 + 5 * MOST_FAULTS, "the rest of the step is not asked"
    assert all(reward.value is None and reward.reason.startswith("error") for reward in found)


def test_it_is_one_term_of_the_sum_and_its_faults_are_in_the_count_of_errors(path):
    name = f"python:{path}:by_length"
    terms = {"format": 1.0, name: 0.25}
    with own_rewards(terms, 30.0) as own:
        good, bad = score([sample(8), sample(1)], terms, {}, own=own)
    assert good.total == 1.25 and good.parts[name].value == 1.0
    assert bad.total is None
    assert errors([good, bad]) == {f"{name}: error: ValueError: one token": 1}


def test_the_processes_end_with_the_block(path):
    with own_rewards({f"python:{path}:brevity": 1.0, f"python:{path}:rank": 0.0}, 30.0) as own:
        (reward,) = own.values()
        reward([sample(1)])
        process = reward.process._process
        assert process.poll() is None
    assert process.poll() is not None


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("FILE:brevty", "did you mean 'brevity'"),
        *(
            (f"FILE:{name}", f"`def {name}\\(sample\\):` .* '{name}' is something else there")
            for name in ("by_lambda", "scorer", "Scorer", "SCALE", "time")
        ),
        ("FILE:nosuch", "unknown function of .* 'nosuch': expected one of always_hangs, brevity"),
        ("FILE:of_two", "expected a function of `sample` .* got one of 'first'"),
        ("nothing.py:brevity", "there is no file nothing.py"),
        ("brevity", "expected python:<file>:<name>"),
    ],
)
def test_a_reward_that_is_not_there_is_named_before_anything_runs(path, spec, message):
    with pytest.raises(UserError, match=message):
        check_terms({"python:" + spec.replace("FILE", str(path)): 1.0})


def test_a_file_that_is_not_python_or_cannot_be_imported_is_named(path):
    path.write_text("def brevity(sample) return 1")
    with pytest.raises(UserError, match="is not Python"):
        check_terms({f"python:{path}:brevity": 1.0})
    path.write_text("import no_such_module\ndef brevity(sample): return 1")
    reward = OwnReward(f"python:{path}:brevity", 30.0)
    with pytest.raises(UserError, match="cannot be imported: ModuleNotFoundError"):
        reward([sample(1)])
