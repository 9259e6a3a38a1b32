"""The Triton kernels of grouped products: rows times the matrix of their expert, the two fused ones of the experts, and the
gradient of the matrices.

Imports Triton: import this module only where a kernel is launched. S routed rows in expert order, T tokens, H hidden
size, I intermediate size, E experts; N inputs and M outputs of a product. Products accumulate in float32, float32 in
true float32. A tile is ROWS x COLUMNS; ``triton_tiles.py`` says how rows become tiles and what UNIT, ``schedule`` and
GROUP are. With DESCRIPTORS the weight, and rows that need no gather, are tensor descriptors, and programs are persistent.
Every kernel runs with any number of programs, each takes every so-many-th tile.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton reads annotations of a kernel as its own types)

import triton
import triton.language as tl

from .triton_gating import gated, gated_with_derivatives
from .triton_tiles import (
    expert_start,
    expert_stop,
    place,
    row_block,
    row_pointers,
    weight_block,
    weight_pointers,
)

LOW_DEPTH = tl.constexpr(16)  # of a step over a rank: little, for the sums of a tile leave few registers


@triton.jit(do_not_specialize=("size", "width", "experts"))
def rows_kernel(
    x,  # (S, N), or the descriptor of its blocks; with ``gather`` (any, N)
    gather,  # (S) int32, or None: the row of x that belongs to a row
    weight,  # (E, M, N) with OUTPUTS_FIRST, else (E, N, M), or the descriptor of its blocks
    out,  # (S, M)
    low,  # (S, R), or None: rows of a low-rank addition
    low_weight,  # (E, M, R) with OUTPUTS_FIRST, else (E, R, M)
    schedule,
    size: tl.int32,  # N
    width: tl.int32,  # M
    experts: tl.int32,
    rank: tl.int32,  # R
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    UNIT: tl.constexpr,
    OUTPUTS_FIRST: tl.constexpr,
    TAIL: tl.constexpr,
    SCALE: tl.constexpr,
):
    """out[r] = SCALE weight[expert of r] @ x[r], or x[r] @ weight[expert of r]; with TAIL rows of no expert become 0. Where there are
    rows ``low``, their product with ``low_weight`` is added to the sums."""
    size *= UNIT
    width *= UNIT
    column_blocks = tl.cdiv(width, COLUMNS)
    step = DEPTH if OUTPUTS_FIRST else width.to(tl.int64) * DEPTH
    tiles = tl.load(schedule) * column_blocks
    in_blocks: tl.constexpr = DESCRIPTORS and gather is None
    flatten: tl.constexpr = DESCRIPTORS and not TAIL and low is None
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=flatten):
        expert, start, stop, column_block = place(tile, schedule, column_blocks, GROUP)
        column_start = column_block * COLUMNS
        # a depth that differs between tiles keeps the loads of a tile from beginning under the epilogue of the one before
        depth = tl.where(expert < experts, size, 0) if TAIL else size
        x_at, w_at = None, None
        if not in_blocks:
            x_at = row_pointers(x, gather, start, stop, size, ROWS, DEPTH)
        if not DESCRIPTORS:
            matrix = weight + expert.to(tl.int64) * size * width
            w_at = weight_pointers(matrix, column_start, size, width, DEPTH, COLUMNS, OUTPUTS_FIRST)
        product = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, depth, DEPTH):
            a = row_block(x, x_at, start, k, size, DEPTH, in_blocks)
            b = weight_block(
                weight, w_at, expert, column_start, k, size, width, DEPTH, COLUMNS, OUTPUTS_FIRST, DESCRIPTORS
            )
            product = tl.dot(a, b, product, input_precision="ieee")
            if not in_blocks:
                x_at += DEPTH
            if not DESCRIPTORS:
                w_at += step
        if low is not None:
            product = add_low_rank(
                product,
                low,
                low_weight,
                expert,
                start,
                stop,
                column_start,
                rank,
                width,
                ROWS,
                COLUMNS,
                OUTPUTS_FIRST,
            )
        if SCALE != 1.0:
            product *= SCALE
        row = start + tl.arange(0, ROWS)
        column = column_start + tl.arange(0, COLUMNS)
        at = out + row.to(tl.int64)[:, None] * width + column[None, :]
        tl.store(at, product.to(out.dtype.element_ty), mask=(row < stop)[:, None] & (column < width)[None, :])


@triton.jit
def add_low_rank(
    product,  # (ROWS, COLUMNS)
    low,  # (S, R)
    low_weight,  # (E, M, R) with OUTPUTS_FIRST, else (E, R, M)
    expert,
    start,
    stop,
    column_start,
    rank,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OUTPUTS_FIRST: tl.constexpr,
):
    """product + low[r] times the matrix of the expert."""
    x_at = row_pointers(low, None, start, stop, rank, ROWS, LOW_DEPTH)
    matrix = low_weight + expert.to(tl.int64) * rank * width
    w_at = weight_pointers(matrix, column_start, rank, width, LOW_DEPTH, COLUMNS, OUTPUTS_FIRST)
    step = LOW_DEPTH if OUTPUTS_FIRST else width.to(tl.int64) * LOW_DEPTH
    for k in range(0, rank, LOW_DEPTH):
        a = row_block(low, x_at, start, k, rank, LOW_DEPTH, False)
        b = weight_block(
            low_weight, w_at, expert, column_start, k, rank, width, LOW_DEPTH, COLUMNS, OUTPUTS_FIRST, False
        )
        product = tl.dot(a, b, product, input_precision="ieee")
        x_at += LOW_DEPTH
        w_at += step
    return product


@triton.jit(do_not_specialize=("size", "width"))
def up_kernel(
    hidden,  # (T, H)
    tokens,  # (S) int32: the token of a row
    gate_up,  # (E, 2, I, H), or the descriptor of its blocks
    pre_activation,  # (S, 2 I), or None
    activation,  # (S, I), or None
    low,  # (S, R), or None: rows of a low-rank addition
    low_weight,  # (E, 2, I, R)
    schedule,
    size: tl.int32,  # H
    width: tl.int32,  # I
    rank: tl.int32,  # R
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    UNIT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """(gate, up) = gate_up[expert of r] @ hidden[token of r], rounded; activation = act(gate) * (up + shift) of these, clamped.
    Where there are rows ``low``, their product with ``low_weight`` is added to gate and up."""
    dtype = hidden.dtype.element_ty
    size *= UNIT
    width *= UNIT
    column_blocks = tl.cdiv(width, COLUMNS)
    tiles = tl.load(schedule) * column_blocks
    flatten: tl.constexpr = DESCRIPTORS and low is None
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=flatten):
        expert, start, stop, column_block = place(tile, schedule, column_blocks, GROUP)
        column_start = column_block * COLUMNS
        x_at = row_pointers(hidden, tokens, start, stop, size, ROWS, DEPTH)
        w_at = None
        if not DESCRIPTORS:
            matrix = gate_up + expert.to(tl.int64) * size * (2 * width)
            w_at = gate_up_pointers(matrix, column_start, size, width, DEPTH, COLUMNS)
        # one accumulator for both: with two in flight the compiler waits after every wgmma
        product = tl.zeros((ROWS, 2 * COLUMNS), tl.float32)
        for k in range(0, size, DEPTH):
            x = row_block(hidden, x_at, start, k, size, DEPTH, False)
            if DESCRIPTORS:
                w = gate_up.load([expert, 0, column_start, k]).reshape(2 * COLUMNS, DEPTH).T
            else:
                w = tl.load(w_at, mask=(tl.arange(0, DEPTH) < size - k)[:, None], other=0.0)
                w_at += DEPTH
            product = tl.dot(x, w, product, input_precision="ieee")
            x_at += DEPTH
        if low is not None:
            low_at = row_pointers(low, None, start, stop, rank, ROWS, LOW_DEPTH)
            low_matrix = low_weight + expert.to(tl.int64) * rank * (2 * width)
            low_weight_at = gate_up_pointers(low_matrix, column_start, rank, width, LOW_DEPTH, COLUMNS)
            for k in range(0, rank, LOW_DEPTH):
                a = row_block(low, low_at, start, k, rank, LOW_DEPTH, False)
                b = tl.load(low_weight_at, mask=(tl.arange(0, LOW_DEPTH) < rank - k)[:, None], other=0.0)
                product = tl.dot(a, b, product, input_precision="ieee")
                low_at += LOW_DEPTH
                low_weight_at += LOW_DEPTH
        gate, up = halves(product, ROWS, COLUMNS)
        row = start + tl.arange(0, ROWS)
        column = column_start + tl.arange(0, COLUMNS)
        mask = (row < stop)[:, None] & (column < width)[None, :]
        row_offset = row.to(tl.int64)[:, None] * width
        rounded_gate, rounded_up = gate.to(dtype), up.to(dtype)
        if pre_activation is not None:
            at = pre_activation + 2 * row_offset + column[None, :]
            tl.store(at, rounded_gate, mask=mask)
            tl.store(at + width, rounded_up, mask=mask)
        if activation is not None:
            wide_gate, wide_up = rounded_gate.to(tl.float32), rounded_up.to(tl.float32)
            value = gated(wide_gate, wide_up, ACTIVATION, ALPHA, LIMIT, SHIFT)
            tl.store(activation + row_offset + column[None, :], value.to(dtype), mask=mask)


@triton.jit
def gate_up_pointers(matrix, start, size, width, DEPTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Of the first block (DEPTH, 2 COLUMNS) of a matrix (2, width, size): columns of the gate, then the same of the up part."""
    column = tl.arange(0, 2 * COLUMNS)
    row = tl.minimum(start + column % COLUMNS, width - 1) + column // COLUMNS * width
    return matrix + row.to(tl.int64)[None, :] * size + tl.arange(0, DEPTH)[:, None]


