"""The Triton kernels that bring routed rows back to their tokens: gather-and-sum, without atomics. And what clears sentinels.

Imports Triton: import this module only where a kernel is launched. T tokens, H hidden size, E experts, K experts per token,
S = T * K routed rows. Row inverse[s] belongs to the flattened index s; rows from offsets[E] on are sentinels and are never read.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton reads annotations of a kernel as its own types)

import triton
import triton.language as tl


@triton.jit(do_not_specialize=("size", "experts"))
def combine_kernel(
    rows,  # (S, H)
    inverse,  # (S) int32
    offsets,  # (E + 1) int32
    weights,  # (S) float32, or None: 1
    out,  # (T, H)
    size: tl.int32,  # H, in units of UNIT elements
    experts: tl.int32,
    TOP_K: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNIT: tl.constexpr,
):
    """out[t] = sum_k weights[t K + k] rows[inverse[t K + k]], in float32 and in the order of k. Grid: (T, H / COLUMNS)."""
    width = size * UNIT
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    used = tl.load(offsets + experts)
    total = tl.zeros((COLUMNS,), tl.float32)
    for k in tl.static_range(TOP_K):
        index = token * TOP_K + k
        row = tl.load(inverse + index)
        present = column < tl.where(row < used, width, 0)
        value = tl.load(rows + row.to(tl.int64) * width + column, mask=present, other=0.0).to(tl.float32)
        if weights is not None:
            value = tl.where(present, value * tl.load(weights + index), 0.0)
        total += value
    tl.store(out + token * width + column, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("count", "width", "experts"))
def clear_rest_kernel(
    matrix,  # (S, N)
    offsets,  # (E + 1) int32
    count: tl.int32,  # S
    width: tl.int32,  # N
    experts: tl.int32,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Rows from offsets[E] on become 0. Grid: S / ROWS."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    nobodys = (row < count) & (row >= tl.load(offsets + experts))
    zeros = tl.zeros((ROWS, COLUMNS), matrix.dtype.element_ty)
    for start in range(0, tl.where(tl.max(nobodys.to(tl.int32), axis=0) > 0, width, 0), COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        at = matrix + row[:, None] * width + column[None, :]
        tl.store(at, zeros, mask=nobodys[:, None] & (column < width)[None, :])


@triton.jit(do_not_specialize=("count", "blocks", "experts"))
def sum_parts_kernel(
    parts,  # (blocks, S) float32, in expert order
    inverse,  # (S) int32
    offsets,  # (E + 1) int32
    out,  # (S) float32
    count: tl.int32,  # S
    blocks: tl.int32,
    experts: tl.int32,
    SIZE: tl.constexpr,
):
    """out[s] = sum over the blocks, in their order, of parts[block, inverse[s]]; 0 for a sentinel."""
    index = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = index < count
    row = tl.load(inverse + index, mask=inside, other=0)
    present = inside & (row < tl.load(offsets + experts))
    total = tl.zeros((SIZE,), tl.float32)
    at = parts + row
    for _ in range(0, blocks):
        total += tl.load(at, mask=present, other=0.0)
        at += count
    tl.store(out + index, total, mask=inside)
