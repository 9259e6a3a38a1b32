"""The drop-in example of the documentation runs, and both losses agree."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "grpo_dropin.py"


def test_the_example_prints_a_difference_of_rounding(capsys):
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = capsys.readouterr().out
    assert float(re.search(r"largest difference (\S+)", printed)[1]) < 1e-6
    assert float(re.search(r"eager loss +(\S+)", printed)[1]) != 0
    assert "clip_ratio/region_mean" in printed
