"""cold_start: long chain-of-thought data by several routes, kept where it is right, readable and in one language.

few_shot: the model continues worked examples, those of the task in the language of the question or else those of zero. reflect: the
model is asked to reflect and verify. refine: the model answers its own prompt; zero mixes languages there, and words that the task's
dictionary has are translated into the language of the question. The first two are the base model's and the last is zero's, where the
recipe does not say otherwise. Every response is sampled; named rules (training/refine.py) put it into the special-token form, and
where they change it the row keeps what was sampled as `before`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from training import filters, prompts, responses, seeding
from training.context import StageContext
from training.errors import UserError
from training.loops.sample import Completion
from training.prompts import Prompter, Turns
from training.refine import refine
from training.response import parse
from training.responses import Source
from training.selection import nothing_kept
from training.tasks.problem import Problem, Task, Translator

EXAMPLES = 3  # rejected responses shown for each filter and route


def run(context: StageContext) -> dict[str, Any]:
    """Sample, refine, filter; writes data.jsonl and rejected.jsonl. Metrics: asked, kept and rejections of every route."""
    filters.check_names(context.config.filters)
    routes = context.config.routes
    tasks = responses.tasks(context.recipe)
    sources = {
        stage: responses.load_source(stage, context.inputs[stage].path / "checkpoint", context.recipe)
        for stage in dict.fromkeys(routes.values())
    }
    metrics: dict[str, Any] = {}
    kept_rows: list[dict[str, Any]] = []
    refused: Counter[str] = Counter()
    rejected_rows: list[dict[str, Any]] = []
    with context.progress.bar(len(routes), 0, context.name) as bar:
        for route, stage in routes.items():
            drawn = _draw(context, route, sources[stage], tasks)
            kept, rejected, rejections = _select(context, route, drawn, sources[stage], tasks)
            kept_rows += kept
            rejected_rows += rejected
            refused.update(rejections)
            metrics |= {f"{route}/asked": len(drawn), f"{route}/kept": len(kept)}
            metrics |= {f"{route}/rejected/{name}": count for name, count in rejections.items()}
            bar.advance(1, kept=len(kept), asked=len(drawn))
            if not kept:
                context.progress.say(f"{context.name}: nothing of the route {route} passed the filters")
    if not kept_rows:
        asked = sum(metrics[f"{route}/asked"] for route in routes)
        raise UserError(nothing_kept(context.name, asked, refused))
    context.stage.write_data("data.jsonl", kept_rows)
    context.stage.write_data("rejected.jsonl", rejected_rows)
    context.stage.log(step=0, **metrics)
    return {"asked": sum(metrics[f"{route}/asked"] for route in routes), "kept": len(kept_rows), **metrics}


def _draw(context: StageContext, route: str, source: Source, tasks: dict[str, Task]) -> list[Completion]:
    config, key = context.config, (context.recipe.seed, context.name, route)
    pool = responses.problems(context.recipe, "train", ("reasoning",))

    shown = [(example.question, example.response) for example in context.recipe.zero.examples]

    def few_shot(problem: Problem) -> Turns:
        examples = tasks[problem.task].worked_examples(problem.language) or shown
        order = seeding.numpy_rng(*key, "examples", problem.id).permutation(len(examples))
        return prompts.few_shot(problem, [examples[i] for i in order[: config.examples]])

    prompt: dict[str, Prompter] = {
        "few_shot": few_shot,
        "reflect": prompts.reflect,
        "refine": source.prompt,
    }
    return responses.draw(
        source,
        responses.choose(pool, config.prompts, *key, "problems"),
        context=context,
        samples=config.samples,
        seed_parts=key,
        prompt=prompt[route],
        **config.options(),
    )


def _select(
    context: StageContext, route: str, drawn: list[Completion], source: Source, tasks: dict[str, Task]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], Counter[str]]:
    """The rows that pass the recipe's filters after refinement, examples of those that do not, and counts by filter."""
    rows, samples = {}, []
    for completion in drawn:
        problem = completion.problem
        task = tasks[problem.task]
        known = (
            task.dictionary(problem.language) if route == "refine" and isinstance(task, Translator) else {}
        )
        text, rules = refine(completion.text, problem, known)
        sample = responses.as_sample(completion, source.response_format)
        samples.append(replace(sample, text=text, response=parse(text, source.response_format)))
        refined = {"before": completion.text, "rules": rules} if rules else {}
        row = responses.row(completion, source, context.recipe.seed, route=route, **refined)
        rows[completion.problem.id, completion.sample_id] = {**row, "response_text": text}
    kept, rejections, examples = filters.apply(
        samples, context.config.filters, filters.Settings(task=tasks), examples=EXAMPLES
    )
    rejected = [
        {"filter": name, "reason": reason, **rows[sample.problem.id, sample.sample_id]}
        for name, shown in examples.items()
        for sample, reason in shown
    ]
    return [rows[sample.problem.id, sample.sample_id] for sample in kept], rejected, rejections
