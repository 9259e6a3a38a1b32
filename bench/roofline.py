"""``python -m bench roofline``: what the kernels for Hopper should take at the marks, by counting, before any GPU has run them.

Not a measurement, and uncalibrated: the figures of the chip below are datasheets' and others' measurements, and no kernel of
ours has been timed against the model. Per launch it counts bytes of memory, bytes that tiles bring from the L2 cache and read
from shared memory, FLOPs, and the instructions behind a tile's products, which come from the machine code
(results/machine_code.json). A tile is its products and then its epilogue, one after the other, for its warps have both to do;
everything else overlaps. Launches add up.

T tokens, H hidden, I intermediate size, E experts, K experts per token, S = T * K routed rows; N tokens, V vocabulary of a head.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass

from .cases import Case
from .ceilings import Ceilings
from .marks import MARKS, Mark
from .peers import OURS
from .results import FOLDER, load
from .table import Table

STATE = "uncalibrated: predicted by counting, no GPU has run it"


@dataclass(frozen=True)
class Chip:
    """Figures of a GPU that are taken on trust."""

    name: str
    processors: int
    clock: float  # under load, a second
    memory: float  # bytes of a copy, read plus written, a second
    l2: float  # bytes a second that tiles bring
    flops: float  # bfloat16, of a large product
    bytes_of_memory: float
    launch: float  # seconds from one kernel of a stream to the next
    issued: int = 4  # instructions of a warp a cycle and multiprocessor
    shared: int = 128  # bytes a cycle and multiprocessor
    exps: int = 16  # of the special function units, a cycle and multiprocessor

    @property
    def ceilings(self) -> Ceilings:
        exps = self.exps * self.processors * self.clock
        return Ceilings(self.memory, {"bfloat16": self.flops, "float32": self.flops / 15}, exps)


H200 = Chip("H200", 132, 1.7e9, 4.3e12, 7.7e12, 790e12, 141e9, 2.5e-6)


@dataclass(frozen=True)
class Launch:
    """Seconds by what is used; parts of one tuple overlap, the tuples follow each other."""

    name: str
    stages: tuple[dict[str, float], ...]

    @property
    def seconds(self) -> float:
        return sum(max(stage.values()) for stage in self.stages)

    @property
    def binding(self) -> str:
        stage = max(self.stages, key=lambda stage: max(stage.values()))
        return max(stage, key=stage.__getitem__)


# --- the tiles of the Hopper kernels (csrc/moe/hopper_plan.h) ---

BLOCK_M, BLOCK_N, BLOCK_K = 128, 256, 64
CONSUMER_WARPS = 8
TILE_BYTES = 2 * BLOCK_K * (BLOCK_M + BLOCK_N)
# each of two warpgroups reads its half of the rows and all columns
SHARED_BYTES = 2 * BLOCK_K * (BLOCK_M + 2 * BLOCK_N)
SILU, BF16 = "(Activation)0", "__nv_bfloat16"


def epilogue(kernel: str) -> int:
    """Instructions behind the products of a tile, of one warp."""
    record = json.loads((FOLDER / "machine_code.json").read_text())["kernels"]
    (found,) = (kernels[kernel] for kernels in record.values() if kernel in kernels)
    return int(found["epilogue"])


def tiles(
    chip: Chip, name: str, kernel: str, count: float, k_tiles: float, memory: float, out: float
) -> Launch:
    """So many tiles of so many k tiles; ``memory``: bytes of all, ``out``: bytes that a tile writes."""
    rounds = math.ceil(count / chip.processors)
    flops = 2 * BLOCK_M * BLOCK_N * BLOCK_K * chip.processors
    products = {
        "tensor cores": k_tiles * flops / chip.flops,
        "L2 cache": k_tiles * TILE_BYTES * chip.processors / chip.l2,
        "shared memory": k_tiles * SHARED_BYTES / chip.shared / chip.clock,
    }
    behind = {
        "epilogue's instructions": epilogue(kernel) * CONSUMER_WARPS / chip.issued / chip.clock,
        "epilogue's stores": out * chip.processors / chip.l2,
    }
    stages = [{key: rounds * value for key, value in stage.items()} for stage in (products, behind)]
    if memory / chip.memory > sum(max(stage.values()) for stage in stages):
        return Launch(name, ({"bandwidth": memory / chip.memory},))
    return Launch(name, tuple(stages))


def passes(chip: Chip, name: str, memory: float, exps: float = 0.0) -> Launch:
    """A kernel that goes over its bytes once."""
    return Launch(
        name,
        (
            {
                "bandwidth": memory / chip.memory,
                "special functions": exps / (chip.exps * chip.processors * chip.clock),
                "launch": chip.launch,
            },
        ),
    )


def product(chip: Chip, name: str, flops: float, memory: float) -> Launch:
    """A product by cuBLAS, at the rate of a large one."""
    return Launch(name, ({"tensor cores": flops / chip.flops, "bandwidth": memory / chip.memory},))


# --- the ops, a launch at a time ---


def experts(chip: Chip, case: Case, backward: bool) -> list[Launch]:
    t, h, i, e, k = (case.sizes[name] for name in "THIEK")
    rows = t * k
    row_tiles = e * (rows / e / BLOCK_M + 0.5)  # half a tile an expert is not full
    weights, hidden, inner = 2 * e * h * i, 2 * rows * h, 2 * rows * i
    store = f"hopper_rows_kernel<{BF16}, (R1kernelsMoeEpilogue)0, {{}}, {SILU}>"
    out = 2 * BLOCK_M * BLOCK_N

    def wide(columns: int) -> int:
        return math.ceil(columns / BLOCK_N)

    if not backward:
        up = f"hopper_rows_kernel<{BF16}, (R1kernelsMoeEpilogue)1, false, {SILU}>"
        of_up = row_tiles * math.ceil(i / (BLOCK_N // 2))
        memory = 2 * weights + 2 * t * h + 3 * inner
        return [
            passes(chip, "order of experts", 24.0 * rows),
            tiles(chip, "up", up, of_up, h / BLOCK_K, memory, 1.5 * out),
            tiles(
                chip,
                "down",
                store.format("false"),
                row_tiles * wide(h),
                i / BLOCK_K,
                weights + inner + hidden,
                out,
            ),
            passes(chip, "sum over experts", hidden + 2 * t * h),
        ]
    gate = f"hopper_rows_kernel<{BF16}, (R1kernelsMoeEpilogue)2, true, {SILU}>"
    left, right = (f"hopper_weights_kernel<{BF16}, {sides}>" for sides in ("true, false", "false, true"))
    a_weight = rows / e / BLOCK_K
    return [
        tiles(
            chip,
            "gate backward",
            gate,
            row_tiles * wide(i),
            h / BLOCK_K,
            weights + 2 * t * h + 5 * inner,
            5 * out,
        ),
        tiles(
            chip,
            "gradient of down",
            left,
            e * math.ceil(h / BLOCK_M) * wide(i),
            a_weight,
            weights + inner + hidden,
            out,
        ),
        tiles(
            chip,
            "gradient of gate and up",
            right,
            e * math.ceil(2 * i / BLOCK_M) * wide(h),
            a_weight,
            2 * weights + 2 * inner + hidden,
            out,
        ),
        tiles(
            chip,
            "gradient of the rows",
            store.format("true"),
            row_tiles * wide(h),
            2 * i / BLOCK_K,
            2 * weights + 2 * inner + hidden,
            out,
        ),
        passes(chip, "sum over experts", hidden + 2 * t * h),
    ]


def head(chip: Chip, case: Case, backward: bool) -> list[Launch]:
    """Float32 logits by cuBLAS, tile by tile, and one pass over them; kept where a sixteenth of the memory holds them."""
    n, v, h = (case.sizes[name] for name in "NVH")
    logits = float(n) * v
    weight, hidden = 2.0 * v * h, 2.0 * n * h
    made = product(chip, "logits", 2 * logits * h, weight + hidden + 4 * logits)
    if not backward:
        return [made, passes(chip, "row sums", 4 * logits, logits)]
    again = [] if 4 * logits <= chip.bytes_of_memory / 16 else [made]
    return [
        *again,
        passes(chip, "gradient of the logits", 6 * logits, logits),
        product(chip, "gradient of hidden", 2 * logits * h, 2 * logits + weight + 2 * hidden),
        product(chip, "gradient of the weight", 2 * logits * h, 2 * logits + hidden + 3 * weight),
    ]


def token(chip: Chip, case: Case, backward: bool) -> list[Launch]:
    work = case.work()["backward" if backward else "forward"]
    return [passes(chip, "rows", work.bytes, work.exps)]


def loss(chip: Chip, case: Case, backward: bool) -> list[Launch]:
    work = case.work()["backward" if backward else "forward"]
    names = ["backward"] if backward else ["sums", "loss"]
    return [passes(chip, name, work.bytes, work.exps) for name in names]


def router(chip: Chip, case: Case, backward: bool) -> list[Launch]:
    work = case.work()["backward" if backward else "forward"]
    return [passes(chip, "counters", 4.0 * case.sizes["E"]), passes(chip, "route", work.bytes, work.exps)]


LAUNCHES: dict[str, Callable[[Chip, Case, bool], list[Launch]]] = {
    "moe_experts": experts,
    "linear_logprobs": head,
    "token_logprobs": token,
    "grpo_loss": loss,
    "route": router,
}


def launches(chip: Chip, mark: Mark) -> list[Launch]:
    """What a mark's phase launches, in order."""
    make = LAUNCHES[mark.case.op]
    return [
        launch for phase in mark.phase.split("+") for launch in make(chip, mark.case, phase == "backward")
    ]


