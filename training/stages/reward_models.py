"""reward_models: the helpful model (pairwise, on the summary) and the safety model (pointwise, on the whole response).

Both learn from responses that checkpoints really gave to training problems, labelled by the oracle of
`training.preferences`. Their accuracy is measured on responses to held-out problems.
"""

from __future__ import annotations

import functools
from typing import Any

from training import estimate, notices, policy, preferences, responses, reward_model
from training.context import StageContext
from training.model import load
from training.parts import run_parts
from training.response import parse
from training.reward_model import Pair, Point
from training.tasks.problem import Problem

MODELS = {"helpful": "helpful", "safety": "unsafe"}  # model -> kind of the problems it learns from
SPLITS = {"data.jsonl": "train", "held_out.jsonl": "test"}


def run(context: StageContext) -> dict[str, Any]:
    """Collect and label responses, train both models, measure; writes checkpoint-helpful and checkpoint-safety.

    Of a kind that the tasks have no problems of, there is no model.
    """
    for name, split in SPLITS.items():
        if not context.stage.has_data(name):
            context.stage.write_data(name, _collect(context, split))
    start, config = context.checkpoint(context.config.start), context.config
    data_of = functools.cache(lambda name: [_data(context, file, name) for file in SPLITS])

    def operations(name: str) -> float:
        count = config.steps * config.batch_size or config.epochs * len(data_of(name)[0])
        length = estimate.length_of(config.max_new_tokens)
        return 3 * count * length * estimate.parameters(context.recipe).forward(length / 2)

    def train(part: StageContext, name: str) -> dict[str, Any]:
        language_model, tokenizer = load(start)
        model = reward_model.from_language_model(language_model)
        policy.adapted(model, part, context.recipe.model.lora)
        data, held_out = data_of(name)
        if data:
            metrics = reward_model.train(model, tokenizer, data, config, part)
        else:
            metrics = {"steps": 0}
            notices.warn(
                f"no {name} data",
                f"the checkpoints gave no good and bad {MODELS[name]} responses to choose between: the {name} model learns "
                "nothing and scores all alike",
            )
        folder = context.stage.path / f"checkpoint-{name}"
        policy.save(model, tokenizer, folder, policy.start_of(context))
        return {
            **metrics,
            "data": len(data),
            "held_out": len(held_out),
            "accuracy_train": reward_model.accuracy(model, tokenizer, data) if data else None,
            "accuracy": reward_model.accuracy(model, tokenizer, held_out) if held_out else None,
        }

    fed = [name for name, kind in MODELS.items() if responses.problems(context.recipe, "train", (kind,))]
    metrics = run_parts(context, fed, train, operations)
    return {f"{name}/{key}": value for name, found in metrics.items() for key, value in found.items()}


def _collect(context: StageContext, split: str) -> list[dict[str, Any]]:
    """Rows of responses to helpful and unsafe problems of a split, each with the oracle's label."""
    config, seed = context.config, context.recipe.seed
    asked = {
        kind: responses.choose(
            responses.problems(context.recipe, split, (kind,)),
            config.prompts,
            seed,
            context.name,
            split,
            kind,
        )
        for kind in MODELS.values()
    }
    samples = {"helpful": config.samples, "unsafe": config.unsafe_samples}
    # a call each: of each checkpoint, to the problems of each kind
    calls = [(stage, kind) for stage in config.samples_from for kind in asked]
    source_of = functools.lru_cache(maxsize=1)(functools.partial(_source, context))

    def collected(call: tuple[str, str]) -> list[dict[str, Any]]:
        stage, kind = call
        source = source_of(stage)
        drawn = responses.draw(
            source,
            asked[kind],
            context=context,
            samples=samples[kind],
            temperature=config.temperature,
            max_new_tokens=config.max_new_tokens,
            seed_parts=(seed, context.name, split),
        )
        labels = [
            preferences.oracle(each.problem, parse(each.text, source.response_format)) for each in drawn
        ]
        return [
            responses.row(each, source, seed, label=label) for each, label in zip(drawn, labels, strict=True)
        ]

    tokens = [float(len(asked[kind]) * samples[kind] * config.max_new_tokens) for _, kind in calls]
    found = responses.sampled_apart(collected, calls, tokens, [context.recipe.rollout])
    return [row for rows in found for row in rows]


def _source(context: StageContext, stage: str) -> responses.Source:
    return responses.load_source(stage, context.inputs[stage].path / "checkpoint", context.recipe)


def _data(context: StageContext, file: str, name: str) -> list[Pair] | list[Point]:
    """Pairs of summaries for the helpful model, points of whole responses for the safety model."""
    kind = MODELS[name]
    problems = responses.by_id(responses.problems(context.recipe, SPLITS[file], (kind,)))
    labelled: list[tuple[Problem, str, bool]] = []
    for row in context.stage.read_data(file):
        text = (
            parse(row["response_text"], context.recipe.response_format).summary
            if name == "helpful"
            else row["response_text"]
        )
        if row["kind"] == kind and text:
            labelled.append((problems[row["problem_id"]], text, row["label"]))
    key = (context.recipe.seed, context.name, file)
    if name == "helpful":
        return reward_model.make_pairs(labelled, context.config.pairs, key)
    return reward_model.make_points(labelled, key)
