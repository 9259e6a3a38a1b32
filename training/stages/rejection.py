"""rejection: many responses of rl_reasoning, of which the right and readable ones become SFT data, and general data.

Most reasoning problems are checked by the rule; a share is checked by the generative judge alone, as if no rule
existed for them, and how often the rule contradicts it is reported. Questions that need no reasoning (writing, facts,
translation, self-knowledge, greetings, secrets) are answered by an earlier checkpoint; all of those answers are
filtered for readability, and a share of them by the oracle. Their thinking, where they have some, is put into the
special-token form. Data: reasoning to general as the recipe says.
"""

from __future__ import annotations

from typing import Any

from training import filters, judge, responses, rewards, seeding
from training.context import StageContext
from training.errors import UserError
from training.loops.sample import Completion
from training.model import load
from training.refine import special_token_form
from training.responses import Source, as_sample
from training.selection import Selection, in_share, nothing_kept, select
from training.tasks.problem import Problem


def run(context: StageContext) -> dict[str, Any]:
    """Sample, judge, filter, mix; writes data.jsonl and rejected.jsonl."""
    source = responses.load_source(
        "rl_reasoning", context.inputs["rl_reasoning"].path / "checkpoint", context.recipe
    )
    reasoning, contradicted = _reasoning(context, source)
    general = _general(context, len(reasoning.kept))
    if not reasoning.kept + general.kept:
        raise UserError(
            nothing_kept(
                context.name, reasoning.asked + general.asked, reasoning.rejections + general.rejections
            )
        )
    context.stage.write_data("data.jsonl", reasoning.kept + general.kept)
    context.stage.write_data("rejected.jsonl", reasoning.examples + general.examples)
    judged = sum(row["checked_by"] == "judge" for row in reasoning.kept)
    return {
        "asked": reasoning.asked + general.asked,
        "kept": len(reasoning.kept) + len(general.kept),
        "reasoning_asked": reasoning.asked,
        "reasoning_kept": len(reasoning.kept),
        "kept_by_judge": judged,
        "kept_by_judge_wrong_by_rule": contradicted,
        "general_asked": general.asked,
        "general_kept": len(general.kept),
        "rejections": dict(reasoning.rejections + general.rejections),
    }


def _reasoning(context: StageContext, source: Source) -> tuple[Selection, int]:
    """The selected reasoning responses, and how many of those that the judge passed are wrong by the rule."""
    config, seed = context.config, context.recipe.seed
    tasks = responses.tasks(context.recipe)
    pool = responses.problems(context.recipe, "train", ("reasoning",))
    asked = responses.choose(pool, config.prompts, seed, context.name)
    drawn = responses.draw(
        source,
        asked,
        context=context,
        samples=config.samples,
        seed_parts=(seed, context.name),
        **config.options(),
    )
    split: dict[bool, list[Completion]] = {False: [], True: []}
    for completion in drawn:
        judged = in_share(completion.problem.id, config.judged_share, seed, context.name, "judged")
        split[judged].append(completion)
    judge_model, judge_tokenizer = load(context.inputs["judge"].path / "checkpoint")
    to_judge = [as_sample(completion, source.response_format) for completion in split[True]]
    said = judge.judge(judge_model, judge_tokenizer, to_judge, context)
    verdicts = {
        (sample.problem.id, sample.sample_id): verdict.correct if verdict.parsed else None
        for sample, verdict in zip(to_judge, said, strict=True)
    }
    settings = filters.Settings(task=tasks, verdicts=verdicts, paragraph_words=config.paragraph_words)
    by_rule = select(split[False], source, seed, config.filters, settings, checked_by="rule")
    by_judge = select(split[True], source, seed, config.filters, settings, checked_by="judge")
    kept = {(row["problem_id"], row["sample_id"]) for row in by_judge.kept}
    contradicted = sum(
        rewards.accuracy(sample, tasks).value != 1.0
        for sample in to_judge
        if (sample.problem.id, sample.sample_id) in kept
    )
    by_rule.add(by_judge)
    return by_rule, contradicted


def _general(context: StageContext, reasoning_kept: int) -> Selection:
    """Selected responses to helpful and unsafe questions, as many as the share of the recipe asks for, every problem in turn."""
    config, seed = context.config, context.recipe.seed
    pool = responses.problems(context.recipe, "train", ("helpful", "unsafe"))
    if not pool or not config.general_share:
        return Selection()
    stage = config.general_from
    source = responses.load_source(stage, context.inputs[stage].path / "checkpoint", context.recipe)
    drawn = responses.draw(
        source,
        pool,
        context=context,
        samples=config.samples,
        seed_parts=(seed, context.name, "general"),
        prompt=responses.prompt_of(context.name, context.recipe),
        **config.options(),
    )
    settings = filters.Settings(paragraph_words=config.paragraph_words)
    split: dict[bool, list[Completion]] = {True: [], False: []}
    for completion in drawn:
        checked = in_share(completion.problem.id, config.general_checked, seed, context.name, "checked")
        split[checked].append(completion)
    found = select(split[True], source, seed, config.filters, settings, checked_by="oracle")
    found.add(select(split[False], source, seed, config.filters, settings, checked_by="nobody"))
    wanted = round(reasoning_kept * config.general_share / (1 - config.general_share))
    by_id = responses.by_id(pool)
    chosen = _in_turn(found.kept, wanted, seed, context.name)
    found.kept = [_in_special_form(row, by_id[row["problem_id"]]) for row in chosen]
    return found


def _in_turn(rows: list[dict[str, Any]], count: int, *key: int | str) -> list[dict[str, Any]]:
    """At most `count` rows: one of every problem in a keyed order, then the second ones, and so on."""
    turns: dict[str, int] = {}
    ranked: list[tuple[int, int, dict[str, Any]]] = []
    for index in seeding.numpy_rng(*key, "general").permutation(len(rows)):
        turn = turns.get(rows[index]["problem_id"], 0)
        turns[rows[index]["problem_id"]] = turn + 1
        ranked.append((turn, len(ranked), rows[index]))
    return [row for _, _, row in sorted(ranked, key=lambda entry: entry[:2])[:count]]


def _in_special_form(row: dict[str, Any], problem: Problem) -> dict[str, Any]:
    """The row with its thinking in the special-token form; where that changes it, it keeps what was sampled."""
    text = special_token_form(row["response_text"], problem)
    if text == row["response_text"]:
        return row
    return {
        **row,
        "before": row["response_text"],
        "rules": [special_token_form.__name__],
        "response_text": text,
    }
