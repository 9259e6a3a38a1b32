"""The whole recipe is checked before its first stage: what would stop a run after hours is one line at its start.

Types, ranges and choices of single settings are checked where a recipe is read (training.config), and whether every stage
gets the problems that it asks in training.needs. Here stands what takes more than one setting, a name of another module or
a file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

import r1kernels
from training import corpus, filters, optional, rewards, sinks, traces
from training.config import nearest, unknown
from training.engines.server import check_python
from training.engines.service import Service
from training.errors import UserError, named
from training.loops.loss import loss_arguments
from training.loops.optim import unfinished_warmup
from training.model import deepseek_config
from training.needs import check_needs, kinds_of
from training.own_rewards import own_rewards
from training.pipeline import POLICIES, STAGES, Stage, plan
from training.pretrained import check_pretrained
from training.recipe import (
    Base,
    Distill,
    Evaluate,
    Grpo,
    Lora,
    NextToken,
    Recipe,
    RlAll,
    Rollout,
    Zero,
    start_of,
)
from training.tasks import names as task_names
from training.tasks.problem import KINDS
from training.tokenizer import build_tokenizer

MASKS = "--return-sampling-mask"  # of vLLM: tells the tokens that top_p and top_k left
ANSWERING = tuple(name for name in POLICIES if name != "distill")  # one checkpoint, which answers questions
_STUDENT_NAME = re.compile(r"[\w.+]+(-[\w.+]+)*")


def check(recipe: Recipe, stages: Mapping[str, Stage] = STAGES, *, data: bool = True) -> list[str]:
    """Raises a UserError for what would stop the recipe on its way.

    Args:
        data: read the problems of the tasks too; False for a plan whose files are on another machine.

    Returns:
        What a person should know although nothing stops: one line each.
    """
    order = plan(recipe, stages)
    if recipe.name in ("", ".", "..") or "/" in recipe.name:
        raise UserError(f"name: expected the name of a folder, without slashes, got {recipe.name!r}")
    for name in order:
        _check_stage(name, getattr(recipe, name), recipe)
        if data:
            _check_folders(name, recipe)
    _check_tasks(recipe)
    _check_lora("model.lora", recipe.model.lora, recipe)
    _check_rollout(recipe.rollout)
    sinks.check(recipe)
    idle = [remark for name in order for remark in _idle(name, recipe)]
    if not data:
        return idle
    _check_own_rewards(order, recipe)
    return idle + check_needs(recipe, order)


def _check_stage(name: str, config: Any, recipe: Recipe) -> None:
    with named(f"{name}.filters"):
        filters.check_names(getattr(config, "filters", ()))
    for key in ("samples_from", "general_from"):
        _check_sources(f"{name}.{key}", getattr(config, key, []))
    if isinstance(config, Base) and not recipe.model.pretrained and not config.steps:
        raise UserError("base.steps: expected at least 1, for which the corpus is made, got 0")
    if isinstance(config, NextToken) and (name != "base" or not recipe.model.pretrained):
        _check_training(name, config)
        _check_optimizer(name, config, recipe)
    if isinstance(config, Base) and not recipe.model.pretrained:
        corpus.check_mix(config.corpus)
        deepseek_config(recipe.model, len(build_tokenizer()))
    if isinstance(config, Zero):
        for index, example in enumerate(config.examples):
            if not example.question.strip() or not example.response.strip():
                raise UserError(f"zero.examples[{index}]: expected a question and a response, got {example}")
    if isinstance(config, RlAll):
        _check_shares("rl_all.mix", config.mix, KINDS)
    if isinstance(config, Grpo):
        _check_grpo(name, config)
        _check_optimizer(name, config, recipe)
        _check_sampler(name, config, recipe.rollout)
        if recipe.model.lora.rank and config.reference_every:
            raise UserError(
                f"{name}.reference_every: expected 0 with model.lora, whose reference is the model without its adapters, got "
                f"{config.reference_every}"
            )
    if isinstance(config, Distill):
        _check_students(config, recipe)
    if isinstance(config, Evaluate):
        _check_evaluate(config, recipe)


def _check_evaluate(config: Evaluate, recipe: Recipe) -> None:
    if "test" not in config.splits:
        raise UserError(
            f"evaluate.splits: expected test among them, on which the marks are taken, got {config.splits}"
        )
    checkpoints = (*ANSWERING, *(f"distill-{student}" for student in recipe.distill.students))
    for each in config.reach_of:
        if each not in checkpoints:
            raise UserError(f"evaluate.reach_of: {unknown('checkpoint', each, checkpoints)}")


def _idle(name: str, recipe: Recipe) -> Iterator[str]:
    """What a stage has no use for, so that whoever sets it waits for an effect in vain."""
    config = getattr(recipe, name)
    longest = getattr(config, "max_new_tokens", 0)
    if not recipe.model.pretrained and "base" in recipe.stages and longest > recipe.model.max_length:
        yield (
            f"{name}.max_new_tokens = {longest}: the model reads {recipe.model.max_length} tokens (model.max_length), prompt and "
            "response together, and cuts responses there"
        )
    for each in fields(config):
        value, told = getattr(config, each.name), each.metadata
        if told.get("idle") and value not in (each.default, told.get("pretrained", each.default)):
            yield f"{name}.{each.name} = {value}: {told['help']}"
    if isinstance(config, NextToken | Grpo) and config.steps:
        trained = not (name == "base" and recipe.model.pretrained)
        if trained and (text := unfinished_warmup(name, config.warmup, config.steps)):
            yield text
    if isinstance(config, Distill):
        yield from _idle_students(config)
    if isinstance(config, Grpo) and config.sampling_rounds > 1 and config.keep_groups == "all":
        yield f"{name}.sampling_rounds = {config.sampling_rounds}: one round, for {name}.keep_groups=all asks for no spread"
    if isinstance(config, Grpo) and config.reference_every and not config.kl_coef:
        yield f"{name}.reference_every = {config.reference_every}: no reference is held, for {name}.kl_coef is 0"


def _idle_students(config: Distill) -> Iterator[str]:
    """Likewise of the distillation and its students."""
    for name, student in config.students.items():
        key = f"distill.students.{name}"
        if student.steps and (text := unfinished_warmup(key, student.warmup, student.steps)):
            yield text
    if config.divergence and all(config.method_of(name) == "sft" for name in config.students):
        yield f"distill.divergence = {config.divergence}: every student learns text (sft), none a distribution"
    if config.beta != Distill().beta and config.divergence != "jsd":
        yield f"distill.beta = {config.beta:g}: no mixture is made, for distill.divergence is not jsd"


def _check_sources(key: str, value: str | list[str]) -> None:
    for stage in [value] if isinstance(value, str) else value:
        if stage not in ANSWERING:
            raise UserError(
                f"{key}: expected one of {', '.join(ANSWERING)}, whose checkpoint answers, got {stage!r}"
            )


def _check_training(key: str, config: NextToken) -> None:
    if not config.steps and not config.epochs:
        raise UserError(f"{key}.steps: expected at least 1 where {key}.epochs is 0, got 0")
    if config.max_length == 1:
        raise UserError(f"{key}.max_length: expected 0, for as many as the model reads, or at least 2, got 1")


def _check_optimizer(key: str, config: NextToken | Grpo, recipe: Recipe) -> None:
    """What keeps moments in 8 bits is there and has whole tensors."""
    if config.optimizer == "adamw_8bit":
        optional.check_installed("bitsandbytes", f"{key}.optimizer: adamw_8bit")
        if recipe.parallel.shard > 1:
            raise UserError(
                f"{key}.optimizer: expected adamw with parallel.shard = {recipe.parallel.shard}, whose processes have parts of "
                "tensors, got adamw_8bit"
            )


def _check_students(config: Distill, recipe: Recipe) -> None:
    before: list[str] = []
    for name, sizes in config.students.items():
        if not _STUDENT_NAME.fullmatch(name):
            raise UserError(f"distill.students: expected names of letters and digits, got {name!r}")
        if sizes.start and sizes.start not in before:
            raise UserError(
                f"distill.students.{name}.start: expected a student listed before ({', '.join(before) or 'none is'}), got "
                f"{sizes.start!r}"
            )
        if sizes.start and sizes.pretrained:
            raise UserError(
                f"distill.students.{name}.pretrained: expected none with start, which is where it begins, got {sizes.pretrained!r}"
            )
        before.append(name)
        # rotary positions take pairs of a head
        if not sizes.pretrained and sizes.hidden_size % (2 * sizes.heads):
            raise UserError(
                f"distill.students.{name}.hidden_size: expected a multiple of twice heads = {sizes.heads}, got "
                f"{sizes.hidden_size}"
            )
        _check_training(f"distill.students.{name}", sizes)
        _check_optimizer(f"distill.students.{name}", sizes, recipe)
        _check_lora(f"distill.students.{name}.lora", sizes.lora, recipe)
        if sizes.lora.rank and not (sizes.pretrained or sizes.start):
            raise UserError(
                f"distill.students.{name}.lora.rank: expected 0 for a student from random weights, which adapters would leave as "
                f"they are, got {sizes.lora.rank}"
            )
        if config.data and config.method_of(name) == "on_policy":
            raise UserError(
                "distill.data: expected none with the method on_policy, for which students answer the problems of the tasks, got "
                f"{config.data!r}"
            )
        if not config.teacher and not (config.data and config.beginning_of(name).pretrained):
            raise UserError(
                f"distill.teacher: expected one where distill.students.{name} does not learn from a file with a tokenizer of its own"
            )


def _check_folders(name: str, recipe: Recipe) -> None:
    """What is no stage is the folder of a checkpoint, and traces can be read."""
    config = getattr(recipe, name)
    start = start_of(recipe, name)
    key = "teacher" if name == "distill" else "start"
    # a teacher that is none is the business of _check_students
    named_one = start or hasattr(config, "start")
    if named_one and start not in ANSWERING and not (start and (Path(start) / "config.json").is_file()):
        likely = nearest(start, ANSWERING, 0.6)
        raise UserError(
            f"{name}.{key}: expected one of {', '.join(ANSWERING)}, or the folder of a checkpoint, got {start!r}"
            + (f": did you mean {likely!r}?" if likely else "")
        )
    if start and start not in ANSWERING:
        check_pretrained(start, f"{name}.{key}")
    if name == "base" and recipe.model.pretrained:
        check_pretrained(recipe.model.pretrained, "model.pretrained")
    if getattr(config, "data", ""):
        with named(f"{name}.data"):
            traces.read(config.data)
    for student, sizes in getattr(config, "students", {}).items():
        if sizes.pretrained:
            check_pretrained(sizes.pretrained, f"distill.students.{student}.pretrained")


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
    with named(f"{name}.rewards"):
        rewards.check_terms(config.rewards)
    for kind in kinds_of(config):
        live = rewards.live_terms(kind, config.rewards)
        if not any(config.rewards.get(term) for term in live):
            raise UserError(
                f"{name}.rewards: expected a weight for one of {', '.join(live)}, which {kind} problems earn, got "
                f"{config.rewards}"
            )
    _try_loss(name, config)


def _check_own_rewards(order: list[str], recipe: Recipe) -> None:
    """The file of every reward of one's own can be imported, in the process that will call it."""
    tried: set[str] = set()
    for name in order:
        terms = getattr(getattr(recipe, name), "rewards", {})
        with named(f"{name}.rewards"), own_rewards(terms, recipe.reward_seconds) as own:
            for spec in own.keys() - tried:
                own[spec].process.start()
            tried |= own.keys()


