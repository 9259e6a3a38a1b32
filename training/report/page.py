"""The page: its sections in order, each from what the run folder holds."""

from html import escape
from pathlib import Path
from typing import Any

from training.files import readable_bytes
from training.format import duration, percent
from training.pipeline import STAGES, plan
from training.recipe import Grpo, Recipe
from training.report import curves, lineage, samples, students, tables
from training.report.marks import evaluation_rows, marks_of, number
from training.run_dir import RunDir

STYLE = Path(__file__).with_name("style.css")
TILES = (
    ("base", "accuracy", "base"),
    ("zero", "accuracy", "R1-Zero"),
    ("zero", "language_consistency", "R1-Zero, in one language"),
    ("sft1", "accuracy", "after the cold start"),
    ("rl_reasoning", "accuracy", "reasoning RL"),
    ("rl_reasoning", "language_consistency", "reasoning RL, in one language"),
    ("rl_all", "accuracy", "R1"),
)


def page(run_dir: RunDir) -> str:
    """The whole page as HTML; sections without anything to show are left out."""
    recipe = run_dir.read_recipe()
    records = {name: run_dir.stage(name).record() for name in STAGES if name in recipe.stages}
    done = {name: record for name, record in records.items() if record}
    sections = [
        _section(
            "Stages",
            _stages_text(run_dir, recipe),
            (tables.stage_table(run_dir, recipe) + tables.unseen(run_dir)) if done else "",
        ),
        _section("Warnings", "", tables.warnings(run_dir)),
        _section(
            "Lineage", _LINEAGE, f'<div class="panel">{lineage.drawing(recipe, _notes(run_dir, done))}</div>'
        ),
        _section("Curves", _curves_text(recipe), _curves(run_dir, recipe)),
        _section("Within reach", _REACH, _reach(run_dir)),
        _section("The same problem, stage by stage", _SAMPLES, samples.side_by_side(run_dir)),
        _section("Students", _STUDENTS, students.tables(run_dir)),
        _section("Rejections by filter", _REJECTIONS, tables.rejections(run_dir)),
        _section("Expert load", _LOAD, _expert_load(run_dir, recipe)),
        _section("Language mix", _LANGUAGES, tables.languages(run_dir)),
        _section("Where the time went", "", tables.times(run_dir, recipe) + tables.rollouts(run_dir, recipe)),
        _section("Settings and versions", "", _facts(run_dir, recipe)),
    ]
    whole = set(plan(recipe)) == set(STAGES)
    title = escape(f"{recipe.name}: {'every stage' if whole else 'stages'} of DeepSeek-R1")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE.read_text(encoding='utf-8')}</style></head><body>"
        f"{_head(run_dir, recipe, done)}{''.join(sections)}</body></html>\n"
    )


_LINEAGE = (
    "Solid arrows carry weights, dashed ones carry samples, data or rewards. Blue boxes are policies, orange ones data "
    "sets, violet ones critics. evaluate reads every checkpoint."
)
_REACH = (
    "The share of problems that one of k samples gets right (pass@k), at the temperature of the marks: what reinforcement "
    "learning can find there before, and whether it only sharpens or goes further."
)
_SAMPLES = (
    "Responses of every checkpoint to the same held-out problem, sampled at the temperature of the marks. Grey is the "
    "thinking, the box is the answer; a green edge means right, a red one wrong."
)
_STUDENTS = (
    "What a student learnt from: the teacher's responses (sft), its distribution of them (logits), or its distribution of what the "
    "student answered itself (on_policy). Tokens carry a loss; the accuracy is that on held-out problems, one sample at temperature 1, "
    "with its 95 % interval."
)
_REJECTIONS = "What the filters refused. A response may be refused by several filters."
_LOAD = (
    "The router's bias, not a loss, keeps the experts evenly busy, in pretraining and in reinforcement learning alike. "
    "Each stage is drawn from its first to its last step."
)
_LANGUAGES = (
    "Words of the thinking that are in the language of the question, at the temperature of the marks."
)


def _section(title: str, text: str, body: str) -> str:
    if not body:
        return ""
    return f"<section><h2>{title}</h2>{f'<p>{escape(text)}</p>' if text else ''}{body}</section>"


def _head(run_dir: RunDir, recipe: Recipe, done: dict[str, dict[str, Any]]) -> str:
    marks = marks_of(run_dir)
    tiles = [
        f'<div class="tile"><b>{percent(value)} <small>%</small></b><span>{escape(label)}'
        f"{': accuracy' if key == 'accuracy' else ''}</span></div>"
        for name, key, label in TILES
        if (value := number(marks.get(name, {}).get(key))) is not None
    ]
    begun = {f"distill-{student.start}" for student in recipe.distill.students.values()}
    of_students = (
        number(row.get("accuracy"))
        for name, row in marks.items()
        if name.startswith("distill-") and name not in begun  # of those, others go on
    )
    known = [value for value in of_students if value is not None]
    if known:
        tiles.append(
            f'<div class="tile"><b>{percent(min(known))} <small>%</small></b><span>weakest student: accuracy</span></div>'
        )
    seconds = sum(record["stage_seconds"] for record in done.values())
    memory = max((record["peak_memory_bytes"] for record in done.values()), default=0)
    order = plan(recipe)
    state = "" if len(done) == len(order) else f", {len(done)} of {len(order)} stages done"
    facts = f"seed {recipe.seed}, {duration(seconds)}, at most {readable_bytes(memory)} of memory{state}"
    return (
        f"<header><h1>{escape(recipe.name)}</h1><p class='lead'>{escape(recipe.description)}<br>{escape(facts)}</p>"
        f'<div class="tiles">{"".join(tiles)}</div></header>'
    )


