"""The drop-in example of the documentation runs, and both ways agree."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "decode_dropin.py"


def test_the_example_prints_a_difference_of_rounding(capsys):
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = capsys.readouterr().out
    assert float(re.search(r"largest difference (\S+)", printed)[1]) < 1e-5
    ours, copied = (int(number.replace(",", "")) for number in re.findall(r"\d[\d,]{4,}", printed))
    assert ours < copied
