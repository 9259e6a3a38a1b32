"""The bytes that the experts keep for the backward, at the true shapes of models, against X (T, H) + pre-activation (S, 2 I), S = T * K.

All tensors that autograd saves count, each storage once, parameters left out. No one needs the weights for that: ours and
grouped_mm run on fake tensors of the true shapes; eager PyTorch, which looks at the routing, on real tokens, with one expert's
weights in the place of all.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch._subclasses import FakeTensorMode

from .. import memory
from ..ops import moe
from ..ops.cases import MODELS, Case
from ..ops.peers import EAGER, OURS, Inputs, Peer
from ..table import Cell, Table, size, times

TOKENS = 64
DTYPE = "bfloat16"
ALLOWED = 1.05  # of X + pre-activation
NOTHING_SAVED, GROUPED_MM = f"{OURS}, nothing saved", "transformers, grouped_mm"
SHOWN = (OURS, NOTHING_SAVED, GROUPED_MM, EAGER)


def goal(case: Case) -> int:
    """Bytes of X (T, H) and the pre-activation (S, 2 I)."""
    s = case.sizes
    return case.bytes_per_value * s["T"] * (s["H"] + s["K"] * 2 * s["I"])


def count(case: Case, peer: Peer) -> int:
    """Bytes that one forward of an implementation keeps."""
    fake = peer.name != EAGER
    mode: AbstractContextManager[object] = FakeTensorMode() if fake else nullcontext()
    with mode:
        inputs = _inputs(case, case.sizes["E"] if fake else 1)
        call = peer.make(case, inputs)
        with memory.counting_saved([inputs["gate_up"], inputs["down"]]) as saved:
            outputs = call(inputs)
    del outputs
    return saved.bytes


def _inputs(case: Case, held: int) -> Inputs:
    """Those of moe_experts, with the weights of so many experts in the place of all."""
    s, dtype = case.sizes, case.torch_dtype
    generator = torch.Generator().manual_seed(0)
    scores, indices = torch.rand(s["T"], s["E"], generator=generator).topk(s["K"], dim=-1)
    gate_up = torch.zeros(held, 2 * s["I"], s["H"], dtype=dtype).expand(s["E"], -1, -1)
    down = torch.zeros(held, s["H"], s["I"], dtype=dtype).expand(s["E"], -1, -1)
    hidden = torch.zeros(s["T"], s["H"], dtype=dtype)
    values = (hidden, indices, scores, gate_up, down)
    tensors = dict(zip(moe.EXPERTS_OF.split(","), values, strict=True))
    return Inputs(tensors, ("hidden", "weights", "gate_up", "down"), {}).require_grad()


def measure() -> dict[str, Any]:
    """Saved bytes of every implementation at every model's shape."""
    peers = {peer.name: peer for peer in moe.EXPERTS}
    found = []
    for model, sizes in MODELS.items():
        case = Case("moe_experts", "cpu", DTYPE, {"T": TOKENS, **sizes}, model=model)
        kept = {name: count(case, peers[name]) for name in SHOWN}
        found.append({"model": model, "sizes": case.sizes, "goal_bytes": goal(case), "saved_bytes": kept})
    return {"dtype": DTYPE, "cases": found}


def tables(record: Mapping[str, Any]) -> list[Table]:
    """A row for each model: X + pre-activation, and how many times as much each implementation keeps."""
    note = (
        f"Bytes that autograd keeps of one call in {record['dtype']}, parameters left out, and in brackets how many times X "
        f"(T, H) + pre-activation (S, 2 I) that is; the goal of ours is at most {ALLOWED}. They grow in proportion to T."
    )
    found = Table("Saved for the backward", ("model", "shape", "X + pre-activation", *SHOWN), note=note)
    for case in record["cases"]:
        wanted = case["goal_bytes"]
        shares = {name: kept / wanted for name, kept in case["saved_bytes"].items()}
        shown = {name: f"{share:.3f}x" if share < 2 else times(share) for name, share in shares.items()}
        cells = [
            Cell(f"{size(kept)} ({shown[name]})", "failed" if name == OURS and shares[name] > ALLOWED else "")
            for name, kept in case["saved_bytes"].items()
        ]
        shape = ", ".join(f"{name} {count}" for name, count in case["sizes"].items())
        found.rows.append([case["model"], shape, size(wanted), *cells])
    return [found]
