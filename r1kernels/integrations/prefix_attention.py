"""Attention over a packed prefix tree: every token sees its ancestors and what stands before it in its own node.

The keys of a token lie in a few stretches of the packed order, one per node on its path. Each is a part with an attention of its own,
o_i with log-sum-exp l_i, and the parts merge exactly:

    l = log sum_i exp(l_i)        o = sum_i exp(l_i - l) o_i

The gradient of a part needs of the others no more than l and o: its probabilities are exp(s - l), and with D = <do, o>

    dv = p^T do        ds = p (do v^T - D)        dq = ds k        dk = ds^T q

so the backward of a fused attention, called with the merged o and l, gives the gradient of a part. Keys and values are never
copied: the descendants of a node are contiguous, and one call serves all of them.

T packed tokens, H heads, D the size of a head.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from .prefix_tree import Node, PrefixTree

NAME = "r1kernels_prefix_tree"
_SHORT = 64  # own parts of nodes up to this length are padded and computed together
_STEP = 16  # to multiples of this length


class Part(NamedTuple):
    """Queries and keys, packed positions [start, end); ``masked`` where a window hides some of the keys."""

    queries: slice
    keys: slice
    masked: bool


class Batch(NamedTuple):
    """Own parts of short nodes, padded with their last tokens: packed positions (nodes, length) and what is real of them."""

    positions: Tensor
    padding: Tensor  # (nodes, 1, length, 1), bool
    rows: Tensor  # of (nodes * length), those that are real
    real: Tensor  # the packed positions of these rows

    def gather(self, values: Tensor) -> Tensor:
        """(1, H, T, ...): (nodes, H, length, ...), in the memory order of (nodes, length, H, ...)."""
        return values[0].transpose(0, 1)[self.positions].transpose(1, 2)

    def scatter(self, values: Tensor, part: Tensor) -> None:
        """The other way, without the padding."""
        values[0].transpose(0, 1)[self.real] = part.transpose(1, 2).flatten(0, 1)[self.rows].to(values.dtype)


class Parts(NamedTuple):
    """What a tree's attention consists of: every token is a query of exactly one own part, and of any number of others."""

    own: list[slice]
    batches: list[Batch]
    others: list[Part]


class Running:
    """A forward over a tree: its parts, and what the attention layers asked for."""

    def __init__(self, tree: PrefixTree, device: torch.device) -> None:
        self.tree = tree
        self.positions = tree.position_ids.to(device)
        self.multiplicity = tree.multiplicity.to(device)
        self.windows: list[int | None] = []  # of each attention layer so far
        self.kernels: dict[str, None] = {}
        self._longest = int(tree.position_ids.max()) + 1
        self._parts: dict[int | None, Parts] = {}

    def parts(self, window: int | None) -> tuple[Parts, int | None]:
        """The parts for a sliding window, which is None where all sequences fit into it."""
        if window is not None and window >= self._longest:
            window = None
        if window not in self._parts:
            self._parts[window] = split(self.tree.nodes, window, self.positions.device)
        return self._parts[window], window


