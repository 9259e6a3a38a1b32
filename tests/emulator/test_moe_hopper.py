"""The Hopper kernels of the grouped products under the host emulator, and their plan.

Barriers, boxes of the copy engine and wgmma are emulated; that the swizzled layouts and the instructions are those of the
hardware, tests/packaging/test_hopper_build.py checks as far as it can be without one.

S rows, E experts. Rows in expert order, rows of no expert last.
"""

import itertools
import random

import pytest
import torch
from torch.nn import functional as F

from tests.support.emulated_rows import address
from tests.support.redzones import Redzones

ELEMENTS = {torch.bfloat16: 1, torch.float16: 2}
STORE, UP, GATE_BACKWARD = range(3)
# rows of each expert, and of no one: none, a part of a tile, exactly one, more than one
COUNTS = [0, 5, 128, 0, 150]
NOBODY = 9
TOLERANCE = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # one rounding


@pytest.fixture(scope="module")
def module(emulated):
    return emulated("moe_hopper")


class Case:
    """Rows of the experts COUNTS and a call of the kernels, whose arrays lie between redzones."""

    def __init__(self, module, dtype, counts=COUNTS, unowned=NOBODY, top_k=2, seed=0):
        torch.manual_seed(seed)
        module.set_seed(seed)
        self.module, self.dtype, self.zones = module, dtype, Redzones()
        self.counts, self.rows = counts, sum(counts) + unowned
        self.bounds = [0, *itertools.accumulate(counts), self.rows]
        order = torch.randperm(self.rows)
        self.tokens = (self.rows + top_k - 1) // top_k
        self.order, self.token = order, order // top_k
        block = module.BLOCK_M
        tiles = [
            (expert, first, min(first + block, end))
            for expert, (begin, end) in enumerate(itertools.pairwise(self.bounds))
            for first in range(begin, end, block)
        ]
        spare = [(-1, 0, 0)] * 3  # the host knows only how many there are at most
        table = torch.tensor([(*tile, 0) for tile in [*tiles, *spare]], dtype=torch.int32)
        self.call = {
            "element": ELEMENTS[dtype],
            "rows": self.rows,
            "experts": len(counts),
            "divisor": top_k,
            "tile_count": len(table),
            "tiles": address(self.given(table)),
            "bounds": address(self.given(torch.tensor(self.bounds, dtype=torch.int32))),
        }

    def given(self, values):
        self.last = self.zones.input(values.contiguous())
        self.kept = [*getattr(self, "kept", []), self.last]
        return self.last

    def values(self, *shape):
        return (torch.randn(*shape) / 4).to(self.dtype)

    def output(self, *shape, dtype=None):
        return self.zones.output(*shape, dtype=dtype or self.dtype)

    def index(self):
        return address(self.given(self.order.to(torch.int32)))

    def run(self, name, **arguments):
        call = self.call | {
            key: address(value) if isinstance(value, torch.Tensor) else value
            for key, value in arguments.items()
        }
        assert getattr(self.module, f"takes_{name}")(call)
        assert getattr(self.module, name)(call) == 0
        self.zones.check()

    def products(self, x, weight):
        """Row r of expert e: x[r] @ weight[e], in float64; zeros for rows of no expert."""
        parts = [
            x[begin:end].double() @ matrix.double()
            for matrix, (begin, end) in zip(weight, itertools.pairwise(self.bounds), strict=False)
        ]
        return torch.cat([*parts, torch.zeros(self.rows - self.bounds[-2], weight.shape[2]).double()])


def close(ours, exact, dtype, extra=1e-4):
    torch.testing.assert_close(ours.double(), exact, rtol=2 * TOLERANCE[dtype], atol=extra)


# depths of one k tile and less, a part of one behind whole ones, and more than there are stages; odd widths
@pytest.mark.parametrize(("depth", "columns"), [(8, 8), (64, 256), (200, 264), (456, 40)])
@pytest.mark.parametrize("transposed", [True, False])
def test_product_of_rows(module, depth, columns, transposed):
    case = Case(module, torch.bfloat16, seed=depth)
    x, weight = case.given(case.values(case.rows, depth)), case.values(len(COUNTS), depth, columns)
    stored = case.given(weight.transpose(1, 2) if transposed else weight)
    out = case.output(case.rows, columns)
    case.run("product", epilogue=STORE, transposed=int(transposed), clear_rest=1, x=x, weight=stored,
             columns=columns, depth=depth, out=out)  # fmt: skip
    close(out, case.products(x, weight), case.dtype)
    assert torch.equal(out[case.bounds[-2] :], torch.zeros(NOBODY, columns, dtype=case.dtype))


