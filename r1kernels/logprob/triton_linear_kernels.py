"""The Triton kernel of linear_logprobs without a gradient: a matrix product whose tiles of logits never leave the chip.

Imports Triton: import this module only where a kernel is launched. Shapes: N tokens, H hidden, V vocabulary. A tile of
logits is TOKENS x COLUMNS; its epilogue sums up each row as triton_softmax.py says, one part a tile, and
``triton_kernels.finish_kernel`` merges the parts of a row in the order of the vocabulary.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton reads annotations of a kernel as its own types)

import triton
import triton.language as tl

from .triton_kernels import store_part
from .triton_softmax import LOG2_E, halves, head_logits, inverse_temperature_of, tile_sums


@triton.jit(do_not_specialize=("hidden_stride", "weight_stride", "depth", "tokens", "vocabulary", "first"))
def linear_kernel(
    hidden,  # (N, H) float16 or bfloat16, or the descriptor of its blocks
    weight,  # (V, H) of the same dtype, or the descriptor of its blocks
    hidden_stride: tl.int64,
    weight_stride: tl.int64,
    depth: tl.int32,  # H
    bias,  # (V,) float32 or None
    logit_scale,  # None: 1
    softcap,  # None: no cap
    targets,  # (N) int64
    temperatures,  # (N) float32 or None
    temperature,
    logp,  # (N) float32: the logit of the target, where it lies in the slab
    parts,  # (3, V / COLUMNS, N) float32, (6, V / COLUMNS, N) with extra
    tokens: tl.int32,
    vocabulary: tl.int32,
    first: tl.int64,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    UNIT: tl.constexpr,
    ENTROPY: tl.constexpr,
    EXTRA: tl.constexpr,
):
    """Grid: any number of programs, each takes every so-many-th tile; one tile each where it is the number of tiles.

    Strides and H are in units of UNIT elements, a vector's, so that the compiler knows what they are multiples of.
    GROUP blocks of tokens go through the vocabulary together, so that their hidden states and a block of the weight stay in
    the L2 cache.
    """
    size = depth * UNIT
    token_blocks = tl.cdiv(tokens, TOKENS)
    column_blocks = tl.cdiv(vocabulary, COLUMNS)
    tiles_of_a_group = GROUP * column_blocks
    field_stride = column_blocks.to(tl.int64) * tokens
    for tile in tl.range(
        tl.program_id(0), token_blocks * column_blocks, tl.num_programs(0), flatten=DESCRIPTORS
    ):
        first_block = tile // tiles_of_a_group * GROUP
        height = tl.minimum(token_blocks - first_block, GROUP)
        token_start = (first_block + tile % tiles_of_a_group % height) * TOKENS
        column_block = tile % tiles_of_a_group // height
        column_start = column_block * COLUMNS
        token = token_start + tl.arange(0, TOKENS)
        column = column_start + tl.arange(0, COLUMNS)

        logits = tl.zeros((TOKENS, COLUMNS), tl.float32)
        if DESCRIPTORS:
            for k in range(0, size, DEPTH):
                x = hidden.load([token_start, k])
                w = weight.load([column_start, k])
                logits = tl.dot(x, w.T, logits, input_precision="ieee")
        else:
            at = tl.arange(0, DEPTH)
            # rows past the end read the last one; what they give is not used
            x_row = tl.minimum(token, tokens - 1).to(tl.int64)
            w_row = tl.minimum(column, vocabulary - 1).to(tl.int64)
            x_at = hidden + x_row[:, None] * (hidden_stride * UNIT) + at[None, :]
            w_at = weight + w_row[:, None] * (weight_stride * UNIT) + at[None, :]
            for k in range(0, size, DEPTH):
                x = tl.load(x_at, mask=at[None, :] < size - k, other=0.0)
                w = tl.load(w_at, mask=at[None, :] < size - k, other=0.0)
                logits = tl.dot(x, w.T, logits, input_precision="ieee")
                x_at += DEPTH
                w_at += DEPTH

        present = token < tokens
        rate = inverse_temperature_of(temperatures, temperature, token, present) * LOG2_E
        if temperatures is not None:
            rate = rate[:, None]
        left, right = halves(logits, TOKENS, COLUMNS // 2)
        a, b = halves(left, TOKENS, COLUMNS // 4)
        c, d = halves(right, TOKENS, COLUMNS // 4)
        a = finished(a, column_start, vocabulary, bias, logit_scale, softcap, COLUMNS // 4)
        b = finished(b, column_start + COLUMNS // 4, vocabulary, bias, logit_scale, softcap, COLUMNS // 4)
        c = finished(c, column_start + COLUMNS // 2, vocabulary, bias, logit_scale, softcap, COLUMNS // 4)
        d = finished(d, column_start + COLUMNS // 4 * 3, vocabulary, bias, logit_scale, softcap, COLUMNS // 4)

        at = tl.load(targets + token, mask=present, other=-1) - first - column_start
        here = (at >= 0) & (at < tl.minimum(COLUMNS, vocabulary - column_start))
        place = tl.where(here, at, -1).to(tl.int32)
        if tl.max(place, axis=0) >= 0:
            offset = place[:, None] - tl.arange(0, COLUMNS // 4)[None, :]
            chosen = tl.where(offset == 0, a, 0.0) + tl.where(offset == COLUMNS // 4, b, 0.0)
            chosen += tl.where(offset == COLUMNS // 2, c, 0.0) + tl.where(offset == COLUMNS // 4 * 3, d, 0.0)
            tl.store(logp + token, tl.sum(chosen, axis=1), mask=place >= 0)

        top, sums = tile_sums(
            a, b, c, d, column_start, vocabulary, rate, TOKENS, COLUMNS // 4, ENTROPY, EXTRA
        )
        part = parts + column_block.to(tl.int64) * tokens + token
        store_part(part, field_stride, present, top, sums, ENTROPY, EXTRA)


@triton.jit
def finished(raw, start, vocabulary, bias, logit_scale, softcap, COLUMNS: tl.constexpr):
    """The logits of raw ones (any, COLUMNS) that begin at column ``start``; -inf past the end of the vocabulary."""
    column = start + tl.arange(0, COLUMNS)
    inside = column < vocabulary
    row_bias = None if bias is None else tl.load(bias + column, mask=inside, other=0.0)[None, :]
    return tl.where(inside[None, :], head_logits(raw, row_bias, logit_scale, softcap)[0], float("-inf"))
