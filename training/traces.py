"""Traces: conversations whose last turn is learnt, from a file of JSON lines (`sft1.data`, `sft2.data`, `distill.data`).

A line is an object with one of

    messages                [{"role": "system" | "user" | "assistant", "content": ...}, ...], the response last
    question, response      the same with one turn of the user

and, where a student is to learn from stored log-probs (`distill.method=logits`),

    teacher_ids             [[ids], ...] of each token of the response, its end counted, by the student's tokenizer
    teacher_logp            [[log-probs], ...] of these ids, over the teacher's whole vocabulary

Other fields are left alone. The response is learnt as it stands, with its thinking and its tags.
"""

import math
from pathlib import Path
from typing import Any

from training import prompts
from training.document import Document, Stored
from training.errors import UserError
from training.prompts import Turn
from training.tasks.jsonl import json_lines, json_object
from training.tasks.problem import DataError
from training.tasks.rows import text_of, turns_of


def read(path: str | Path, system_prompt: str = "") -> list[Document]:
    """The documents of a file, in its order. system_prompt: of the recipe, for conversations that have none of their own.

    Raises:
        UserError: the file cannot be read or is empty, or a line is broken (file and line are named).
    """
    documents = []
    for number, line in json_lines(path):
        try:
            row = json_object(line)
            before, response = _conversation(row)
            turns = prompts.with_system(before, system_prompt)
            documents.append(Document(response, tuple(Turn(*turn) for turn in turns), _stored(row)))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: {error}") from None
    if not documents:
        raise UserError(f"{path}: there are no traces in the file")
    return documents


def _stored(row: dict[str, Any]) -> Stored | None:
    """What a teacher said of each token of the response, or None."""
    if "teacher_ids" not in row and "teacher_logp" not in row:
        return None
    ids: Any = row.get("teacher_ids")
    logp: Any = row.get("teacher_logp")
    if not (_lists_of(ids, int) and _lists_of(logp, (int, float))) or [*map(len, ids)] != [*map(len, logp)]:
        raise ValueError(
            "fields 'teacher_ids' and 'teacher_logp': expected a list of ids and one of as many log-probs for each token"
        )
    for token, (those, theirs) in enumerate(zip(ids, logp, strict=True)):
        if len(set(those)) < len(those) or min(those, default=0) < 0:
            raise ValueError(
                f"field 'teacher_ids': expected ids from 0, each once, for token {token}, got {those}"
            )
        if not all(math.isfinite(each) and each <= 0.01 for each in theirs):
            raise ValueError(
                f"field 'teacher_logp': expected log-probs, at most 0, for token {token}, got {theirs}"
            )
    return Stored(ids, logp)


def _lists_of(value: Any, kind: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(inner, list)
        and all(isinstance(each, kind) and not isinstance(each, bool) for each in inner)
        for inner in value
    )


def _conversation(row: dict[str, Any]) -> tuple[tuple[tuple[str, str], ...], str]:
    """The turns before the response, and the response."""
    if ("messages" in row) == ("question" in row or "response" in row):
        raise ValueError("expected the field 'messages', or 'question' and 'response'")
    if "messages" not in row:
        return (("user", text_of(row, "question")),), text_of(row, "response")
    *prompt, (role, response) = turns_of(row["messages"])
    if role != "assistant" or not response:
        raise ValueError(
            f"field 'messages': expected a response of the assistant last, got {role!r}: {response!r:.60}"
        )
    if not any(role == "user" for role, _ in prompt):
        raise ValueError("field 'messages': expected a turn of the user before the response")
    return tuple(prompt), response