def test_rows_of_nobody_stay_as_they_are_where_nobody_asks(module):
    case = Case(module, torch.float16)
    x, weight = case.given(case.values(case.rows, 64)), case.given(case.values(len(COUNTS), 24, 64))
    out = case.output(case.rows, 24)
    before = out.clone()
    case.run("product", epilogue=STORE, transposed=1, x=x, weight=weight, columns=24, depth=64, out=out)
    end = case.bounds[-2]
    close(out[:end], case.products(x, weight.transpose(1, 2))[:end], case.dtype)
    assert torch.equal(out[end:].view(torch.int16), before[end:].view(torch.int16))


def test_a_row_does_not_feel_infinities_in_other_rows(module):
    case = Case(module, torch.bfloat16)
    values = case.values(case.rows, 72)
    x, spoiled = case.given(values), values.clone()
    spoiled[1::2] = torch.inf
    weight = case.given(case.values(len(COUNTS), 72, 16))
    outs = []
    for rows in (x, case.given(spoiled)):
        outs.append(case.output(case.rows, 16))
        case.run("product", epilogue=STORE, x=rows, weight=weight, columns=16, depth=72, out=outs[-1])
    end = case.bounds[-2]
    assert torch.equal(outs[0][:end:2], outs[1][:end:2])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("activation", [0, 1])
def test_up_projection_with_gather(module, activation, seed):
    """Widths beyond one column tile: gate and up come from different halves of it."""
    case = Case(module, torch.bfloat16, seed=seed)
    hidden, inner = 136, (136, 8, 128)[seed]
    x, weight = (
        case.given(case.values(case.tokens, hidden)),
        case.given(case.values(len(COUNTS), 2 * inner, hidden)),
    )
    pre, activated = case.output(case.rows, 2 * inner), case.output(case.rows, inner)
    case.run("product", epilogue=UP, activation=activation, transposed=1, clear_rest=1, x=x, x_index=case.index(),
             weight=weight, columns=2 * inner, depth=hidden, out=pre, activated=activated)  # fmt: skip
    close(pre, case.products(x[case.token], weight.transpose(1, 2)), case.dtype)
    gate, up = pre.double().chunk(2, dim=1)
    act = F.silu(gate) if activation == 0 else F.gelu(gate, approximate="tanh")
    close(activated, act * up, case.dtype, extra=1e-6)


def gate_backward(module, dtype, inner, hidden=136, seed=0, **wanted):
    """Runs it; the case, its outputs and what they are to be: (out, activated, partials) twice."""
    case = Case(module, dtype, seed=seed)
    grad, weight = case.values(case.tokens, hidden), case.values(len(COUNTS), hidden, inner)
    pre = case.values(case.rows, 2 * inner) * 4
    pre[case.bounds[-2] :] = torch.nan  # no one has written them
    scales = torch.rand(case.rows)
    scales[case.order[case.bounds[-2] :]] = torch.nan
    parts = (inner + module.PART_COLUMNS - 1) // module.PART_COLUMNS
    outputs = {
        "out": case.output(case.rows, 2 * inner),
        "activated": case.output(case.rows, inner),
        "partials": case.output(parts, case.rows, dtype=torch.float32),
    }
    outputs = {name: output for name, output in outputs.items() if wanted.get(name, True)}
    case.run("product", epilogue=GATE_BACKWARD, x=case.given(grad), x_index=case.index(), weight=case.given(weight),
             columns=inner, depth=hidden, pre_activation=case.given(pre), scales=case.given(scales),
             order=case.index(), **outputs)  # fmt: skip
    end = case.bounds[-2]
    d_a = case.products(grad[case.token], weight)[:end]
    gate, up = (half.double().requires_grad_() for half in pre[:end].chunk(2, dim=1))
    a = F.silu(gate) * up
    s = scales[case.order[:end]].double()[:, None]
    d_gate, d_up = torch.autograd.grad(a, (gate, up), s * d_a)
    rounded = a.detach().to(dtype).double()
    exact = {"out": torch.cat([d_gate, d_up], dim=1), "activated": s * rounded}
    exact["partials"] = torch.stack(
        [part.sum(1) for part in (d_a * rounded).split(module.PART_COLUMNS, dim=1)]
    )
    return case, outputs, exact


@pytest.mark.parametrize("dtype", ELEMENTS)
@pytest.mark.parametrize("inner", [8, 72, 264])
def test_backward_of_the_gate(module, dtype, inner):
    case, ours, exact = gate_backward(module, dtype, inner, seed=inner)
    end = case.bounds[-2]
    close(ours["out"][:end], exact["out"], dtype)
    close(ours["activated"][:end], exact["activated"], dtype, extra=2e-2 * TOLERANCE[dtype])
    torch.testing.assert_close(ours["partials"][:, :end].double(), exact["partials"], rtol=1e-3, atol=2e-2)
    assert ours["out"][end:].isnan().all(), "rows of no expert were written"


