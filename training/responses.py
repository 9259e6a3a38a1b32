"""Responses of a checkpoint: problems in, samples and provenance rows out.

What several stages share: which problems a recipe has, which prompt a checkpoint was trained with, how a completion
becomes a `Sample` for rewards and filters, and the data row that says where a response came from.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from training import checkpoint, engines, notices, prompts, seeding, sources
from training.context import StageContext
from training.encoder import Encoder
from training.errors import UserError
from training.loops.sample import Completion, Prompt, room
from training.model import load
from training.parallel import ranks
from training.pieces import sample_in_pieces
from training.prompts import Prompter
from training.recipe import Recipe, Rollout
from training.response import parse
from training.rewards import Sample
from training.tasks import get_task
from training.tasks.own import OwnTask
from training.tasks.problem import Problem, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

T = TypeVar("T")
R = TypeVar("R")

# Checkpoints that know the R1-Zero template; all later ones answer the plain chat prompt.
ZERO_PROMPT = ("base", "zero")
BATCH_SIZE = 256  # sequences in flight
MEASURED = 1024  # prompts whose tokens are in memory at once
# tokens of the longest call that ranks make apart: one that has no more to do waits for the others' last ones
APART = 2**18


@dataclass
class Source:
    """A checkpoint to sample from: the stage that made it, its model and tokenizer, the hash of its files, the prompt that it
    answers and the name of that, where its answers stand, and who draws them."""

    stage: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    hash: str
    prompt: Prompter
    style: str = "chat"
    response_format: str = "answer_tags"
    rollout: Rollout = field(default_factory=Rollout)


def load_source(stage: str, path: Path, recipe: Recipe, style: str | None = None) -> Source:
    """Load the checkpoint folder `path`, of the named stage or of none.

    style: the prompt that it shall answer, of prompts.STYLES; None: the one that is noted in the folder, else that of the stage.
    """
    own = style_of(stage, recipe)
    noted = {**own, "prompt": style} if style else checkpoint.read_style(path) or own
    model, tokenizer = load(path)
    made = checkpoint.checkpoint_hash(path)
    return Source(
        stage,
        model,
        tokenizer,
        made,
        prompter(noted),
        noted["prompt"],
        recipe.response_format,
        recipe.rollout,
    )


def tasks(recipe: Recipe) -> dict[str, Task]:
    """The tasks of a recipe by name. A file of problems is read once in a process, until it changes."""
    brought = sources.hashes(
        {spec: path for spec in recipe.task if (path := sources.path_of(spec)) is not None}
    )
    made = [
        _made(spec, json.dumps(recipe.task_options.get(spec, {}), sort_keys=True), brought.get(spec, ""))
        for spec in recipe.task
    ]
    for task in made:
        if isinstance(task, OwnTask):
            task.limit(recipe.reward_seconds)
    return {task.name: task for task in made}


@lru_cache(maxsize=32)
def _made(spec: str, options: str, content: str) -> Task:
    """A task by all that decides what it is: its name, its options (JSON) and the hash of its file."""
    return get_task(spec, **json.loads(options))


def problems(recipe: Recipe, split: str, kinds: Iterable[str]) -> list[Problem]:
    """All problems of a recipe in a split, of some kinds ("reasoning", "helpful", "unsafe"), behind its system prompt.

    A problem that two tasks have counts once.

    Raises:
        UserError: two different problems have one id.
    """
    wanted = frozenset(kinds)
    found: dict[str, Problem] = {}
    for task in tasks(recipe).values():
        for each in task.problems(split):
            first = found.setdefault(each.id, each)
            if first is not each and replace(first, task=each.task) != each:
                raise UserError(f"{first.task} and {each.task} have different problems of the id {each.id!r}")
    chosen = [each for each in found.values() if each.kind in wanted]
    if not recipe.system_prompt:
        return chosen
    return [replace(each, before=prompts.with_system(each.before, recipe.system_prompt)) for each in chosen]


def choose(pool: Sequence[Problem], count: int, *seed_parts: int | str) -> list[Problem]:
    """`count` problems of the pool without repetition (all of them where there are fewer), keyed by seed_parts."""
    order = seeding.numpy_rng(*seed_parts).permutation(len(pool))[:count]
    return [pool[index] for index in order]


def style_of(stage: str, recipe: Recipe) -> dict[str, Any]:
    """The prompt that a stage trains with, as it is noted in its checkpoint's folder."""
    examples = [[example.question, example.response] for example in recipe.zero.examples]
    name = "zero" if stage in ZERO_PROMPT else "chat"
    return {"prompt": name, "examples": examples, "response_format": recipe.response_format}


def prompt_of(stage: str, recipe: Recipe) -> Prompter:
    """The prompt that the checkpoint of a stage answers."""
    return prompter(style_of(stage, recipe))


