"""The whole recipe is checked before its first stage: what would stop a run after hours is one line at its start.

Types, ranges and choices of single settings are checked where a recipe is read (training.config). Here stands what takes
more than one setting, a name of another module, or the data: every stage gets the problems that it asks.
"""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import r1kernels
from training import corpus, filters, responses, rewards, traces
from training.config import nearest, unknown
from training.errors import UserError
from training.loops.loss import loss_arguments
from training.model import deepseek_config
from training.pipeline import POLICIES, STAGES, Stage, parents_of, plan
from training.pretrained import pretrained_config
from training.recipe import Grpo, NextToken, Recipe, start_of
from training.tasks import names as task_names
from training.tasks.problem import KINDS, Problem
from training.tokenizer import build_tokenizer

WHERE = {"train": "to train on", "test": "held out for the test"}
GENERAL = ("helpful", "unsafe")
ANSWERING = tuple(name for name in POLICIES if name != "distill")  # one checkpoint, which answers questions
_STUDENT_NAME = re.compile(r"[\w.+]+(-[\w.+]+)*")


@dataclass(frozen=True)
class Need:
    """A stage cannot do without problems of one of these kinds in a split."""

    stage: str
    split: str
    kinds: tuple[str, ...]

    def __str__(self) -> str:
        return f"no {' and no '.join(self.kinds)} problems {WHERE[self.split]}"


def check(recipe: Recipe, stages: Mapping[str, Stage] = STAGES, *, data: bool = True) -> list[str]:
    """Raises a UserError for what would stop the recipe on its way.

    Args:
        data: read the problems of the tasks too; False for a plan whose files are on another machine.

    Returns:
        What a person should know although nothing stops: one line each.
    """
    order = plan(recipe, stages)
    for name in order:
        _check_stage(name, getattr(recipe, name), recipe)
        if data:
            _check_folders(name, recipe)
    _check_tasks(recipe)
    return _check_data(recipe, order) if data else []


def _check_stage(name: str, config: Any, recipe: Recipe) -> None:
    with _named(f"{name}.filters"):
        filters.check_names(getattr(config, "filters", ()))
    trains = isinstance(config, NextToken) and (name != "base" or not recipe.model.pretrained)
    if trains and not config.steps and not config.epochs:
        raise UserError(f"{name}.steps: expected at least 1 where {name}.epochs is 0, got 0")
    if trains and config.max_length == 1:
        raise UserError(
            f"{name}.max_length: expected 0, for as many as the model reads, or at least 2, got 1"
        )
    if trains and name == "base":
        corpus.check_mix(config.corpus)
        deepseek_config(recipe.model, len(build_tokenizer()))
    for index, example in enumerate(getattr(config, "examples", []) if name == "zero" else []):
        if not example.question.strip() or not example.response.strip():
            raise UserError(f"zero.examples[{index}]: expected a question and a response, got {example}")
    for key in ("samples_from", "general_from"):
        named = getattr(config, key, [])
        for stage in [named] if isinstance(named, str) else named:
            if stage not in ANSWERING:
                raise UserError(
                    f"{name}.{key}: expected one of {', '.join(ANSWERING)}, whose checkpoint answers, got {stage!r}"
                )
    if name == "evaluate" and "test" not in config.splits:
        raise UserError(
            f"evaluate.splits: expected test among them, on which the marks are taken, got {config.splits}"
        )
    if name == "rl_all":
        _check_shares("rl_all.mix", config.mix, KINDS)
    if isinstance(config, Grpo):
        _check_grpo(name, config)
    if name == "distill":
        for student, sizes in config.students.items():
            if not _STUDENT_NAME.fullmatch(student):
                raise UserError(f"distill.students: expected names of letters and digits, got {student!r}")
            if not sizes.pretrained and sizes.hidden_size % sizes.heads:
                raise UserError(
                    f"distill.students.{student}.hidden_size: expected a multiple of heads = {sizes.heads}, "
                    f"got {sizes.hidden_size}"
                )
            if not sizes.steps and not sizes.epochs:
                raise UserError(
                    f"distill.students.{student}.steps: expected at least 1 where epochs is 0, got 0"
                )


def _check_folders(name: str, recipe: Recipe) -> None:
    """What is no stage is the folder of a checkpoint, and traces can be read."""
    config = getattr(recipe, name)
    start = start_of(recipe, name)
    key = "teacher" if name == "distill" else "start"
    if start and start not in ANSWERING and not (Path(start) / "config.json").is_file():
        likely = nearest(start, ANSWERING, 0.6)
        raise UserError(
            f"{name}.{key}: expected one of {', '.join(ANSWERING)}, or the folder of a checkpoint, got {start!r}"
            + (f": did you mean {likely!r}?" if likely else "")
        )
    if getattr(config, "data", ""):
        with _named(f"{name}.data"):
            traces.read(config.data)
    for student, sizes in getattr(config, "students", {}).items():
        if sizes.pretrained:
            pretrained_config(sizes.pretrained, f"distill.students.{student}.pretrained")