@pytest.mark.parametrize("missing", ["out", "activated", "partials"])
def test_backward_of_the_gate_writes_what_is_asked_for(module, missing):
    case, ours, exact = gate_backward(module, torch.bfloat16, 24, **{missing: False})
    for name in ours:
        ours_of_experts = (
            ours[name][..., : case.bounds[-2]] if name == "partials" else ours[name][: case.bounds[-2]]
        )
        torch.testing.assert_close(ours_of_experts.double(), exact[name], rtol=1e-2, atol=2e-2)


def test_an_infinite_gradient_is_no_nan_where_the_columns_end(module):
    """Columns of a tile behind the last of the matrix hold inf * 0, which must not be added to <dA', a>."""
    row, inner = 3, 8
    case = Case(module, torch.bfloat16)
    grad, weight = case.values(case.tokens, 64), case.values(len(COUNTS), 64, inner).abs() + 1
    grad[case.token[row], 5] = torch.inf
    partials = case.output(1, case.rows, dtype=torch.float32)
    case.run("product", epilogue=GATE_BACKWARD, x=case.given(grad), x_index=case.index(), weight=case.given(weight),
             columns=inner, depth=64, pre_activation=case.given(case.values(case.rows, 2 * inner).abs() + 1),
             scales=case.given(torch.ones(case.rows)), order=case.index(), partials=partials)  # fmt: skip
    assert partials[0, row] == torch.inf
    others = case.token[: case.bounds[-2]] != case.token[row]
    assert partials[0, : len(others)][others].isfinite().all()


@pytest.mark.parametrize("gathered", ["left", "right", None])
@pytest.mark.parametrize(("m", "n"), [(8, 8), (136, 264)])
def test_gradient_of_the_weights(module, gathered, m, n):
    counts = [0, 5, 64, 300]  # of k tiles: none, a part, one, more than there are stages
    case = Case(module, torch.float16, counts=counts, seed=m)
    left = case.values(case.tokens if gathered == "left" else case.rows, m)
    right = case.values(case.tokens if gathered == "right" else case.rows, n)
    if gathered != "left":
        left[case.bounds[-2] :] = torch.nan  # rows of no expert
    if gathered != "right":
        right[case.bounds[-2] :] = torch.inf
    out = case.output(len(counts), m, n)
    index = {} if gathered is None else {f"{gathered}_index": case.index()}
    case.run("weight_product", left=case.given(left), right=case.given(right), m=m, n=n, out=out, **index)
    if gathered == "left":
        left = left[case.token]
    if gathered == "right":
        right = right[case.token]
    for expert, (begin, end) in enumerate(itertools.pairwise(case.bounds[:-1])):
        close(out[expert], left[begin:end].double().T @ right[begin:end].double(), case.dtype, extra=1e-3)
    assert torch.equal(out[0], torch.zeros(m, n, dtype=case.dtype))


def test_two_runs_agree_bit_for_bit_in_any_order_of_events(module):
    outs = []
    for seed in range(3):
        case = Case(module, torch.bfloat16, counts=[200, 3], unowned=0)
        module.set_seed(seed)
        x, weight = case.given(case.values(case.rows, 328)), case.given(case.values(2, 40, 328))
        outs.append(case.output(case.rows, 40))
        case.run(
            "product", epilogue=STORE, transposed=1, x=x, weight=weight, columns=40, depth=328, out=outs[-1]
        )
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


# --- the plan ---


