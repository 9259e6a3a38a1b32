"""``python -m bench guard``: have the main CPU kernels become slower than the committed baseline?

A time is not comparable between two days of one machine; a ratio to a yardstick timed in the same rounds is. Forward
and backward of each kernel are divided by a pass of torch.exp over as many values (for logits and log-probs) or by the
bare GEMMs of the op in float32, shortest round by shortest round, without the first calls of turns (turns.py). One
thread: threads that wait for one another repeat badly on a machine that others use too. Where memory happens to lie
changes a time, so rounds are taken with fresh tensors REPEATS times; and what seems slower is measured up to AGAIN
times more, since noise goes away and a slower kernel does not. Hardware counters, which would do better, are missing
in most virtual machines. The command ends with an error where a ratio has grown by more than BAND.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from . import families, measure, results, timing, turns
from .cases import Case
from .numerics import allowed
from .peers import Inputs, Peer

BASELINE = results.FOLDER / "cpu/guard.json"
# wider than what two runs on one machine differ by
BAND = 0.3
ROUNDS, REPEATS, AGAIN = 12, 3, 3
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
Ratios = dict[str, dict[str, float]]
Shortest = dict[str, tuple[float, float]]  # phase -> of ours, of the yardstick


def ratios(say: Callable[[str], None], baseline: Ratios) -> Ratios:
    """Case -> phase -> our shortest round over the yardstick's; without ops that the reference serves.

    The page faults of its large temporaries do not repeat themselves, and it is no kernel.

    Raises:
        SystemExit: a kernel gives wrong results, so that its time means nothing.
    """
    found: Ratios = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for case in GUARDED:
            if _backend(case) == "reference":
                say(f"{case.id}: no kernel serves it here")
                continue
            shortest: Shortest = {}
            for _ in range(1 + AGAIN):
                for _ in range(REPEATS):
                    now = _shortest(case)
                    for phase, (ours, its) in now.items():
                        before = shortest.get(phase, (ours, its))
                        shortest[phase] = min(ours, before[0]), min(its, before[1])
                found[case.id] = {phase: ours / its for phase, (ours, its) in shortest.items()}
                if not compare(baseline, {case.id: found[case.id]}):
                    break
            say(f"{case.id}: {', '.join(f'{phase} {value:.3g}' for phase, value in found[case.id].items())}")
            measure.release()
    finally:
        torch.set_num_threads(threads)
    return found


def _backend(case: Case) -> str:
    op = families.OPS[case.op]
    return op.ours.backend(case, op.inputs(case, torch.device("cpu")))


def _shortest(case: Case) -> Shortest:
    """The shortest rounds of ours and of the yardstick."""
    op, device = families.OPS[case.op], torch.device("cpu")
    inputs, exact = op.problem(case, device)
    # of ours the last: in place where there is such a form, since the page faults of a large result are not repeatable
    peer = [peer for peer in op.peers if peer.kind == "ours"][-1 if case.op == "token_logprobs" else 0]
    call, ready = peer.make(case, inputs), peer.fresh(inputs)
    outputs = call(ready)
    for name, off in timing.errors(op, outputs, timing.differentiate(outputs, ready), exact).items():
        if not off <= allowed(None, case.torch_dtype):
            raise SystemExit(f"FAILED {case.id}: {name} is off by {off:.2g}")
    yardstick, clock = _yardstick(case, inputs, op.peers), timing.Clock(device)
    both = (lambda: timing.train(call, peer.fresh(inputs), clock), lambda: timing.floor(yardstick, clock))
    # the first round is a warm-up, and tells how many calls a turn makes
    calls = [turns.take(once).calls for once in both]
    rounds = [
        [turns.take(once, count).samples for once, count in zip(both, calls, strict=True)]
        for _ in range(ROUNDS)
    ]
    ours, its = zip(*rounds, strict=True)
    return {phase: (min(one[phase] for one in ours), min(one[phase] for one in its)) for phase in PHASES}


def _yardstick(case: Case, inputs: Inputs, peers: tuple[Peer, ...]) -> dict[str, Callable[[], object]]:
    """The bare GEMMs of the op where it has some, else torch.exp over values like those of its first leaf."""
    single = {
        name: tensor.detach().float() if tensor.is_floating_point() else tensor
        for name, tensor in inputs.tensors.items()
    }
    for peer in peers:
        if peer.kind == "floor":
            found: dict[str, Callable[[], object]] = peer.make(
                replace(case, dtype="float32"), replace(inputs, tensors=single)
            )
            return found
    values = single[inputs.leaves[0]]
    target = torch.empty_like(values)
    return dict.fromkeys(PHASES, lambda: torch.exp(values, out=target))


def main(update: bool, baseline: Path = BASELINE) -> int:
    """The command: 1 if a kernel is slower than the baseline by more than BAND."""
    if not update and not baseline.is_file():
        raise SystemExit(f"{baseline}: there is no baseline yet; write one with --update")
    before = {} if update else json.loads(baseline.read_text(encoding="utf-8"))["ratios"]
    found = ratios(lambda text: print(text, flush=True), before)
    if update:
        short = {
            name: {phase: results.short(value) for phase, value in one.items()} for name, one in found.items()
        }
        results.save(baseline, results.record(ratios=short))
        return 0
    slower = compare(before, found)
    print("\n".join(slower) if slower else "no kernel is slower than the baseline")
    return 1 if slower else 0


def compare(before: Mapping[str, Mapping[str, float]], after: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A line for every phase whose ratio has grown by more than BAND."""
    return [
        f"SLOWER {name}, {phase}: {before[name][phase]:.3g} before, {value:.3g} now"
        for name, phases in after.items()
        for phase, value in phases.items()
        if name in before and value > before[name][phase] * (1 + BAND)
    ]
