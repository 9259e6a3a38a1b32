"""docs/your-data.md: its files are read as they stand there, and its rewards run."""

import re
from pathlib import Path

from training import traces
from training.own_rewards import own_rewards
from training.response import parse
from training.rewards import Sample
from training.tasks import get_task

BLOCKS = re.findall(
    r"```(\w+)\n(.*?)```", (Path(__file__).parents[2] / "docs" / "your-data.md").read_text("utf-8"), re.DOTALL
)
PROBLEMS, TRACES = (text for kind, text in BLOCKS if kind == "json")
(REWARDS,) = (text for kind, text in BLOCKS if kind == "python")


def test_the_problems_are_read_and_checked(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text(PROBLEMS, encoding="utf-8")
    task = get_task(f"jsonl:{path}", test_share=0.0)
    right = ["72", "0.5", "5 km", "(B)", "2"]
    problems = task.problems("train")
    assert [task.check(problem, answer) for problem, answer in zip(problems, right, strict=True)] == [
        True
    ] * 5
    assert not any(task.check(problem, "7") for problem in problems)


def test_the_traces_are_read(tmp_path):
    path = tmp_path / "traces.jsonl"
    path.write_text(TRACES, encoding="utf-8")
    first, second = traces.read(path)
    assert (first.text, list(first.prompt)) == (second.text, list(second.prompt))


def test_the_rewards_run(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text(REWARDS, encoding="utf-8")
    task_path = tmp_path / "problems.jsonl"
    task_path.write_text(PROBLEMS, encoding="utf-8")
    problem = get_task(f"jsonl:{task_path}", test_share=0.0).problems("train")[0]
    samples = [Sample(problem, "", parse(""), tuple(range(length))) for length in (20, 10)]
    with own_rewards({f"python:{path}:brevity": 1.0, f"python:{path}:rank": 1.0}, 60.0) as own:
        values = [[reward.value for reward in one(samples)] for one in own.values()]
    assert values == [[-0.02, -0.01], [0.5, 0.0]]
