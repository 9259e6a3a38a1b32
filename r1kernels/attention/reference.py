"""decode_attention in plain PyTorch: one product a level, in which the rows of a node stand together.

B rows, N nodes, W rows of a node at most, Hq and Hk heads of queries and keys, G = Hq / Hk, L tokens, D and Dv their widths.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .layout import SharedPrefix

if TYPE_CHECKING:
    from .decode import DecodeCall


def decode_attention(call: DecodeCall) -> Tensor:
    """(B, Hq, Dv); the key and the value of each token are written to the caches first."""
    rows = torch.arange(len(call.query), device=call.query.device)
    call.key_cache[rows, :, call.lengths] = call.key
    call.value_cache[rows, :, call.lengths] = call.value
    tokens = call.layout.tokens
    own = SharedPrefix(call.lengths, None, 1, len(rows), tokens[-1])
    parts = [*call.layout.prefixes, own]
    keys, values = (
        [every[: part.nodes, :, : part.longest] for every, part in zip(kept, parts, strict=True)]
        for kept in ((*call.keys, call.key_cache), (*call.values, call.value_cache))
    )
    grouped = call.query.unflatten(1, (call.key.shape[1], -1))  # (B, Hk, G, D)
    scores = [
        _by_row(_by_node(grouped, part) @ key.transpose(-1, -2), part)
        for key, part in zip(keys, parts, strict=True)
    ]
    sinks = None if call.sinks is None else call.sinks.view(call.key.shape[1], -1, 1)
    bias = call.layout.bias(call.window)[:, None, None]
    weights = softmax(torch.cat(scores, dim=-1), bias, call.scale, call.softcap, sinks)
    found = [
        _by_row(_by_node(weight, part) @ value, part)
        for weight, value, part in zip(
            weights.to(call.value.dtype).split(tokens, -1), values, parts, strict=True
        )
    ]
    return torch.stack(found).sum(dim=0).flatten(1, 2)


def softmax(scores: Tensor, bias: Tensor, scale: float, softcap: float, sinks: Tensor | None) -> Tensor:
    """Softmax over the last dimension, in float32 at least, of capped scores and a bias.

    softcap: 0 for none. sinks: the score for nothing, of one dimension less than a row of scores has, 1 in the last; None: none.
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores + bias
    if sinks is None:
        return scores.softmax(dim=-1)
    column = sinks.to(scores).expand(*scores.shape[:-1], 1)
    return torch.cat((scores, column), dim=-1).softmax(dim=-1)[..., :-1]


def _by_node(rows: Tensor, part: SharedPrefix) -> Tensor:
    """(B, Hk, G, X) by row -> (N, Hk, W * G, X) by node; 0 where a node has fewer rows."""
    by_node = rows
    if part.place is not None:
        by_node = rows.new_zeros((part.nodes * part.width, *rows.shape[1:]))
        by_node[part.place] = rows
    if part.width == 1:
        return by_node
    return by_node.unflatten(0, (part.nodes, part.width)).transpose(1, 2).flatten(2, 3)


def _by_row(by_node: Tensor, part: SharedPrefix) -> Tensor:
    """(N, Hk, W * G, X) by node -> (B, Hk, G, X) by row: the inverse of ``_by_node``."""
    rows = by_node
    if part.width > 1:
        rows = by_node.unflatten(2, (part.width, -1)).transpose(1, 2).flatten(0, 1)
    return rows if part.place is None else rows[part.place]
