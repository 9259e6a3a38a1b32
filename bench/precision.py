"""How exact log-probs, entropies and gradients are, also where one logit leads.

Rows of V logits whose target leads the others by a number of nats, as a trained model's do, for divergences in student and teacher
alike; errors are the largest against float64, over the largest exact value, of rows with the same lead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import divergence, logprob, results, timing
from . import measure as measuring
from .cases import DTYPES, Case
from .numerics import error
from .peers import Draw, Inputs, Op, Unavailable
from .table import Cell, Table, small

SIZES = {"N": 64, "V": 32768, "H": 512}
LEADS = (0, 10, 20, 24, 30)
QUANTITIES = {"logp": "log-prob", "entropy": "entropy", "divergence": "divergence",
              "mean divergence": "mean of the divergences", "gradient": "gradient"}  # fmt: skip
# of the implementations of the benchmarks, those that are not another name for one of these
LEFT_OUT = ("r1kernels, in place", "r1kernels, logits recomputed")
_CPU = torch.device("cpu")


def logits_inputs(dtype: torch.dtype, lead: int) -> Inputs:
    """Normal logits with the target at ``lead`` (0: a target like any other)."""
    draw = Draw(_CPU, lead)
    logits, targets = draw.normal(SIZES["N"], SIZES["V"]), draw.below(SIZES["V"], SIZES["N"])
    if lead:
        logits.scatter_(1, targets.unsqueeze(1), float(lead))
    tensors = {"logits": logits.to(dtype), "targets": targets}
    return Inputs(tensors, ("logits",), {"logp": torch.ones(SIZES["N"])})


def linear_inputs(dtype: torch.dtype, lead: int) -> Inputs:
    """A head of unit rows and hidden states along the row of the target, so that its logit is ``lead``."""
    draw = Draw(_CPU, lead)
    weight, targets = _unit_rows(draw), draw.below(SIZES["V"], SIZES["N"])
    hidden = _along(weight, targets, lead, draw)
    tensors = {"hidden": hidden.to(dtype), "weight": weight.to(dtype), "targets": targets}
    above = {"logp": torch.full((SIZES["N"],), -1 / SIZES["N"]), "loss": torch.ones(())}
    return Inputs(tensors, ("hidden", "weight"), above)


def divergence_inputs(dtype: torch.dtype, lead: int) -> Inputs:
    """Two such heads, whose hidden states lie along the rows of the same targets."""
    given, draw = linear_inputs(dtype, lead), Draw(_CPU, 100 + lead)
    weight = _unit_rows(draw)
    hidden = _along(weight, given.tensors.pop("targets"), lead, draw)
    tensors = {**given.tensors, "teacher_hidden": hidden.to(dtype), "teacher_weight": weight.to(dtype)}
    above = {"divergence": torch.full((SIZES["N"],), 1 / SIZES["N"]), "loss": torch.ones(())}
    return Inputs(tensors, given.leaves, above)


def _unit_rows(draw: Draw) -> Tensor:
    return F.normalize(draw.normal(SIZES["V"], SIZES["H"]))


def _along(weight: Tensor, targets: Tensor, lead: int, draw: Draw) -> Tensor:
    return lead * weight[targets] if lead else draw.normal(SIZES["N"], SIZES["H"])


# an op, and of a divergence its kind: who is measured, and the inputs
OPS: Mapping[str, tuple[Op, Callable[[torch.dtype, int], Inputs]]] = {
    "token_logprobs": (logprob.OPS["token_logprobs"], logits_inputs),
    "linear_logprobs": (logprob.OPS["linear_logprobs"], linear_inputs),
    **{
        f"linear_divergence, {kind}": (divergence.OPS["linear_divergence"], divergence_inputs)
        for kind in ("forward_kl", "reverse_kl", "jsd")
    },
}


def measure() -> dict[str, Any]:
    """Errors of every implementation that runs here, for each dtype and lead."""
    rows: dict[tuple[str, str, str], dict[str, list[float | None]]] = {}
    for name, (op, inputs_of) in OPS.items():
        for dtype in DTYPES:
            for lead in LEADS:
                inputs = inputs_of(DTYPES[dtype], lead)
                case = Case(name.partition(", ")[0], "cpu", dtype, SIZES, name.partition(", ")[2])
                for peer, errors in _errors(case, op, inputs).items():
                    row = rows.setdefault((name, peer, dtype), {})
                    for quantity, value in errors.items():
                        row.setdefault(quantity, []).append(results.short(value))
            measuring.release()
    found = [
        {**dict(zip(("op", "peer", "dtype"), names, strict=True)), "errors": each}
        for names, each in rows.items()
    ]
    return {"sizes": SIZES, "leads": LEADS, "rows": found}


def _errors(case: Case, op: Op, inputs: Inputs) -> dict[str, dict[str, float]]:
    exact, found = op.exact(case, inputs), {}
    inputs.require_grad()
    for peer in op.peers:
        if peer.kind == "floor" or peer.name in LEFT_OUT:
            continue
        try:
            outputs = peer.make(case, inputs)(inputs)
        except Unavailable:
            continue
        gradients = timing.differentiate(outputs, inputs)
        # a mean over tokens hides what each of them is off by: it is shown only of those that give a divergence in no other form
        errors = {name: error(value, exact[name]) for name, value in outputs.items() if name != "loss"}
        if case.op == "linear_divergence" and not errors:
            errors["mean divergence"] = error(outputs["loss"], exact["loss"])
        errors["gradient"] = max(error(value, exact[name]) for name, value in gradients.items())
        found[peer.name] = errors
    return found


def tables(record: Mapping[str, Any]) -> list[Table]:
    """For each op and quantity a row for each implementation and dtype, a column for each lead; the smallest error stands out."""
    head = ("", "dtype", "target like any other", *(f"leads by {lead}" for lead in record["leads"] if lead))
    found = []
    for op, (quantity, name) in product(
        dict.fromkeys(row["op"] for row in record["rows"]), QUANTITIES.items()
    ):
        table = Table(f"{op}: error of the {name}", head)
        for dtype in DTYPES:
            same = [row for row in record["rows"] if (row["op"], row["dtype"]) == (op, dtype)]
            rows = {row["peer"]: row["errors"][quantity] for row in same if quantity in row["errors"]}
            least = [min(filter(None, values), default=None) for values in zip(*rows.values(), strict=True)]
            for peer, values in rows.items():
                pairs = zip(values, least, strict=True)
                table.rows.append(
                    [peer, dtype, *(Cell(small(one), "best" if one == best else "") for one, best in pairs)]
                )
        if table.rows:
            found.append(table)
    return found
