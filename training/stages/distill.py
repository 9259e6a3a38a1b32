"""distill: the teacher answers the SFT prompts again, and small dense students learn from what passes the filters.

No RL. Teacher and students answer the prompt that the teacher was trained with. Reasoning responses have to be right by the rule,
the others helpful by the oracle. A file of traces may stand in for the teacher. A student learns the responses (sft), the
teacher's distribution of them (logits), or its distribution of what the student answers itself to the same prompts (on_policy),
and in the last case as many tokens as it would of the responses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from training import checkpoint, estimate, filters, policy, responses, rewards, student, traces
from training.context import StageContext
from training.document import Document
from training.encoder import Encoder
from training.errors import UserError
from training.loops import next_token, on_policy
from training.loops.sample import Prompt
from training.loops.token_loss import OfStored, OfTeacher, OfText, TokenLoss
from training.model import load
from training.parts import run_parts
from training.recipe import start_of
from training.responses import Source, as_sample
from training.sections import Distill
from training.selection import Selection, nothing_kept, select
from training.tasks.problem import Problem

UNSEEN_PROBLEMS = 256  # held-out reasoning problems on which a student is measured here; evaluate takes more


def run(context: StageContext) -> dict[str, Any]:
    """Sample the teacher, filter, train every student; writes data.jsonl, rejected.jsonl and checkpoint-<student>."""
    config, seed = context.config, context.recipe.seed
    if config.data:
        documents = traces.read(config.data, context.recipe.system_prompt)
        counts: dict[str, Any] = {"asked": len(documents), "rejections": {}}
    else:
        documents, counts = _taught(context)
    # once for all students that are left
    of_teacher = functools.cache(lambda: _tokenizer_and_positions(context))
    teacher = functools.cache(lambda: _teacher(context))

    def train(part: StageContext, name: str) -> dict[str, Any]:
        sizes = config.students[name]
        method = config.method_of(name)
        if sizes.start:
            model, tokenizer = load(_folder(context, sizes.start))
        else:
            teacher_tokenizer, positions = of_teacher()
            model, tokenizer = student.build(sizes, teacher_tokenizer, seed, positions)
        policy.adapted(model, part, sizes.lora, f"distill.students.{name}.lora")
        loss = _loss(config, method, documents, lambda: _alike(name, tokenizer, teacher()))
        if method == "on_policy":
            metrics = on_policy.train(
                model,
                tokenizer,
                _asked(context, model, tokenizer),
                loss,
                sizes,
                config,
                next_token.amount_of(model, tokenizer, documents, sizes, part.name),
                part,
            )
        else:
            metrics = next_token.train(model, tokenizer, documents, sizes, part, token_loss=loss)
        folder = _folder(context, name)
        began = str(_folder(context, sizes.start)) if sizes.start else sizes.pretrained
        policy.save(model, tokenizer, folder, began, _style(context))
        parameters = sum(parameter.numel() for parameter in model.parameters())
        accuracy = _accuracy(context, name, folder)
        return {**metrics, "method": method, "parameters": parameters, "accuracy": accuracy}

    def operations(name: str) -> float:
        teacher = estimate.parameters(context.recipe)
        takes = estimate.of_student(context.recipe, name, len(documents), teacher)
        return takes.training_flops + takes.sampling_flops

    trained: dict[str, dict[str, Any]] = {}
    for names in _in_turn(config):
        trained = run_parts(context, names, train, operations)
    return {
        **counts,
        "kept": len(documents),
        **{f"{name}/{key}": value for name in config.students for key, value in trained[name].items()},
    }


def _in_turn(config: Distill) -> list[list[str]]:
    """The students in lists, each of those that go on from one of the list before, or in the first from none."""
    after: dict[str, int] = {}
    for name, sizes in config.students.items():
        after[name] = after[sizes.start] + 1 if sizes.start else 0
    return [[name for name in after if after[name] == turn] for turn in sorted(set(after.values()))]


def _folder(context: StageContext, name: str) -> Path:
    """Of a student's checkpoint."""
    return context.stage.path / f"checkpoint-{name}"


def _teacher(context: StageContext) -> tuple[Any, Any]:
    """The teacher, which is not trained, and its tokenizer."""
    start = start_of(context.recipe, context.name)
    if not start:
        raise UserError("distill.teacher: expected one, since not all traces have stored log-probs, got none")
    model, tokenizer = load(context.checkpoint(start))
    return model.requires_grad_(False).eval(), tokenizer


def _alike(name: str, tokenizer: Any, teacher: tuple[Any, Any]) -> Any:
    """The teacher of a student that reads the same ids."""
    model, its_tokenizer = teacher
    if tokenizer.get_vocab() != its_tokenizer.get_vocab():
        raise UserError(
            f"distill.students.{name}: its tokenizer is not the teacher's, so that it can learn the teacher's text alone: "
            "method=sft, or a student from random weights"
        )
    return model


def _loss(
    config: Distill, method: str, documents: Sequence[Document], teacher: Callable[[], Any]
) -> TokenLoss:
    """What a student minimises, token by token."""
    if method == "sft":
        return OfText()
    kind = config.divergence or {"logits": "forward_kl", "on_policy": "reverse_kl"}[method]
    if method == "logits" and all(document.stored is not None for document in documents):
        return OfStored(kind, config.beta)
    return OfTeacher(teacher(), kind, config.beta)


