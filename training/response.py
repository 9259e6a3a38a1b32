"""The one strict parse of a response. Every reward, filter and metric reads its result, never the text again.

Two outer forms are accepted:

    <think> R </think> S                          R1-Zero
    <|special_token|> R <|special_token|> S       cold start and later

and a recipe's `response_format` says where the answer stands in S:

    answer_tags     S holds one `<answer> A </answer>` and nothing after it
    boxed           A is in the last `\\boxed{A}` of S
    free            A is in the last box, else what follows the last "answer is" or "answer:" on its line, else the last line

A bare S, without thinking, has the one flag "no_think", for problems that need no thinking.
Everything else is still parsed as far as it is unambiguous, and each fault leaves a flag of its own.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"
SPECIAL = "<|special_token|>"
_CLOSING = {THINK_OPEN: THINK_CLOSE, ANSWER_OPEN: ANSWER_CLOSE, SPECIAL: SPECIAL}

# Each flag and what it means, in the order in which `Response.flags` lists them.
FLAGS = {
    "no_think": "there is no thinking block",
    "no_answer": "there is no complete answer outside the thinking",
    "several_thinks": "more than one thinking block",
    "several_answers": "more than one answer block",
    "mixed_forms": "the think tags and the special token are used together",
    "nested": "a block is opened again inside itself",
    "unclosed": "a block is opened and never closed",
    "unopened": "a block is closed that was not open",
    "reversed": "an answer stands before the thinking",
    "answer_in_think": "answer tags inside the thinking",
    "think_in_answer": "thinking tags inside the answer",
    "empty_think": "the thinking is empty",
    "empty_answer": "the answer is empty",
    "text_before": "text before the first block of a response with thinking",
    "text_after": "text after the last block",
}

_TAG = re.compile(r"</?(?:think|answer)>|<\|special_token\|>")
_THINK_TAG = re.compile(r"</?think>|<\|special_token\|>")
_ANY_TAG = re.compile(rf" *(?:{_TAG.pattern}) *")
_AMBIGUOUS = {"nested", "unclosed", "think_in_answer"}
_LEAD_IN = re.compile(r"\banswer\b[\s*_]*(?:is\b|:)[\s*_:]*|答案(?:是|为|:|\uff1a)", re.IGNORECASE)
_BOX = "\\boxed{"


class _Block(NamedTuple):
    """A complete block: the offsets of its opening tag, of its content, and of the end of its closing tag."""

    start: int
    inner_start: int
    inner_end: int
    end: int


@dataclass(frozen=True, slots=True)
class Response:
    """A parsed response. Blocks are stripped of outer white space; a block that is missing or empty is None.

    text: the whole response as sampled.
    think: the thinking, where there is exactly one complete block of it.
    answer: the answer, where there is exactly one complete block of it outside the thinking, or one that is stated.
    summary: what follows the thinking, without any tags but with the answer (what a user reads).
    flags: names from FLAGS; empty if and only if the response is strictly well formed.
    """

    text: str
    think: str | None
    answer: str | None
    summary: str | None
    flags: tuple[str, ...]

    @property
    def well_formed(self) -> bool:
        """Exactly one thinking block and one answer, in order, nothing before (with answer tags: or after), neither empty."""
        return not self.flags


def parse(text: str, response_format: str = "answer_tags") -> Response:
    """Parse the text of a response (without its prompt, padding and end-of-sequence token). Never raises.

    text: where the prompt has opened the thinking, its tag belongs to the response and stands at the head of the text.
    response_format: "answer_tags", "boxed" or "free", see at the top.
    """
    tagged = response_format == "answer_tags"
    tags = list((_TAG if tagged else _THINK_TAG).finditer(text))
    thinks, answers, found = _blocks(tags)
    thinking_tags = any(match.group() not in (ANSWER_OPEN, ANSWER_CLOSE) for match in tags)

    if not thinking_tags:
        found.add("no_think")
    if len(thinks) > 1:
        found.add("several_thinks")
    if len(answers) > 1:
        found.add("several_answers")
    if thinks and answers and answers[0].start < thinks[-1].start:
        found.add("reversed")
    if thinking_tags and text[: tags[0].start()].strip():
        found.add("text_before")
    if answers and text[tags[-1].end() :].strip():
        found.add("text_after")

    rest = text[thinks[-1].end if thinks else 0 :] if thinks or not thinking_tags else None
    think = _only(text, thinks)
    if think == "":
        found.add("empty_think")
    if tagged:
        answer = _only(text, answers)
        if not answers:
            found.add("no_answer")
    else:
        answer = None if rest is None else stated(rest, boxed=response_format == "boxed")
        if answer is None:
            found.add("no_answer")
    if answer == "":
        found.add("empty_answer")
    if found & _AMBIGUOUS:  # which text was meant as the answer is open
        answer = None

    summary = None if rest is None else _ANY_TAG.sub(" ", rest).strip()
    flags = tuple(flag for flag in FLAGS if flag in found) if found else ()
    return Response(text, think or None, answer or None, summary or None, flags)


def stated(text: str, boxed: bool = False) -> str | None:
    """The answer that a text without answer tags states, stripped; None where there is none.

    boxed: only that of the last box; else see "free" at the top. A full stop at the end of a line is not of the answer.
    """
    box = last_box(text)
    if boxed or box is not None:
        return None if box is None else box.strip()
    text = _ANY_TAG.sub(" ", text).strip()
    return after_lead_in(text) or _line(text.rpartition("\n")[2])


def after_lead_in(text: str) -> str | None:
    """What follows the last "answer is" or "answer:" on its line; None where there is no such words or nothing follows."""
    *_, last = (None, *_LEAD_IN.finditer(text))
    return _line(text[last.end() :].strip().partition("\n")[0]) if last else None


def _line(text: str) -> str | None:
    return text.strip(" *").removesuffix(".").rstrip(" *") or None


def last_box(text: str) -> str | None:
    """The content of the last `\\boxed{...}`; None where there is none or it is never closed."""
    start = text.rfind(_BOX)
    depth = 0
    for position in range(start + len(_BOX) - 1, len(text)) if start >= 0 else ():
        depth += (text[position] == "{") - (text[position] == "}")
        if depth == 0:
            return text[start + len(_BOX) : position]
    return None


def _only(text: str, blocks: list[_Block]) -> str | None:
    """The stripped content where there is exactly one block, else None."""
    return text[blocks[0].inner_start : blocks[0].inner_end].strip() if len(blocks) == 1 else None


def _blocks(tags: list[re.Match[str]]) -> tuple[list[_Block], list[_Block], set[str]]:
    """Walk the tags from left to right; return the thinking blocks, the answer blocks and the faults of nesting."""
    thinks: list[_Block] = []
    answers: list[_Block] = []
    found: set[str] = set()
    opener: re.Match[str] | None = None  # the tag of the block that is open
    form = ""  # the opening tag of the thinking used so far: one response keeps to one form
    for match in tags:
        tag = match.group()
        if opener is None:
            if tag in (THINK_CLOSE, ANSWER_CLOSE):
                found.add("unopened")
                continue
            opener = match
            if tag != ANSWER_OPEN:
                if form and form != tag:
                    found.add("mixed_forms")
                form = tag
        elif tag == _CLOSING[opener.group()]:
            block = _Block(opener.start(), opener.end(), match.start(), match.end())
            (answers if tag == ANSWER_CLOSE else thinks).append(block)
            opener = None
        elif tag == opener.group():
            found.add("nested")
        elif opener.group() == ANSWER_OPEN:
            found.add("think_in_answer")
        elif tag in (ANSWER_OPEN, ANSWER_CLOSE):
            found.add("answer_in_think")
        else:
            found.add("mixed_forms")
    if opener is not None:
        found.add("unclosed")
    return thinks, answers, found
