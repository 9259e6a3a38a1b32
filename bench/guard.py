"""Have the main CPU kernels become slower than the committed baseline?

Forward and backward of each are divided by the bare GEMMs of the op in float32, or else by torch.exp over as many values, shortest
round by shortest round, on one thread. Where memory happens to lie changes a time, so rounds are taken with fresh tensors REPEATS
times; what seems slower is measured up to AGAIN times more. The command ends with an error where a ratio has grown by more than
BAND.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from . import measure, results
from .environment import environment
from .ops import families
from .ops.cases import Case
from .ops.peers import TRAINING, Inputs, Peer

BASELINE = results.FOLDER / "cpu/guard.json"
# wider than what two runs on one machine differ by
BAND = 0.3
SECONDS, REPEATS, AGAIN = 1.0, 3, 3
PHASES = ("forward", "backward")

_LOGITS, _HEAD = {"N": 256, "V": 32768}, {"N": 512, "V": 16384, "H": 256}
_EXPERTS = {"T": 256, "H": 256, "I": 128, "E": 16, "K": 4}
GUARDED = (
    Case("token_logprobs", "cpu", "float32", _LOGITS),
    Case("token_logprobs", "cpu", "bfloat16", _LOGITS),
    Case("linear_logprobs", "cpu", "float32", _HEAD),
    Case("linear_logprobs", "cpu", "bfloat16", _HEAD),
    Case("grouped_logprobs", "cpu", "float32", {"B": 64, "L": 32, "G": 8, "V": 4096}, "padded"),
    Case("grpo_loss", "cpu", "float32", {"B": 64, "L": 1024}, "padded"),
    Case("moe_experts", "cpu", "float32", _EXPERTS),
    Case("moe_experts", "cpu", "bfloat16", _EXPERTS),
    Case("route", "cpu", "float32", {"T": 2048, "E": 256, "K": 8}),
)
Ratios = dict[str, dict[str, float]]  # case -> phase -> our shortest round over the yardstick's


def ratios(baseline: Ratios) -> Ratios:
    """Of all cases but those that the reference serves, which is no kernel, and whose page faults do not repeat themselves.

    Raises:
        SystemExit: a kernel gives wrong results, so that its time means nothing.
    """
    found: Ratios = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for case in GUARDED:
            if _backend(case) == "reference":
                print(f"{case.id}: no kernel serves it here", flush=True)
                continue
            shortest: dict[str, tuple[float, float]] = {}
            for _ in range(1 + AGAIN):
                for _ in range(REPEATS):
                    for phase, pair in _shortest(case).items():
                        ours, its = map(min, pair, shortest.get(phase, pair))
                        shortest[phase] = ours, its
                found[case.id] = {phase: ours / its for phase, (ours, its) in shortest.items()}
                if not compare(baseline, {case.id: found[case.id]}):
                    break
            said = ", ".join(f"{phase} {value:.3g}" for phase, value in found[case.id].items())
            print(f"{case.id}: {said}", flush=True)
            measure.release()
    finally:
        torch.set_num_threads(threads)
    return found


def _backend(case: Case) -> str:
    op = families.OPS[case.op]
    return op.ours.backend(case, op.inputs(case, torch.device("cpu")))


def _shortest(case: Case) -> dict[str, tuple[float, float]]:
    """Phase -> the shortest rounds of ours and of the yardstick, which take turns."""
    op = families.OPS[case.op]
    # of ours the last: in place where there is such a form, since the page faults of a large result are not repeatable
    peer = [peer for peer in op.peers if peer.kind == "ours"][-1 if case.op == "token_logprobs" else 0]
    yardstick = Peer("yardstick", lambda case, inputs: _yardstick(case, inputs, op.peers), "floor")
    pair = (replace(peer, phases=TRAINING), yardstick)
    ours, its = measure.race(case, pair, *op.problem(case, torch.device("cpu")), SECONDS)
    if ours.status != "ok":
        raise SystemExit(f"FAILED {case.id}: {ours.reason}")
    return {phase: (ours.seconds[phase][0], its.seconds[phase][0]) for phase in PHASES}


def _yardstick(case: Case, inputs: Inputs, peers: tuple[Peer, ...]) -> dict[str, Callable[[], object]]:
    """The bare GEMMs of the op where it has some, else torch.exp over values like those of its first leaf."""
    single = {
        name: tensor.detach().float() if tensor.is_floating_point() else tensor
        for name, tensor in inputs.tensors.items()
    }
    for peer in (peer for peer in peers if peer.kind == "floor"):
        found: dict[str, Callable[[], object]] = peer.make(
            replace(case, dtype="float32"), replace(inputs, tensors=single)
        )
        return found
    values = single[inputs.leaves[0]]
    target = torch.empty_like(values)
    return dict.fromkeys(PHASES, lambda: torch.exp(values, out=target))


def compare(before: Mapping[str, Mapping[str, float]], after: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A line for every phase whose ratio has grown by more than BAND."""
    return [
        f"SLOWER {name}, {phase}: {before[name][phase]:.3g} before, {value:.3g} now"
        for name, phases in after.items()
        for phase, value in phases.items()
        if name in before and value > before[name][phase] * (1 + BAND)
    ]


def _ratios_of(baseline: Path) -> Ratios:
    """Raises SystemExit where another instruction set was measured, whose ratios are others."""
    record = json.loads(baseline.read_text(encoding="utf-8"))
    then, now = record["environment"]["extension"], environment("cpu")["extension"]
    if then != now:
        raise SystemExit(
            f"{baseline}: its extension is {then}, that of this machine {now}; write a baseline of its own with --baseline FILE --update"
        )
    ratios: Ratios = record["ratios"]
    return ratios


def main(update: bool = False, baseline: Path = BASELINE) -> int:
    """1 if a kernel is slower than the baseline by more than BAND; update: write the baseline."""
    if not update and not baseline.is_file():
        raise SystemExit(f"{baseline}: there is no baseline yet; write one with --update")
    before = {} if update else _ratios_of(baseline)
    found = ratios(before)
    if update:
        short = {
            name: {phase: results.short(value) for phase, value in one.items()} for name, one in found.items()
        }
        results.save(baseline, results.record(ratios=short))
        return 0
    slower = compare(before, found)
    print("\n".join(slower) if slower else "no kernel is slower than the baseline")
    return 1 if slower else 0
