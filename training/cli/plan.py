"""`run --dry-run`: the plan of a recipe, its stage graph, memory and cost."""

from training.engines.describe import describe
from training.estimate import (
    BYTES,
    CPU,
    GPU,
    LENGTH_SHARE,
    Device,
    Estimate,
    Parameters,
    estimate,
    parameters,
)
from training.exchange import LINKS, MANY, Layout, Share, fitting, held, layout_of, shares
from training.files import readable_bytes
from training.format import align, short
from training.pipeline import STAGES, parents_of, plan
from training.recipe import Recipe, remarks, start_of

GPU_BYTES = 80 * 2**30


def text(recipe: Recipe) -> str:
    """Everything that a dry run prints."""
    model = parameters(recipe)
    rows = estimate(recipe)
    device = GPU if recipe.device == "cuda" else CPU
    lines = [
        f"recipe {recipe.name}: {recipe.description}",
        f"model: {short(model.total)} parameters, {short(model.active)} of them active for a token "
        f"({model.total:,} in all); forward passes in {recipe.dtype}",
        f"rollouts: {describe(recipe.rollout)}",
        _bytes_per_parameter(model),
        *_eight_bits(recipe),
        "",
        "stage graph",
        *graph(recipe),
        "",
    ]
    header = [
        "stage",
        "work",
        "tokens sampled",
        "tokens trained",
        "operations",
        "memory",
        "a step",
        device.name,
    ]
    body = [
        [
            row.stage,
            row.work,
            short(row.sampled_tokens),
            short(row.trained_tokens),
            f"{row.sampling_flops + row.training_flops:.1e}",
            readable_bytes(row.memory_bytes),
            "?" if row.step_bytes is None else readable_bytes(row.step_bytes) if row.step_bytes else "-",
            f"{row.hours(device):,.2f}" if row.hours(device) < 100 else f"{row.hours(device):,.0f}",
        ]
        for row in rows
    ]
    lines += align([header, *body])
    hours = sum(row.hours(device) for row in rows)
    lines += [
        "",
        f"largest stage: {readable_bytes(max(held(row, 1) for row in rows))}: memory for weights, gradients, optimizer moments and reference, "
        "and what a step takes beside them (activations of a micro-batch or of the longest text, one gradient); caches of rollouts "
        "are not counted",
        *_fitting(rows),
        f"in all: about {hours:,.{0 if hours > 100 else 2}f} {device.name}"
        + (
            f", {hours * device.dollars_per_hour:,.0f} dollars at {device.dollars_per_hour:g} an hour"
            if device is GPU
            else ""
        ),
        f"assumed: responses and documents {LENGTH_SHARE:.0%} as long as the longest allowed, nothing filtered out, "
        f"{device.training_flops:.1e} operations a second in training and {device.sampling_flops:.1e} in sampling",
    ]
    if recipe.name == "deepseek-r1":
        lines.append(
            "the paper reports 147,000 H800 hours (101,000 for zero, 5,000 for data, 41,000 for the rest): 294,000 dollars"
        )
    layout = layout_of(recipe)
    if layout.processes > 1:
        lines += ["", *_processes(shares(recipe, model, rows, layout, device), layout, device)]
    lines += [f"warning: {remark}" for remark in remarks(recipe)]
    return "\n".join(lines)


def _fitting(rows: list[Estimate]) -> list[str]:
    """How many GPUs have to divide the models of a recipe that one of them does not hold, or what is in the way."""
    shard = fitting(rows, GPU_BYTES)
    if shard == 1:
        return []
    if shard:
        return [f"on GPUs of 80 GiB: parallel.processes={shard} parallel.shard={shard}, or more processes"]
    row = max(rows, key=lambda row: held(row, MANY))
    return [
        f"on GPUs of 80 GiB: not even {MANY:,} that divide it: in {row.stage.strip()} each has {readable_bytes(held(row, MANY))}, of "
        f"which {readable_bytes(BYTES * row.weights)} are the undivided copy that draws the responses and "
        f"{readable_bytes(row.divided_step_bytes or 0)} what a step takes (less of that by gradient_checkpointing, shorter texts, "
        "smaller micro_batch_tokens)"
    ]


def _processes(found: list[Share], layout: Layout, device: Device) -> list[str]:
    """What each of several processes holds, sends and computes."""
    header = ["stage", "memory", "sent in a step", "hours", "of exchange"]
    body = [
        [
            share.stage,
            readable_bytes(share.memory_bytes),
            readable_bytes(share.step_bytes),
            f"{share.hours:,.2f}",
            f"{share.exchange_hours:,.2f}",
        ]
        for share in found
    ]
    speed = LINKS["cpu" if device is CPU else "cuda"]
    return [
        f"one of {layout.processes} processes ({layout.replicate} x {layout.shard}: models side by side, processes of a model)",
        *align([header, *body]),
        f"assumed: work that divides evenly, exchange at {readable_bytes(speed)} a second that nothing hides, micro-batches of a "
        "process counted as they are; a divided model has an undivided copy beside it in every process",
    ]


def _bytes_per_parameter(model: Parameters) -> str:
    if model.adapted:
        return (
            f"bytes per parameter: {BYTES} (float32 weights), and {4 * BYTES} for each of the {short(model.trained)} of the "
            "adapters (with gradients and two moments); the reference is the model without them"
        )
    return (
        f"bytes per parameter: {4 * BYTES} in training (float32 weights, gradients and two moments), {BYTES} more for a "
        f"reference, {BYTES} for sampling"
    )


def _eight_bits(recipe: Recipe) -> list[str]:
    """The line for stages whose optimizer keeps moments in 8 bits."""
    stages = [
        stage for stage in plan(recipe) if getattr(getattr(recipe, stage), "optimizer", "") == "adamw_8bit"
    ]
    saved = 2 * (BYTES - 1)
    return [f"of these {saved} less in {', '.join(stages)}: moments in 8 bits"] if stages else []


def graph(recipe: Recipe) -> list[str]:
    """One line a stage: what it is made from."""
    rows = []
    for name in plan(recipe):
        start = recipe.model.pretrained if name == "base" else start_of(recipe, name)
        folder = [start] if start and start not in STAGES else []
        rows.append(["  " + name, "<- " + (", ".join([*folder, *parents_of(name, recipe)]) or "nothing")])
    return align(rows)