def _asked(context: StageContext, model: Any, tokenizer: Any) -> list[Prompt]:
    """The prompts that the teacher was asked, those that the student can read."""
    prompt = responses.prompter(_style(context))
    problems = _prompts(context, ("reasoning", "helpful", "unsafe"))
    fit = responses.fitting(model, tokenizer, problems, prompt)
    return [Prompt(problem, prompt(problem)) for problem in fit]


def _tokenizer_and_positions(context: StageContext) -> tuple[Any, int]:
    """The teacher's tokenizer, or None without a teacher, and how many tokens it reads; its weights are let go."""
    longest = context.recipe.model.max_length
    start = start_of(context.recipe, context.name)
    if not start:
        return None, longest
    teacher, tokenizer = checkpoint.load_model(context.checkpoint(start))
    return tokenizer, Encoder(teacher, tokenizer).positions or longest


def _taught(context: StageContext) -> tuple[list[Document], dict[str, Any]]:
    """The teacher's responses that passed the filters, and how many were asked and rejected; both are kept in files."""
    if not context.stage.has_data("data.jsonl"):
        selection = _teach(context)
        if not selection.kept:
            raise UserError(nothing_kept(context.name, selection.asked, selection.rejections))
        context.stage.write_data("rejected.jsonl", selection.examples)
        counts = {"asked": selection.asked, "rejections": dict(selection.rejections)}
        context.stage.write_data("counts.jsonl", [counts])
        context.stage.write_data("data.jsonl", selection.kept)
    by_id = responses.by_id(responses.problems(context.recipe, "train", ("reasoning", "helpful", "unsafe")))
    rows = context.stage.read_data("data.jsonl")
    prompt = responses.prompter(_style(context))
    documents = [Document(row["response_text"], prompt(by_id[row["problem_id"]])) for row in rows]
    return documents, context.stage.read_data("counts.jsonl")[0]


def _teach(context: StageContext) -> Selection:
    """The teacher's responses to the prompts of the SFT mix, filtered."""
    config, seed = context.config, context.recipe.seed
    name = config.teacher if config.teacher in context.inputs else "teacher"
    teacher = responses.load_source(name, context.checkpoint(config.teacher), context.recipe)
    tasks = responses.tasks(context.recipe)
    settings = filters.Settings(task=tasks, paragraph_words=context.recipe.rejection.paragraph_words)

    def taught(part: tuple[list[Problem], str]) -> Selection:
        problems, checked_by = part
        drawn = _draw(
            context,
            teacher,
            problems,
            samples=config.samples,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
        )
        return select(drawn, teacher, seed, config.filters, settings, checked_by=checked_by)

    kinds = {"rule": ("reasoning",), "oracle": ("helpful", "unsafe")}
    parts = [(problems, by) for by, of in kinds.items() if (problems := _prompts(context, of))]
    tokens = [float(len(problems) * config.samples * config.max_new_tokens) for problems, _ in parts]
    found = Selection()
    for selection in responses.sampled_apart(taught, parts, tokens, [teacher.rollout]):
        found.add(selection)
    return found


def _prompts(context: StageContext, kinds: tuple[str, ...]) -> list[Problem]:
    """The problems of the SFT mix, or all training problems where no mix was made; of these as many as the recipe says."""
    pool = responses.problems(context.recipe, "train", ("reasoning", "helpful", "unsafe"))
    if "rejection" in context.inputs:
        mixed = {row["problem_id"] for row in context.inputs["rejection"].read_data("data.jsonl")}
        pool = [each for each in pool if each.id in mixed]
    if context.config.prompts:
        pool = responses.choose(pool, context.config.prompts, context.recipe.seed, context.name, "problems")
    return [each for each in pool if each.kind in kinds]


def _style(context: StageContext) -> dict[str, Any]:
    """The prompt of teacher and students, as it is noted in folders: the teacher's, and that of a file of traces."""
    recipe, start = context.recipe, start_of(context.recipe, context.name)
    if context.config.data or not start:
        return responses.style_of(context.name, recipe)
    return checkpoint.read_style(context.checkpoint(start)) or responses.style_of(start, recipe)


def _accuracy(context: StageContext, name: str, folder: Any) -> float | None:
    """Share of held-out reasoning problems that the student gets right at temperature 1, one sample each; None without."""
    pool = responses.problems(context.recipe, "test", ("reasoning",))
    asked = responses.choose(pool, UNSEEN_PROBLEMS, context.recipe.seed, context.name, "unseen")
    source = responses.load_source(f"{context.name}-{name}", folder, context.recipe)
    drawn = _draw(context, source, asked, samples=1, temperature=1.0)
    tasks = responses.tasks(context.recipe)
    right = [rewards.accuracy(as_sample(each, source.response_format), tasks).value == 1.0 for each in drawn]
    return sum(right) / len(right) if right else None


def _draw(
    context: StageContext,
    source: Source,
    asked: Sequence[Problem],
    **how: Any,
) -> list[Any]:
    return responses.draw(
        source,
        asked,
        **how,
        context=context,
        max_new_tokens=context.config.max_new_tokens,
        seed_parts=(context.recipe.seed, context.name),
        batch_size=context.config.batch_size,
    )
