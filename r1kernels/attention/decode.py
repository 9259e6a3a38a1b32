"""decode_attention: one new token of each row attends to the row's text, of which rows may share the beginning.

B rows, N nodes, Hq and Hk heads of queries and keys, L tokens, D and Dv the widths of keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from .. import autocast, checks
from ..op import OUTSIDE, Float32, Kernel, Op, Written
from . import reference
from .layout import DecodeLayout

MOST_PREFIXES = 7  # kMostLevels of csrc/attention/cpu.h, less the cache of the rows


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: tuple[Tensor, Tensor],
    layout: DecodeLayout,
    prefixes: Sequence[tuple[Tensor, Tensor]] = (),
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Attention of one token per row over the row's text, whose parts lie in keys and values that rows share.

    The text of row b is what it sees of each prefix, then the ``layout.lengths[b]`` tokens of its own cache, then its new
    token, whose key and value are written behind them, in place, first. With its scores
    s_t = cap(scale <query, key_t>), cap(x) = softcap tanh(x / softcap) or x, over the last ``window`` tokens of the text:

        out = sum_t exp(s_t) value_t / (sum_t exp(s_t) + exp(sink))

    A prompt of many samples, or a system prompt of all rows, is read once per node that holds it, not copied per row
    (cascade attention, "Hydragen: High-Throughput LLM Inference with Shared Prefixes", arXiv:2402.05099).

    Args:
        query: (B, Hq, D), float32, bfloat16, float16 or float64. key, value: (B, Hk, D), (B, Hk, Dv), Hq a multiple of Hk: heads of
            queries h Hq / Hk, ... share head h of keys. Any strides.
        cache: keys (>= B, Hk, L, D) and values (>= B, Hk, L, Dv) of the rows, row b in node b; written to at
            ``layout.lengths``. Any strides of entries that do not overlap but in the last dimension.
        layout: which node of each prefix a row reads, how much of it, and how much of the cache; one for all layers of a step.
        prefixes: keys (>= N, Hk, L, D) and values (>= N, Hk, L, Dv) of each of ``layout.prefixes``, L at least the longest part that
            a row sees: what else is there does not count, but must be finite.
        scale: of the scores; None: D ** -0.5. window: tokens that a token sees, itself among them; None: all.
        softcap: above 0, or None. sinks: (Hq,) a score for nothing, per head of queries, or None.
        backend: "cpu" or "reference": that one or an error; None chooses (see r1kernels.backends).

    Returns:
        (B, Hq, Dv) in the dtype of ``value``. There is no gradient. Under autocast query, key and value are cast, and the caches have
        its dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        IndexError: on the CPU in eager mode, a length that the cache has no room for; nothing is written then.
        RuntimeError: a gradient is asked for.

    Precision: the cpu backend has float32 products, sums and weights from inputs of any dtype. The bits of a row depend on its own
    text alone: not on the other rows, nor on where the text is cut into prefixes, nor on the number of threads. The reference
    multiplies in the dtype of the inputs, the rows of a node at once. Deterministic.
    """
    checks.tensor("query", query, dtypes=checks.FLOATS, ndim=3)
    rows, query_heads, key_size = query.shape
    checks.tensor("key", key, dtypes=checks.FLOATS, shape=(rows, None, key_size), like=query)
    heads = key.shape[1]
    checks.tensor("value", value, dtypes=checks.FLOATS, shape=(rows, heads, None), like=query)
    query, key, value = autocast.cast(query, key, value)
    if key.dtype != query.dtype:
        raise TypeError(f"key: expected the dtype of query, {query.dtype}, got {key.dtype}")
    if heads == 0 or query_heads % heads:
        raise ValueError(f"query: expected a multiple of {heads} heads, got {query_heads}")
    if key_size == 0:
        raise ValueError(f"query: expected shape (B, Hq, D) with D >= 1, got {tuple(query.shape)}")
    if not isinstance(layout, DecodeLayout):
        raise TypeError(f"layout: expected a DecodeLayout, got {type(layout).__name__}")
    if not isinstance(prefixes, (tuple, list)):
        raise TypeError(f"prefixes: expected a sequence of pairs, got {type(prefixes).__name__}")
    parts = [("cache", cache, rows, layout.longest + 1)]
    if len(prefixes) != len(layout.prefixes):
        raise ValueError(f"prefixes: expected {len(layout.prefixes)}, as layout has, got {len(prefixes)}")
    for part, prefix in zip(layout.prefixes, prefixes, strict=True):
        parts.append(("prefixes", prefix, part.nodes, part.longest))
    for name, pair, nodes, tokens in parts:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(f"{name}: expected a pair of keys and values, got {type(pair).__name__}")
        keys, values = pair
        checks.tensor(name, keys, dtypes=(key.dtype,), shape=(None, heads, None, key_size), like=query)
        shape = (keys.shape[0], heads, keys.shape[2], value.shape[2])
        checks.tensor(name, values, dtypes=(value.dtype,), shape=shape, like=query)
        if keys.shape[0] < nodes or keys.shape[2] < tokens:
            raise ValueError(
                f"{name}: expected at least {nodes} nodes of {tokens} tokens, as layout says, got "
                f"{keys.shape[0]} of {keys.shape[2]}"
            )
    checks.tensor("layout.lengths", layout.lengths, shape=(rows,), like=query)
    if sinks is not None:
        checks.tensor("sinks", sinks, dtypes=checks.FLOATS, shape=(query_heads,), like=query)
    if torch.is_grad_enabled() and _needs_gradient(
        query, key, value, sinks, *(pair for _, pair, *_ in parts)
    ):
        raise RuntimeError("decode_attention has no gradient: expected a call under torch.no_grad()")
    call = DecodeCall(
        _lines(query),
        _lines(key),
        _lines(value),
        *cache,
        layout.lengths,
        [keys for keys, _ in prefixes],
        [values for _, values in prefixes],
        layout.prefix_lengths,
        layout.places,
        layout.widths,
        sinks,
        key_size**-0.5 if scale is None else checks.number("scale", scale),
        0 if window is None else checks.integer("window", window, 1),
        0.0 if softcap is None else checks.positive("softcap", softcap),
        layout,
    )
    try:
        return DECODE_ATTENTION(backend, call)
    except RuntimeError:
        # looked at here alone: it costs as much as a small step
        layout.check()
        _check_apart(*cache)
        for name, pair, *_ in parts:
            for tensor in pair:
                if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
                    raise ValueError(
                        f"{name}: expected the last dimension contiguous, got strides {tensor.stride()}"
                    ) from None
        raise