@triton.jit(do_not_specialize=("size", "width", "rows"))
def down_backward_kernel(
    grad,  # (T, H): dO
    tokens,  # (S) int32: the token of a row
    down,  # (E, H, I), or the descriptor of its blocks
    pre_activation,  # (S, 2 I)
    weights,  # (T K) float32
    permutation,  # (S) int32: the place of a row's weight
    d_pre_activation,  # (S, 2 I), or None
    scaled,  # (S, I), or None: s A
    parts,  # (I / COLUMNS, S) float32, or None: <dA', A> of a block of columns
    low,  # (S, R), or None: rows of a low-rank addition
    low_weight,  # (E, R, I)
    schedule,
    size: tl.int32,  # H; 0 where ``scaled`` alone is wanted
    height: tl.int32,  # H
    width: tl.int32,  # I
    rows: tl.int32,  # S
    rank: tl.int32,  # R
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    UNIT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """dA' = dO[token of r] @ down[expert of r]; with the weight s of a row, dA = s dA', and the gradient of (gate, up) from it.
    Where there are rows ``low``, their product with ``low_weight`` is added to dA'."""
    size *= UNIT
    height *= UNIT
    width *= UNIT
    column_blocks = tl.cdiv(width, COLUMNS)
    step = width.to(tl.int64) * DEPTH
    tiles = tl.load(schedule) * column_blocks
    flatten: tl.constexpr = DESCRIPTORS and low is None
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=flatten):
        expert, start, stop, column_block = place(tile, schedule, column_blocks, GROUP)
        column_start = column_block * COLUMNS
        x_at = row_pointers(grad, tokens, start, stop, height, ROWS, DEPTH)
        w_at = None
        if not DESCRIPTORS:
            matrix = down + expert.to(tl.int64) * height * width
            w_at = weight_pointers(matrix, column_start, height, width, DEPTH, COLUMNS, False)
        d_activation = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, size, DEPTH):
            a = row_block(grad, x_at, start, k, height, DEPTH, False)
            b = weight_block(
                down, w_at, expert, column_start, k, height, width, DEPTH, COLUMNS, False, DESCRIPTORS
            )
            d_activation = tl.dot(a, b, d_activation, input_precision="ieee")
            x_at += DEPTH
            if not DESCRIPTORS:
                w_at += step
        if low is not None:
            d_activation = add_low_rank(
                d_activation,
                low,
                low_weight,
                expert,
                start,
                stop,
                column_start,
                rank,
                width,
                ROWS,
                COLUMNS,
                False,
            )

        row = start + tl.arange(0, ROWS)
        present = row < stop
        scale = tl.load(weights + tl.load(permutation + row, mask=present, other=0), mask=present, other=0.0)
        left, right = halves(d_activation, ROWS, COLUMNS // 2)
        part = tl.zeros((ROWS,), tl.float32)
        for quarter in tl.static_range(4):  # all at once, the epilogue would not fit into registers
            if quarter % 2 == 0:
                first, second = halves(left if quarter == 0 else right, ROWS, COLUMNS // 4)
            part += gated_backward(
                first if quarter % 2 == 0 else second,
                column_start + quarter * (COLUMNS // 4),
                row,
                present,
                scale,
                width,
                pre_activation,
                d_pre_activation,
                scaled,
                COLUMNS // 4,
                ACTIVATION,
                ALPHA,
                LIMIT,
                SHIFT,
            )
        if parts is not None:
            tl.store(parts + column_block.to(tl.int64) * rows + row, part, mask=present)


@triton.jit
def gated_backward(
    d_activation,  # (ROWS, COLUMNS): dA'
    column_start,
    row,
    present,
    scale,  # (ROWS): s
    width,
    pre_activation,
    d_pre_activation,
    scaled,
    COLUMNS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Store s A and the gradient of the pre-activation in these columns, each if wanted; returns their <dA', A>."""
    dtype = pre_activation.dtype.element_ty
    column = column_start + tl.arange(0, COLUMNS)
    mask = present[:, None] & (column < width)[None, :]
    row_offset = row.to(tl.int64)[:, None] * width
    at = 2 * row_offset + column[None, :]
    gate = tl.load(pre_activation + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(pre_activation + at + width, mask=mask, other=0.0).to(tl.float32)
    value, by_gate, by_up = gated_with_derivatives(gate, up, ACTIVATION, ALPHA, LIMIT, SHIFT)
    forward = value.to(dtype).to(tl.float32)  # A, as the forward rounded it
    if scaled is not None:
        tl.store(scaled + row_offset + column[None, :], (scale[:, None] * forward).to(dtype), mask=mask)
    if d_pre_activation is not None:
        scaled_gradient = scale[:, None] * d_activation
        tl.store(d_pre_activation + at, (scaled_gradient * by_gate).to(dtype), mask=mask)
        tl.store(d_pre_activation + at + width, (scaled_gradient * by_up).to(dtype), mask=mask)
    return tl.sum(tl.where(mask, d_activation * forward, 0.0), axis=1)


@triton.jit
def halves(block, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right COLUMNS columns of a block."""
    return block.reshape(ROWS, 2, COLUMNS).permute(0, 2, 1).split()


@triton.jit(do_not_specialize=("height", "width", "rows", "experts"))
def weight_gradient_kernel(
    left,  # (any, M)
    left_rows,  # (S) int32, or None: the row of ``left`` that belongs to a row
    right,  # (any, N)
    right_rows,  # (S) int32, or None
    offsets,  # (E + 1) int32
    out,  # (E, M, N)
    height: tl.int32,  # M
    width: tl.int32,  # N
    rows: tl.int32,  # S
    experts: tl.int32,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
):
    """out[e] = sum over the rows r of expert e of left[r]^T right[r]: 0 without rows. Grid: the number of tiles."""
    height *= UNIT
    width *= UNIT
    row_blocks = tl.cdiv(height, ROWS)
    column_blocks = tl.cdiv(width, COLUMNS)
    tile = tl.program_id(0) % (row_blocks * column_blocks)
    expert = tl.program_id(0) // (row_blocks * column_blocks)
    tiles_of_a_group = GROUP * column_blocks
    first_block = tile // tiles_of_a_group * GROUP
    group = tl.minimum(row_blocks - first_block, GROUP)
    m = (first_block + tile % tiles_of_a_group % group) * ROWS + tl.arange(0, ROWS)
    n = tile % tiles_of_a_group // group * COLUMNS + tl.arange(0, COLUMNS)

    start = expert_start(offsets, expert, experts, rows)
    stop = expert_stop(offsets, expert, experts, rows)
    product = tl.zeros((ROWS, COLUMNS), tl.float32)
    row = start + tl.arange(0, DEPTH)
    a_row = gathered(left_rows, row, stop)
    b_row = gathered(right_rows, row, stop)
    for _ in range(start, stop, DEPTH):
        present = row < stop
        a_at = left + a_row.to(tl.int64)[None, :] * height + m[:, None]
        b_at = right + b_row.to(tl.int64)[:, None] * width + n[None, :]
        a = tl.load(a_at, mask=present[None, :] & (m < height)[:, None], other=0.0)
        b = tl.load(b_at, mask=present[:, None] & (n < width)[None, :], other=0.0)
        product = tl.dot(a, b, product, input_precision="ieee")
        # a round ahead, so that the loads of a block wait for no index
        row += DEPTH
        a_row = gathered(left_rows, row, stop)
        b_row = gathered(right_rows, row, stop)

    matrix = out + expert.to(tl.int64) * height * width
    at = matrix + m.to(tl.int64)[:, None] * width + n[None, :]
    tl.store(at, product.to(out.dtype.element_ty), mask=(m < height)[:, None] & (n < width)[None, :])


@triton.jit
def gathered(rows, row, stop):
    """rows[row], 0 from ``stop`` on; without ``rows`` the row itself."""
    return row if rows is None else tl.load(rows + row, mask=row < stop, other=0)
