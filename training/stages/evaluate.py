"""evaluate: the marks of every checkpoint that answers questions, on held-out problems and on a harder level.

The marks of the report are taken at `temperature` with one sample a problem; beside them stand pass@1 (mean of k), pass@k
and maj@k at T 0.6 and top-p 0.95, and greedy accuracy. Where the recipe says so, pass@k at `temperature` up to a large k shows
what sampling reaches. Helpful and harmless are judged by the tasks' oracle.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from training import evaluation, notices, preferences, responses, rewards
from training.context import StageContext
from training.recipe import Evaluate, Recipe
from training.responses import Source
from training.rewards import Sample
from training.tasks.problem import Problem, Task

# stages whose checkpoints score or judge and answer nothing themselves
NO_POLICY = (
    "judge",
    "reward_models",
)
SHOWN = ("accuracy", "format", "language_consistency", "helpful", "harmless")
SAMPLES_SHOWN = 8  # responses of every checkpoint in samples.jsonl


def run(context: StageContext) -> dict[str, Any]:
    """Evaluate the checkpoints of all parents; writes evaluation.jsonl, one row per checkpoint, split and language."""
    checkpoints = {
        name: (parent, path)
        for parent, stage in context.inputs.items()
        if parent not in NO_POLICY
        for name, path in stage.checkpoints().items()
    }
    state = context.stage.load_state()
    rows: list[dict[str, Any]] = list(state.counters["rows"]) if state else []
    finished = {row["checkpoint"] for row in rows}
    if "test" in context.config.splits and not responses.problems(context.recipe, "test", ("reasoning",)):
        notices.warn(
            "empty_test_split", "no reasoning problems are held out, so there are no marks (see test_share)"
        )
    with context.progress.bar(len(checkpoints), len(finished), context.name) as bar:
        for name, (parent, path) in checkpoints.items():
            if name in finished:
                continue
            new, samples = marks(
                responses.load_source(parent, path, context.recipe),
                name,
                context.recipe,
                context.config,
                context,
            )
            rows += new
            context.stage.add_samples(samples)
            context.stage.save_state(len(rows), {}, {"rows": rows})
            errors = sum(row["reward_errors"] for row in new if row["language"] == "all")
            if errors:
                context.progress.say(f"{name}: the check raised on {errors} responses, which count as wrong")
            bar.advance(1, **{key: new[0][key] for key in SHOWN if new[0][key] is not None})
    context.stage.write_data("evaluation.jsonl", rows)
    test = [row for row in rows if row["split"] == "test" and row["language"] == "all"]
    return {f"{row['checkpoint']}/{key}": row[key] for row in test for key in SHOWN if row[key] is not None}


def marks(
    source: Source, name: str, recipe: Recipe, config: Evaluate, context: StageContext | None = None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """All marks of one checkpoint.

    On "test", config.problems reasoning problems are asked once at config.temperature, the first k_problems of them k times
    at k_temperature and k_top_p, and once greedily; on any other split k_problems are asked in all three ways. Helpful and
    unsafe problems are all asked once at config.temperature.

    context: of the stage that asks, whose folder keeps the responses until it is done.

    Returns:
        rows for each split and language ("all" first), None where a mark has no problems; some responses for samples.jsonl.
    """
    tasks = responses.tasks(recipe)
    split: str
    asked: dict[str, list[Problem]] = {}
    calls: dict[tuple[str, str], dict[str, Any]] = {}
    for split in config.splits:
        count = config.problems if split == "test" else config.k_problems
        pool = responses.problems(recipe, split, ("reasoning",))
        reasoning = responses.choose(pool, count, recipe.seed, "evaluate", split)
        general = responses.problems(recipe, split, ("helpful", "unsafe"))
        if not reasoning and not general:  # said at the start of the run
            continue
        asked[split] = reasoning
        few = reasoning[: config.k_problems]
        ways = {
            "once": ([*reasoning, *general], 1, config.temperature, config.top_p),
            "repeated": (few, config.k, config.k_temperature, config.k_top_p),
            "greedy": (few, 1, 0.0, 1.0),
        }
        if config.reach and name in config.reach_of:
            often = reasoning[: config.reach_problems]
            ways["reach"] = (often, config.reach, config.temperature, config.top_p)
        for way, (problems, samples, temperature, top_p) in ways.items():
            calls[split, way] = {
                "source": source,
                "asked": problems,
                "samples": samples,
                "temperature": temperature,
                "top_p": top_p,
                "seed_parts": (recipe.seed, "evaluate", split, way),
            }
    drawn = responses.draw_each(
        list(calls.values()),
        context=context,
        top_k=config.top_k,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
    )
    found = {
        call: [responses.as_sample(completion, source.response_format) for completion in completions]
        for call, completions in zip(calls, drawn, strict=True)
    }
    rows, shown = [], []
    for split, reasoning in asked.items():
        measured = [found[split, way] for way in ("once", "repeated", "greedy")]
        for language in ("all", *sorted({problem.language for problem in reasoning})):
            once, repeated, greedy = (
                [s for s in way if language in ("all", s.problem.language)] for way in measured
            )
            mark = _row(once, repeated, greedy, config.k, tasks)
            rows.append({"checkpoint": name, "split": split, "language": language, **mark})
            if language == "all":
                rows[-1] |= _reach(found.get((split, "reach"), []), config.reach, tasks)
        shown += [_shown(sample, name, split, tasks) for sample in measured[0][:SAMPLES_SHOWN]]
    return rows, shown


def _reach(drawn: list[Sample], most: int, tasks: Mapping[str, Task]) -> dict[str, Any]:
    """`reach` (k as text -> pass@k, up to `most`) and the number of problems behind it, where any were drawn for it."""
    verdicts: dict[str, list[bool]] = defaultdict(list)
    for sample in drawn:
        verdicts[sample.problem.id].append(_right(sample, tasks))
    if not verdicts:
        return {}
    return {"reach": evaluation.reach(list(verdicts.values()), most), "reach_problems": len(verdicts)}


def _row(
    once: list[Sample], repeated: list[Sample], greedy: list[Sample], k: int, tasks: Mapping[str, Task]
) -> dict[str, Any]:
    reasoning = [sample for sample in once if sample.problem.kind == "reasoning"]
    right = [_right(sample, tasks) for sample in reasoning]
    formed = [rewards.format(sample).value == 1.0 for sample in reasoning]
    groups: dict[str, list[Sample]] = defaultdict(list)
    for sample in repeated:
        groups[sample.problem.id].append(sample)
    verdicts = [[_right(sample, tasks) for sample in group] for group in groups.values()]
    answers = [[sample.response.answer for sample in group] for group in groups.values()]
    low, high = evaluation.wilson(sum(right), len(right))
    greedily = [_right(sample, tasks) for sample in greedy]
    greedy_low, greedy_high = evaluation.wilson(sum(greedily), len(greedily))
    oracle = {
        kind: [preferences.oracle(s.problem, s.response) for s in once if s.problem.kind == kind]
        for kind in ("helpful", "unsafe")
    }
    return {
        "problems": len(reasoning),
        "accuracy": _share(right),
        "wilson_low": low,
        "wilson_high": high,
        "format": _share(formed),
        "language_consistency": _share([rewards.language_consistency(sample).value for sample in reasoning]),
        "well_formed_and_right": _share([a and b for a, b in zip(right, formed, strict=True)]),
        "length": _share([len(sample.token_ids) for sample in reasoning]),
        "finished": _share([sample.finished for sample in reasoning]),
        "k": k,
        "pass@1": evaluation.pass_at_1(verdicts) if verdicts else None,
        "pass@k": evaluation.pass_at_k(verdicts, k) if verdicts else None,
        "maj@k": evaluation.maj_at_k(answers, verdicts) if verdicts else None,
        "greedy": _share(greedily),
        "greedy_problems": len(greedily),
        "greedy_low": greedy_low,
        "greedy_high": greedy_high,
        "helpful": _share(oracle["helpful"]),
        "harmless": _share(oracle["unsafe"]),
        "reward_errors": sum(
            rewards.accuracy(s, tasks).value is None for s in (*reasoning, *repeated, *greedy)
        ),
    }


def _right(sample: Sample, tasks: Mapping[str, Task]) -> bool:
    return rewards.accuracy(sample, tasks).value == 1.0


def _share(values: Sequence[float | bool | None]) -> float | None:
    """The mean of what is known; None where nothing is."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _shown(sample: Sample, name: str, split: str, tasks: Mapping[str, Task]) -> dict[str, Any]:
    """A row of samples.jsonl; the same problems for every checkpoint, so that they can be read side by side."""
    parts = {
        "format": rewards.format(sample).value,
        "language_consistency": rewards.language_consistency(sample).value,
    }
    if sample.problem.kind == "reasoning":
        parts["accuracy"] = rewards.accuracy(sample, tasks).value
    return {
        "checkpoint": name,
        "split": split,
        "problem_id": sample.problem.id,
        "language": sample.problem.language,
        "kind": sample.problem.kind,
        "question": sample.problem.question,
        "text": sample.text,
        "rewards": parts,
        "finished": sample.finished,
    }
