"""Engines of several ranks: every call is made by all of them, and all get all outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from training.encoder import Encoder
from training.engines import Engine, Kept, Output, Request, SamplingParams
from training.parallel import ranks


class SharedEngine:
    """An `Engine` in each process: every rank draws a share of the requests with its own."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.encoder, self.version = engine.encoder, engine.version

    def update(self, model: PreTrainedModel, version: int) -> None:
        """Draws with the weights of `model` from now on."""
        self.engine.update(model, version)
        self.version = version

    def close(self) -> None:
        """Gives back what the engine holds."""
        self.engine.close()

    def sample(self, requests: Sequence[Request], params: SamplingParams) -> list[Output]:
        """One output per request, in order."""

        def draw(own: Sequence[Request]) -> list[Output]:
            return [_packed(each) for each in self.engine.sample(own, params)]

        order = _dealt(requests)
        drawn = dict(zip(order, ranks.spread(draw, [requests[i] for i in order]), strict=True))
        return [_unpacked(drawn[i]) for i in range(len(requests))]


def _dealt(requests: Sequence[Request]) -> list[int]:
    """Indices of requests in an order of which every rank has a stretch: prompts by turns, for those of a kind, whose responses
    are of much the same length, often stand together; the samples of a prompt stay together, as long as they can."""
    groups = groupby(range(len(requests)), key=lambda i: requests[i].prompt_ids)
    turns: list[list[int]] = [[] for _ in range(ranks.world())]
    for number, (_, group) in enumerate(groups):
        turns[number % len(turns)] += group
    return [i for turn in turns for i in turn]


class EngineOfMain:
    """An `Engine` that rank 0 alone speaks to, such as a server."""

    def __init__(
        self,
        connect: Callable[[], Engine],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        version: int,
    ) -> None:
        """connect: makes the engine, on rank 0."""
        self.encoder, self.version = Encoder(model, tokenizer), version
        self._engine: Engine

        def keep() -> None:
            self._engine = connect()

        ranks.once(keep)

    def update(self, model: PreTrainedModel, version: int) -> None:
        """Draws with the weights of `model` from now on."""
        ranks.once(lambda: self._engine.update(model, version))
        self.version = version

    def close(self) -> None:
        """Gives back what the engine holds; no rank waits, for this one may end alone."""
        if ranks.main():
            self._engine.close()

    def sample(self, requests: Sequence[Request], params: SamplingParams) -> list[Output]:
        """One output per request, in order."""
        drawn = ranks.once(lambda: [_packed(each) for each in self._engine.sample(requests, params)])
        return [_unpacked(each) for each in drawn]


def _packed(output: Output) -> Output:
    """An output that is pickled at once: NumPy's arrays are, tensors are not."""
    routing: Any = None if output.routing is None else output.routing.numpy()
    kept: Any = None if output.kept is None else [each.numpy() for each in output.kept]
    return replace(output, routing=routing, kept=kept)


def _unpacked(output: Output) -> Output:
    routing = None if output.routing is None else torch.from_numpy(output.routing)
    kept = None if output.kept is None else Kept(*map(torch.from_numpy, output.kept))
    return replace(output, routing=routing, kept=kept)
