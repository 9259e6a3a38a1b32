"""Which problems every stage asks, and whether the tasks of a recipe have them: said at the start, not after hours."""

from __future__ import annotations

import copy
import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training import prompts, responses, rewards
from training.encoder import Encoder
from training.errors import UserError, named
from training.pipeline import parents_of
from training.pretrained import SMOLLM2, pretrained_config, pretrained_tokenizer
from training.recipe import STAGE_NAMES, Grpo, Recipe, start_of
from training.tasks.problem import KINDS, Problem
from training.tokenizer import build_tokenizer

WHERE = {"train": "to train on", "test": "held out for the test"}
GENERAL = ("helpful", "unsafe")
Pools = Mapping[str, Mapping[str, list[Problem]]]  # split -> kind -> problems of all tasks


@dataclass(frozen=True)
class Need:
    """A stage cannot do without problems of one of these kinds in a split."""

    stage: str
    split: str
    kinds: tuple[str, ...]

    def __str__(self) -> str:
        return f"no {' and no '.join(self.kinds)} problems {WHERE[self.split]}"


def check_needs(recipe: Recipe, order: list[str]) -> list[str]:
    """Raises a UserError where the tasks lack problems that a stage of `order` asks; returns what is left out without harm."""
    if not list(_needs(recipe, order)):
        return []
    with named("task"):
        pools = _pools(recipe)
    for name in order:
        config = getattr(recipe, name)
        if isinstance(config, Grpo):
            asked = [each for kind in kinds_of(config) for each in pools["train"][kind]]
            rewards.check_languages(f"{name}.rewards", config.rewards, asked)
    unmet = [need for need in _needs(recipe, order) if not _fed(need, pools)]
    if unmet:
        raise UserError(_unmet_text(recipe, order, unmet, pools))
    _check_lengths(recipe, order, pools)
    return [remark for name in order for remark in _remarks(name, recipe, pools)]


