"""The order of rows by expert in Triton: a stable counting sort, without atomics whose order matters.

S routed rows, E experts; a bin is an expert, and the last bin, E, holds the rows of no expert. Rows are cut into tiles, one
program each:

    count   the rank of each row among the rows of its bin in its tile, and how many rows of each bin a tile has
    scan    where the rows of a bin in a tile begin
    place   the sum of both

A few rows are sorted by one program, in one launch.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton reads annotations of a kernel as its own types)

import torch
import triton
import triton.language as tl

ROWS = 64  # compared with each other at once
FEW = 8 * ROWS  # rows that one program sorts
MOST_TILES = 2048
MOST_COUNTS = 1 << 22  # of all tiles: where there are many experts, tiles are larger
SCANNED = 1024  # counts
LAUNCH = {"num_warps": 4, "enable_fp_fusion": True}


def sort_rows(
    indices: torch.Tensor, experts: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The rows (S,) int64 by expert: offsets (E + 1,) int32, permutation (S,) and inverse (S,) of ``dtype``, an integer.

    Rows of one expert keep their order; indices outside [0, E) come last. S is less than 2^31. Deterministic, no sync.
    """
    rows, bins = indices.numel(), experts + 1
    offsets = indices.new_empty(bins, dtype=torch.int32)
    permutation, inverse = (indices.new_empty(rows, dtype=dtype) for _ in range(2))
    with torch.cuda.device_of(indices):
        if rows <= FEW:
            counts = indices.new_empty(bins, dtype=torch.int32)
            arguments = (indices, counts, offsets, permutation, inverse, rows, bins)
            sort_kernel[(1,)](*arguments, ROWS, SCANNED, **LAUNCH)
            return offsets, permutation, inverse
        most = min(max(MOST_COUNTS // bins, 1), MOST_TILES)
        tile_rows = max(-(-rows // (most * ROWS)), 2) * ROWS
        tiles = -(-rows // tile_rows)
        totals, counts = indices.new_zeros((1 + tiles) * bins, dtype=torch.int32).split((bins, tiles * bins))
        sizes = (rows, bins, tiles, tile_rows)
        count_kernel[(tiles,)](indices, counts, totals, inverse, *sizes, ROWS, **LAUNCH)
        scan_kernel[(bins,)](counts, totals, offsets, tiles, SCANNED, **LAUNCH)
        grid = (-(-rows // ROWS),)
        place_kernel[grid](indices, counts, permutation, inverse, *sizes, ROWS, **LAUNCH)
    return offsets, permutation, inverse


@triton.jit(do_not_specialize=("rows", "bins", "tiles", "tile_rows"))
def count_kernel(
    indices,  # (S,) int64
    counts,  # (bins, tiles) int32, zeros: how many rows of a bin a tile has
    totals,  # (bins,) int32, zeros: of all tiles
    inverse,  # (S,): the rank of a row among the rows of its bin in its tile
    rows,
    bins,
    tiles,
    tile_rows,
    ROWS: tl.constexpr,
):
    """Grid: tiles."""
    tile = tl.program_id(0)
    first = tile.to(tl.int64) * tile_rows
    end = tl.minimum(first + tile_rows, rows)
    for start in range(first, end, ROWS):
        rank_rows(indices, counts + tile, totals, inverse, start, end, bins, tiles, ROWS)


@triton.jit(do_not_specialize=("tiles",))
def scan_kernel(
    counts,  # (bins, tiles): becomes the place of the first row of a bin in a tile
    totals,  # (bins,)
    offsets,  # (bins,) int32
    tiles,
    SCANNED: tl.constexpr,
):
    """Grid: bins."""
    bin = tl.program_id(0)
    start = bin * 0
    for first in range(0, bin, SCANNED):
        other = first + tl.arange(0, SCANNED)
        start += tl.sum(tl.load(totals + other, mask=other < bin, other=0), axis=0)
    tl.store(offsets + bin, start)
    scan(counts + bin * tiles, counts + bin * tiles, tiles, start, SCANNED)


@triton.jit(do_not_specialize=("rows", "bins", "tiles", "tile_rows"))
def place_kernel(
    indices,  # (S,) int64
    counts,  # (bins, tiles)
    permutation,  # (S,)
    inverse,  # (S,): ranks, become places
    rows,
    bins,
    tiles,
    tile_rows,
    ROWS: tl.constexpr,
):
    """Grid: S / ROWS."""
    start = tl.program_id(0).to(tl.int64) * ROWS
    tile = (start // tile_rows).to(tl.int32)
    place_rows(indices, counts + tile, permutation, inverse, start, rows, bins, tiles, ROWS)


@triton.jit(do_not_specialize=("rows", "bins"))
def sort_kernel(
    indices,  # (S,) int64
    counts,  # (bins,) int32, anything
    offsets,  # (bins,) int32
    permutation,  # (S,)
    inverse,  # (S,)
    rows,
    bins,
    ROWS: tl.constexpr,
    SCANNED: tl.constexpr,
):
    """All phases for one tile. Grid: 1."""
    for first in range(0, bins, SCANNED):
        bin = first + tl.arange(0, SCANNED)
        tl.store(counts + bin, 0, mask=bin < bins)
    tl.debug_barrier()
    for start in range(0, rows, ROWS):
        rank_rows(indices, counts, None, inverse, start, rows, bins, 1, ROWS)
    scan(counts, offsets, bins, 0, SCANNED)
    tl.debug_barrier()
    for start in range(0, rows, ROWS):
        place_rows(indices, offsets, permutation, inverse, start, rows, bins, 1, ROWS)


@triton.jit
def bins_of(indices, row, end, bins):
    """The bins of rows; 0 for those not before ``end``."""
    index = tl.load(indices + row, mask=row < end, other=0)
    return tl.where((index >= 0) & (index < bins), index, bins - 1).to(tl.int32)


@triton.jit
def rank_rows(indices, counts, totals, inverse, start, end, bins, tiles, ROWS: tl.constexpr):
    """Adds ROWS rows to the counts of their tile, and writes their ranks. ``counts`` points to the tile's first count."""
    place = tl.arange(0, ROWS)
    row = start + place
    real = row < end
    bin = tl.where(real, bins_of(indices, row, end, bins), -1)
    same = bin[:, None] == bin[None, :]
    count = tl.sum(same.to(tl.int32), axis=1)
    rank = tl.sum((same & (place[None, :] < place[:, None])).to(tl.int32), axis=1)
    before = tl.load(counts + bin * tiles, mask=real, other=0)
    tl.store(inverse + row, before + rank, mask=real)
    tl.debug_barrier()  # all have read
    first = real & (rank == 0)
    tl.store(counts + bin * tiles, before + count, mask=first)
    if totals is not None:
        tl.atomic_add(totals + bin, count, mask=first, sem="relaxed")
    tl.debug_barrier()  # all is written


@triton.jit
def scan(counts, sums, size, start, SCANNED: tl.constexpr):
    """sums[i] = start + the sum of counts[:i]; they may be the same."""
    before = start + size * 0  # a tensor, even if the start is a constant
    for first in range(0, size, SCANNED):
        place = first + tl.arange(0, SCANNED)
        count = tl.load(counts + place, mask=place < size, other=0)
        tl.store(sums + place, before + tl.cumsum(count, axis=0) - count, mask=place < size)
        before += tl.sum(count, axis=0)


@triton.jit
def place_rows(indices, starts, permutation, inverse, start, end, bins, tiles, ROWS: tl.constexpr):
    """Places ROWS rows behind the starts of their bins. ``starts`` points to the tile's first one."""
    row = start + tl.arange(0, ROWS)
    real = row < end
    bin = bins_of(indices, row, end, bins)
    place = tl.load(starts + bin * tiles, mask=real, other=0) + tl.load(inverse + row, mask=real, other=0)
    tl.store(inverse + row, place, mask=real)
    tl.store(permutation + place, row, mask=real)
