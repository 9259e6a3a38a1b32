"""judge: SFT of the base model to read question, reference and response and to write the verdict as JSON.

The texts it learns from are responses that earlier checkpoints really gave to training problems, labelled by the
rule. Its agreement with the rule is measured on responses to held-out problems, right and wrong ones in equal number
from every checkpoint.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from training import notices, responses, rewards
from training.context import StageContext
from training.document import Document
from training.judge import Verdict, balance, document, is_hard, judge
from training.loops import next_token
from training.policy import load_policy, save_policy
from training.prompts import Turn
from training.response import parse
from training.rewards import Sample

SPLITS = {"data.jsonl": "train", "held_out.jsonl": "test"}


def run(context: StageContext) -> dict[str, Any]:
    """Collect responses, train, measure; writes checkpoint, data.jsonl and held_out.jsonl."""
    model, tokenizer = load_policy(context)
    for name, split in SPLITS.items():
        if not context.stage.has_data(name):
            context.stage.write_data(name, _collect(context, split))
    training_rows = context.stage.read_data("data.jsonl")
    documents = [
        Document(row["verdict"], [Turn(**turn) for turn in row["judge_prompt"]]) for row in training_rows
    ]
    metrics = next_token.train(model, tokenizer, documents, context.config, context)
    agreement = _measure(context, model, tokenizer)
    if agreement["agreement"] < context.config.minimum_agreement:
        notices.warn(
            "agreement",
            f"the judge agrees with the rule on {agreement['agreement']:.1%} of {agreement['held_out']} held-out responses, "
            f"less than the {context.config.minimum_agreement:.0%} of the recipe; {agreement['parsed']:.0%} of its verdicts can "
            "be read, and the others count as wrong",
        )
    save_policy(model, tokenizer, context)
    return {
        **metrics,
        **agreement,
        "documents": len(documents),
        "hard_negatives": sum(r["hard"] for r in training_rows),
    }


def _collect(context: StageContext, split: str) -> list[dict[str, Any]]:
    """Rows of sampled responses to problems of a split, labelled by the rule and balanced."""
    config, seed = context.config, context.recipe.seed
    pool = responses.problems(context.recipe, split, ("reasoning",))
    tasks = responses.tasks(context.recipe)
    count = config.prompts if split == "train" else math.ceil(config.held_out * config.prompts)
    asked = responses.choose(pool, count, seed, context.name, split)
    candidates: list[tuple[Sample, bool, str]] = []
    rows = {}

    def collected(stage: str) -> list[tuple[Sample, bool, dict[str, Any]]]:
        """Responses of a checkpoint, whether they are right, and their rows."""
        source = responses.load_source(stage, context.inputs[stage].path / "checkpoint", context.recipe)
        drawn = responses.draw(
            source,
            asked,
            context=context,
            samples=config.samples,
            temperature=config.temperature,
            max_new_tokens=config.max_new_tokens,
            seed_parts=(seed, context.name, split),
        )
        samples = [responses.as_sample(completion, source.response_format) for completion in drawn]
        right = [rewards.accuracy(sample, tasks).value == 1.0 for sample in samples]
        own = [responses.row(completion, source, seed) for completion in drawn]
        return list(zip(samples, right, own, strict=True))

    tokens = [float(len(asked) * config.samples * config.max_new_tokens)] * len(config.samples_from)
    found = responses.sampled_apart(collected, config.samples_from, tokens, [context.recipe.rollout])
    for stage, collection in zip(config.samples_from, found, strict=True):
        for sample, right, row in collection:
            candidates.append((sample, right, stage))
            rows[stage, sample.problem.id, sample.sample_id] = row
    chosen = balance(candidates, (seed, context.name, split))
    if not chosen:
        chosen = list({(each[0].problem.id, each[0].text): each for each in candidates}.values())
        notices.warn(
            f"balance {split}",
            f"no checkpoint gave both right and wrong responses to the {split} problems of the judge: all {len(chosen)} are "
            "taken as they are, and the judge learns little from them",
        )
    return [
        {
            **rows[stage, sample.problem.id, sample.sample_id],
            "right": right,
            "hard": is_hard(sample, right),
            "judge_prompt": [turn._asdict() for turn in text.prompt],
            "verdict": text.text,
        }
        for sample, right, stage in chosen
        for text in [document(sample, right)]
    ]


def _measure(context: StageContext, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Agreement of the judge with the rule on the held-out rows, overall and by checkpoint; adds sample rows."""
    rows = context.stage.read_data("held_out.jsonl")
    problems = responses.by_id(responses.problems(context.recipe, "test", ("reasoning",)))
    held_out = [
        Sample(
            problems[row["problem_id"]],
            row["response_text"],
            parse(row["response_text"], context.recipe.response_format),
            tuple(row["response_ids"]),
        )
        for row in rows
    ]
    verdicts = judge(model, tokenizer, held_out, context)
    agreed = Counter(
        row["stage"] for row, verdict in zip(rows, verdicts, strict=True) if verdict.correct == row["right"]
    )
    asked = Counter(row["stage"] for row in rows)
    context.stage.add_samples(_sample_row(row, verdict) for row, verdict in zip(rows, verdicts, strict=True))
    hard = [verdict for row, verdict in zip(rows, verdicts, strict=True) if row["hard"]]
    return {
        "held_out": len(rows),
        "agreement": sum(agreed.values()) / len(rows),
        "agreement_hard": sum(not verdict.correct for verdict in hard) / len(hard) if hard else None,
        "parsed": sum(verdict.parsed for verdict in verdicts) / len(rows),
        "agreement_by_stage": {stage: agreed[stage] / asked[stage] for stage in asked},
    }


def _sample_row(row: dict[str, Any], verdict: Verdict) -> dict[str, Any]:
    shown = ("problem_id", "language", "kind", "question", "stage", "right")
    return {
        **{name: row[name] for name in shown},
        "text": row["response_text"],
        "analysis": verdict.analysis,
        "correct": verdict.correct,
        "parsed": verdict.parsed,
    }