def measured(mark: Mark) -> float | None:
    """The median seconds of the committed results of a GPU, if there are any."""
    for path in sorted(FOLDER.glob("*/ops.json")):
        run = load(path)
        if run.environment["device"] == "cuda":
            rows = [one.named(OURS) for one in run.cases if one.case.id == mark.case.id]
            return next((row.median(mark.phase) for row in rows if row), None)
    return None


def table(chip: Chip = H200) -> Table:
    """The marks, the predictions beside them, and what was measured."""
    head = (
        "op",
        "shape",
        "phase",
        "mark",
        "mark, ms",
        f"predicted on an {chip.name}, ms ({STATE})",
        "what binds",
        "measured, ms",
    )
    found = Table("Roofline", head)
    for mark in MARKS:
        parts = launches(chip, mark)
        seconds, most = sum(launch.seconds for launch in parts), max(parts, key=lambda launch: launch.seconds)
        start = [f"`{mark.case.op}`", mark.case.shape, mark.phase, mark.words]
        times = [f"{1e3 * value:.3g}" for value in (mark.goal(chip.ceilings), seconds)]
        took = measured(mark)
        last = "-" if took is None else f"{1e3 * took:.3g}"
        found.rows.append([*start, *times, f"{most.name}: {most.binding}", last])
    return found


def main() -> None:
    """The command: the table, and every launch of every mark."""
    print(f"{STATE}\n\n{table().markdown()}")
    for mark in MARKS:
        print(f"\n{mark.case.op}, {mark.case.shape}, {mark.phase}")
        for launch in launches(H200, mark):
            print(f"  {launch.name:<26} {1e3 * launch.seconds:8.3f} ms  {launch.binding}")
