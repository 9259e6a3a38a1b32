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

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .prefix_kernels import Kernel, Operands, Options
from .prefix_tree import Node

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


def split(nodes: Sequence[Node], window: int, device: torch.device) -> Parts:
    """The parts of a tree; a window (0: none) cuts its nodes to that length first, so that own parts need no mask."""
    if window:
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
        starts, ends = torch.tensor([node[:2] for node in group]).T.unsqueeze(2)
        positions = starts + torch.arange(int((ends - starts).max()))
        rows = (positions < ends).flatten().nonzero().squeeze(1)
        padding = (positions >= ends)[:, None, :, None]
        positions = torch.minimum(positions, ends - 1)
        found = Batch(positions, padding, rows, positions.flatten()[rows])
        batches.append(Batch(*(one.to(device) for one in found)))
    others = []
    for index, node in enumerate(nodes):
        for start, end, deepest in _runs(nodes, index, window):
            masked = window > 0 and deepest - node.depth >= window
            others.append(Part(slice(start, end), slice(node.start, node.end), masked))
    return Parts(own, batches, others)


def _runs(nodes: Sequence[Node], index: int, window: int) -> Iterator[tuple[int, int, int]]:
    """Stretches of descendants that a window lets see something of a node: (start, end, depth of the deepest token)."""
    node = nodes[index]
    reach = node.depth + node.end - node.start - 1 + window
    start, end, deepest = node.end, node.end, 0
    for below in islice(nodes, index + 1, None):
        if below.start >= node.last:
            break
        if window and below.depth >= reach:
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


class Call(NamedTuple):
    """One attention layer over one tree."""

    parts: Parts
    positions: Tensor  # (T,)
    window: int  # 0: none
    options: Options
    kernel: Kernel
    masked: Kernel  # for parts of which the window hides something

    def own(self, qkv: Iterable[Tensor]) -> Operands:
        """Of tokens that attend to their own node: each to those before it and to itself."""
        q, k, v = qkv
        return Operands(q, k, v, True, None, self.options)

    def other(self, part: Part, dtype: torch.dtype) -> tuple[Kernel, Tensor | None, Tensor | None]:
        """The kernel of a part, what the window hides of it (0 or -inf), and which queries see anything of it."""
        if not part.masked:
            return self.kernel, None, None
        apart = self.positions[part.queries].unsqueeze(1) - self.positions[part.keys]
        visible = apart < self.window
        mask = torch.zeros(apart.shape, dtype=dtype, device=apart.device).masked_fill(~visible, float("-inf"))
        return self.masked, mask, visible[:, -1]


def attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, call: Call) -> Tensor:
    """The attention of every token over its path: (1, H, T, D of v), in the memory order of (1, T, H, D).

    Args:
        q: (1, H, T, D); k and v may have fewer heads.
        sinks: (H,), a score per head that takes its share of the softmax and adds nothing.
    """
    return _TreeAttention.apply(q, k, v, sinks, call)


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, call: Call) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        shape = (1, q.shape[2], q.shape[1])
        out = q.new_empty(*shape, v.shape[-1], dtype=wide).transpose(1, 2)
        lse = q.new_empty(shape, dtype=wide).transpose(1, 2)
        for own in call.parts.own:
            operands = call.own(t[:, :, own] for t in (q, k, v))
            out[:, :, own], lse[:, :, own] = call.kernel.forward(operands)
        for batch in call.parts.batches:
            operands = call.own(batch.gather(t) for t in (q, k, v))
            for whole, part in zip((out, lse), call.kernel.forward(operands), strict=True):
                batch.scatter(whole, part)
        for other in call.parts.others:
            kernel, mask, sees = call.other(other, q.dtype)
            qkv = q[:, :, other.queries], k[:, :, other.keys], v[:, :, other.keys]
            o, log_sum = kernel.forward(Operands(*qkv, False, mask, call.options))
            if sees is not None:  # what comes out of a row that sees no key is not defined
                o, log_sum = o.masked_fill(~sees.unsqueeze(1), 0.0), log_sum.masked_fill(~sees, float("-inf"))
            _merge(out[:, :, other.queries], lse[:, :, other.queries], o, log_sum)
        if sinks is not None:  # a part with one score per head, whose value is 0
            _merge(out, lse, torch.zeros_like(out[:, :, :1]), sinks.to(wide).view(1, -1, 1))
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.call = call
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, lse = ctx.saved_tensors
        call, do = ctx.call, grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        gradients = tuple(
            torch.zeros(t.transpose(1, 2).shape, dtype=lse.dtype, device=t.device).transpose(1, 2)
            for t in (q, k, v)
        )
        for own in call.parts.own:
            operands = call.own(t[:, :, own] for t in (q, k, v))
            parts = call.kernel.backward(operands, *(t[:, :, own] for t in (do, out, lse)))
            for whole, part in zip(gradients, parts, strict=True):
                whole[:, :, own] = part
        for batch in call.parts.batches:
            # padding has no gradient upstream, so it has none at all
            upstream = batch.gather(do).masked_fill(batch.padding, 0.0)
            operands = call.own(batch.gather(t) for t in (q, k, v))
            parts = call.kernel.backward(operands, upstream, batch.gather(out), batch.gather(lse))
            for whole, part in zip(gradients, parts, strict=True):
                batch.scatter(whole, part)
        for other in call.parts.others:
            kernel, mask, _ = call.other(other, q.dtype)
            queries, keys = other.queries, other.keys
            qkv = q[:, :, queries], k[:, :, keys], v[:, :, keys]
            operands = Operands(*qkv, False, mask, call.options)
            parts = kernel.backward(operands, *(t[:, :, queries] for t in (do, out, lse)))
            for whole, place, part in zip(gradients, (queries, keys, keys), parts, strict=True):
                whole[:, :, place] += part
        of_sinks = None
        if sinks is not None:
            # its value is 0: ds = -sum_t p <do, o>
            p = (sinks.to(lse.dtype).view(1, -1, 1) - lse).exp()
            of_sinks = -(p * (do.to(lse.dtype) * out).sum(dim=-1)).sum(dim=(0, 2)).to(sinks.dtype)
        return *(whole.to(t.dtype) for whole, t in zip(gradients, (q, k, v), strict=True)), of_sinks, None


def _merge(out: Tensor, lse: Tensor, o: Tensor, log_sum: Tensor) -> None:
    """Merge a part into (out, lse), in place."""
    merged = torch.logaddexp(lse, log_sum)
    out *= (lse - merged).exp_().unsqueeze(-1)
    out += o * (log_sum - merged).exp_().unsqueeze(-1)
    lse.copy_(merged)
