"""``python -m bench precision``: how exact log-probs, entropies and gradients are, also where one logit leads.

Rows of V logits whose target leads the others by a number of nats, as a trained model's do, for divergences in student and teacher
alike; errors are the largest against float64, over the largest exact value, of rows with the same lead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import divergence, logprob, measure, results, timing
from .cases import DTYPES, Case
from .environment import environment
from .numerics import Exact, error
from .peers import Inputs, Peer, Unavailable
from .report.table import Cell, Table, small

SIZES = {"N": 64, "V": 32768, "H": 512}
LEADS = (0, 10, 20, 24, 30)
SCHEMA = 1
QUANTITIES = (
    ("logp", "log-prob"),
    ("entropy", "entropy"),
    ("divergence", "divergence"),
    ("mean divergence", "mean of the divergences"),
    ("gradient", "gradient"),
)
# of the implementations of the benchmarks, those that are not another name for one of these
LEFT_OUT = ("r1kernels, in place", "r1kernels, logits recomputed")


def logits_inputs(dtype: torch.dtype, lead: int) -> Inputs:
    """Normal logits with the target at ``lead`` (0: a target like any other)."""
    generator = torch.Generator().manual_seed(lead)
    logits = torch.randn(SIZES["N"], SIZES["V"], generator=generator)
    targets = torch.randint(SIZES["V"], (SIZES["N"],), generator=generator)
    if lead:
        logits.scatter_(1, targets.unsqueeze(1), float(lead))
    ones = torch.ones(SIZES["N"])
    return Inputs({"logits": logits.to(dtype), "targets": targets}, ("logits",), {"logp": ones})


def linear_inputs(dtype: torch.dtype, lead: int) -> Inputs:
    """A head of unit rows and hidden states along the row of the target, so that its logit is ``lead``."""
    generator = torch.Generator().manual_seed(lead)
    weight = _unit_rows(generator)
    targets = torch.randint(SIZES["V"], (SIZES["N"],), generator=generator)
    hidden = _along(weight, targets, lead, generator)
    above = {"logp": torch.full((SIZES["N"],), -1 / SIZES["N"]), "loss": torch.ones(())}
    tensors = {"hidden": hidden.to(dtype), "weight": weight.to(dtype), "targets": targets}
    return Inputs(tensors, ("hidden", "weight"), above)


def divergence_inputs(dtype: torch.dtype, lead: int) -> Inputs:
    """Two such heads, whose hidden states lie along the rows of the same targets."""
    given = linear_inputs(dtype, lead)
    generator = torch.Generator().manual_seed(100 + lead)
    weight = _unit_rows(generator)
    hidden = _along(weight, given["targets"], lead, generator)
    tensors = {name: given[name] for name in ("hidden", "weight")}
    tensors |= {"teacher_hidden": hidden.to(dtype), "teacher_weight": weight.to(dtype)}
    above = {"divergence": torch.full((SIZES["N"],), 1 / SIZES["N"]), "loss": torch.ones(())}
    return Inputs(tensors, ("hidden", "weight"), above)


def _unit_rows(generator: torch.Generator) -> Tensor:
    weight = torch.randn(SIZES["V"], SIZES["H"], generator=generator)
    return weight / weight.norm(dim=1, keepdim=True)


def _along(weight: Tensor, targets: Tensor, lead: int, generator: torch.Generator) -> Tensor:
    return lead * weight[targets] if lead else torch.randn(SIZES["N"], SIZES["H"], generator=generator)


# an op, and of a divergence its kind: the inputs, and who is measured
Ops = Mapping[str, tuple[Callable[[torch.dtype, int], Inputs], tuple[Peer, ...]]]
LOGPROBS: Ops = {
    "token_logprobs": (logits_inputs, logprob.TOKEN),
    "linear_logprobs": (linear_inputs, logprob.LINEAR),
}
DIVERGENCES: Ops = {
    f"linear_divergence, {kind}": (divergence_inputs, divergence.DIVERGENCE)
    for kind in ("forward_kl", "reverse_kl", "jsd")
}
OPS: Ops = {**LOGPROBS, **DIVERGENCES}


def measure_all() -> dict[str, Any]:
    """Errors of every implementation that runs here, for each dtype and lead."""
    rows = []
    for op, (inputs_of, peers) in OPS.items():
        for name, dtype in DTYPES.items():
            for lead in LEADS:
                inputs = inputs_of(dtype, lead)
                exact = _exact(op, inputs)
                for leaf in inputs.leaves:
                    inputs[leaf].requires_grad_()
                case = _case(op, name)
                for peer in peers:
                    if peer.kind != "floor" and peer.name not in LEFT_OUT:
                        found = _errors(case, peer, inputs, exact)
                        if found:
                            rows.append(
                                {"op": op, "peer": peer.name, "dtype": name, "lead": lead, "errors": found}
                            )
            measure.release()
    return {
        "schema": SCHEMA,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "environment": environment("cpu"),
        "sizes": SIZES,
        "rows": rows,
    }


def _case(op: str, dtype: str) -> Case:
    name, _, layout = op.partition(", ")
    return Case(name, "cpu", dtype, SIZES, layout)


def _exact(op: str, inputs: Inputs) -> dict[str, Exact]:
    case = _case(op, "float32")
    if case.op == "linear_logprobs":
        return logprob.linear_exact(case, inputs)
    if case.op == "linear_divergence":
        return divergence.exact(case, inputs)
    found = logprob.softmax_rows(inputs["logits"], inputs["targets"], inputs.upstream["logp"])
    return {name: Exact(value) for name, value in found.items()}


def _errors(case: Case, peer: Peer, inputs: Inputs, exact: Mapping[str, Exact]) -> dict[str, float | None]:
    try:
        outputs = peer.make(case, inputs)(inputs)
    except Unavailable:
        return {}
    gradients = timing.differentiate(*timing.upstream(outputs, inputs), inputs)
    # a mean over tokens hides what each of them is off by: it is shown only of those that give a divergence in no other form
    found = {name: error(value, exact[name]) for name, value in outputs.items() if name != "loss"}
    if case.op == "linear_divergence" and not found:
        found["mean divergence"] = error(outputs["loss"], exact["loss"])
    found["gradient"] = max(error(value, exact[name]) for name, value in gradients.items())
    return {name: results.short(value) for name, value in found.items()}


def table(record: Mapping[str, Any], op: str, quantity: str) -> Table:
    """A row for each implementation and dtype, a column for each lead; the smallest error stands out."""
    title = f"{op}: error of the {dict(QUANTITIES)[quantity]}"
    leads = ["target like any other", *(f"leads by {lead}" for lead in LEADS if lead)]
    found = Table(title, ("", "dtype", *leads))
    rows = [row for row in record["rows"] if row["op"] == op and quantity in row["errors"]]
    for dtype in DTYPES:
        for peer in dict.fromkeys(row["peer"] for row in rows):
            cells = []
            for lead in LEADS:
                group = [row for row in rows if row["dtype"] == dtype and row["lead"] == lead]
                values = {row["peer"]: row["errors"][quantity] for row in group}
                if peer in values:
                    least = min(value for value in values.values() if value is not None)
                    cells.append(Cell(small(values[peer]), "best" if values[peer] == least else ""))
            if cells:
                found.rows.append([Cell(peer), Cell(dtype), *cells])
    return found


def tables(record: Mapping[str, Any], ops: Iterable[str] = OPS) -> list[Table]:
    """Those of these ops, those without a row left out."""
    every = [table(record, op, name) for op in ops for name, _ in QUANTITIES]
    return [one for one in every if one.rows]


def main(out: Path) -> None:
    """The command."""
    from .report import markdown

    record = measure_all()
    results.save(out, record)
    print("\n\n".join(markdown.section(one) for one in tables(record)))
    print(out)
