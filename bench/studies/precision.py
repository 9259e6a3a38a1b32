"""How exact log-probs, entropies and gradients are, also where one logit leads.

Rows of V logits whose target leads the others by a number of nats, as a trained model's do, for divergences in student and teacher
alike; errors are the largest against float64, over the largest exact value, of rows with the same lead.
"""

from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import results
from ..measure import release
from ..ops import divergence, logprob
from ..ops.cases import DTYPES, Case
from ..ops.peers import Draw, Inputs, Op, Unavailable
from ..table import Cell, Table, small

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
    rows = []
    for (name, (op, inputs_of)), (dtype, of_torch) in product(OPS.items(), DTYPES.items()):
        op_name, _, kind = name.partition(", ")
        case = Case(op_name, "cpu", dtype, SIZES, kind)
        found = [_errors(case, op, inputs_of(of_torch, lead)) for lead in LEADS]
        for peer, errors in found[0].items():
            of_leads = {key: [results.short(each[peer][key]) for each in found] for key in errors}
            rows.append({"op": name, "peer": peer, "dtype": dtype, "errors": of_leads})
        release()
    return {"sizes": SIZES, "leads": LEADS, "rows": rows}


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
        errors = op.errors({**outputs, **inputs.gradients(outputs)}, exact)
        slopes = max(value for name, value in errors.items() if name.startswith("d "))
        shown = {name: value for name, value in errors.items() if name in QUANTITIES}
        # a mean over tokens hides what each of them is off by: it is shown only of those that give a divergence in no other form
        if case.op == "linear_divergence" and not shown:
            shown = {"mean divergence": errors["loss"]}
        found[peer.name] = {**shown, "gradient": slopes}
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
