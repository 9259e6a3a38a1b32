"""Tables and bars of the report as HTML."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from statistics import fmean
from typing import Any

from training.format import duration, percent
from training.pipeline import STAGES
from training.recipe import Recipe
from training.report.marks import MARKS, MORE_MARKS, evaluation_rows, marks_of, number
from training.run_dir import RunDir

TIMES = ("rollout", "reward", "old_logprob", "reference_logprob", "new_logprob", "update")
# Mark -> the ends of its interval.
INTERVALS = {"accuracy": ("wilson_low", "wilson_high"), "greedy": ("greedy_low", "greedy_high")}
DATA_STAGES = ("cold_start", "rejection", "distill")


def stage_table(run_dir: RunDir, recipe: Recipe) -> str:
    """The headline: every stage with the marks of its checkpoints, the harder levels, length and time."""
    marks = marks_of(run_dir)
    beyond = {split: found for split in ("harder", "hardest") if (found := marks_of(run_dir, split=split))}
    more = [
        (key, title.replace("@k", f"@{recipe.evaluate.k}"))
        for key, title in MORE_MARKS
        if any(number(row.get(key)) is not None for row in marks.values())
    ]
    titles = ["", *(title for _, title in MARKS), *(title for _, title in more)]
    titles += [*beyond, "length", "time"]
    lines = ["<thead><tr>" + "".join(f"<th>{title}</th>" for title in titles) + "</tr></thead><tbody>"]
    for name in STAGES:
        record = run_dir.stage(name).record() if name in recipe.stages else None
        if record is None or name == "evaluate":
            continue
        mine = {each: row for each, row in marks.items() if each == name or each.startswith(f"{name}-")}
        time = duration(record["stage_seconds"])
        if not mine:
            note = escape(said(name, record["metrics"]))
            span = len(titles) - 2
            lines.append(
                f'<tr class="quiet">{_name(name)}<td class="note" colspan="{span}">{note}</td><td>{time}</td></tr>'
            )
        for index, (each, row) in enumerate(mine.items()):
            cells = [_mark(row, key) for key, _ in (*MARKS, *more)]
            cells += [_mark(found.get(each, {}), "accuracy") for found in beyond.values()]
            length = number(row.get("length"))
            cells.append(f"<td>{'-' if length is None else f'{length:.0f}'}</td>")
            cells.append(f"<td>{time if index == 0 else ''}</td>")
            lines.append(f"<tr>{_name(name, each)}{''.join(cells)}</tr>")
    return f'<div class="wide"><table class="stages">{"".join(lines)}</tbody></table></div>'


def _name(stage: str, checkpoint: str = "") -> str:
    return f"<th>{escape(checkpoint or stage)}<small>{escape(STAGES[stage].title)}</small></th>"


def _mark(row: Mapping[str, Any], key: str) -> str:
    value = number(row.get(key))
    if value is None:
        return '<td class="none">-</td>'
    title = ""
    ends = INTERVALS.get(key)
    if ends and all(number(row.get(end)) is not None for end in ends):
        low, high = (percent(row[end]) for end in ends)
        title = f' title="95 % interval {low} to {high}"'
    return f'<td class="mark" style="--value:{value:.3f}"{title}>{percent(value)}</td>'


def said(stage: str, metrics: Mapping[str, Any]) -> str:
    """What a stage without marks has to say for itself, in a few words."""
    if "asked" in metrics and "kept" in metrics:
        return f"{metrics['kept']:,} of {metrics['asked']:,} responses kept"
    if "agreement" in metrics:
        return f"agrees with the rule on {percent(metrics['agreement'])} % of {metrics['held_out']:,} held-out responses"
    accuracies = {
        name.removesuffix("/accuracy"): value for name, value in metrics.items() if name.endswith("/accuracy")
    }
    if stage == "reward_models" and accuracies:
        return "held-out accuracy: " + ", ".join(
            f"{name} {percent(value)} %" for name, value in accuracies.items()
        )
    return ""


def warnings(run_dir: RunDir) -> str:
    """What the stages warned of, in their order."""
    items = "".join(
        f"<li><b>{name}</b> {escape(row['text'])}</li>"
        for name in STAGES
        for row in run_dir.stage(name).warnings()
    )
    return f"<ul>{items}</ul>" if items else ""


def bar(share: float, label: str, value: str, kind: int = 0) -> str:
    """One line with a bar: `share` of the full width."""
    return (
        f'<div class="bar"><span>{escape(label)}</span><i><b style="width:{100 * share:.2f}%;'
        f'background:var(--series-{kind})"></b></i><em>{escape(value)}</em></div>'
    )


def stacked(parts: Sequence[tuple[str, float]], label: str, value: str) -> str:
    """One line with a bar in several colours; `parts` are (title, share), drawn in the order of the series."""
    pieces = "".join(
        f'<b title="{escape(title)} {100 * share:.0f} %" style="width:{100 * share:.2f}%;background:var(--series-{index})"></b>'
        for index, (title, share) in enumerate(parts)
        if share > 0
    )
    return f'<div class="bar"><span>{escape(label)}</span><i>{pieces}</i><em>{escape(value)}</em></div>'


def legend(titles: Iterable[str]) -> str:
    """The colours of `stacked` bars and what they mean."""
    return (
        '<p class="legend">'
        + "".join(
            f'<span><b style="background:var(--series-{index})"></b>{escape(title)}</span>'
            for index, title in enumerate(titles)
        )
        + "</p>"
    )


def rejections_of(metrics: Mapping[str, Any]) -> Counter[str]:
    """Filter -> responses that it rejected, from the final metrics of a data stage."""
    counted: Counter[str] = Counter(metrics.get("rejections", {}))
    for name, count in metrics.items():
        if "/rejected/" in name:
            counted[name.rpartition("/")[2]] += count
    return counted


def rejections(run_dir: RunDir) -> str:
    """Bars by filter for every data stage, and for each filter one response that it rejected."""
    parts = []
    for stage in DATA_STAGES:
        record = run_dir.stage(stage).record()
        if record is None:
            continue
        metrics = record["metrics"]
        counted = rejections_of(metrics)
        largest = max([*counted.values(), 1])
        bars = [
            bar(count / largest, name.replace("_", " "), f"{count:,}", 5)
            for name, count in counted.most_common()
            if count
        ]
        never = [name.replace("_", " ") for name, count in counted.items() if not count]
        if never:
            bars.append(f"<p><small>nothing by {escape(', '.join(never))}</small></p>")
        routes = [
            f"{route} {metrics[f'{route}/kept']:,} of {metrics[f'{route}/asked']:,}"
            for route in dict.fromkeys(name.split("/")[0] for name in metrics if name.endswith("/asked"))
        ]
        head = said(stage, metrics) + (f" ({', '.join(routes)})" if routes else "")
        parts.append(
            f"<div><h3>{stage}</h3><p>{escape(head)}</p>{''.join(bars)}{_examples(run_dir, stage)}</div>"
        )
    return f'<div class="columns">{"".join(parts)}</div>' if parts else ""


def _examples(run_dir: RunDir, stage: str) -> str:
    path = run_dir.stage(stage).data("rejected.jsonl")
    if not path.is_file():
        return ""
    first: dict[str, dict[str, Any]] = {}
    for row in run_dir.stage(stage).read_data("rejected.jsonl"):
        first.setdefault(row["filter"], row)
    items = "".join(
        f"<dt>{escape(name.replace('_', ' '))} <small>{escape(str(row.get('reason', '')))}</small></dt>"
        f"<dd>{escape(row['question'])} <code>{escape(row['response_text'][:400])}</code></dd>"
        for name, row in first.items()
    )
    return (
        f"<details><summary>one response for every filter</summary><dl>{items}</dl></details>"
        if items
        else ""
    )


def times(run_dir: RunDir, recipe: Recipe) -> str:
    """How long every stage took, and for those that roll out how the time was spent."""
    records = {name: run_dir.stage(name).record() for name in STAGES if name in recipe.stages}
    done = {name: record for name, record in records.items() if record}
    if not done:
        return ""
    longest = max(record["stage_seconds"] for record in done.values()) or 1.0
    lines = []
    for name, record in done.items():
        rows = run_dir.stage(name).metrics()
        spent = {part: sum(number(row.get(f"{part}_seconds")) or 0.0 for row in rows) for part in TIMES}
        whole = record["stage_seconds"]
        rest = max(0.0, whole - sum(spent.values()))
        shares = [(part, seconds / longest) for part, seconds in (*spent.items(), ("everything else", rest))]
        lines.append(stacked(shares, name, duration(whole)))
    total = sum(record["stage_seconds"] for record in done.values())
    return legend((*TIMES, "everything else")) + "".join(lines) + f"<p>{duration(total)} in all.</p>"


def rollouts(run_dir: RunDir, recipe: Recipe) -> str:
    """For every stage that rolls out: how fast, how much of a step, and how near the sampler is to the policy that learns."""
    lines = []
    for name in STAGES:
        rows = run_dir.stage(name).metrics() if name in recipe.stages else []
        rows = [row for row in rows if number(row.get("rollout_tokens_per_second")) is not None]
        if not rows:
            continue
        spent = sum(row["rollout_seconds"] for row in rows)
        tokens = sum(row["rollout_seconds"] * row["rollout_tokens_per_second"] for row in rows)
        whole = sum(number(row.get(f"{part}_seconds")) or 0.0 for row in rows for part in TIMES)
        gaps = [row for row in rows if "sampler_gap" in row]
        mean = f"{fmean(row['sampler_gap'] for row in gaps):.1e}" if gaps else "-"
        most = f"{max(row['sampler_gap_max'] for row in gaps):.1e}" if gaps else "-"
        stale = fmean(row["stale"] for row in rows)
        old = getattr(recipe, name).old_logprobs
        cells = (
            f"{tokens / spent:,.0f}",
            f"{percent(spent / whole)} %",
            mean,
            most,
            old,
            f"{percent(stale)} %",
        )
        lines.append(f"<tr><th>{name}</th>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    if not lines:
        return ""
    titles = (
        "",
        "tokens per second",
        "share of the step",
        "sampler gap, mean",
        "maximum",
        "old log-probs",
        "of other weights",
    )
    return (
        "<h3>Rollouts</h3><p><small>Sampler gap: |log-prob of a token as the sampler gives it - as the trainer does|, before the "
        "first update of a step: at rounding, it is all one whether old log-probs are the sampler's or recomputed."
        '</small></p><div class="wide"><table class="small"><thead><tr>'
        + "".join(f"<th>{title}</th>" for title in titles)
        + f"</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def unseen(run_dir: RunDir) -> str:
    """rl_all before and after, on prompts it never saw: by the task's oracle, and by the reward models beside it."""
    metrics = (run_dir.stage("rl_all").record() or {}).get("metrics", {})
    names = [
        name.split("/")[1] for name in metrics if name.startswith("unseen/") and name.endswith("/before")
    ]
    if not names:
        return ""
    rows = "".join(
        f"<tr><th>{escape(name.replace('_', ' '))}</th>"
        + "".join(f"<td>{_plain(metrics[f'unseen/{name}/{when}'])}</td>" for when in ("before", "after"))
        + "</tr>"
        for name in names
    )
    return (
        "<h3>rl_all on unseen prompts</h3><p><small>By the task's oracle, which it was not trained on; the scores of the "
        'reward models that it was trained on stand beside.</small></p><table class="small"><thead><tr><th></th>'
        f"<th>before</th><th>after</th></tr></thead><tbody>{rows}</tbody></table>"
    )


def _plain(value: Any) -> str:
    found = number(value)
    return "-" if found is None else f"{found:.3f}"


def languages(run_dir: RunDir) -> str:
    """For every checkpoint and language of question: words of the thinking in that language and in others."""
    rows = [row for row in evaluation_rows(run_dir) if row["split"] == "test" and row["language"] != "all"]
    groups: dict[str, list[str]] = {}
    for row in rows:
        share = number(row.get("language_consistency"))
        if share is not None:
            line = stacked([("same", share), ("other", 1 - share)], row["checkpoint"], f"{100 * share:.1f} %")
            groups.setdefault(row["language"], []).append(line)
    if not groups:
        return ""
    parts = [
        f"<div><h3>questions in {escape(name)}</h3>{''.join(lines)}</div>" for name, lines in groups.items()
    ]
    return legend(("words in the language of the question", "words in another, or no words")) + (
        f'<div class="columns">{"".join(parts)}</div>'
    )
