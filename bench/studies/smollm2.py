"""What finished runs of SmolLM2 learnt, kept without weights, and their tables.

python -m training run smollm2
python -m bench smollm2 runs/smollm2 zero

keeps the recipe, record.json (marks, times, versions), metrics.jsonl of every stage that learns after base, the best and the worst
response of every step of GRPO and the report in bench/results/cpu/smollm2/zero;
`python -m training run bench/results/cpu/smollm2/zero/recipe.yaml` does the same run again. Likewise smollm2-languages, whose folder is
languages, and smollm2-student, whose folder is student.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from training import files
from training.evaluation import wilson
from training.format import percent
from training.recipe import Distill, Grpo, NextToken
from training.report import write_report
from training.report.marks import evaluation_rows
from training.run_dir import RunDir

from .. import results
from ..step import PARTS
from ..table import Table
from . import pipeline

FOLDER = results.FOLDER / "cpu/smollm2"
LANGUAGES = {"all": "all", "en": "English", "de": "German", "zh": "Chinese"}
WINDOW = 10  # steps of a mean in the picture
SHOWN = {
    "accuracy": "right",
    "format": "in the form that is asked for",
    "language_consistency": "words in the question's language",
}


def collect(run: Path, folder: Path) -> None:
    """Writes what is kept of a finished run."""
    run_dir = RunDir(run)
    recipe = run_dir.read_recipe()
    found = pipeline.measure([run])
    left_out = ("test", "harder", "hardest")  # the marks are all of them
    found_of_run = {key: value for key, value in found["runs"][0].items() if key not in left_out}
    record = {"machine": found["machine"], **found_of_run, "marks": kept(evaluation_rows(run_dir))}
    results.save(folder / "record.json", record)
    later = [name for name in recipe.stages if name != "base"]
    learn = [name for name in later if isinstance(getattr(recipe, name), (Grpo, NextToken, Distill))]
    stages = [name for name in learn if isinstance(getattr(recipe, name), Grpo)]
    steps = [{"stage": name, **row} for name in learn for row in run_dir.stage(name).metrics()]
    files.write_jsonl(folder / "metrics.jsonl", steps)
    shown = [
        {"stage": name, **row} for name in (*stages, "evaluate") for row in run_dir.stage(name).samples()
    ]
    files.write_jsonl(folder / "samples.jsonl", shown)
    shutil.copyfile(run / "recipe.yaml", folder / "recipe.yaml")
    write_report(run_dir, folder / "report.html")


def kept(marks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Six places of each mark, which a table rounds again, and where all problems are in one language, once."""
    several = len({row["language"] for row in marks}) > 2
    return [pipeline.rounded(row, 6) for row in marks if several or row["language"] == "all"]


def load(name: str) -> dict[str, Any]:
    """The committed record of a run."""
    record: dict[str, Any] = files.read_json(FOLDER / name / "record.json")
    return record


def metrics(name: str, stage: str) -> list[dict[str, Any]]:
    """The committed metrics of the steps of a stage of a run."""
    return [row for row in files.read_jsonl(FOLDER / name / "metrics.jsonl") if row["stage"] == stage]


def marks_table(record: Mapping[str, Any]) -> Table:
    """A row per checkpoint and language, shares with their 95 % Wilson intervals; of several languages without the few greedy ones."""
    marks = [row for row in record["marks"] if row["split"] == "test"]
    several = len({row["language"] for row in marks} - {"all"}) > 1
    shown = [row for row in marks if several or row["language"] == "all"]
    greedy = f"greedy, n = {shown[0]['greedy_problems']}"
    columns = {
        "checkpoint": [row["checkpoint"] for row in shown],
        "questions": [f"{LANGUAGES[row['language']]} ({row['problems']})" for row in shown],
        f"right at temperature 1, n = {shown[0]['problems']}": [
            _share(row, "accuracy", "wilson") for row in shown
        ],
        greedy: [_share(row, "greedy", "greedy") for row in shown],
        "format": [percent(row["format"]) for row in shown],
        "words in the language": [_consistency(row) for row in shown],
        "tokens": [f"{row['length']:.1f}" for row in shown],
    }
    for title in (greedy,) if several else ("questions", "words in the language"):
        del columns[title]
    return Table("Checkpoints", list(columns), [list(row) for row in zip(*columns.values(), strict=True)])


def students_table(record: Mapping[str, Any], of: Mapping[str, Any]) -> Table:
    """A row per student of a run; above them what they begin as and their teacher, of the run `of`."""
    rows = [["nothing, as it begins", "", "", *_of_student(marks(of, "base"))]]
    for each in record["students"]:
        spent = f"{each['tokens']:,}", f"{each['seconds']:.0f}"
        rows.append([each["method"], *spent, *_of_student(marks(record, f"distill-{each['name']}"))])
    rows.append(["the teacher", "", "", *_of_student(marks(of, "zero"))])
    problems = marks(of, "zero")["problems"]
    head = ("learns by", "tokens", "seconds", f"right at temperature 1, n = {problems}", "format", "length")
    return Table("Students", head, rows)


def _of_student(row: Mapping[str, Any]) -> list[str]:
    return [_share(row, "accuracy", "wilson"), percent(row["format"]), f"{row['length']:.1f}"]


def _consistency(row: Mapping[str, Any]) -> str:
    """With the interval of so many responses that are in their language or not; those between would only narrow it."""
    share, count = row["language_consistency"], row["problems"]
    low, high = wilson(round(share * count), count)
    return f"{percent(share)} ({percent(low)} to {percent(high)})"


