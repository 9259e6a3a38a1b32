"""linear_logprobs on Triton: its engine for the tile loop, and the forward that writes no tile.

Shapes: N tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cuda, divergence_tiles, linear_tiles, tiles, tuning
from . import triton as row_kernels
from .linear import LinearCall
from .token import Rows, Upstream, row_results
from .triton import VECTOR_BYTES


def forward(call: LinearCall) -> tiles.RowResults | None:
    """(logp, entropy, stats, extra) without a tile of logits in memory; None where tiles serve the call better.

    float32 has no tensor core that keeps its digits, and rows that are no multiple of 16 bytes would have to be copied:
    both come here for batch invariance alone, float32 not where the GEMMs of its backward are TF32. The tile shape depends on the
    tokens only where they may change the last bits.
    """
    hidden, rows = call.hidden, call.rows
    if not call.batch_invariant and (hidden.dtype == torch.float32 or _odd(hidden)):
        return None
    if hidden.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return None
    kind = "rich" if call.with_extra or rows.softcap else "plain"
    if hidden.dtype == torch.float32:
        kind = "float32"
    tokens, columns = hidden.shape[0], call.weight.shape[0]
    results = row_results(hidden, tokens, columns, rows, call.with_entropy, call.with_extra)
    if tokens:
        tile = tuning.linear_forward(hidden.device, kind, None if call.batch_invariant else tokens)
        forward_into(hidden, call.weight, rows, call.with_entropy, tile, *results)
    return results


def forward_into(
    hidden: Tensor,
    weight: Tensor,
    rows: Rows,
    with_entropy: bool,
    tile: tuning.Tile,
    logp: Tensor,
    entropy: Tensor,
    stats: Tensor,
    extra: Tensor,
) -> None:
    """``forward`` into tensors that the caller gives, with this tile."""
    from . import triton_linear_kernels as kernels

    tokens, columns = hidden.shape[0], weight.shape[0]
    # the bits may not depend on how the tensors lie in memory
    hidden, weight = _in_vectors(hidden), _in_vectors(weight)
    column_blocks = -(-columns // tile.columns)
    unit = VECTOR_BYTES // hidden.element_size()
    tile_count = -(-tokens // tile.tokens) * column_blocks
    parts = row_kernels.empty_parts(hidden, tokens, column_blocks, extra)
    with torch.cuda.device_of(hidden):
        kernels.linear_kernel[(_programs(hidden.device, tile_count) if tile.descriptors else tile_count,)](
            _blocks(hidden, tile.tokens, tile.depth) if tile.descriptors else hidden,
            _blocks(weight, tile.columns, tile.depth) if tile.descriptors else weight,
            hidden.stride(0) // unit,
            weight.stride(0) // unit,
            hidden.shape[1] // unit,
            *row_kernels.head_arguments(rows),
            *row_kernels.row_arguments(rows),
            logp,
            parts,
            tokens,
            columns,
            rows.first,
            TOKENS=tile.tokens,
            COLUMNS=tile.columns,
            DEPTH=tile.depth,
            GROUP=tile.group,
            DESCRIPTORS=tile.descriptors,
            UNIT=unit,
            ENTROPY=with_entropy,
            EXTRA=extra.numel() > 0,
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=True,
        )
    row_kernels.finish_into(parts, columns, rows, with_entropy, logp, entropy, stats, extra)


def gradient(
    engine: tiles.Engine, tile: Tensor, rows: Rows, dtype: torch.dtype, upstream: Upstream
) -> Tensor:
    """The gradient of the raw logits of a tile, in the dtype that the GEMMs take."""
    grad = tile if dtype == tile.dtype else tiles.scratch(engine, tile, tile.shape[0], tile.shape[1], dtype)
    row_kernels.backward_into(grad.unsqueeze(0), tile.unsqueeze(0), rows, upstream)
    return grad


def _odd(matrix: Tensor) -> bool:
    return matrix.shape[1] * matrix.element_size() % VECTOR_BYTES != 0


def _in_vectors(matrix: Tensor) -> Tensor:
    """The matrix with rows of stride 1 that begin on a vector's boundary; zeros after them change no product."""
    if _odd(matrix):
        return F.pad(matrix, (0, -matrix.shape[1] % (VECTOR_BYTES // matrix.element_size())))
    aligned = (matrix.stride(0) * matrix.element_size()) % VECTOR_BYTES == 0
    if matrix.stride(1) != 1 or not aligned or matrix.data_ptr() % VECTOR_BYTES:
        return matrix.clone(memory_format=torch.contiguous_format)
    return matrix


def _blocks(matrix: Tensor, rows: int, columns: int) -> Any:
    """The descriptor of a matrix that is read in blocks."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(matrix, [rows, columns])


def _programs(device: torch.device, tile_count: int) -> int:
    """One program a multiprocessor, which takes one tile after the other."""
    if device.type != "cuda":
        return min(tile_count, 2)
    return min(tile_count, torch.cuda.get_device_properties(device).multi_processor_count)


ENGINE = cuda.ENGINE._replace(backend="triton", gradient=gradient, forward=forward)


def _wide_logits(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    cuda.logits(hidden.float(), weight.float(), out)


def _add_wide_product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    cuda.add_product(a.float(), b.float(), out, accumulate)


# in Triton's interpreter: on the CPU the library has no 16-bit product with a float32 result
INTERPRETED_ENGINE = ENGINE._replace(logits=_wide_logits, add_product=_add_wide_product)
for _engine, _key in ((ENGINE, "CUDA"), (INTERPRETED_ENGINE, "CPU")):
    linear_tiles.implement(_engine, _key)
    divergence_tiles.implement(_engine, _key)
