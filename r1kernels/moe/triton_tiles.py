"""How a grouped product is cut into tiles on a GPU: the schedule of the rows, and the blocks that a tile reads.

Imports Triton: import this module only where a kernel is launched. S routed rows in expert order, E experts. Rows are
taken ROWS at a time, and no tile has rows of two experts, so at most ceil(S / ROWS) + E of them are needed: a bound
that the host knows. Which expert a tile has only the device knows; ``schedule_kernel`` writes it down:

    schedule[0]             the number of row tiles in use
    schedule[1 + 3 t ...]   of row tile t: its expert, its first row, and the end of the expert's rows

With a tail, rows of no expert get tiles too: those behind the last expert as rows of an expert E, those before the first one as
rows of an expert E + 1.

Sizes of matrices are given in units of UNIT elements, a vector's, so that the compiler knows what they are multiples of.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton reads annotations of a kernel as its own types)

import triton
import triton.language as tl


@triton.jit
def larger(a, b):
    return tl.maximum(a, b)


@triton.jit(do_not_specialize=("rows", "experts"))
def ascend_kernel(
    offsets,  # (E + 1) int32, anything
    bounds,  # (E + 1) int32
    rows: tl.int32,  # S
    experts: tl.int32,
    EXPERTS: tl.constexpr,  # a power of two, at least E + 1
):
    """bounds[e] = the largest of offsets[: e + 1], in [0, S]. Grid: 1."""
    expert = tl.arange(0, EXPERTS)
    offset = tl.load(offsets + expert, mask=expert <= experts, other=0)
    bound = tl.associative_scan(tl.minimum(tl.maximum(offset, 0), rows), 0, larger)
    tl.store(bounds + expert, bound, mask=expert <= experts)


@triton.jit(do_not_specialize=("rows", "experts", "bound"))
def schedule_kernel(
    offsets,  # (E + 1) int32, ascending
    schedule,  # (1 + 3 * bound) int32
    rows: tl.int32,  # S
    experts: tl.int32,
    bound: tl.int32,  # row tiles that the schedule has room for
    ROWS: tl.constexpr,
    TAIL: tl.constexpr,
    EXPERTS: tl.constexpr,  # a power of two, at least E, with TAIL at least E + 2
    TILES: tl.constexpr,  # a program's
):
    """Grid: bound / TILES."""
    expert = tl.arange(0, EXPERTS)
    start = expert_start(offsets, expert, experts, rows)
    stop = expert_stop(offsets, expert, experts, rows)
    groups = experts + 2 if TAIL else experts
    count = tl.where(expert < groups, tl.cdiv(tl.maximum(stop - start, 0), ROWS), 0)
    end = tl.cumsum(count, axis=0)  # tiles of this expert and of those before it
    used = tl.minimum(tl.sum(count, axis=0), bound)

    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    before = (end[None, :] <= tile[:, None]) & (expert < groups)[None, :]
    owner = tl.sum(before.to(tl.int32), axis=1)
    tiles_before = tl.sum(tl.where(before, count[None, :], 0), axis=1)
    present = tile < used
    owner = tl.where(present, owner, 0)
    at = schedule + 1 + 3 * tile
    first = expert_start(offsets, owner, experts, rows) + (tile - tiles_before) * ROWS
    tl.store(at, owner, mask=present)
    tl.store(at + 1, first, mask=present)
    tl.store(at + 2, expert_stop(offsets, owner, experts, rows), mask=present)
    if tl.program_id(0) == 0:
        tl.store(schedule, used)


@triton.jit
def expert_start(offsets, expert, experts, rows):
    """The first row of an expert; of expert E + 1 row 0."""
    return clipped(tl.load(offsets + expert, mask=expert <= experts, other=0), rows)


@triton.jit
def expert_stop(offsets, expert, experts, rows):
    """The end of an expert's rows: of expert E + 1 where expert 0 begins, of expert E row S."""
    place = tl.where(expert > experts, 0, expert + 1)
    return clipped(tl.load(offsets + place, mask=place <= experts, other=rows), rows)


@triton.jit
def clipped(offset, rows):
    return tl.minimum(tl.maximum(offset, 0), rows)


@triton.jit
def place(tile, schedule, column_blocks, GROUP: tl.constexpr):
    """(expert, first row, end of the expert's rows, column block) of a tile.

    GROUP row tiles go through the columns together, so that their rows and a block of the weight stay in the L2 cache.
    """
    tiles_of_a_group = GROUP * column_blocks
    first_block = tile // tiles_of_a_group * GROUP
    height = tl.minimum(tl.load(schedule) - first_block, GROUP)
    at = schedule + 1 + 3 * (first_block + tile % tiles_of_a_group % height)
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tile % tiles_of_a_group // height


@triton.jit
def row_pointers(x, gather, start, stop, size, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """Of the first block (ROWS, DEPTH) of rows of ``size`` elements; with ``gather`` row r is row gather[r] of x."""
    # rows past the end read the last one; what they give is not used
    row = tl.minimum(start + tl.arange(0, ROWS), stop - 1)
    if gather is not None:
        row = tl.load(gather + row)
    return x + row.to(tl.int64)[:, None] * size + tl.arange(0, DEPTH)[None, :]


@triton.jit
def row_block(x, pointers, start, k, size, DEPTH: tl.constexpr, DESCRIPTOR: tl.constexpr):
    """(ROWS, DEPTH) of x from depth k on, by its descriptor or by pointers that the caller moves; 0 past the end."""
    if DESCRIPTOR:
        block = x.load([start, k])
    else:
        block = tl.load(pointers, mask=tl.arange(0, DEPTH)[None, :] < size - k, other=0.0)
    return block


@triton.jit
def weight_pointers(
    matrix, start, size, width, DEPTH: tl.constexpr, COLUMNS: tl.constexpr, OUTPUTS_FIRST: tl.constexpr
):
    """Of the first block (DEPTH, COLUMNS) of a matrix (width, size) with OUTPUTS_FIRST, else (size, width)."""
    at = tl.arange(0, DEPTH)
    column = start + tl.arange(0, COLUMNS)
    if OUTPUTS_FIRST:
        row = tl.minimum(column, width - 1).to(tl.int64)
        pointers = matrix + row[None, :] * size + at[:, None]
    else:
        pointers = matrix + at.to(tl.int64)[:, None] * width + column[None, :]
    return pointers


@triton.jit
def weight_block(
    weight,
    pointers,
    expert,
    start,
    k,
    size,
    width,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    OUTPUTS_FIRST: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    """(DEPTH, COLUMNS) of an expert's matrix from depth k on; 0 past the end of the depth."""
    if DESCRIPTOR:
        if OUTPUTS_FIRST:
            block = weight.load([expert, start, k]).reshape(COLUMNS, DEPTH).T
        else:
            block = weight.load([expert, k, start]).reshape(DEPTH, COLUMNS)
    else:
        mask = (tl.arange(0, DEPTH) < size - k)[:, None]
        if not OUTPUTS_FIRST:
            mask &= (start + tl.arange(0, COLUMNS) < width)[None, :]
        block = tl.load(pointers, mask=mask, other=0.0)
    return block
