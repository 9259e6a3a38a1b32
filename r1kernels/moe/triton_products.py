"""What the Triton backend of the experts launches: grouped products, and what is fused with them.

Triton is imported at the first launch, never before. T tokens, H hidden size, I intermediate size, E experts, K experts per
token, S = T * K routed rows; N inputs and M outputs of a product, R rank of a low-rank addition. Nothing here depends on values:
grids and buffers follow from shapes, and what an expert has is read on the device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import tuning

VECTOR_BYTES = 16
SCHEDULED_TILES = 32  # row tiles that a program of schedule_kernel places, of few experts:
SCHEDULED_PAIRS = 32 * 128  # of a tile and an expert, which the program holds in registers
COMBINED_COLUMNS = 1024
SUMMED_ROWS = 256
MANY_ROWS = 1 << 20  # of an expert: where the tile must not depend on their number, it is that of many
CLEARED = (16, 512)  # rows and columns of a block


class LowRank(NamedTuple):
    """What is added to the sums of a product: rows (S, R) times the matrix of their expert, which lies as that of the product."""

    rows: Tensor
    weight: Tensor


class Rows:
    """The routed rows of a call: how many, where each expert's begin, and their tiles.

    offsets: (E + 1) int32, ascending.
    tail: products have a result for rows that no expert has, 0.
    batch_invariant: the tile does not depend on how many rows there are, nor on where operands lie in memory.
    """

    def __init__(
        self,
        offsets: Tensor,
        count: int,
        dtype: torch.dtype,
        tail: bool = False,
        batch_invariant: bool = False,
    ) -> None:
        self.count, self.tail, self.batch_invariant = count, tail, batch_invariant
        self.experts = offsets.shape[0] - 1
        self.offsets = offsets
        self._dtype = dtype
        self._schedules: dict[int, Tensor] = {}

    def tile(self, kernel: str, unit: int, *described: Tensor) -> tuning.Tile:
        """The tile of a kernel for these rows. Where rows begin off the boundary of a vector it is that of few rows,
        without descriptors: it leaves registers for elements that are read one by one."""
        found = self._entry(kernel, MANY_ROWS * self.experts if self.batch_invariant else self.count)
        unaligned = any(each.data_ptr() % VECTOR_BYTES for each in described)
        if unit > 1 and self.batch_invariant:
            return found._replace(descriptors=found.descriptors and not unaligned)
        if unit == 1 or (found.descriptors and unaligned):
            return self._entry(kernel, 1)._replace(descriptors=False)
        return found

    def _entry(self, kernel: str, rows: int) -> tuning.Tile:
        return tuning.tile(kernel, self.offsets.device, self._dtype, rows, self.experts)

    @property
    def _groups(self) -> int:
        return self.experts + 2 * self.tail

    def bound(self, tile_rows: int) -> int:
        """At most so many tiles of so many rows have a row."""
        return min(self.count, -(-self.count // tile_rows) + self._groups - 1)

    def schedule(self, tile_rows: int) -> Tensor:
        """What ``triton_tiles.schedule_kernel`` writes for tiles of so many rows."""
        from . import triton_tiles as kernels

        if tile_rows not in self._schedules:
            bound = self.bound(tile_rows)
            schedule = self.offsets.new_empty(1 + 3 * bound)
            experts = 1 << (self._groups - 1).bit_length()
            tiles = max(min(SCHEDULED_TILES, SCHEDULED_PAIRS // experts), 1)
            with torch.cuda.device_of(schedule):
                kernels.schedule_kernel[(-(-bound // tiles),)](
                    self.offsets,
                    schedule,
                    self.count,
                    self.experts,
                    bound,
                    ROWS=tile_rows,
                    TAIL=self.tail,
                    EXPERTS=experts,
                    TILES=tiles,
                    enable_fp_fusion=True,
                )
            self._schedules[tile_rows] = schedule
        return self._schedules[tile_rows]


def ascending(offsets: Tensor, count: int) -> Tensor:
    """Offsets that ascend within [0, count] whatever the given ones hold, and that are the same if they do."""
    from . import triton_tiles as kernels

    bounds, experts = torch.empty_like(offsets), offsets.shape[0] - 1
    with torch.cuda.device_of(offsets):
        size = 1 << experts.bit_length()
        kernels.ascend_kernel[(1,)](offsets, bounds, count, experts, EXPERTS=size, enable_fp_fusion=True)
    return bounds


def multiply(
    kernel: str,
    x: Tensor,
    weight: Tensor,
    rows: Rows,
    gather: Tensor | None = None,
    low: LowRank | None = None,
    scale: float = 1.0,
) -> Tensor:
    """``scale`` times each row x[gather] (None: x (S, N) itself) times the matrix of its expert: (M, N) for the kernel "rows",
    (N, M) for "rows_transposed"."""
    from . import triton_gemm as kernels

    outputs_first = kernel == "rows"
    size = x.shape[1]
    width = weight.shape[1 if outputs_first else 2]
    out = x.new_empty(rows.count, width)
    if rows.count == 0:
        return out
    unit = _unit(x, size, width)
    tile = rows.tile(kernel, unit, x, weight)
    block = (tile.columns, tile.depth) if outputs_first else (tile.depth, tile.columns)
    with torch.cuda.device_of(x):
        kernels.rows_kernel[(_programs(tile, rows, width),)](
            _blocks(x, tile.rows, tile.depth) if tile.descriptors and gather is None else x,
            gather,
            _blocks(weight, 1, *block) if tile.descriptors else weight,
            out,
            *_pointers(low),
            rows.schedule(tile.rows),
            size // unit,
            width // unit,
            rows.experts,
            _rank(low),
            **_shape(tile, unit),
            DESCRIPTORS=tile.descriptors,
            OUTPUTS_FIRST=outputs_first,
            TAIL=rows.tail,
            SCALE=scale,
        )
    return out


def up_into(
    pre_activation: Tensor | None,
    activated: Tensor | None,
    hidden: Tensor,
    tokens: Tensor,
    gate_up: Tensor,
    gating: dict[str, int | float],
    rows: Rows,
    low: LowRank | None = None,
) -> None:
    """The pre-activation (S, 2 I) and the activation (S, I), either or both."""
    from . import triton_gemm as kernels

    if rows.count == 0:
        return
    size, width = hidden.shape[1], gate_up.shape[1] // 2
    unit = _unit(hidden, size, width)
    tile = rows.tile("up", unit, gate_up)
    blocks = gate_up.view(rows.experts, 2, width, size)
    with torch.cuda.device_of(hidden):
        kernels.up_kernel[(_programs(tile, rows, width),)](
            hidden,
            tokens,
            _blocks(blocks, 1, 2, tile.columns, tile.depth) if tile.descriptors else gate_up,
            pre_activation,
            activated,
            *_pointers(low),
            rows.schedule(tile.rows),
            size // unit,
            width // unit,
            _rank(low),
            **_shape(tile, unit),
            DESCRIPTORS=tile.descriptors,
            **gating,
        )


def clear_rest(matrix: Tensor, rows: Rows) -> None:
    """Rows of sentinels, which no one computes, become 0: they are saved too."""
    from . import triton_combine as kernels

    if rows.count == 0:
        return
    with torch.cuda.device_of(matrix):
        kernels.clear_rest_kernel[(-(-rows.count // CLEARED[0]),)](
            matrix, rows.offsets, rows.count, matrix.shape[1], rows.experts, *CLEARED, enable_fp_fusion=True
        )


def down_backward_into(
    d_pre: Tensor | None,
    scaled: Tensor | None,
    d_weights: Tensor | None,
    grad: Tensor,
    tokens: Tensor,
    down: Tensor,
    pre_activation: Tensor,
    weights: Tensor,
    permutation: Tensor,
    inverse: Tensor,
    gating: dict[str, int | float],
    rows: Rows,
    low: LowRank | None = None,
) -> None:
    """The gradient of the pre-activation (S, 2 I), s A (S, I) and the gradient of the routing weights (T, K), each if given."""
    from . import triton_combine, triton_gemm

    if rows.count == 0:
        return
    size, width = down.shape[1:]
    unit = _unit(grad, size, width)
    tile = rows.tile("down_backward", unit, down)
    blocks = -(-width // tile.columns)
    parts = None if d_weights is None else weights.new_empty(blocks, rows.count)
    product_wanted = d_pre is not None or parts is not None
    with torch.cuda.device_of(grad):
        triton_gemm.down_backward_kernel[(_programs(tile, rows, width),)](
            grad,
            tokens,
            _blocks(down, 1, tile.depth, tile.columns) if tile.descriptors else down,
            pre_activation,
            weights,
            permutation,
            d_pre,
            scaled,
            parts,
            *_pointers(low if product_wanted else None),
            rows.schedule(tile.rows),
            size // unit if product_wanted else 0,
            size // unit,
            width // unit,
            rows.count,
            _rank(low),
            **_shape(tile, unit),
            DESCRIPTORS=tile.descriptors,
            **gating,
        )
        if d_weights is not None:
            triton_combine.sum_parts_kernel[(-(-rows.count // SUMMED_ROWS),)](
                parts,
                inverse,
                rows.offsets,
                d_weights,
                rows.count,
                blocks,
                rows.experts,
                SIZE=SUMMED_ROWS,
                enable_fp_fusion=True,
            )


def weight_gradient(
    left: Tensor, left_rows: Tensor | None, right: Tensor, right_rows: Tensor | None, rows: Rows
) -> Tensor:
    """(E, M, N): for each expert the sum over its rows of left[left_rows]^T right[right_rows] (None: the row itself)."""
    from . import triton_gemm as kernels

    height, width = left.shape[1], right.shape[1]
    out = left.new_empty(rows.experts, height, width)
    unit = _unit(left, height, width)
    tile = rows.tile("weight_gradient", unit)
    tiles = -(-height // tile.rows) * -(-width // tile.columns)
    with torch.cuda.device_of(left):
        kernels.weight_gradient_kernel[(rows.experts * tiles,)](
            left,
            left_rows,
            right,
            right_rows,
            rows.offsets,
            out,
            height // unit,
            width // unit,
            rows.count,
            rows.experts,
            **_shape(tile, unit),
        )
    return out


def combine(values: Tensor, inverse: Tensor, weights: Tensor | None, rows: Rows, tokens: int) -> Tensor:
    """(T, H): for each token the sum of its rows of values (S, H), weighted or not."""
    from . import triton_combine as kernels

    width = values.shape[1]
    out = values.new_empty(tokens, width)
    if rows.count == 0:
        return out
    unit = _unit(values, width)
    with torch.cuda.device_of(values):
        kernels.combine_kernel[(tokens, -(-width // COMBINED_COLUMNS))](
            values,
            inverse,
            rows.offsets,
            weights,
            out,
            width // unit,
            rows.experts,
            TOP_K=rows.count // tokens,
            COLUMNS=COMBINED_COLUMNS,
            UNIT=unit,
            enable_fp_fusion=True,
        )
    return out


def _pointers(low: LowRank | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if low is None else low


def _rank(low: LowRank | None) -> int:
    return 0 if low is None else low.rows.shape[1]


def _unit(matrix: Tensor, *sizes: int) -> int:
    """The elements of a vector, if all sizes are multiples of it, else 1."""
    unit = VECTOR_BYTES // matrix.element_size()
    return 1 if any(size % unit for size in sizes) else unit


def _blocks(matrix: Tensor, *block: int) -> Any:
    """The descriptor of a tensor that is read in blocks."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(matrix, list(block))


def _programs(tile: tuning.Tile, rows: Rows, width: int) -> int:
    """One program a tile, or one a multiprocessor, which takes one tile after the other."""
    tiles = rows.bound(tile.rows) * -(-width // tile.columns)
    device = rows.offsets.device
    if not tile.descriptors:
        return tiles
    return min(
        tiles, torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    )


def _shape(tile: tuning.Tile, unit: int) -> dict[str, Any]:
    return {
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "DEPTH": tile.depth,
        "GROUP": tile.group,
        "UNIT": unit,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "enable_fp_fusion": True,
    }