def prompter(noted: Mapping[str, Any]) -> Prompter:
    """A prompt as it is noted in a checkpoint's folder."""
    return prompts.style(**{"name" if key == "prompt" else key: value for key, value in noted.items()})


def fitting(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, asked: Sequence[Problem], prompt: Prompter
) -> list[Problem]:
    """The problems whose prompts the model can read; a warning counts the others."""
    encoder = Encoder(model, tokenizer)

    def measure(own: Sequence[Problem]) -> list[int]:
        if encoder.positions is None:
            return [0] * len(own)
        parts = (own[start : start + MEASURED] for start in range(0, len(own), MEASURED))
        return [len(each.ids) for part in parts for each in encoder.prompts(map(prompt, part))]

    lengths = ranks.spread(measure, asked)
    fit = [each for each, length in zip(asked, lengths, strict=True) if room(encoder, length) >= 1]
    if len(fit) < len(asked):
        text = (
            f"{len(asked) - len(fit)} of {len(asked)} problems are left out: their prompts have up to {max(lengths)} tokens, "
            f"and the model reads {encoder.positions}"
        )
        if not fit:
            raise UserError(text)
        notices.warn("long prompts", text)
    return fit


def draw(
    source: Source,
    asked: Sequence[Problem],
    *,
    context: StageContext | None = None,
    samples: int,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
    max_new_tokens: int,
    seed_parts: tuple[int | str, ...],
    batch_size: int = BATCH_SIZE,
    prompt: Prompter | None = None,
) -> list[Completion]:
    """Sample `samples` responses to every problem that fits, with the prompt of the source unless one is given.

    context: of the stage that asks, whose folder keeps what is drawn until it is done; None keeps nothing.
    """
    write = prompt or source.prompt
    fit = fitting(source.model, source.tokenizer, asked, write)
    with closing(engines.connect(source.rollout, source.model, source.tokenizer)) as engine:
        return sample_in_pieces(
            context,
            source.hash,
            engine,
            [Prompt(each, write(each)) for each in fit],
            samples=samples,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            max_new_tokens=max_new_tokens,
            seed_parts=(*seed_parts, source.stage),
            batch_size=batch_size,
        )


def draw_each(calls: Sequence[Mapping[str, Any]], **same: Any) -> list[list[Completion]]:
    """`draw` with each of the `calls`, no two of them alike, its arguments beside `same`; see `sampled_apart`."""
    tokens = [
        float(len(call["asked"]) * how["samples"] * how["max_new_tokens"])
        for call in calls
        for how in [{**same, **call}]
    ]
    rollouts = [call["source"].rollout for call in calls]
    return sampled_apart(lambda call: draw(**call, **same), calls, tokens, rollouts)


def sampled_apart(
    work: Callable[[T], R], items: Sequence[T], tokens: Sequence[float], rollouts: Iterable[Rollout]
) -> list[R]:
    """`work` of each item, in order, which samples at most so many `tokens`. Ranks do whole items where these are short and divide
    evenly: of a short call, half the problems take more than half the time.

    work: returns what can be pickled. rollouts: of the engines that draw.
    """

    def heard(item: T) -> tuple[list[tuple[str, str]], R]:
        told: list[tuple[str, str]] = []
        with notices.listening(lambda kind, text: told.append((kind, text))):
            return told, work(item)

    # rank 0 alone speaks to a server
    in_process = all(each.engine == "transformers" for each in rollouts)
    short = max(tokens, default=0.0) <= APART
    if ranks.world() == 1 or not (in_process and short and ranks.even(tokens)):
        return [work(item) for item in items]
    found = ranks.apart(heard, items, tokens)
    for told, _ in found:
        for kind, text in told:
            notices.warn(kind, text)
    return [result for _, result in found]


def as_sample(completion: Completion, response_format: str) -> Sample:
    """What rewards and filters read. response_format: of the recipe."""
    return Sample(
        problem=completion.problem,
        text=completion.text,
        response=parse(completion.text, response_format),
        token_ids=completion.token_ids,
        sample_id=completion.sample_id,
        finished=completion.finished,
    )


def row(completion: Completion, source: Source, seed: int, **more: Any) -> dict[str, Any]:
    """The data row of a response: what was asked, what was answered, and which checkpoint, seed and sample it is."""
    problem = completion.problem
    return {
        "problem_id": problem.id,
        "kind": problem.kind,
        "language": problem.language,
        "question": problem.question,
        **({"turns_before": [list(turn) for turn in problem.before]} if problem.before else {}),
        "prompt_ids": list(completion.prompt_ids),
        "response_text": completion.text,
        "response_ids": list(completion.token_ids),
        "stage": source.stage,
        "checkpoint": source.hash,
        "seed": seed,
        "sample_id": completion.sample_id,
        **more,
    }


def by_id(pool: Iterable[Problem]) -> Mapping[str, Problem]:
    """Problems by their id."""
    return {problem.id: problem for problem in pool}
