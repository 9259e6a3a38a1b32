"""The engine in the process: the policy itself draws, through transformers' model.

Every response has one key; its n-th token is chosen by the n-th number of a counter-based generator of that key
(training.engines.choice). So nothing has to be saved for a resume, any number of machines draw the same responses, and
rows may come and go: a response that has ended makes room for the next one (continuous batching). Prompts are read in
packed passes without padding, each once, and what all begin with once in all (training.engines.cache).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from r1kernels import DecodeLayout, SharedPrefix, devices
from r1kernels.integrations import transformers as integration
from r1kernels.integrations.prefix_tree import common_length
from r1kernels.integrations.routing_record import RoutingRecord
from training import notices
from training.encoder import Encoder
from training.engines import Kept, Output, Request, SamplingParams, equal_lengths
from training.engines.cache import Level, Pass, PromptPass, Segment, TokenPass, attention, forward
from training.engines.choice import choose_tokens, uniforms
from training.model import is_patched

PROMPT_TOKENS = 4096  # of one pass over prompts
SHORTEST_HEAD = 16  # a common head of fewer tokens costs more than it saves
SAME = 1e-2  # most that two ways of one log-prob may differ
FIRST_ROOM = 128  # tokens of a response that the cache has room for at first
# tokens that a device draws before the host looks which responses have ended; others 1
STEPS_UNSEEN = {"cuda": 8}


class TransformersEngine:
    """An `Engine` that draws from the model that is trained: an update copies nothing."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, version: int = 0) -> None:
        self.encoder = Encoder(model, tokenizer)
        self.model, self.version = model, version

    def update(self, model: PreTrainedModel, version: int) -> None:
        """Draws from `model` from now on."""
        self.model, self.version = model, version

    def close(self) -> None:
        """Nothing is held."""

    @torch.no_grad()
    def sample(self, requests: Sequence[Request], params: SamplingParams) -> list[Output]:
        """One output per request, in order."""
        if not requests:
            return []
        with ExitStack() as stack:
            stack.enter_context(_evaluated(self.model))
            stack.enter_context(_weights_cast_once())
            if not _served(self.model):
                return equal_lengths.draw(self.model, requests, params, self.version)
            stack.enter_context(attention(self.model))
            record = None
            if params.record_routing and is_patched(self.model):
                record = stack.enter_context(integration.record_routing(self.model))
            return _Flight(self.model, requests, params, record, self.version).run()


