"""The drop-in examples of the adapters run, and both sides of each agree."""

from __future__ import annotations

import importlib.util
import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


@pytest.mark.parametrize(
    ("name", "needs", "limit"),
    [
        ("distillation", "transformers", 1e-5),
        ("fused_logprobs", "transformers", 1e-5),
        ("shared_prefix", "transformers", 1e-5),
        ("trl", "trl", 1e-5),
        ("verl", "transformers", 1e-5),
    ],
)
def test_the_example_prints_a_difference_of_rounding(name, needs, limit, capsys):
    if importlib.util.find_spec(needs) is None:
        pytest.skip(f"{needs} is not installed")
    runpy.run_path(str(EXAMPLES / f"{name}_dropin.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert float(re.search(r"largest difference (\S+)", printed)[1]) < limit
