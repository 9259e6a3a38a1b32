"""Sampling with transformers' own attention and cache, for models whose attention cannot be asked for (training.engines.cache).

Only prompts of one length share a batch, so that nothing is padded; responses are keyed as everywhere.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from transformers import DynamicCache, PreTrainedModel

from training.engines import Output, Request, SamplingParams
from training.engines.choice import choose_tokens, uniforms


def draw(
    model: PreTrainedModel, requests: Sequence[Request], params: SamplingParams, version: int
) -> list[Output]:
    """One output a request, in order, without routing; call it without gradients and in eval mode."""
    alike: dict[int, list[int]] = defaultdict(list)
    for i, request in enumerate(requests):
        alike[len(request.prompt_ids)].append(i)
    found: dict[int, Output] = {}
    for group in alike.values():
        for first in range(0, len(group), params.batch_size):
            chosen = group[first : first + params.batch_size]
            drawn = _draw_batch(model, [requests[i] for i in chosen], params, version)
            found.update(zip(chosen, drawn, strict=True))
    return [found[i] for i in range(len(requests))]


def _draw_batch(
    model: PreTrainedModel, requests: Sequence[Request], params: SamplingParams, version: int
) -> list[Output]:
    most = max(request.max_new_tokens for request in requests)
    uniform = uniforms([request.key for request in requests], most).to(model.device)
    tokens: list[list[int]] = [[] for _ in requests]
    logps: list[list[float]] = [[] for _ in requests]
    rows = list(range(len(requests)))  # those whose responses are still growing
    cache = DynamicCache(config=model.config)
    ids = torch.tensor([request.prompt_ids for request in requests], device=model.device)
    while True:
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1]
        step = len(tokens[rows[0]])
        chosen, logp = choose_tokens(
            logits, uniform[rows, step], params.temperature, params.top_p, params.top_k
        )
        for row, token, value in zip(rows, chosen.tolist(), logp.tolist(), strict=True):
            tokens[row].append(token)
            logps[row].append(value)
        going = [
            i
            for i, row in enumerate(rows)
            if tokens[row][-1] not in params.stop_ids and step + 1 < requests[row].max_new_tokens
        ]
        if not going:
            break
        if len(going) < len(rows):
            cache.batch_select_indices(torch.tensor(going, device=model.device))
        rows = [rows[i] for i in going]
        ids = chosen[going].unsqueeze(1)
    return [
        Output(tuple(ids), tuple(logp), ids[-1] in params.stop_ids, version)
        for ids, logp in zip(tokens, logps, strict=True)
    ]
