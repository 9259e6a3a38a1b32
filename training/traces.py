"""Traces: conversations whose last turn is learnt, from a file of JSON lines (`sft1.data`, `sft2.data`, `distill.data`).

A line is an object with one of

    messages                [{"role": "system" | "user" | "assistant", "content": ...}, ...], the response last
    question, response      the same with one turn of the user

Other fields are left alone. The response is learnt as it stands, with its thinking and its tags.
"""

from pathlib import Path
from typing import Any

from training import prompts
from training.document import Document
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
            before, response = _conversation(json_object(line))
            turns = prompts.with_system(before, system_prompt)
            documents.append(Document(response, tuple(Turn(*turn) for turn in turns)))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: {error}") from None
    if not documents:
        raise UserError(f"{path}: there are no traces in the file")
    return documents


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