def _share(row: Mapping[str, Any], key: str, interval: str) -> str:
    low, high = percent(row[f"{interval}_low"]), percent(row[f"{interval}_high"])
    return f"{percent(row[key])} ({low} to {high})"


def marks(record: Mapping[str, Any], checkpoint: str) -> Mapping[str, Any]:
    """The row of a checkpoint over all held-out problems."""
    wanted = {"checkpoint": checkpoint, "split": "test", "language": "all"}
    return next(row for row in record["marks"] if wanted.items() <= row.items())


def _from_to(before: Mapping[str, Any], after: Mapping[str, Any], key: str) -> str:
    return f"from {percent(before[key])} to {percent(after[key])} %"


def sentence(name: str) -> str:
    """What R1-Zero did in a run, in one sentence."""
    record = load(name)
    before, after = marks(record, "base"), marks(record, "zero")
    once, greedy = (_from_to(before, after, key) for key in ("accuracy", "greedy"))
    return (
        f"{len(metrics(name, 'zero'))} steps of R1-Zero ({record['stage_seconds']['zero'] / 60:.0f} minutes on CPUs) take "
        f"SmolLM2-135M-Instruct {once} right at temperature 1 and {greedy} greedy, on {after['problems']} sums and differences of two "
        "numbers that it was not trained on"
    )


def times(rows: Sequence[Mapping[str, Any]]) -> str:
    """Where the time of a step went, as medians, in words."""
    spent = {part: [row.get(f"{part}_seconds", 0.0) for row in rows] for part in PARTS}
    named = {
        "rollout": "rollout",
        "new_logprob": "forward of the new log-probs",
        "update": "backward and update",
    }
    parts = ", ".join(f"{median(spent[part]):.1f} s {words}" for part, words in named.items())
    whole = median(map(sum, zip(*spent.values(), strict=True)))
    return f"{whole:.1f} s a step (medians): {parts}"


def by_operator(name: str, stage: str) -> str:
    """How many of the responses that are kept of the last half of a stage of GRPO are right."""
    steps = len(metrics(name, stage))
    kept = files.read_jsonl(FOLDER / name / "samples.jsonl")
    shown = [row for row in kept if row["stage"] == stage and row["step"] >= steps // 2]
    counts = []
    for sign, noun in (("+", "sums"), ("-", "differences")):
        right = [row["rewards"]["accuracy"] == 1 for row in shown if f" {sign} " in row["question"]]
        counts.append(f"{sum(right)} of {len(right)} on {noun}")
    last = steps - steps // 2
    return f"of the best and the worst responses of the last {last} steps {' and '.join(counts)} are right"


def language_reward() -> str:
    """What GRPO with the language reward did over all languages, in one sentence."""
    record = load("languages")
    before, after = marks(record, "sft1"), marks(record, "rl_reasoning")
    words, form = (_from_to(before, after, key) for key in ("language_consistency", "format"))
    return (
        f"{len(metrics('languages', 'rl_reasoning'))} steps of GRPO with the language reward take the words in the question's language "
        f"{words} and well-formed responses {form}, on {after['problems']} held-out problems; right are "
        f"{percent(before['accuracy'])} % before and {percent(after['accuracy'])} % after"
    )


def no_more_right() -> str:
    """What GRPO in three languages had to learn from, in one sentence."""
    rows = metrics("languages", "rl_reasoning")
    first, last = (
        (fmean(row["entropy"] for row in part), fmean(row["kept"] for row in part))
        for part in (rows[:WINDOW], rows[-WINDOW:])
    )
    return (
        f"Between the first and the last {WINDOW} steps entropy falls from {first[0]:.2f} to {last[0]:.2f} nats and the share of groups "
        f"with a spread from {percent(first[1])} to {percent(last[1])} %; {by_operator('languages', 'rl_reasoning')}"
    )


def cold_start() -> str:
    """What the cold start in three languages kept, and what refused the rest, in one sentence."""
    found = load("languages")["final_metrics"]["cold_start"]
    refused = {key.rpartition("/")[2]: count for key, count in found.items() if "/rejected/" in key and count}
    reasons = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in refused.items())
    return f"Of {found['asked']} responses the cold start kept {found['kept']} (refused, some for two reasons: {reasons})"


def operators(name: str) -> str:
    """How many of the responses that are kept of the last half of R1-Zero are right, by operator, and how sure the policy was."""
    rows = metrics(name, "zero")
    entropy = [row["entropy"] for row in rows if "entropy" in row]
    return (
        f"Sums are learnt and differences hardly: {by_operator(name, 'zero')}. Entropy falls from {entropy[0]:.1f} to {entropy[4]:.2f} nats within five steps, and from "
        f"step {WINDOW} on {percent(fmean(row['kept'] for row in rows[WINDOW:]))} % of the groups have a spread to learn from."
    )


def curve(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """What is shown, of what is rewarded -> step -> mean over the last WINDOW steps."""
    found: dict[str, dict[str, float]] = {}
    for name, title in ((name, title) for name, title in SHOWN.items() if f"reward/{name}" in rows[0]):
        values = [row[name] for row in rows]
        windows = (values[max(0, step + 1 - WINDOW) : step + 1] for step in range(len(values)))
        found[title] = {str(step): round(fmean(window), 4) for step, window in enumerate(windows)}
    return found


def main(run: Path, name: str) -> None:
    collect(run, FOLDER / name)
    print(marks_table(load(name)).markdown())