def split(nodes: Sequence[Node], window: int | None, device: torch.device) -> Parts:
    """The parts of a tree; with a window its nodes are cut to that length first, so that own parts need no mask."""
    if window is not None:
        nodes = [piece for node in nodes for piece in _pieces(node, window)]
    own: list[slice] = []
    short: dict[int, list[Node]] = {}  # by length, in steps
    for node in nodes:
        length = node.end - node.start
        if length > _SHORT:
            own.append(slice(node.start, node.end))
        else:
            short.setdefault(-(-length // _STEP) * _STEP, []).append(node)
    batches = []
    for group in short.values():
        if len(group) == 1:
            own.append(slice(group[0].start, group[0].end))
            continue
        starts, ends = torch.tensor([node[:2] for node in group], device=device).T.unsqueeze(2)
        positions = starts + torch.arange(int((ends - starts).max()), device=device)
        rows = (positions < ends).flatten().nonzero().squeeze(1)
        padding = (positions >= ends)[:, None, :, None]
        positions = torch.minimum(positions, ends - 1)
        batches.append(Batch(positions, padding, rows, positions.flatten()[rows]))
    others = []
    for index, node in enumerate(nodes):
        for start, end, deepest in _runs(nodes, index, window):
            masked = window is not None and deepest - node.depth >= window
            others.append(Part(slice(start, end), slice(node.start, node.end), masked))
    return Parts(own, batches, others)


def _runs(nodes: Sequence[Node], index: int, window: int | None) -> Iterator[tuple[int, int, int]]:
    """Stretches of descendants that a window lets see something of a node: (start, end, depth of the deepest token)."""
    node = nodes[index]
    reach = None if window is None else node.depth + node.end - node.start - 1 + window
    start, end, deepest = node.end, node.end, 0
    for below in islice(nodes, index + 1, None):
        if below.start >= node.last:
            break
        if reach is not None and below.depth >= reach:
            if start < end:
                yield start, end, deepest
            start, deepest = below.end, 0
        end = below.end
        deepest = max(deepest, below.depth + below.end - below.start - 1)
    if start < end:
        yield start, end, deepest


def _pieces(node: Node, length: int) -> Iterator[Node]:
    for start in range(node.start, node.end, length):
        yield Node(start, min(start + length, node.end), node.last, node.depth + start - node.start)


class Kernel(NamedTuple):
    """An attention that returns its log-sum-exp, and its gradient.

    ``forward(q, k, v, causal, mask, options)`` gives (o, l); ``backward(do, q, k, v, o, l, causal, mask, options)`` gives
    (dq, dk, dv). q is (B, H, T, D), k and v may have fewer heads; l is (B, H, T); mask (queries, keys) is added to the scores.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


class Options(NamedTuple):
    """The numbers of an attention layer."""

    scale: float
    softcap: float | None


def _flash_cpu(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=mask, scale=options.scale
    )


def _flash_cpu_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    causal: bool,
    mask: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        do, q, k, v, o, lse, 0.0, causal, attn_mask=mask, scale=options.scale
    )


def _eager(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    scores, _ = _scores(q, k, causal, mask, options)
    lse = scores.logsumexp(dim=-1)
    # a row that sees nothing: exp(-inf - 0) = 0
    p = (scores - lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1)).exp()
    return (p @ v.to(p.dtype).unsqueeze(2)).flatten(1, 2), lse.flatten(1, 2)


def _eager_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    causal: bool,
    mask: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    scores, slope = _scores(q, k, causal, mask, options)
    heads = scores.shape[1:3]
    do, o, lse, grouped = (t.to(scores.dtype).unflatten(1, heads) for t in (do, o, lse, q))
    p = (scores - lse.unsqueeze(-1)).exp()
    dv = (p.mT @ do).sum(dim=2)
    ds = p * (do @ v.to(p.dtype).unsqueeze(2).mT - (do * o).sum(dim=-1, keepdim=True)) * slope
    dq = ds @ k.to(p.dtype).unsqueeze(2)
    dk = (ds.mT @ grouped).sum(dim=2)
    return dq.flatten(1, 2), dk, dv


def _scores(
    q: Tensor, k: Tensor, causal: bool, mask: Tensor | None, options: Options
) -> tuple[Tensor, Tensor | float]:
    """Scores (B, key heads, queries per key head, queries, keys), and their slope in q k^T; float32 at least."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q = q.to(dtype).unflatten(1, (k.shape[1], -1))
    scores = q @ k.to(dtype).unsqueeze(2).mT * options.scale
    slope: Tensor | float = options.scale
    if options.softcap is not None:
        # c tanh(s / c) has the slope 1 - tanh(s / c)^2
        bounded = (scores / options.softcap).tanh()
        scores, slope = options.softcap * bounded, options.scale * (1 - bounded.square())
    if causal:
        above = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(above, float("-inf"))
    return (scores if mask is None else scores + mask.to(dtype)), slope


KERNELS = {
    "torch's flash attention for CPUs": Kernel(_flash_cpu, _flash_cpu_backward),
    "plain PyTorch": Kernel(_eager, _eager_backward),
}


def choose(q: Tensor, v: Tensor, options: Options) -> str:
    """Which of KERNELS serves an attention layer."""
    if q.device.type == "cpu" and options.softcap is None and v.shape[-1] <= q.shape[-1]:
        return "torch's flash attention for CPUs"
    return "plain PyTorch"


class _TreeAttention(torch.autograd.Function):
    """(q (1, H, T, D), k, v, sinks (H,) or None) -> o (1, H, T, D of v), in the memory order of (1, T, H, D)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, call: _Call) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        (_, heads, tokens, _), size = q.shape, v.shape[-1]
        out = q.new_empty(1, tokens, heads, size, dtype=wide).transpose(1, 2)
        lse = q.new_empty(1, tokens, heads, dtype=wide).transpose(1, 2)
        for own in call.parts.own:
            part = call.kernel.forward(q[:, :, own], k[:, :, own], v[:, :, own], True, None, call.options)
            out[:, :, own], lse[:, :, own] = part
        for batch in call.parts.batches:
            o, l = call.kernel.forward(  # noqa: E741
                *(batch.gather(t) for t in (q, k, v)), True, None, call.options
            )
            batch.scatter(out, o)
            batch.scatter(lse, l)
        for queries, keys, masked in call.parts.others:
            mask, sees = call.mask(queries, keys, q.dtype) if masked else (None, None)
            o, l = call.kernel.forward(  # noqa: E741
                q[:, :, queries], k[:, :, keys], v[:, :, keys], False, mask, call.options
            )
            if sees is not None:  # what comes out of a row that sees no key is not defined
                o, l = o.masked_fill(~sees.unsqueeze(1), 0.0), l.masked_fill(~sees, float("-inf"))  # noqa: E741
            _merge(out[:, :, queries], lse[:, :, queries], o, l)
        if sinks is not None:  # a part with one score per head and the value 0
            merged = torch.logaddexp(lse, sinks.to(wide).view(1, -1, 1))
            out *= (lse - merged).exp_().unsqueeze(-1)
            lse.copy_(merged)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.call = call
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, lse = ctx.saved_tensors
        call, (do,) = ctx.call, grads
        if do.stride(-1) != 1:
            do = do.contiguous()
        dq, dk, dv = (
            torch.zeros(t.transpose(1, 2).shape, dtype=lse.dtype, device=t.device).transpose(1, 2)
            for t in (q, k, v)
        )
        for own in call.parts.own:
            tensors = (t[:, :, own] for t in (do, q, k, v, out, lse))
            parts = call.kernel.backward(*tensors, True, None, call.options)
            for whole, part in zip((dq, dk, dv), parts, strict=True):
                whole[:, :, own] = part
        for batch in call.parts.batches:
            # padding has no gradient upstream, so it has none at all
            upstream = batch.gather(do).masked_fill(batch.padding, 0.0)
            tensors = (batch.gather(t) for t in (q, k, v, out, lse))
            parts = call.kernel.backward(upstream, *tensors, True, None, call.options)
            for whole, part in zip((dq, dk, dv), parts, strict=True):
                batch.scatter(whole, part)
        for queries, keys, masked in call.parts.others:
            mask, _ = call.mask(queries, keys, q.dtype) if masked else (None, None)
            of_queries = [t[:, :, queries] for t in (do, q, out, lse)]
            parts = call.kernel.backward(
                *of_queries[:2], k[:, :, keys], v[:, :, keys], *of_queries[2:], False, mask, call.options
            )
            for whole, where, part in zip((dq, dk, dv), (queries, keys, keys), parts, strict=True):
                whole[:, :, where] += part
        dsinks = None
        if sinks is not None:
            # p = exp(s - l) and its value is 0: ds = -sum_t p <do, o>
            p = (sinks.to(lse.dtype).view(1, -1, 1) - lse).exp()
            dsinks = -(p * (do.to(lse.dtype) * out).sum(dim=-1)).sum(dim=(0, 2)).to(sinks.dtype)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsinks, None


class _Call(NamedTuple):
    """One attention layer over one tree."""

    parts: Parts
    window: int  # 0: none
    positions: Tensor
    kernel: Kernel
    options: Options

    def mask(self, queries: slice, keys: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What the window hides of a part, 0 or -inf, and which queries see anything of it."""
        apart = self.positions[queries].unsqueeze(1) - self.positions[keys]
        visible = apart < self.window
        mask = torch.zeros(apart.shape, dtype=dtype, device=apart.device).masked_fill(~visible, float("-inf"))
        return mask, visible[:, -1]


def _merge(out: Tensor, lse: Tensor, o: Tensor, l: Tensor) -> None:  # noqa: E741
    """Merge a part (o, l) into (out, lse), in place."""
    merged = torch.logaddexp(lse, l)
    out *= (lse - merged).exp_().unsqueeze(-1)
    out += o * (l - merged).exp_().unsqueeze(-1)
    lse.copy_(merged)


class _Current(threading.local):
    running: Running | None = None


_current = _Current()


def current() -> Running | None:
    """The forward over a tree that runs in this thread."""
    return _current.running


@torch.compiler.disable
def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **inputs: Any,
) -> tuple[Tensor, None]:
    """The attention function of transformers for a packed tree: query (1, H, T, D) to (1, T, H, D of value).

    Raises:
        RuntimeError: no forward over a tree runs. ValueError: the layer asks for what this attention does not compute.
    """
    running, name = current(), type(module).__name__
    if running is None:
        raise RuntimeError(
            f"{name}: {NAME} attends within shared_prefix_states and shared_prefix_logprobs only"
        )
    if dropout:
        raise ValueError(
            f"{name}: expected attention without dropout, got dropout={dropout:g}; call model.eval()"
        )
    if attention_mask is not None or inputs.get("position_bias") is not None:
        raise ValueError(f"{name}: expected attention without a mask or bias of its own")
    if not (getattr(module, "is_causal", True) and inputs.get("is_causal", True) in (True, None)):
        raise ValueError(f"{name}: expected causal attention")
    tokens = running.tree.tokens
    if any(t.shape[0] != 1 or t.shape[2] != tokens for t in (query, key, value)):
        raise ValueError(
            f"{name}: expected queries, keys and values of {tokens} tokens, got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    running.windows.append(sliding_window)
    parts, window = running.parts(sliding_window)
    query, key, value = _one_dtype(query, key, value)
    options = Options(query.shape[-1] ** -0.5 if scaling is None else float(scaling), softcap)
    kernel = choose(query, value, options)
    running.kernels[kernel] = None
    size = value.shape[-1]
    if kernel != "plain PyTorch" and size < query.shape[-1]:
        value = nn.functional.pad(value, (0, query.shape[-1] - size))
    call = _Call(parts, window or 0, running.positions, KERNELS[kernel], options)
    with torch.autocast(query.device.type, enabled=False):
        out = _TreeAttention.apply(query, key, value, s_aux, call)
    return out.transpose(1, 2)[..., :size], None


def _one_dtype(*tensors: Tensor) -> list[Tensor]:
    """As autocast does for torch's own attention; without it, what all of them can be."""
    device = tensors[0].device.type
    dtype = tensors[0].dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    else:
        for other in tensors[1:]:
            dtype = torch.promote_types(dtype, other.dtype)
    return [tensor.to(dtype) for tensor in tensors]


AttentionInterface.register(NAME, tree_attention)
AttentionMaskInterface.register(NAME, lambda *arguments, **options: None)


@contextmanager
def attending(configs: Sequence[Any], running: Running) -> Iterator[None]:
    """Let the models of these configurations attend over a tree, in a ``with`` block in this thread."""
    before = [config._attn_implementation_internal for config in configs]
    outer = _current.running
    try:
        for config in configs:
            config._attn_implementation_internal = NAME
        _current.running = running
        yield
    finally:
        _current.running = outer
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation_internal = implementation


@contextmanager
def packed(model: Any, tree: PrefixTree) -> Iterator[Running]:
    """Let a model of transformers attend over a tree in a ``with`` block, and wherever its layers are computed again."""
    modules = list(model.modules())
    configs = {
        id(module.config): module.config
        for module in modules
        if hasattr(getattr(module, "config", None), "_attn_implementation_internal")
    }
    running = Running(tree, next(model.parameters()).device)
    checkpointed = [module for module in modules if "_gradient_checkpointing_func" in vars(module)]
    originals = [module._gradient_checkpointing_func for module in checkpointed]

    def checkpointing(original: Callable[..., Any]) -> Callable[..., Any]:
        def checkpoint(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
            def run(*args: Any, **inputs: Any) -> Any:  # in the forward, and again in the backward
                with attending([*configs.values()], running):
                    return function(*args, **inputs)

            return original(run, *args, **options)

        return checkpoint

    try:
        for module, original in zip(checkpointed, originals, strict=True):
            module._gradient_checkpointing_func = checkpointing(original)
        with attending([*configs.values()], running):
            yield running
    finally:
        for module, original in zip(checkpointed, originals, strict=True):
            module._gradient_checkpointing_func = original
