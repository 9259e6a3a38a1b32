"""Hidden states times the rows of the head that were kept, and the gradients, in Triton (see kept_head.py).

Imports Triton: import this module only where a kernel is launched. N tokens, H hidden, V rows of the head from ``first`` on, Z
entries: pairs of a token and a row. Every sum has a fixed order that depends on the set of the token, or on the entries of
the row, alone.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton reads annotations of a kernel as its own types)

import triton
import triton.language as tl

ENTRIES = tl.constexpr(4)  # that a program reads at a time
WIDTH = tl.constexpr(256)  # columns that it reads at a time
WARPS = 4
SIZES = ("entries", "vocabulary", "first", "width")  # not specialised on: no recompilation when one changes


@triton.jit(do_not_specialize=SIZES)
def products_kernel(
    hidden,  # (N, H)
    weight,  # (V, H)
    bias,  # (V,) float32 or None
    ids,  # (Z,)
    tokens,  # (Z,), -1 for no part
    raw,  # (Z,) float32
    entries: tl.int64,
    vocabulary: tl.int64,
    first: tl.int64,
    width: tl.int64,
):
    """Grid: a program for every ENTRIES entries."""
    entry = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    token = tl.load(tokens + entry, mask=entry < entries, other=-1)
    row = tl.load(ids + entry, mask=entry < entries, other=-1) - first
    takes_part = (token >= 0) & (row >= 0) & (row < vocabulary)
    sums = tl.zeros((ENTRIES, WIDTH), tl.float32)
    for start in range(0, width, WIDTH):
        column = start + tl.arange(0, WIDTH)
        inside = takes_part[:, None] & (column < width)[None, :]
        x = tl.load(hidden + token[:, None] * width + column[None, :], mask=inside, other=0.0)
        w = tl.load(weight + row[:, None] * width + column[None, :], mask=inside, other=0.0)
        sums += x.to(tl.float32) * w.to(tl.float32)
    total = tl.sum(sums, axis=1)
    if bias is not None:
        total += tl.load(bias + row, mask=takes_part, other=0.0)
    tl.store(raw + entry, total, mask=entry < entries)


@triton.jit(do_not_specialize=SIZES)
def gradient_of_hidden_kernel(
    grad,  # (Z,) float32; an entry at 0 takes no part
    weight,
    ids,
    offsets,  # (N + 1,)
    out,  # (N, H)
    entries: tl.int64,
    vocabulary: tl.int64,
    first: tl.int64,
    width: tl.int64,
):
    """Grid: N * blocks of WIDTH columns."""
    blocks = tl.cdiv(width, WIDTH)
    token = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * WIDTH + tl.arange(0, WIDTH)
    # offsets that do not rise (an error that only the CPU sees) must not lead outside
    begin = tl.maximum(tl.load(offsets + token), 0)
    end = tl.minimum(tl.load(offsets + token + 1), entries)
    sums = tl.zeros((ENTRIES, WIDTH), tl.float32)
    for start in range(begin, end, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        g = tl.load(grad + entry, mask=entry < end, other=0.0)
        row = tl.load(ids + entry, mask=entry < end, other=-1) - first
        takes_part = (g != 0.0) & (row >= 0) & (row < vocabulary)
        inside = takes_part[:, None] & (column < width)[None, :]
        w = tl.load(weight + row[:, None] * width + column[None, :], mask=inside, other=0.0)
        sums += tl.where(takes_part, g, 0.0)[:, None] * w.to(tl.float32)
    tl.store(
        out + token.to(tl.int64) * width + column,
        tl.sum(sums, axis=0).to(out.dtype.element_ty),
        mask=column < width,
    )


@triton.jit(do_not_specialize=SIZES)
def gradient_of_weight_kernel(
    grad,
    hidden,
    ids,
    tokens,
    order,  # (Z,): the entries by id
    out,  # (V, H), 0 before, or None
    out_bias,  # (V,) float32, 0 before, or None
    entries: tl.int64,
    vocabulary: tl.int64,
    first: tl.int64,
    width: tl.int64,
):
    """Grid: Z * blocks of WIDTH columns; a program has work where its entry is the first of its row."""
    blocks = tl.cdiv(width, WIDTH) if out is not None else 1
    place = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    column = block * WIDTH + tl.arange(0, WIDTH)
    row = tl.load(ids + tl.load(order + place)) - first
    before = tl.load(ids + tl.load(order + tl.maximum(place - 1, 0))) - first
    if ((place == 0) | (before != row)) & (row >= 0) & (row < vocabulary):
        sums = tl.zeros((ENTRIES, WIDTH), tl.float32)
        total = tl.zeros((ENTRIES,), tl.float32)
        more = True
        while more:
            at = place + tl.arange(0, ENTRIES)
            entry = tl.load(order + at, mask=at < entries, other=0)
            of_row = (at < entries) & (tl.load(ids + entry) - first == row)
            g = tl.load(grad + entry, mask=of_row, other=0.0)
            token = tl.load(tokens + entry, mask=of_row & (g != 0.0), other=-1)
            total += g
            if out is not None:
                inside = (token >= 0)[:, None] & (column < width)[None, :]
                x = tl.load((hidden + column)[None, :] + token[:, None] * width, mask=inside, other=0.0)
                sums += g[:, None] * x.to(tl.float32)
            place += ENTRIES
            more = tl.sum(of_row.to(tl.int32), axis=0) == ENTRIES
        if out is not None:
            tl.store(
                out + row * width + column,
                tl.sum(sums, axis=0).to(out.dtype.element_ty),
                mask=column < width,
            )
        if out_bias is not None:
            tl.store(out_bias + row, tl.sum(total, axis=0), mask=block == 0)
