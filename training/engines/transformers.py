"""The engine in the process: the policy itself draws, through transformers' model.

Every response has one key; its n-th token is chosen by the n-th number of a counter-based generator of that key, as the
token at which the cumulated probability passes that number. So nothing has to be saved for a resume, and any number of
machines draw the same responses.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from r1kernels.integrations import transformers as integration
from training.encoder import Encoder
from training.engines import Output, Request, SamplingParams
from training.model import is_patched


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
        """One output a request, in order."""
        was_training = self.model.training
        self.model.eval()
        # Prompts of one length share a batch, so that nothing is padded. Keyed draws make the order irrelevant.
        alike: dict[tuple[int, int], list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            alike[len(request.prompt_ids), request.max_new_tokens].append(i)
        found: dict[int, Output] = {}
        for (_, most), group in alike.items():
            for first in range(0, len(group), params.batch_size):
                chosen = group[first : first + params.batch_size]
                keys = [requests[i].key for i in chosen]
                choose = _Choice(uniforms(keys, most), params.temperature, params.top_p)
                drawn = _generate(
                    self.model,
                    [list(requests[i].prompt_ids) for i in chosen],
                    choose,
                    params.stop_ids,
                    params.record_routing,
                )
                for i, (token_ids, logp, routing) in zip(chosen, drawn, strict=True):
                    finished = token_ids[-1] in params.stop_ids
                    found[i] = Output(tuple(token_ids), tuple(logp), finished, self.version, routing)
        self.model.train(was_training)
        return [found[i] for i in range(len(requests))]


def uniforms(keys: Sequence[int], count: int) -> Tensor:
    """(len(keys), count) float64 in [0, 1): number n of a key is SplitMix64's output at counter key + n * golden ratio."""
    with np.errstate(over="ignore"):
        counter = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = np.array(keys, dtype=np.uint64)[:, None] + counter
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return torch.from_numpy((z >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def choose_tokens(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """The token of each row at which the cumulated probability passes `uniform`, and its log-prob.

    logits (B, V); uniform (B,) float64 in [0, 1). With top_p < 1 only the most probable tokens whose probabilities sum
    to at least top_p stay. temperature 0: the most probable token (the lowest index among equals), log-prob 0.
    """
    if temperature == 0:
        chosen = logits.argmax(dim=-1)
        return chosen, torch.zeros(chosen.shape, dtype=torch.float64, device=logits.device)
    probs = torch.softmax(logits.double() / temperature, dim=-1)
    if top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered
        probs = torch.zeros_like(probs).scatter(
            -1, order, ordered.masked_fill((before >= top_p) & (before > 0), 0.0)
        )
    cumulated = probs.cumsum(dim=-1)
    # Scaled by the total, which is 1 but for rounding, so that a token of probability 0 is never chosen.
    passed = cumulated > (uniform.to(probs.device) * cumulated[:, -1]).unsqueeze(-1)
    chosen = passed.int().argmax(dim=-1)
    return chosen, (probs.gather(-1, chosen.unsqueeze(-1)).squeeze(-1) / cumulated[:, -1]).log()


@dataclass(frozen=True)
class _Choice:
    """How the tokens of a batch are chosen: uniform (rows, max_new_tokens), temperature and top_p."""

    uniform: Tensor
    temperature: float
    top_p: float

    def __call__(self, logits: Tensor, rows: Tensor, step: int) -> tuple[Tensor, Tensor]:
        return choose_tokens(logits, self.uniform[rows.cpu(), step], self.temperature, self.top_p)


def _generate(
    model: PreTrainedModel,
    prompts: list[list[int]],
    choose: _Choice,
    stop_ids: tuple[int, ...],
    record_routing: bool,
) -> list[tuple[list[int], list[float], Tensor | None]]:
    """Token ids (the one that ends it included), their log-probs and routing of a response to every prompt; all have the same length.

    Equal prompts are read once, and a response that has ended leaves the batch.
    """
    distinct = list({tuple(prompt): None for prompt in prompts})
    position = {prompt: i for i, prompt in enumerate(distinct)}
    source = torch.tensor([position[tuple(prompt)] for prompt in prompts], device=model.device)
    rows = torch.arange(len(prompts), device=model.device)  # the prompts whose responses are still growing
    ids = torch.tensor(distinct, device=model.device)
    cache = DynamicCache(config=model.config)
    tokens: list[list[int]] = [[] for _ in prompts]
    logps: list[list[float]] = [[] for _ in prompts]
    growing = [rows]
    stops = torch.tensor(stop_ids, dtype=torch.int64, device=model.device)
    recording = integration.record_routing(model) if record_routing and is_patched(model) else nullcontext()
    with recording as record:
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[
            source, -1
        ]
        cache.batch_select_indices(source)
        for step in range(choose.uniform.shape[1]):
            chosen, logp = choose(logits, rows, step)
            for row, token, value in zip(rows.tolist(), chosen.tolist(), logp.tolist(), strict=True):
                tokens[row].append(token)
                logps[row].append(value)
            going = (~torch.isin(chosen, stops)).nonzero().squeeze(1)
            if len(going) == 0 or step + 1 == choose.uniform.shape[1]:
                break
            if len(going) < len(rows):
                cache.batch_select_indices(going)
                rows, chosen = rows[going], chosen[going]
            growing.append(rows)
            logits = model(input_ids=chosen.unsqueeze(1), past_key_values=cache, use_cache=True).logits[:, -1]
    if record is None:
        return [(*row, None) for row in zip(tokens, logps, strict=True)]
    routing = _by_row(record.calls, source.cpu(), growing, tokens)
    return list(zip(tokens, logps, routing, strict=True))


def _by_row(
    calls: list[list[Tensor]], source: Tensor, growing: list[Tensor], tokens: list[list[int]]
) -> list[Tensor]:
    """The recorded experts of every response, (layers, tokens of prompt and response but the last, experts per token).

    calls[layer]: the prompts' (distinct prompts * length, K), then one (rows still growing, K) for every further token.
    """
    prompts = torch.stack([layer[0] for layer in calls]).cpu().unflatten(1, (int(source.max()) + 1, -1))
    layers, _, length, top_k = prompts.shape
    routing = prompts.new_zeros((layers, len(tokens), length + len(growing) - 1, top_k))
    routing[:, :, :length] = prompts[:, source]
    for step, rows in enumerate(growing[1:]):
        routing[:, rows.cpu(), length + step] = torch.stack([layer[step + 1] for layer in calls]).cpu()
    return [routing[:, row, : length + len(ids) - 1].clone() for row, ids in enumerate(tokens)]