def _check_grpo(name: str, config: Grpo) -> None:
    outputs = config.prompts * config.group_size
    if config.minibatches > outputs:
        raise UserError(
            f"{name}.minibatches: expected at most {outputs}, the responses of a step, got {config.minibatches}"
        )
    for step, longest in config.max_new_tokens_from.items():
        if step < 0 or longest < 1:
            raise UserError(
                f"{name}.max_new_tokens_from: expected steps from 0 with at least 1 token, got {step}: {longest}"
            )
    with _named(f"{name}.rewards"):
        rewards.check_terms(config.rewards)
    kinds = [kind for kind, share in getattr(config, "mix", {"reasoning": 1.0}).items() if share]
    for kind in kinds:
        live = rewards.live_terms(kind, config.rewards)
        if not any(config.rewards.get(term) for term in live):
            raise UserError(
                f"{name}.rewards: expected a weight for one of {', '.join(live)}, which {kind} problems earn, got "
                f"{config.rewards}"
            )
    _try_loss(name, config)


def _try_loss(name: str, config: Grpo) -> None:
    """Calls the loss op as a step will: it knows which variants, reductions and limits go together."""
    logp, mask = torch.zeros(2, 1), torch.ones(2, 1, dtype=torch.bool)
    arguments = loss_arguments(config, {"num_sequences": 2, "num_tokens": 2, "max_length": 1})
    try:
        r1kernels.grpo_loss(logp, logp, torch.tensor([1.0, -1.0]), mask, ref_logp=logp, **arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}.{re.sub(r'^clip_(low|high)', 'clip', str(error))}") from None


def _check_shares(key: str, shares: Mapping[str, float], known: tuple[str, ...]) -> None:
    for kind in shares:
        if kind not in known:
            raise UserError(f"{key}: {unknown('kind of problems', kind, known)}")
    if not shares or min(shares.values()) < 0 or not any(shares.values()):
        raise UserError(f"{key}: expected shares from 0, not all of them 0, got {shares}")


def _check_tasks(recipe: Recipe) -> None:
    """Options name a task of the recipe, or one of the embedded ones, whose options a recipe may leave behind."""
    for spec in recipe.task_options:
        if spec not in recipe.task and (":" in spec or spec not in task_names()):
            raise UserError(f"task_options: {unknown('task', spec, recipe.task)}")


def _check_data(recipe: Recipe, order: list[str]) -> list[str]:
    if not list(_needs(recipe, order)):
        return []
    with _named("task"):
        pools = _pools(recipe)
    for name in order:
        config = getattr(recipe, name)
        if isinstance(config, Grpo):
            kinds = [kind for kind, share in getattr(config, "mix", {"reasoning": 1.0}).items() if share]
            rewards.check_languages(
                f"{name}.rewards", config.rewards, [each for kind in kinds for each in pools["train"][kind]]
            )
    unmet = [need for need in _needs(recipe, order) if not _fed(need, pools)]
    if unmet:
        raise UserError(_unmet_text(recipe, order, unmet, pools))
    remarks = []
    for name in order:
        if name == "evaluate":
            remarks += [
                f"evaluate: the tasks have no problems of the split {split}, which is left out"
                for split in recipe.evaluate.splits
                if not any(pools[split].values())
            ]
        if name == "cold_start" and not recipe.zero.examples:
            remarks += [
                f"cold_start: {task.name} has no worked examples and zero.examples is empty, so that the route few_shot asks "
                "its bare questions"
                for task in responses.tasks(recipe).values()
                if (asked := [each for each in pools["train"]["reasoning"] if each.task == task.name])
                and not task.worked_examples(asked[0].language)
            ]
        if name == "reward_models":
            remarks += [
                f"reward_models: the tasks have {need}: there will be no model of that"
                for need in (Need(name, "train", (kind,)) for kind in GENERAL)
                if not _fed(need, pools)
            ]
    return remarks


def _pools(recipe: Recipe) -> dict[str, dict[str, list[Problem]]]:
    """Split -> kind -> problems of all tasks."""
    return {
        split: {kind: responses.problems(recipe, split, (kind,)) for kind in KINDS}
        for split in ("train", "test", "harder")
    }


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


def _fed(need: Need, pools: Mapping[str, Mapping[str, list[Problem]]]) -> bool:
    return any(pools[need.split][kind] for kind in need.kinds)


def _unmet_text(
    recipe: Recipe, order: list[str], unmet: list[Need], pools: Mapping[str, Mapping[str, list[Problem]]]
) -> str:
    """Which stages lack which problems, and the words that run the recipe without them."""
    missing: dict[str, list[str]] = {}
    for need in unmet:
        missing.setdefault(str(need).removeprefix("no "), []).append(need.stage)
    said = "; ".join(
        f"no task of the recipe has {what.replace(' and no ', ' or ')}, as {', '.join(dict.fromkeys(who))} needs"
        for what, who in missing.items()
    )
    ways = []
    if any(need.split == "test" for need in unmet):
        ways.append("raise the task's test_share or give it more problems")
    if any(set(need.kinds) <= set(GENERAL) for need in unmet):
        ways.append("add a task or rows of these kinds")
    possible, words = _possible(recipe, order, pools)
    if possible:
        ways.append(f"run without: {shlex.join(words)}")
    return f"{said} ({', '.join(recipe.task)}): {', or '.join(ways) or 'add a task that has them'}"


def _possible(
    recipe: Recipe, order: list[str], pools: Mapping[str, Mapping[str, list[Problem]]]
) -> tuple[list[str], list[str]]:
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


class _named:
    """A context manager that puts the key before the message of a UserError."""

    def __init__(self, key: str) -> None:
        self.key = key

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, UserError):
            raise UserError(f"{self.key}: {error}") from None
