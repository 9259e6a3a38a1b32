"""What the kernels for Hopper should take at the marks, by counting, before any GPU has run them.

Not a measurement, and uncalibrated: the figures of the chip below are datasheets' and others' measurements, and no kernel of
ours has been timed against the model. Per launch it counts bytes of memory, bytes that tiles bring from the L2 cache and read
from shared memory, FLOPs, and the instructions behind a tile's products, which come from the machine code
(results/machine_code.json). A tile is its products and then its epilogue, one after the other, for its warps have both to do;
everything else overlaps. Launches add up.

T tokens, H hidden, I intermediate size, E experts, K experts per token, S = T * K routed rows; N tokens, V vocabulary of a head.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass

from ..ceilings import Ceilings
from ..ops.cases import CASES, Case, Work
from ..ops.peers import OURS
from ..results import FOLDER, load
from ..table import Table

STATE = "uncalibrated: predicted by counting, no GPU has run it"

# --- the marks: what the kernels are to reach, each at the shape of one case ---


@dataclass(frozen=True)
class Mark:
    """The phase of a case, the mark in words, and its seconds by the work of the phase under the ceilings of a machine."""

    case: Case
    phase: str
    words: str
    seconds: Callable[[Work, Ceilings], float]

    @property
    def work(self) -> Work:
        return self.case.work()[self.phase]

    def goal(self, ceilings: Ceilings) -> float:
        return self.seconds(self.work, ceilings)


def _mark(name: str, phase: str, words: str, seconds: Callable[[Work, Ceilings], float]) -> Mark:
    (case,) = (case for case in CASES if case.device == "cuda" and case.id == name)
    return Mark(case, phase, words, seconds)


def _products(work: Work, ceilings: Ceilings) -> float:
    """1.10 * 8 N V H at the rate of a GEMM: of 6 N V H and the logits, which the backward computes again."""
    return 1.10 * 8 / 6 * work.flops / ceilings.flops_per_second["bfloat16"]


HEAD = "linear_logprobs-N8192-V131072-H4096-bfloat16"
LARGE_HEAD = "linear_logprobs-N16384-V248320-H2048-bfloat16"
EXPERTS, BOTH = "moe_experts-T32768-H2048-I768-E128-K8-bfloat16", "forward+backward"
MARKS = (
    _mark("token_logprobs-N8192-V151936-bfloat16", "forward", "85 % of the bandwidth",
          lambda work, ceilings: work.bytes / ceilings.bytes_per_second / 0.85),
    _mark(HEAD, "forward", "650 TFLOP/s", lambda work, ceilings: work.flops / 650e12),
    _mark(HEAD, BOTH, "1.10 of 8 N V H", _products),
    _mark(LARGE_HEAD, BOTH, "1.10 of 8 N V H", _products),
    _mark("grpo_loss-B64-L1024-float32-padded", "forward", "20 microseconds", lambda work, ceilings: 20e-6),
    _mark(EXPERTS, "forward", "550 TFLOP/s", lambda work, ceilings: work.flops / 550e12),
    _mark(EXPERTS, BOTH, "450 TFLOP/s", lambda work, ceilings: work.flops / 450e12),
    _mark("route-T4096-E256-K8-float32", "forward", "10 microseconds", lambda work, ceilings: 10e-6),
)  # fmt: skip

# --- the chip ---


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
    products = {
        "tensor cores": k_tiles * 2 * BLOCK_M * BLOCK_N * BLOCK_K * chip.processors / chip.flops,
        "L2 cache": k_tiles * TILE_BYTES * chip.processors / chip.l2,
        "shared memory": k_tiles * SHARED_BYTES / chip.shared / chip.clock,
    }
    behind = {
        "epilogue's instructions": epilogue(kernel) * CONSUMER_WARPS / chip.issued / chip.clock,
        "epilogue's stores": out * chip.processors / chip.l2,
    }
    stages = tuple({key: rounds * value for key, value in stage.items()} for stage in (products, behind))
    if memory / chip.memory > sum(max(stage.values()) for stage in stages):
        stages = ({"bandwidth": memory / chip.memory},)
    return Launch(name, stages)


def passes(chip: Chip, name: str, memory: float, exps: float = 0.0) -> Launch:
    """A kernel that goes over its bytes once."""
    functions = exps / (chip.exps * chip.processors * chip.clock)
    used = {"bandwidth": memory / chip.memory, "special functions": functions, "launch": chip.launch}
    return Launch(name, (used,))


def product(chip: Chip, name: str, flops: float, memory: float) -> Launch:
    """A product by cuBLAS, at the rate of a large one."""
    return Launch(name, ({"tensor cores": flops / chip.flops, "bandwidth": memory / chip.memory},))


# --- the ops, a launch at a time ---


def experts(chip: Chip, case: Case, backward: bool) -> list[Launch]:
    t, h, i, e, k = (case.sizes[name] for name in "THIEK")
    rows = t * k
    row_tiles = e * (rows / e / BLOCK_M + 0.5)  # half a tile an expert is not full
    weights, hidden, inner = 2 * e * h * i, 2 * rows * h, 2 * rows * i
    wide_h, wide_i = (math.ceil(columns / BLOCK_N) for columns in (h, i))

    def on_rows(
        name: str, kernel: str, columns: float, depth: float, memory: float, out: float = 1.0
    ) -> Launch:
        kernel = f"hopper_rows_kernel<__nv_bfloat16, (R1kernelsMoeEpilogue){kernel}, (Activation)0>"
        tile = out * 2 * BLOCK_M * BLOCK_N
        return tiles(chip, name, kernel, row_tiles * columns, depth / BLOCK_K, memory, tile)

    def on_weights(name: str, kernel: str, height: int, width: int, memory: float) -> Launch:
        kernel, tile = f"hopper_weights_kernel<__nv_bfloat16, {kernel}>", 2 * BLOCK_M * BLOCK_N
        count = e * math.ceil(height / BLOCK_M) * width
        return tiles(chip, name, kernel, count, rows / e / BLOCK_K, memory, tile)

    total = passes(chip, "sum over experts", hidden + 2 * t * h)
    up, read = 2 * weights + 2 * t * h + 3 * inner, 2 * weights + 2 * inner + hidden
    if not backward:
        return [
            passes(chip, "order of experts", 24.0 * rows),
            on_rows("up", "1, false", math.ceil(i / (BLOCK_N // 2)), h, up, 1.5),
            on_rows("down", "0, false", wide_h, i, weights + inner + hidden),
            total,
        ]
    return [
        on_rows("gate backward", "2, true", wide_i, h, weights + 2 * t * h + 5 * inner, 5.0),
        on_weights("gradient of down", "true, false", h, wide_i, weights + inner + hidden),
        on_weights("gradient of gate and up", "false, true", 2 * i, wide_h, read),
        on_rows("gradient of the rows", "0, true", wide_h, 2 * i, read),
        total,
    ]


def head(chip: Chip, case: Case, backward: bool) -> list[Launch]:
    """Float32 logits by cuBLAS, tile by tile, and one pass over them; kept where a sixteenth of the memory holds them."""
    n, v, h = (case.sizes[name] for name in "NVH")
    logits, weight, hidden = float(n) * v, 2.0 * v * h, 2.0 * n * h
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


def small(chip: Chip, case: Case, backward: bool) -> list[Launch]:
    """Kernels that go over their bytes once, one after another."""
    work = case.work()["backward" if backward else "forward"]
    last = passes(chip, "backward" if backward else case.op, work.bytes, work.exps)
    if case.op == "route":
        return [passes(chip, "counters", 4.0 * case.sizes["E"]), last]
    sums = case.op == "grpo_loss" and not backward
    return [passes(chip, "sums", work.bytes, work.exps), last] if sums else [last]


def launches(chip: Chip, mark: Mark) -> list[Launch]:
    """What a mark's phase launches, in order."""
    make = {"moe_experts": experts, "linear_logprobs": head}.get(mark.case.op, small)
    phases = mark.phase.split("+")
    return [launch for phase in phases for launch in make(chip, mark.case, phase == "backward")]


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
    predicted = f"predicted on an {chip.name}, ms ({STATE})"
    rows = []
    for mark in MARKS:
        parts, took = launches(chip, mark), measured(mark)
        most = max(parts, key=lambda launch: launch.seconds)
        goal, seconds = (
            f"{1e3 * value:.3g}" for value in (mark.goal(chip.ceilings), sum(one.seconds for one in parts))
        )
        rows.append([f"`{mark.case.op}`", mark.case.shape, mark.phase, mark.words, goal, seconds,
                     f"{most.name}: {most.binding}", "-" if took is None else f"{1e3 * took:.3g}"])  # fmt: skip
    head = ("op", "shape", "phase", "mark", "mark, ms", predicted, "what binds", "measured, ms")
    return Table("Roofline", head, rows)


def main() -> None:
    """The command: the table, and every launch of every mark."""
    print(f"{STATE}\n\n{table().markdown()}")
    for mark in MARKS:
        print(f"\n{mark.case.op}, {mark.case.shape}, {mark.phase}")
        for launch in launches(H200, mark):
            print(f"  {launch.name:<26} {1e3 * launch.seconds:8.3f} ms  {launch.binding}")
