"""docs/your-model.md from the first line to the last, as a person would follow it."""

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.support.own_models import write_folder
from training.cli import main

PAGE = (Path(__file__).parents[2] / "docs/your-model.md").read_text()
FILES = dict(re.findall(r"^`([\w.-]+)`:\n```\w+\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
COMMANDS = [
    line
    for block in re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]


@pytest.fixture
def place(tmp_path):
    """A folder with what the page speaks of; of its questions, the page shows the first lines."""
    write_folder(tmp_path / "my-model", "qwen2", bos=None, dtype="bfloat16")
    write_folder(tmp_path / "my-student", "llama", seed=1)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    more = [{"question": f"What is 8 plus {n}?", "answer": 8 + n} for n in range(27)]
    with (tmp_path / "questions.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in more)
    return tmp_path


def test_from_a_folder_and_a_file_to_a_report_in_ten_lines():
    way = re.search(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)[1]
    assert len(way.splitlines()) <= 10 and way.splitlines()[-1].startswith("python -m training report")


def test_every_command_runs_and_the_report_is_there(place, monkeypatch):
    """One test, for the later commands read what the earlier ones wrote."""
    monkeypatch.chdir(place)
    for command in COMMANDS:
        words = shlex.split(command)
        assert words[:3] == ["python", "-m", "training"]
        assert main(words[3:]) == 0, command
    assert "R1-Zero on my model" in (place / "my-report.html").read_text()
    row = json.loads((place / "runs/my/zero/metrics.jsonl").read_text().splitlines()[0])
    assert "reward/python:my_rewards.py:brevity" in row
