"""The model card of an exported checkpoint: what it was made from, stage by stage, and the marks it got."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from training.format import percent
from training.pipeline import STAGES
from training.recipe import Recipe
from training.report.marks import MARKS, MORE_MARKS, evaluation_rows
from training.run_dir import RunDir

COLUMNS = (*MARKS, *MORE_MARKS)


def card(run_dir: RunDir, name: str, adapters_of: str | None = None) -> str:
    """The text of README.md for the checkpoint `name` of a run ("zero", "distill-llama").

    adapters_of: the folder is one of PEFT, with adapters of this model; None: it is a whole model.
    """
    recipe = run_dir.read_recipe()
    stage = name.split("-")[0]
    rows = [row for row in evaluation_rows(run_dir) if row["checkpoint"] == name]
    base = adapters_of or recipe.model.pretrained or None
    data = ModelCardData(
        library_name="transformers" if adapters_of is None else "peft",
        base_model=base,
        pipeline_tag="text-generation",
        tags=["r1kernels", *([] if stage in ("base", "distill") else ["reinforcement-learning"])],
        model_name=f"{recipe.name}-{name}",
        eval_results=_results(rows, recipe) or None,
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {recipe.name}: {name}",
        f"{recipe.description}. The checkpoint of the stage `{stage}` ({STAGES[stage].title}) of a run with r1kernels."
        if recipe.description
        else f"The checkpoint of the stage `{stage}` ({STAGES[stage].title}) of a run with r1kernels.",
        "## Marks\n\n" + (_marks(rows) if rows else "This run has not evaluated it."),
        "## Lineage\n\n" + _lineage(run_dir, stage),
        "## Settings\n\n" + _settings(run_dir, stage, recipe),
        "## Versions\n\n" + _versions(run_dir, stage),
    ]
    text = "\n\n".join(parts) + "\n"
    return str(ModelCard(text))


def _results(rows: list[dict[str, Any]], recipe: Recipe) -> list[EvalResult]:
    """The marks as the hub reads them."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=task if ":" not in task else task.split(":")[0],
            dataset_name=f"{task}, {row['split']}",
            metric_type=mark,
            metric_value=row[mark],
        )
        for task in [", ".join(recipe.task)]
        for row in rows
        if row["language"] == "all"
        for mark, _ in COLUMNS
        if row.get(mark) is not None
    ]


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines)


def _marks(rows: list[dict[str, Any]]) -> str:
    shown = [(mark, title) for mark, title in COLUMNS if any(row.get(mark) is not None for row in rows)]
    header = ["split", "language", "problems", *(title for _, title in shown)]
    body = [
        [row["split"], row["language"], str(row["problems"]), *(percent(row.get(mark)) for mark, _ in shown)]
        for row in rows
    ]
    return "In % of held-out problems.\n\n" + _table(header, body)


def _ancestors(run_dir: RunDir, stage: str) -> list[str]:
    """The stages that one was made from, directly or not, and itself, in the order of the pipeline."""
    found: set[str] = set()
    waiting = [stage]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += list((run_dir.stage(name).record() or {}).get("inputs", {}))
    return [name for name in STAGES if name in found]


def _lineage(run_dir: RunDir, stage: str) -> str:
    body = []
    for name in _ancestors(run_dir, stage):
        record: Mapping[str, Any] = run_dir.stage(name).record() or {}
        config = record.get("config", {})
        start = config.get(name, {}).get("start", config.get(name, {}).get("teacher", ""))
        if name == "base":
            start = config.get("model", {}).get("pretrained", "")
        made_from = [
            *([start] if start and start not in record.get("inputs", {}) else []),
            *record.get("inputs", {}),
        ]
        files = [f"{brought} ({digest[:12]})" for brought, digest in config.get("files", {}).items()]
        body.append(
            [
                name,
                STAGES[name].title,
                ", ".join(made_from) or "nothing",
                ", ".join(files) or "-",
                str(record.get("hash", "not done"))[:12],
            ]
        )
    header = ["stage", "what it does", "made from", "files", "SHA-256"]
    return "Of every stage that it was made from; hashes are over all files that a stage wrote.\n\n" + _table(
        header, body
    )


def _settings(run_dir: RunDir, stage: str, recipe: Recipe) -> str:
    config = (run_dir.stage(stage).record() or {}).get("config", {})
    shown = {
        key: config[key]
        for key in ("seed", "dtype", "task", "system_prompt", "response_format", stage)
        if key in config
    }
    if (lora := config.get("model", {}).get("lora", {})).get("rank"):
        shown["lora"] = lora
    return f"```yaml\n{yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)}```"


def _versions(run_dir: RunDir, stage: str) -> str:
    from training import files

    path = run_dir.stage(stage).path / "lineage.json"
    written = files.read_json(path) if path.is_file() else {}
    packages = ", ".join(f"{name} {version}" for name, version in written.get("packages", {}).items())
    return f"Code {written.get('code', 'unknown')}; {packages}."
