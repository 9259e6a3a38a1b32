"""The report of a run: metrics in, one self-contained HTML page out (no script, no link, no picture from outside)."""

from pathlib import Path

from training import files
from training.run_dir import RunDir


def write_report(run_dir: RunDir, path: Path | None = None) -> Path:
    """Writes the page about a run, finished or not, and returns where it is (report.html in the run folder)."""
    from training.report.page import page  # matplotlib takes half a second, which no other command needs

    path = path or run_dir.path / "report.html"
    files.write_text(path, page(run_dir))
    return path