def _stages_text(run_dir: RunDir, recipe: Recipe) -> str:
    marks = marks_of(run_dir)
    problems = max((number(row.get("problems")) or 0 for row in marks.values()), default=0)
    if not problems:
        return "The marks come with the stage evaluate."
    config = recipe.evaluate
    text = (
        f"In % of {problems:,.0f} held-out problems, one sample each at temperature {config.temperature:g}; language: words "
        "of the thinking that are in the language of the question"
    )
    if any(number(row.get("pass@1")) is not None for row in marks.values()):
        text += (
            f"; pass@1 (mean of {config.k}), pass@{config.k} and maj@{config.k} at temperature {config.k_temperature:g} and "
            f"top-p {config.k_top_p:g}"
        )
    text += ". Harder: accuracy on harder levels. Helpful and harmless are judged by the task's oracle."
    return text


def _notes(run_dir: RunDir, done: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The second line of the boxes in the lineage drawing."""
    marks, notes = marks_of(run_dir), {}
    for name, record in done.items():
        accuracy = number(marks.get(name, {}).get("accuracy"))
        metrics = record["metrics"]
        if accuracy is not None:
            notes[name] = f"{percent(accuracy)} %"
        elif name in ("cold_start", "rejection"):
            notes[name] = f"{metrics['kept']:,} kept" if "kept" in metrics else "done"
        elif name == "judge" and number(metrics.get("agreement")) is not None:
            notes[name] = f"agrees {percent(metrics['agreement'])} %"
        elif name == "reward_models" and any(key.endswith("/accuracy") for key in metrics):
            notes[name] = (
                ", ".join(percent(metrics.get(f"{which}/accuracy")) for which in ("helpful", "safety")) + " %"
            )
        elif name == "distill":
            notes[name] = f"{sum(key.endswith('/parameters') for key in metrics)} students"
        else:
            notes[name] = "done"
    return notes


def _curves_text(recipe: Recipe) -> str:
    config = recipe.zero
    return (
        "Thin lines are single steps, thick ones their running mean. For GRPO the reward comes first: its loss is near 0 by "
        f"construction, because the advantages of a group sum to 0. The probability ratio of zero is taken per {config.ratio}, "
        f"with clip {config.clip:g} and KL coefficient {config.kl_coef:g}."
    )


def _curves(run_dir: RunDir, recipe: Recipe) -> str:
    """Reinforcement learning first, a panel as wide as the page for each stage; then what learns the next token."""
    broad, narrow = [], []
    for name in STAGES:
        rows = run_dir.stage(name).metrics() if name in recipe.stages else []
        if name in ("cold_start", "evaluate") or not rows:
            continue
        heading = f"<h3>{name} <small>{escape(STAGES[name].title)}</small></h3>"
        if isinstance(getattr(recipe, name), Grpo):
            picture = curves.figure(name, rows, curves.with_reward_terms(curves.GRPO_PANELS, rows))
            if picture:
                levels = curves.levels_figure(name, rows)
                shown = f"{heading}{picture}{levels}{samples.rollouts(run_dir, name)}"
                broad.append(f'<div class="panel">{shown}</div>')
            continue
        by_part = any("part" in row for row in rows)
        picture = (
            curves.figure(name, *_by_part(rows)) if by_part else curves.figure(name, rows, curves.LOSS_PANELS)
        )
        if picture:
            narrow.append(f'<div class="panel">{heading}{picture}</div>')
    return "".join(broad) + (f'<div class="panels">{"".join(narrow)}</div>' if narrow else "")


def _by_part(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[curves.Panel]]:
    """Rows and panels of a stage that trains several models: one panel for the loss of each."""
    names = list(dict.fromkeys(row["part"] for row in rows if "part" in row))
    renamed = [{"step": row["step"], f"loss/{row.get('part')}": row.get("loss")} for row in rows]
    return renamed, [curves.Panel(f"loss of {name}", {f"loss/{name}": name}) for name in names]


def _reach(run_dir: RunDir) -> str:
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in evaluation_rows(run_dir):
        if "reach" in row:
            found.setdefault(row["split"], {})[row["checkpoint"]] = row["reach"]
    picture = curves.reach_figure(found)
    return f'<div class="panel">{picture}</div>' if picture else ""


def _expert_load(run_dir: RunDir, recipe: Recipe) -> str:
    names = [
        name for name in STAGES if name in recipe.stages and name not in ("judge", "reward_models", "distill")
    ]
    picture = curves.load_figure({name: run_dir.stage(name).metrics() for name in names})
    return f'<div class="panel">{picture}</div>' if picture else ""


def _facts(run_dir: RunDir, recipe: Recipe) -> str:
    lineage_path = run_dir.stage("base").path / "lineage.json"
    facts: dict[str, Any] = {}
    if lineage_path.is_file():
        from training.files import read_json

        record = read_json(lineage_path)
        facts |= record["packages"] | {"code": record["code"]}
    facts |= {
        "tasks": ", ".join(recipe.task),
        "threads": recipe.threads,
        "device": recipe.device,
        "dtype": recipe.dtype,
    }
    lines = "".join(
        f"<div><span>{escape(str(name))}</span>{escape(str(value))}</div>" for name, value in facts.items()
    )
    written = (run_dir.path / "recipe.yaml").read_text(encoding="utf-8")
    return (
        f'<div class="facts">{lines}</div><details><summary>the resolved recipe</summary>'
        f"<pre>{escape(written)}</pre></details>"
    )
