"""Who draws the responses of a policy: one interface, an engine in the process and a server behind it.

An engine turns requests (the token ids of a prompt and a key) into outputs (the token ids of a response). What stands
around it, from turns to token ids and from token ids to text, is `training.loops.sample`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from training.errors import UserError
from training.parallel import ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from training.encoder import Encoder
    from training.sections import Rollout


class EngineError(UserError):
    """The engine failed while nothing had changed yet: the same command draws the step again."""


@dataclass(frozen=True)
class Request:
    """One response to draw.

    key: of its draws (training.seeding.key); max_new_tokens: at most so many tokens, at least 1, and they fit the model.
    """

    prompt_ids: tuple[int, ...]
    key: int
    max_new_tokens: int

    def __post_init__(self) -> None:
        if not self.prompt_ids or min(self.prompt_ids) < 0:
            raise ValueError(
                f"prompt_ids: expected one or more token ids of at least 0, got {self.prompt_ids}"
            )
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, got {self.max_new_tokens}")


@dataclass(frozen=True)
class SamplingParams:
    """How the responses of a call are drawn.

    temperature: 0 takes the most probable token. top_p: from the smallest set of most probable tokens with at least this
    probability. top_k: from that many most probable tokens, 0 from all. stop_ids: tokens that end a response.
    batch_size: at most so many responses in flight. record_routing: keep the experts that the routers chose. record_kept: keep
    the tokens that top_p and top_k left to draw from.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_ids: tuple[int, ...] = ()
    batch_size: int = 384
    record_routing: bool = False
    record_kept: bool = False

    def __post_init__(self) -> None:
        for name, holds, expected in (
            ("temperature", 0 <= self.temperature < math.inf, "a finite number of at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
        ):
            if not holds:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)}")

    @property
    def truncated(self) -> bool:
        """Whether some tokens are never drawn, although the model gives them a probability."""
        return self.top_p < 1 or self.top_k > 0


class Kept(NamedTuple):
    """The tokens that each token of a response was drawn from: of the n-th ids[offsets[n] : offsets[n + 1]], or all where that
    is empty. ids (Z,) int32, offsets (N + 1,) int64, both on the CPU; `kept` of the log-prob ops takes them."""

    ids: Tensor
    offsets: Tensor

    @classmethod
    def of_sets(cls, sets: Sequence[Tensor]) -> Kept:
        """From the set of every token, int32."""
        sizes = torch.tensor([0, *(len(one) for one in sets)])
        return cls(torch.cat([*sets]) if sets else torch.empty(0, dtype=torch.int32), sizes.cumsum(0))

    @classmethod
    def joined(cls, parts: Sequence[Kept]) -> Kept:
        """The sets of several responses, one behind the other."""
        sizes = [torch.zeros(1, dtype=torch.int64), *(part.offsets.diff() for part in parts)]
        return cls(torch.cat([part.ids for part in parts]), torch.cat(sizes).cumsum(0))

    def of(self, token: int) -> Tensor:
        """The set of one token."""
        return self.ids[self.offsets[token] : self.offsets[token + 1]]


@dataclass(frozen=True)
class Output:
    """One response. Where it is `finished`, token_ids ends with one of the stop ids; else it was cut at max_new_tokens.

    logp: log-prob of each token under the distribution that it was drawn from, renormalised over what top_p and top_k
    left; 0 at temperature 0. version: of the weights that drew it. routing: with record_routing, the experts chosen for
    every token of prompt and response but the last, (layers, tokens, experts per token) int16; None for a dense model, and
    from an engine that does not tell. kept: with record_kept, the tokens that each was drawn from; None where that are all.
    """

    token_ids: tuple[int, ...]
    logp: tuple[float, ...]
    finished: bool
    version: int
    routing: Tensor | None = None
    kept: Kept | None = None


class Engine(Protocol):
    """Draws responses from the model that it was given last. Several engines may live at once, each with its own model."""

    encoder: Encoder  # of that model and its tokenizer
    version: int  # of its weights

    def sample(self, requests: Sequence[Request], params: SamplingParams) -> list[Output]:
        """One output per request, in order. What is drawn depends on a request's prompt and key, on no other request."""

    def update(self, model: PreTrainedModel, version: int) -> None:
        """Draws with the weights and buffers of `model` from now on: the same model at a later version, its weights changed."""

    def close(self) -> None:
        """Gives back what the engine holds; it is not used again."""


def connect(
    rollout: Rollout, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, version: int = 0
) -> Engine:
    """The engine that the recipe's section `rollout` names, with the weights of `model` at `version`, for all ranks.

    Raises:
        UserError: the engine cannot serve the model, or cannot be reached.
    """
    from training.engines.shared import EngineOfMain, SharedEngine

    if rollout.engine == "vllm":
        from training.engines.vllm import VllmEngine

        open_server = partial(VllmEngine, rollout, model, tokenizer, version)
        return open_server() if ranks.world() == 1 else EngineOfMain(open_server, model, tokenizer, version)
    from training.engines.transformers import TransformersEngine

    engine = TransformersEngine(model, tokenizer, version)
    return engine if ranks.world() == 1 else SharedEngine(engine)