def _check_lengths(recipe: Recipe, order: list[str], pools: Pools) -> None:
    """Raises a UserError where the model reads no prompt of a stage; of a model that is not here nothing is known."""
    spec = recipe.model.pretrained
    elsewhere = spec and spec != SMOLLM2 and not Path(spec).is_dir()
    if elsewhere or any((start_of(recipe, name) or "base") not in STAGE_NAMES for name in order):
        return
    positions: int | None = recipe.model.max_length
    if spec:
        positions = getattr(pretrained_config(spec).get_text_config(), "max_position_embeddings", None)
    if positions is None:
        return
    for need in _needs(recipe, order):
        prompt = responses.prompt_of(need.stage, recipe)
        asked = [each for kind in need.kinds for each in pools[need.split][kind]]
        # a byte is a token at most, and the other half is for the template: most tokenizers need not be loaded
        if any(len(prompts.plain(prompt(each)).encode()) <= positions // 2 for each in asked):
            continue
        encoder = Encoder(None, pretrained_tokenizer(spec) if spec else build_tokenizer())
        lengths: list[int] = []
        # if any fits, the first most often does
        for turns in sorted(map(prompt, asked), key=lambda turns: len(prompts.plain(turns))):
            lengths.append(len(encoder.prompt(turns).ids))
            if lengths[-1] <= positions:
                break
        else:
            raise UserError(
                f"{need.stage}: the prompts of all {len(asked)} problems {WHERE[need.split]} have at least {min(lengths)} tokens, and "
                f"the model reads {positions}"
            )


def kinds_of(config: Grpo) -> list[str]:
    """The kinds of problems that a stage of reinforcement learning asks."""
    return [kind for kind, share in getattr(config, "mix", {"reasoning": 1.0}).items() if share]


def _remarks(name: str, recipe: Recipe, pools: Pools) -> Iterator[str]:
    """What a stage goes without."""
    config: Any = getattr(recipe, name)
    there = len(pools["train"]["reasoning"])
    if name in ("zero", "rl_reasoning", "cold_start", "rejection") and there < config.prompts:
        yield f"{name}: asks {there} problems, all that there are to train on, not {name}.prompts={config.prompts}"
    if name == "evaluate":
        there = len(pools["test"]["reasoning"])
        if 0 < there < config.problems:
            yield f"evaluate: asks {there} problems, all that are held out, not evaluate.problems={config.problems}"
        for split in recipe.evaluate.splits:
            if not any(pools[split].values()):
                yield f"evaluate: the tasks have no problems of the split {split}, which is left out"
    if name == "reward_models":
        for kind in GENERAL:
            if not _fed(need := Need(name, "train", (kind,)), pools):
                yield f"reward_models: the tasks have {need}: there will be no model of that"
    if name == "cold_start" and not recipe.zero.examples:
        for task in responses.tasks(recipe).values():
            asked = [each for each in pools["train"]["reasoning"] if each.task == task.name]
            if asked and not task.worked_examples(asked[0].language):
                yield (
                    f"cold_start: {task.name} has no worked examples and zero.examples is empty, so that the route few_shot "
                    "asks its bare questions"
                )


def _pools(recipe: Recipe) -> Pools:
    """Split that a stage asks -> kind -> problems of all tasks."""
    splits = dict.fromkeys(("train", "test", *recipe.evaluate.splits))
    pools: Pools = {split: {kind: [] for kind in KINDS} for split in splits}
    for split, of_kinds in pools.items():
        for each in responses.problems(recipe, split, KINDS):
            of_kinds[each.kind].append(each)
    return pools


def _needs(recipe: Recipe, order: list[str]) -> Iterator[Need]:
    for name in order:
        if name in ("zero", "cold_start", "rl_reasoning", "judge", "rejection"):
            yield Need(name, "train", ("reasoning",))
        if name == "judge":
            yield Need(name, "test", ("reasoning",))
        if name == "reward_models":
            yield Need(name, "train", GENERAL)
        if name == "rl_all":
            yield from (Need(name, "train", (kind,)) for kind, share in recipe.rl_all.mix.items() if share)
        if name == "evaluate":
            yield Need(name, "test", KINDS)


def _fed(need: Need, pools: Pools) -> bool:
    return any(pools[need.split][kind] for kind in need.kinds)


def _unmet_text(recipe: Recipe, order: list[str], unmet: list[Need], pools: Pools) -> str:
    """Which stages lack which problems, and the words that run the recipe without them."""
    missing: dict[str, dict[str, None]] = {}
    for need in unmet:
        missing.setdefault(str(need).removeprefix("no "), {})[need.stage] = None
    said = "; ".join(
        f"no task of the recipe has {what.replace(' and no ', ' or ')}, as {', '.join(who)} need{'s' * (len(who) == 1)}"
        for what, who in missing.items()
    )
    ways = []
    if any(need.split == "test" for need in unmet):
        ways.append(_more_held_out(recipe))
    if any(set(need.kinds) <= set(GENERAL) for need in unmet):
        ways.append("add a task or rows of these kinds")
    possible, words = _possible(recipe, order, pools)
    if possible:
        ways.append(f"run without: {shlex.join(words)}")
    return f"{said} ({', '.join(recipe.task)}): {', or '.join(ways) or 'add a task that has them'}"


def _more_held_out(recipe: Recipe) -> str:
    """How a task comes to a larger test split, in the words of a command where its file has a share of it."""
    files = [spec for spec in recipe.task if spec.startswith("jsonl:")]
    if not files:
        return "give the task more problems"
    options = {**recipe.task_options, files[0]: {**recipe.task_options.get(files[0], {}), "test_share": 0.3}}
    word = f"task_options={json.dumps(options, ensure_ascii=False)}"
    return (
        f"hold out more of the problems, such as 3 of 10: {shlex.quote(word)}, or give the task more of them"
    )


def _possible(recipe: Recipe, order: list[str], pools: Pools) -> tuple[list[str], list[str]]:
    """The stages that the data can feed, and the words of a command that leave out the others."""
    fixed = copy.deepcopy(recipe)
    words = []
    mix = {kind: share for kind, share in recipe.rl_all.mix.items() if share and pools["train"][kind]}
    if mix and mix.keys() != recipe.rl_all.mix.keys() and "rl_all" in order:
        fixed.rl_all.mix = mix
        words.append("rl_all.mix={" + ", ".join(f"{kind}: {share:g}" for kind, share in mix.items()) + "}")
    starved = {need.stage for need in _needs(fixed, order) if not _fed(need, pools)}
    possible: list[str] = []
    for name in order:
        fixed.stages = [each for each in order if each not in starved]
        if name not in starved and set(parents_of(name, fixed)) <= set(possible):
            possible.append(name)
        else:
            starved.add(name)
    if "rl_all" not in possible:
        words = []
    return possible, [f"stages=[{','.join(possible)}]", *words] if possible != order else words
