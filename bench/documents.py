"""The tables and pictures of README and docs that come from committed results; tables are written between marks.

    <!-- bench: headline -->
    ...
    <!-- end -->

``python -m bench documents`` writes them; a test holds them against the results.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from . import pictures, precision, results, saved
from .report import markdown, tables

ROOT = Path(__file__).parents[1]
FILES = (
    ROOT / "README.md",
    ROOT / "docs/benchmarks.md",
    ROOT / "docs/logprob.md",
    ROOT / "docs/shared-prefix.md",
    ROOT / "docs/mixtures.md",
    ROOT / "docs/training.md",
    ROOT / "docs/distillation.md",
    ROOT / "docs/divergence.md",
)
TRUNCATION = ROOT / "bench/results/cpu/truncation.json"
_BLOCK = re.compile(r"(<!-- bench: ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _ops() -> dict[str, Any]:
    return results.load(ROOT / "bench/results/cpu/ops.json")


def ops() -> str:
    """A row per op."""
    return markdown.rows(tables.summary(_ops()))


def every_case() -> str:
    """The headline table of all cases."""
    record = _ops()
    table = tables.headline(record)
    lists = {
        "Where we are not the best": tables.not_best(record),
        "Cases whose rounds do not repeat": tables.noisy(record),
    }
    parts = [markdown.summary(record), table.note, markdown.rows(table), f"**{tables.NOT_ON_A_GPU}**"]
    parts += [
        f"{title}:\n\n" + "\n".join(f"- {line}" for line in lines) for title, lines in lists.items() if lines
    ]
    return "\n\n".join(parts)


def inference() -> str:
    """The same for a forward without gradients."""
    table = tables.inference(_ops())
    return f"{table.note}\n\n{markdown.rows(table)}"


def floors() -> str:
    """Our phases against what binds them."""
    table = tables.floors(_ops())
    return f"{table.note}\n\n{markdown.rows(table)}"


def exactness(ops: precision.Ops) -> str:
    """The tables of ``python -m bench precision`` of these ops."""
    record = json.loads((ROOT / "bench/results/cpu/precision.json").read_text(encoding="utf-8"))
    return "\n\n".join(markdown.section(one, level=3) for one in precision.tables(record, ops))


def divergences() -> str:
    """Times, errors and memory of everyone, case by case."""
    cases = dict(tables.by_op(_ops()["cases"])).get("linear_divergence", [])
    return "\n\n".join(markdown.section(tables.case_table(case), level=3) for case in cases)


def saved_bytes() -> str:
    """The table of ``python -m bench saved``."""
    found = saved.table(json.loads((ROOT / "bench/results/cpu/saved.json").read_text(encoding="utf-8")))
    return f"{found.note}\n\n{markdown.rows(found)}"


def every_mixture() -> str:
    """The table of ``python -m bench mixtures``."""
    from . import mixtures  # which needs transformers

    return mixtures.table(json.loads((ROOT / "bench/results/cpu/mixtures.json").read_text(encoding="utf-8")))


def own_tests() -> str:
    """The table of ``python -m bench suite``."""
    from . import suite  # which needs transformers

    return suite.table(json.loads((ROOT / "bench/results/cpu/suite.json").read_text(encoding="utf-8")))


def prefixes() -> str:
    """The tables of ``python -m bench prefix``."""
    from . import prefix  # which needs transformers

    path = ROOT / "bench/results/cpu/prefix.json"
    if not path.is_file():
        return "Not measured yet."
    record = json.loads(path.read_text(encoding="utf-8"))
    return "\n\n".join(
        f"{one.note}\n\n{markdown.rows(one)}" for one in (prefix.table(record), prefix.profile_table(record))
    )


def rollouts() -> str:
    """The table of ``python -m bench rollout``."""
    from . import rollout  # which needs transformers

    path = ROOT / "bench/results/cpu/rollout.json"
    if not path.is_file():
        return "Not measured yet."
    found = rollout.table(json.loads(path.read_text(encoding="utf-8")))
    return f"{found.note}\n\n{markdown.rows(found)}"


def truncated() -> str:
    """The means of ``python -m bench truncation``."""
    from . import truncation  # which needs transformers

    return truncation.note(truncation.load_record(TRUNCATION))


def students() -> str:
    """The table of ``python -m bench distillation``."""
    from . import distillation  # which needs transformers

    return distillation.table(distillation.load_record(ROOT / "bench/results/cpu/distillation.json"))


BLOCKS: Mapping[str, Callable[[], str]] = {
    "ops": ops,
    "every case": every_case,
    "inference": inference,
    "floors": floors,
    "precision": partial(exactness, precision.LOGPROBS),
    "precision of divergences": partial(exactness, precision.DIVERGENCES),
    "divergences": divergences,
    "saved": saved_bytes,
    "prefix": prefixes,
    "mixtures": every_mixture,
    "suite": own_tests,
    "rollout": rollouts,
    "truncation": truncated,
    "distillation": students,
}


def filled(text: str) -> str:
    """A document with what stands between its marks made again.

    Raises:
        KeyError: a mark names no block.
    """
    return _BLOCK.sub(lambda found: f"{found[1]}{BLOCKS[found[2]]()}\n{found[3]}", text)


def main() -> None:
    """The command."""
    for path in FILES:
        before = path.read_text(encoding="utf-8")
        after = filled(before)
        if after != before:
            path.write_text(after, encoding="utf-8")
            print(path.relative_to(ROOT))
    for path in pictures.write(ROOT):
        print(path.relative_to(ROOT))