@pytest.mark.parametrize("columns", [8, 256, 264, 4096])
@pytest.mark.parametrize("epilogue", [STORE, UP])
@pytest.mark.parametrize("row_tiles", [1, 7, 8, 20])
def test_every_tile_comes_exactly_once(module, row_tiles, columns, epilogue):
    call = {
        "tile_count": row_tiles,
        "columns": columns,
        "depth": 64,
        "rows": 1,
        "experts": 1,
        "epilogue": epilogue,
    }
    plan = module.row_plan(call, 132)
    width = module.BLOCK_N // 2 if epilogue == UP else module.BLOCK_N
    covered = columns // 2 if epilogue == UP else columns
    assert (plan["column_tiles"] - 1) * width < covered <= plan["column_tiles"] * width
    assert plan["blocks"] == min(132, plan["tiles"])
    tiles = module.row_tiles(plan["tiles"], plan["column_tiles"])
    padded = -(-row_tiles // module.GROUP) * module.GROUP
    assert sorted(tiles) == sorted(itertools.product(range(padded), range(plan["column_tiles"])))


@pytest.mark.parametrize(("m", "n"), [(8, 8), (128, 256), (136, 264), (1000, 2048)])
def test_every_tile_of_every_weight_comes_exactly_once(module, m, n):
    call = {"m": m, "n": n, "experts": 3, "rows": 10}
    expected = itertools.product(range(3), range(-(-m // module.BLOCK_M)), range(-(-n // module.BLOCK_N)))
    assert sorted(module.weight_tiles(call)) == sorted(expected)


def test_boxes_fill_a_stage_and_their_geometry_is_what_the_copy_engine_takes(module):
    """Limits of cuTensorMapEncodeTiled: strides of 16 bytes, boxes up to 256 a side, a swizzle as wide as a box."""
    for transposed in (0, 1):
        call = {
            "tile_count": 4,
            "columns": 4096,
            "depth": 7168,
            "rows": 1000,
            "experts": 256,
            "transposed": transposed,
        }
        plan = module.row_plan(call, 132)
        for boxes in (plan["x"], plan["weight"]):
            assert boxes["box"][0] * 2 == 128
            assert all(0 < side <= 256 for side in boxes["box"])
            assert all(0 < size <= 2**32 for size in boxes["dims"])
            assert all(stride % 16 == 0 and stride < 2**40 for stride in boxes["strides"])
            assert boxes["bytes"] == 2 * torch.Size(boxes["box"]).numel()
            assert boxes["strides"][0] == 2 * boxes["dims"][0]
            assert boxes["strides"][1] == boxes["strides"][0] * boxes["dims"][1]
        a_boxes, b_boxes = 1, 4 - 2 * transposed
        filled = a_boxes * plan["x"]["bytes"] + b_boxes * plan["weight"]["bytes"]
        assert filled == module.STAGE_BYTES == 2 * module.BLOCK_K * (module.BLOCK_M + module.BLOCK_N)
        assert plan["weight"]["dims"] == ([7168, 4096, 256] if transposed else [4096, 7168, 256])
    assert module.STAGES * module.STAGE_BYTES < module.SHARED_BYTES <= 227 * 1024


def test_every_step_has_one_producer_which_is_the_one_of_its_stage(module):
    stages = module.STAGES
    for steps, k_tiles in itertools.product(range(3 * stages), range(3 * stages)):
        filled = [
            (k, warp)
            for warp in range(stages)
            for k in range(module.first_step_of(warp, steps), k_tiles, stages)
        ]
        assert sorted(filled) == [(k, (steps + k) % stages) for k in range(k_tiles)]


def test_the_protocol_neither_hangs_nor_overruns_for_any_number_of_k_tiles(module):
    """Tiles with 0 to 3 * STAGES k tiles one after another in a block: the emulator stops where no one can go on."""
    for seed in range(2):
        counts = [64 * k - 7 * (k > 0) for k in range(3 * module.STAGES + 1)]
        random.Random(seed).shuffle(counts)
        case = Case(module, torch.float16, counts=counts, unowned=0, seed=seed)
        left, right = case.values(case.rows, 8), case.values(case.rows, 8)
        out = case.output(len(counts), 8, 8)
        case.run("weight_product", left=case.given(left), right=case.given(right), m=8, n=8, out=out)
        for expert, (begin, end) in enumerate(itertools.pairwise(case.bounds[:-1])):
            close(out[expert], left[begin:end].double().T @ right[begin:end].double(), case.dtype, extra=2e-3)


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({}, True),
        ({"element": 0}, False),
        ({"element": 2}, True),
        ({"depth": 60}, False),
        ({"depth": 0}, False),
        ({"columns": 12}, False),
        ({"x": 0x1008}, False),
        ({"weight": 0x1002}, False),
        ({"out": 0x1004}, False),
        ({"x_index": 0x1004}, False),
        ({"low": 0x1000}, False),
        ({"scale": 2.0}, False),
        ({"epilogue": UP, "x_index": 0x1004}, True),
        ({"epilogue": UP, "x_index": 0x1004, "columns": 40}, False),
        ({"epilogue": UP, "x_index": 0x1004, "activated": 0x1008}, False),
        ({"epilogue": UP}, False),
        ({"epilogue": GATE_BACKWARD, "x_index": 0x1004}, False),
        ({"epilogue": GATE_BACKWARD, "x_index": 0x1004, "transposed": 0}, True),
        ({"epilogue": GATE_BACKWARD, "x_index": 0x1004, "transposed": 0, "pre_activation": 0x1008}, False),
    ],
)
def test_which_products_are_taken(module, change, taken):
    """Those whose chunks of 16 bytes are whole and aligned, whatever the number of rows is."""
    call = {"element": 1, "epilogue": STORE, "transposed": 1, "columns": 64, "depth": 64, "x": 0x1000, "weight": 0x1000,
            "out": 0x1000, "experts": 4}  # fmt: skip
    for rows in (1, 100_000):
        assert module.takes_product(call | {"rows": rows} | change) is taken
