"""Decoding steps for tests, and their attention in float64, row by row over the text of each.

B rows, N nodes, Hq and Hk heads of queries and keys, D and Dv the widths of keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from r1kernels import DecodeLayout, SharedPrefix, decode_attention


@dataclass
class DecodeCase:
    """Rows with a head of all, a prompt of some and tokens of their own.

    prefixes: of each, the node and the number of tokens of every row. lengths: of the rows' own tokens.
    """

    lengths: list[int]
    prefixes: list[tuple[list[int], list[int]]] = field(default_factory=list)
    sizes: tuple[int, int, int, int] = (6, 2, 16, 16)  # Hq, Hk, D, Dv
    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        Hq, Hk, D, Dv = self.sizes
        B = len(self.lengths)
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.dtype)

        self.query, self.key, self.value = normal(B, Hq, D), normal(B, Hk, D), normal(B, Hk, Dv)
        room = max(self.lengths, default=0) + 3
        self.cache = normal(B + 1, Hk, room, D), normal(B + 1, Hk, room, Dv)
        self.shared = [
            (normal(max(nodes) + 2, Hk, max(tokens) + 2, D), normal(max(nodes) + 2, Hk, max(tokens) + 2, Dv))
            for nodes, tokens in self.prefixes
        ]

    def layout(self) -> DecodeLayout:
        shared = [SharedPrefix.of(*prefix) for prefix in self.prefixes]
        return DecodeLayout(torch.tensor(self.lengths), max(self.lengths), shared)

    def run(self, **options: Any) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """What the op gives, and the caches behind it; those of the case stay as they are."""
        keys, values = self.cache[0].clone(), self.cache[1].clone()
        arguments = self.query, self.key, self.value, (keys, values), self.layout(), self.shared
        return decode_attention(*arguments, **self.options, **options), (keys, values)

    def text(self, row: int) -> tuple[Tensor, Tensor]:
        """Keys (Hk, tokens, D) and values (Hk, tokens, Dv) of one row, the new token last."""
        parts = [
            (keys[nodes[row], :, : tokens[row]], values[nodes[row], :, : tokens[row]])
            for (keys, values), (nodes, tokens) in zip(self.shared, self.prefixes, strict=True)
        ]
        parts.append((self.cache[0][row, :, : self.lengths[row]], self.cache[1][row, :, : self.lengths[row]]))
        parts.append((self.key[row, :, None], self.value[row, :, None]))
        return torch.cat([k for k, _ in parts], 1), torch.cat([v for _, v in parts], 1)

    def eager(self, dtype: torch.dtype) -> Tensor:
        """(B, Hq, Dv) by torch's own operators in this dtype, one row after the other; the softmax in float32 at least."""
        window, softcap, sinks = (self.options.get(name) for name in ("window", "softcap", "sinks"))
        scale = self.options.get("scale", self.sizes[2] ** -0.5)
        rows = []
        for row, query in enumerate(self.query.to(dtype)):
            keys, values = (
                x.to(dtype).repeat_interleave(self.sizes[0] // self.sizes[1], 0) for x in self.text(row)
            )
            scores = (keys @ query.unsqueeze(-1)).squeeze(-1) * scale  # (Hq, tokens)
            scores = scores.to(torch.promote_types(dtype, torch.float32))
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if window is not None:
                scores[:, : max(0, scores.shape[1] - window)] = -torch.inf
            if sinks is not None:
                scores = torch.cat((scores, sinks[:, None].to(scores)), dim=1)
            weights = scores.softmax(-1)[:, : keys.shape[1]].to(dtype)
            rows.append((weights.unsqueeze(1) @ values).squeeze(1))
        return torch.stack(rows)