@contextmanager
def _evaluated(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block `model` is in eval mode; behind it each of its modules is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _weights_cast_once() -> Iterator[None]:
    """Inside the block autocast keeps its copies of the weights, which do not change while responses are drawn."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(True)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
        torch.clear_autocast_cache()


def _served(model: PreTrainedModel) -> bool:
    """Whether the passes of this engine compute what the model does, seen once a model; a warning where they do not."""
    if model not in _SERVED:
        _SERVED[model] = _reason(model)
    if _SERVED[model]:
        notices.warn(
            "rollout",
            f"{type(model).__name__} {_SERVED[model]}: only prompts of one length share a batch, which takes longer",
        )
    return not _SERVED[model]


_SERVED: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()


@torch.no_grad()
def _reason(model: PreTrainedModel) -> str:
    """Why the passes of this engine cannot serve a model; "" where they can.

    Two short prompts with a common head are drawn from, and the model as it is scores what was drawn: an attention that does
    more than this engine shows there. What shows in long texts alone is known by name.
    """
    config = model.config.get_text_config()
    if not model._supports_attention_backend:
        return "does not ask transformers' attention interface"
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        return "attends in chunks"
    longest = min(SHORTEST_HEAD + 5, (getattr(config, "max_position_embeddings", None) or 64) - 3)
    ids = torch.randint(
        config.vocab_size, (longest + 1,), generator=torch.Generator().manual_seed(0)
    ).tolist()
    requests = [Request(tuple(ids[:longest]), 1, 3), Request((*ids[: longest - 3], ids[-1]), 2, 3)]
    with torch.autocast(model.device.type, enabled=False):
        try:
            with attention(model):
                drawn = _Flight(model, requests, SamplingParams(), None, 0).run()
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            if devices.out_of_memory(error):
                raise
            return f"cannot be asked for its attention ({str(error).splitlines()[0]})"
        for request, output in zip(requests, drawn, strict=True):
            first = len(request.prompt_ids)
            text = torch.tensor([request.prompt_ids + output.token_ids], device=model.device)
            logits = model(input_ids=text, use_cache=False).logits[0, first - 1 : -1].float()
            logp = logits.log_softmax(-1).gather(1, text[0, first:, None]).squeeze(1).cpu()
            if not torch.allclose(logp, torch.tensor(output.logp).float(), rtol=0, atol=SAME, equal_nan=True):
                return "has an attention of its own"
    return ""


@dataclass
class _Prompt:
    """A distinct prompt, without the common head. waiting: requests that are not drawn yet; node: of the level of prompts,
    once it is read; rows: its responses in flight; logits (V,) behind it; routing (layers, tokens, K)."""

    ids: tuple[int, ...]
    waiting: deque[int] = field(default_factory=deque)
    node: int = -1
    rows: int = 0
    logits: Tensor | None = None
    routing: Tensor | None = None


@dataclass
class _Row:
    """A response in flight. since: the steps that were taken before its first token; kept: what each of its tokens was drawn
    from."""

    request: int
    prompt: _Prompt
    since: int
    kept: list[Tensor] = field(default_factory=list)


class _Flight:
    """All responses of one call. Row b, slot b of every tensor and node b of the level `own` are one response."""

    def __init__(
        self,
        model: PreTrainedModel,
        requests: Sequence[Request],
        params: SamplingParams,
        record: RoutingRecord | None,
        version: int,
    ) -> None:
        self.model, self.requests, self.params = model, requests, params
        self.record, self.version = record, version
        self.device = model.device
        prompts: dict[tuple[int, ...], _Prompt] = {}
        head = _common_head([request.prompt_ids for request in requests])
        for i, request in enumerate(requests):
            prompt = prompts.setdefault(request.prompt_ids, _Prompt(request.prompt_ids[head:]))
            prompt.waiting.append(i)
        self.head_ids = requests[0].prompt_ids[:head]
        # Longest first: rows in flight at a time have prompts of much the same length, and none is left for the end.
        self.queue = deque(sorted(prompts.values(), key=lambda prompt: -len(prompt.ids)))
        self.head, self.shared, self.own = Level(), Level(), Level()
        self.head_routing: Tensor | None = None
        self.rows: list[_Row] = []
        self.nodes: list[_Prompt] = []  # of the level `shared`, by node
        self.slots = slots = min(params.batch_size, len(requests))
        self.most = max(request.max_new_tokens for request in requests)
        # a place more than a response has tokens, for those that are drawn when it has ended and no one has looked yet
        self.tokens = self._zeros((slots, self.most + 1), torch.int64)
        self.logp = self._zeros((slots, self.most + 1), torch.float64)
        self.uniform = self._zeros((slots, self.most + 1), torch.float64)
        self.count = self._zeros((slots,), torch.int64)
        self.limit = self._zeros((slots,), torch.int64)
        self.done = self._zeros((slots,), torch.bool)
        self.start = self._zeros((slots,), torch.int64)  # tokens of head and prompt
        self.routing: Tensor | None = None  # (slots, tokens of a response, layers, K)
        self.record_kept = params.record_kept and params.truncated
        # of every draw since the host has looked: its first row, and (rows, V), all False where a row had ended
        self.unseen_sets: list[tuple[int, Tensor]] = []
        self.stops = torch.tensor(params.stop_ids, dtype=torch.int64, device=self.device)
        self.outputs: dict[int, Output] = {}
        self.steps = 0
        self.prefixes: list[SharedPrefix] = []  # what rows read of head and prompts, until some come or go

    def _zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def run(self) -> list[Output]:
        """The outputs of all requests, in order."""
        unseen = STEPS_UNSEEN.get(self.device.type, 1)
        enough = max(1, self.slots // 8)  # free slots, so that a pass over prompts is worth it
        if self.head_ids:
            self._read_head()
        while self.queue or self.rows:
            if self.queue and (not self.rows or self.slots - len(self.rows) >= enough):
                self._admit()
            else:
                for _ in range(unseen):
                    self._step()
            self._leave()
        return [self.outputs[i] for i in range(len(self.requests))]

    def _read_head(self) -> None:
        length = len(self.head_ids)
        self.head.make_room(1, length)
        current = PromptPass(self.head, [Segment(0, 0, length)])
        _, self.head_routing = self._forward(current, self.head_ids, range(length), [length - 1])

    def _forward(
        self, current: Pass, ids: Sequence[int], positions: Sequence[int], keep: Sequence[int]
    ) -> tuple[Tensor, Tensor | None]:
        """Logits of the tokens `keep` and the routing of all, (layers, T, K)."""
        logits = forward(
            self.model,
            current,
            torch.tensor(ids, device=self.device),
            torch.tensor(positions, device=self.device),
            torch.tensor(keep, device=self.device),
        )
        return logits, self._recorded()

    def _recorded(self) -> Tensor | None:
        """The experts chosen in the last pass, (layers, T, K)."""
        if self.record is None:
            return None
        return torch.stack([calls.pop() for calls in self.record.calls])

    def _admit(self) -> None:
        """Fills the free slots with waiting requests, whose prompts are read and whose first tokens are drawn."""
        first = len(self.rows)
        fresh: list[_Prompt] = []
        while self.queue and len(self.rows) < self.slots:
            prompt = self.queue[0]
            if prompt.node < 0:
                prompt.node = len(self.nodes)
                self.nodes.append(prompt)
                fresh.append(prompt)
            while prompt.waiting and len(self.rows) < self.slots:
                self.rows.append(_Row(prompt.waiting.popleft(), prompt, self.steps))
                prompt.rows += 1
            if not prompt.waiting:
                self.queue.popleft()
        self._read(fresh)
        new = self.rows[first:]
        asked = [self.requests[row.request] for row in new]
        here = slice(first, len(self.rows))
        self.uniform[here] = uniforms([r.key for r in asked], self.uniform.shape[1]).to(self.device)
        self.limit[here] = torch.tensor([r.max_new_tokens for r in asked], device=self.device)
        self.start[here] = torch.tensor([len(r.prompt_ids) for r in asked], device=self.device)
        self.count[here] = 0
        self.done[here] = False
        logits = []
        for row in new:
            assert row.prompt.logits is not None
            logits.append(row.prompt.logits)
        self._draw(here, torch.stack(logits))
        for row in new:
            if not row.prompt.waiting:
                row.prompt.logits = None
        self.prefixes = []

    def _read(self, prompts: list[_Prompt]) -> None:
        """Reads prompts, several in a pass."""
        if not prompts:
            return
        offset = len(self.head_ids)
        self.shared.make_room(len(self.nodes), max(len(prompt.ids) for prompt in prompts))
        pieces: list[list[_Prompt]] = [[]]
        for prompt in prompts:
            if pieces[-1] and sum(len(p.ids) for p in pieces[-1]) + len(prompt.ids) > PROMPT_TOKENS:
                pieces.append([])
            pieces[-1].append(prompt)
        for piece in pieces:
            ids: list[int] = []
            positions: list[int] = []
            segments = []
            for prompt in piece:
                segments.append(Segment(prompt.node, len(ids), len(ids) + len(prompt.ids)))
                ids += prompt.ids
                positions += range(offset, offset + len(prompt.ids))
            current = PromptPass(self.shared, segments, self.head if offset else None, offset)
            logits, routing = self._forward(current, ids, positions, [s.end - 1 for s in segments])
            for prompt, segment, last in zip(piece, segments, logits, strict=True):
                prompt.logits = last
                if routing is not None:
                    prompt.routing = routing[:, segment.first : segment.end].clone()

    def _step(self) -> None:
        """Reads the last token of every row, and draws the next one."""
        n = len(self.rows)
        if not self.prefixes:
            self.prefixes = self._shared_prefixes()
        longest = self._longest(self.rows)
        # A row that has ended reads its last token again and again until someone looks: nothing of it changes.
        at = self.count[:n] - 1
        self.own.make_room(self.slots, min(max(longest, FIRST_ROOM), self.most))
        levels = [self.head, self.shared] if self.head_ids else [self.shared]
        current = TokenPass(self.own, levels, DecodeLayout(at, longest - 1, self.prefixes))
        ids = self.tokens[:n].gather(1, at[:, None]).squeeze(1)
        logits = forward(self.model, current, ids, self.start[:n] + at)
        self._keep_routing(self._recorded(), at, longest)
        self._draw(slice(0, n), logits)
        self.steps += 1

    def _longest(self, rows: Iterable[_Row]) -> int:
        """The most tokens that a response has; more where it has ended and no one has looked yet."""
        return min(self.steps - min(row.since for row in rows) + 1, self.most)

    def _shared_prefixes(self) -> list[SharedPrefix]:
        """What the rows in flight read of the head and of their prompts."""
        n, head = len(self.rows), len(self.head_ids)
        prompts = [row.prompt for row in self.rows]
        own = SharedPrefix.of([p.node for p in prompts], [len(p.ids) for p in prompts], self.device)
        return [SharedPrefix.of([0] * n, [head] * n, self.device), own] if head else [own]

    def _draw(self, here: slice, logits: Tensor) -> None:
        """Chooses the next token of the rows `here` from logits (rows, V)."""
        count, done = self.count[here], self.done[here]
        at = count.unsqueeze(1)
        uniform = self.uniform[here].gather(1, at).squeeze(1)
        chosen, logp, kept = choose_tokens(
            logits, uniform, self.params.temperature, self.params.top_p, self.params.top_k
        )
        if self.record_kept and kept is not None:
            self.unseen_sets.append((here.start, kept & ~done.unsqueeze(1)))
        self.tokens[here].scatter_(1, at, chosen.unsqueeze(1))
        self.logp[here].scatter_(1, at, logp.unsqueeze(1))
        count += ~done
        done |= torch.isin(chosen, self.stops) | (count >= self.limit[here])

    def _keep_routing(self, routing: Tensor | None, at: Tensor, longest: int) -> None:
        """Keeps the experts (layers, rows, K) of the tokens `at` of the rows in flight."""
        if routing is None:
            return
        layers, n, top_k = routing.shape
        held = 0 if self.routing is None else self.routing.shape[1]
        if held < longest:
            grown = routing.new_zeros((self.slots, max(longest, 2 * held), layers, top_k))
            if self.routing is not None:
                grown[:, :held] = self.routing
            self.routing = grown
        assert self.routing is not None
        self.routing[torch.arange(n, device=self.device), at] = routing.transpose(0, 1)

    def _see_sets(self) -> None:
        """Hands what the last draws were from to their rows."""
        for first, kept in self.unseen_sets:
            tokens, sizes = kept.nonzero()[:, 1].int().cpu(), kept.sum(dim=1).tolist()
            rows = self.rows[first : first + len(kept)]
            for row, one, size in zip(rows, tokens.split(sizes), sizes, strict=True):
                if size:
                    row.kept.append(one[: size % kept.shape[1]])  # the whole vocabulary is no set
        self.unseen_sets = []

    def _leave(self) -> None:
        """Takes the responses that have ended out of the batch, and puts the last ones into their places."""
        self._see_sets()
        n = len(self.rows)
        ended = self.done[:n].nonzero().squeeze(1)
        leaving = ended.tolist()
        if not leaving:
            return
        tokens, logp = self.tokens[ended].tolist(), self.logp[ended].tolist()
        counts = self.count[ended].tolist()
        routing = None if self.routing is None else self.routing[ended].cpu()
        for i, slot in enumerate(leaving):
            row, count = self.rows[slot], counts[i]
            ids = tuple(tokens[i][:count])
            self.outputs[row.request] = Output(
                ids,
                tuple(logp[i][:count]),
                ids[-1] in self.params.stop_ids,
                self.version,
                self._routing_of(row, None if routing is None else routing[i, : count - 1]),
                Kept.of_sets(row.kept) if row.kept else None,
            )
            row.prompt.rows -= 1
        stay = n - len(leaving)
        targets = [slot for slot in leaving if slot < stay]
        gone = set(leaving)
        sources = [slot for slot in range(stay, n) if slot not in gone]
        if sources:
            for held in (self.tokens, self.logp, self.uniform, self.count, self.limit, self.done, self.start):
                held[targets] = held[sources]
            self.own.move(sources, targets, self._longest(self.rows[slot] for slot in sources))
            if self.routing is not None:
                self.routing[targets] = self.routing[sources]
            for source, target in zip(sources, targets, strict=True):
                self.rows[target] = self.rows[source]
        del self.rows[stay:]
        self._drop_nodes()
        self.prefixes = []

    def _routing_of(self, row: _Row, response: Tensor | None) -> Tensor | None:
        """(layers, tokens, K) of head, prompt and `response` (tokens, layers, K)."""
        if self.record is None:
            return None
        assert row.prompt.routing is not None
        parts = [self.head_routing, row.prompt.routing]
        if response is not None:
            parts.append(response.transpose(0, 1))
        return torch.cat([part.cpu() for part in parts if part is not None], dim=1)

    def _drop_nodes(self) -> None:
        """Gives back the nodes of prompts that no row reads and no request waits for."""
        for node in reversed(range(len(self.nodes))):
            if self.nodes[node].rows or self.nodes[node].waiting:
                continue
            last = self.nodes.pop()
            if last.node != node:
                self.shared.move([last.node], [node], len(last.ids))
                self.nodes[node], last.node = last, node


def _common_head(prompts: Sequence[tuple[int, ...]]) -> int:
    """How many tokens all prompts begin with, each keeping one of its own; 0 where it is not worth a pass of its own."""
    distinct = sorted(set(prompts))
    if len(distinct) < 2:
        return 0
    # of sorted texts, the first and the last differ earliest
    head = min(common_length(distinct[0], distinct[-1]), min(map(len, distinct)) - 1)
    return head if head >= SHORTEST_HEAD else 0
