"""Sampling with a model's own attention and cache, where its attention cannot be asked for (training.engines.cache).

Only prompts of one length share a batch, so that nothing is padded; responses are keyed as everywhere.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from training.engines import Kept, Output, Request, SamplingParams
from training.engines.choice import choose_tokens, uniforms


def draw(
    model: PreTrainedModel, requests: Sequence[Request], params: SamplingParams, version: int
) -> list[Output]:
    """One output per request, in order, without routing; call it without gradients and in eval mode."""
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
    sets: list[list[torch.Tensor]] = [[] for _ in requests]
    record = params.record_kept and params.truncated
    # rows whose responses have not ended; the others are read on and left alone
    growing = set(range(len(requests)))
    text = read = torch.tensor([request.prompt_ids for request in requests], device=model.device)
    kept: dict[str, Any] = {}
    for step in range(most):
        outputs = model(input_ids=read, use_cache=True, **kept)
        chosen, logp, left = choose_tokens(
            outputs.logits[:, -1], uniform[:, step], params.temperature, params.top_p, params.top_k
        )
        for row, (token, value) in enumerate(zip(chosen.tolist(), logp.tolist(), strict=True)):
            if row not in growing:
                continue
            tokens[row].append(token)
            logps[row].append(value)
            if record and left is not None:
                one = left[row].nonzero().squeeze(1).int().cpu()
                sets[row].append(one[: len(one) % left.shape[1]])  # the whole vocabulary is no set
            if token in params.stop_ids or step + 1 == requests[row].max_new_tokens:
                growing.remove(row)
        if not growing:
            break
        text = torch.cat((text, chosen.unsqueeze(1)), dim=1)
        cache = getattr(outputs, "past_key_values", None)
        kept = {} if cache is None else {"past_key_values": cache}
        # a model that keeps nothing reads the whole text again
        read = text if cache is None else text[:, -1:]
    return [
        Output(
            tuple(ids),
            tuple(logp),
            ids[-1] in params.stop_ids,
            version,
            kept=Kept.of_sets(one) if one else None,
        )
        for ids, logp, one in zip(tokens, logps, sets, strict=True)
    ]
