"""The report of a run: the same tables as one HTML page, as Markdown and, in short, for a terminal."""

from __future__ import annotations

from pathlib import Path


def write(path: Path, against: Path | None, committed: Path) -> None:
    """Writes page and Markdown beside the results at `path`, and prints them in short.

    against: older results; None: those in the folder `committed` of the same kind of device.
    """
    from .. import results
    from . import markdown, page

    record = results.load(path)
    before = results.load(against) if against else page.committed(record, committed, "ops.json")
    saved = page.committed(record, committed, "saved.json")
    path.with_suffix(".html").write_text(page.page(record, before, saved), encoding="utf-8")
    path.with_suffix(".md").write_text(markdown.document(record, before, saved), encoding="utf-8")
    print(markdown.terminal(record))
    print(f"{path.with_suffix('.html')}, {path.with_suffix('.md')}")