def _check_sampler(name: str, config: Grpo, rollout: Rollout) -> None:
    """What is asked of the sampler's log-probs and kept sets is there."""
    if rollout.stale == "correct" and config.old_logprobs == "sampler":
        raise UserError(
            f"{name}.old_logprobs: expected recomputed with rollout.stale=correct, which weighs the sampler's log-probs against "
            "them, got sampler"
        )
    cut = [
        f"{key}={getattr(config, key)}"
        for key, all_ in (("top_p", 1), ("top_k", 0))
        if getattr(config, key) != all_
    ]
    if cut and rollout.engine == "vllm" and rollout.start and MASKS not in rollout.options:
        raise UserError(
            f"rollout.options: expected {MASKS} among them, so that the server tells what {name}.{cut[0]} left, got "
            f"{rollout.options}"
        )


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


def _check_lora(key: str, lora: Lora, recipe: Recipe) -> None:
    """Adapters can be made, and what is said of them belongs to some."""
    if not lora.rank:
        if lora != Lora():
            raise UserError(
                f"{key}.rank: expected at least 1 where other settings of {key} are given, got {lora}"
            )
        return
    optional.check_installed("peft", key)
    if lora.experts and lora.dropout:
        raise UserError(
            f"{key}.dropout: expected 0 with {key}.experts, for PEFT has none there, got {lora.dropout:g}"
        )
    if recipe.parallel.shard > 1:
        raise UserError(
            f"parallel.shard: expected 1 with {key}, whose adapters every process has whole, got {recipe.parallel.shard}"
        )


def _check_rollout(rollout: Rollout) -> None:
    """A server is asked for in one way, and only where it is the engine."""
    if rollout.engine == "vllm" and bool(rollout.url) == rollout.start:
        raise UserError(
            "rollout.engine: vllm takes either rollout.url=http://HOST:PORT of a server, or rollout.start=true, which starts one"
        )
    if rollout.engine != "vllm" and (rollout.url or rollout.start):
        raise UserError(
            f"rollout.engine: expected vllm, whose server rollout.url or rollout.start name, got {rollout.engine}"
        )
    if rollout.url:
        Service(rollout.url, rollout.timeout)
    if rollout.start:
        check_python(rollout.python)