def _needs_gradient(*values: Tensor | tuple[Tensor, Tensor] | None) -> bool:
    """Whether a tensor, or one of a pair, requires a gradient."""
    return any(
        x.requires_grad if isinstance(x, Tensor) else x is not None and _needs_gradient(*x) for x in values
    )


class DecodeCall(NamedTuple):
    """A checked call of decode_attention; the argument list of its torch ops."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_cache: Written
    value_cache: Written
    lengths: Tensor  # (B,)
    keys: list[Tensor]  # of the prefixes
    values: list[Tensor]
    prefix_lengths: list[Tensor]
    places: list[Tensor]  # empty where row b reads node b
    widths: list[int]
    sinks: Float32 | None
    scale: float
    window: int  # 0: none
    softcap: float  # 0: none
    layout: Annotated[DecodeLayout, OUTSIDE] = DecodeLayout(torch.empty(0, dtype=torch.int64), 0)


def _lines(tensor: Tensor) -> Tensor:
    """A tensor as the kernel takes it: contiguous in the last dimension."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _shapes(call: DecodeCall) -> Tensor:
    return call.query.new_empty((*call.query.shape[:2], call.value.shape[2]))


def _limits(backend: str, call: DecodeCall) -> Sequence[str]:
    if call.value.dtype != call.query.dtype:
        return ("value: of another dtype than query",)
    if len(call.keys) > MOST_PREFIXES:
        return (f"prefixes: more than {MOST_PREFIXES}",)
    return ()


def _check_apart(*cache: Tensor) -> None:
    """Raise ValueError at a cache of which rows would overwrite one another."""
    for tensor in cache:
        if checks.overlaps(tensor):
            raise ValueError(
                f"cache: expected entries that do not overlap, got strides {tensor.stride()} for shape {tuple(tensor.shape)}"
            )


def _reference(call: DecodeCall) -> Tensor:
    call.layout.check()
    _check_apart(call.key_cache, call.value_cache)
    return reference.decode_attention(call)


DECODE_ATTENTION = Op(
    "decode_attention",
    _reference,
    Kernel("decode_attention", DecodeCall, _shapes, backends=("cpu",)),
    decides="query",
    limits=_limits,
    only=("cpu",),
)
