"""What the checkpoints wrote: the same problem side by side, and the first and last rollouts of a stage."""

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from training.report.marks import number
from training.response import ANSWER_CLOSE, ANSWER_OPEN, SPECIAL, THINK_CLOSE, THINK_OPEN, parse
from training.run_dir import RunDir

PROBLEMS = 2  # best and worst problems shown
LONGEST = 700  # characters of a response
_TAGS = re.compile("|".join(map(re.escape, (THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE, SPECIAL))))


def response_html(text: str) -> str:
    """A response with its thinking dimmed, its answer in bold and its tags small."""
    shown = text if len(text) <= LONGEST else text[:LONGEST] + " …"
    response = parse(shown, "answer_tags" if ANSWER_OPEN in shown else "boxed")
    places = {}
    for kind, part in (("think", response.think), ("answer", response.answer)):
        at = -1 if part is None else (shown.find(part) if kind == "think" else shown.rfind(part))
        if at >= 0 and part:
            places[at] = (at + len(part), kind)
    html, at = [], 0
    for start, (end, kind) in sorted(places.items()):
        if start >= at:
            html += [_tagged(shown[at:start]), f'<span class="{kind}">', _tagged(shown[start:end]), "</span>"]
            at = end
    return "".join([*html, _tagged(shown[at:])])


def _tagged(text: str) -> str:
    parts, at = [], 0
    for match in _TAGS.finditer(text):
        parts += [escape(text[at : match.start()]), f'<span class="tag">{escape(match[0])}</span>']
        at = match.end()
    return "".join([*parts, escape(text[at:])])


def side_by_side(run_dir: RunDir) -> str:
    """The problems on which the checkpoints did best and worst, a card for the response of each checkpoint."""
    rows = run_dir.stage("evaluate").samples()
    by_problem: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row.get("split", "test") == "test" and "accuracy" in row["rewards"]:
            by_problem.setdefault(row["problem_id"], []).append(row)
    complete = [group for group in by_problem.values() if len(group) == max(map(len, by_problem.values()))]
    ranked = sorted(complete, key=_gain, reverse=True)
    best = [group for group in ranked[:PROBLEMS] if _gain(group)[0] > 0]
    worst = [group for group in sorted(complete, key=_score)[:PROBLEMS] if group not in best]
    general = _general(rows)
    parts = [f"<h3>learnt on the way</h3>{''.join(map(_group, best))}"] if best else []
    parts += [f"<h3>hardest for all of them</h3>{''.join(map(_group, worst))}"] if worst else []
    parts += [f"<h3>helpful and unsafe prompts</h3>{''.join(map(_group, general))}"] if general else []
    return "".join(parts)


def _score(group: Sequence[Mapping[str, Any]]) -> float:
    return sum(sum(value or 0.0 for value in row["rewards"].values()) for row in group)


def _gain(group: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """How much more the later half of the checkpoints earned than the first ones, then how much in all."""
    middle = max(1, len(group) // 3)
    return _score(group[middle:]) / max(1, len(group) - middle) - _score(group[:middle]) / middle, _score(
        group
    )


def _general(rows: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """One problem of every kind that is no reasoning, as all checkpoints answered it."""
    groups: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for row in rows:
        if row["kind"] != "reasoning" and row.get("split", "test") == "test":
            groups.setdefault(row["kind"], {}).setdefault(row["problem_id"], []).append(row)
    return [next(iter(by_problem.values())) for by_problem in groups.values()]


def _group(rows: Sequence[Mapping[str, Any]]) -> str:
    cards = "".join(card(row, row.get("checkpoint", "")) for row in rows)
    first = rows[0]
    return (
        f'<div class="problem"><p class="question">{escape(first["question"])} '
        f'<small>{escape(first["language"])}</small></p><div class="cards">{cards}</div></div>'
    )


def card(row: Mapping[str, Any], title: str, question: bool = False) -> str:
    """One response with its rewards; the mark is whether the answer is right, or else the format."""
    rewards = {name: number(value) for name, value in row["rewards"].items()}
    verdict = rewards.get("accuracy", rewards.get("preference", rewards.get("format")))
    kind = "unknown" if verdict is None else "right" if verdict >= 1 else "wrong"
    chips = "".join(
        f"<span>{escape(name.replace('_', ' '))} {value:.2g}</span>"
        for name, value in rewards.items()
        if value is not None
    )
    if number(row.get("advantage")) is not None:
        chips += f"<span>advantage {row['advantage']:+.2f}</span>"
    if row.get("finished") is False:
        chips += '<span class="bad">cut off</span>'
    asked = f'<p class="question">{escape(row["question"])}</p>' if question else ""
    return (
        f'<article class="{kind}"><h4>{escape(title)}</h4>{asked}<p class="response">{response_html(row["text"])}</p>'
        f'<p class="chips">{chips}</p></article>'
    )


def rollouts(run_dir: RunDir, stage: str) -> str:
    """The best and worst response of the first and of the last step of a GRPO stage."""
    rows = [row for row in run_dir.stage(stage).samples() if number(row.get("reward")) is not None]
    if not rows:
        return ""
    cards = []
    for step in dict.fromkeys((rows[0]["step"], rows[-1]["step"])):
        group = sorted((row for row in rows if row["step"] == step), key=lambda row: row["reward"])
        for which, row in dict([("worst", group[0]), ("best", group[-1])]).items():
            cards.append(card(row, f"step {step}, {which}", question=True))
    return (
        f"<details><summary>best and worst responses of the first and the last step</summary>"
        f'<div class="cards">{"".join(cards)}</div></details>'
    )
