"""The log-probs of the sampler against the trainer's: a gap that the arithmetic of an engine does not explain stops the run.

Both score the same tokens with the same weights, the experts that were recorded and the sets that were kept. What is left is
rounding: of float32 in the process, of another program's kernels in a server. A model that is undecided between two tokens, for its
attention or its router tips over there, makes a hundred times more of it than elsewhere: the limits leave room for that.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from r1kernels.integrations import transformers as integration
from r1kernels.logprob.linear_reference import head_logits
from training.engines import EngineError
from training.engines.choice import truncated
from training.loops.batch import collate, routed, states
from training.loops.off_policy import of_sampler, sampler_gap
from training.loops.sample import Completion
from training.model import has_experts
from training.parallel.shard import forward
from training.recipe import Grpo, Recipe

if TYPE_CHECKING:
    from training.loops.passes import Passes

# Largest sampler_gap_max of a step by engine and number format, where the recipe sets none; in the process a pretrained model, which
# is deeper, gets DEEPER times as much.
LIMITS = {
    ("transformers", "float32"): 1e-3,
    ("transformers", "bfloat16"): 1.0,
    ("vllm", "float32"): 1e-2,
    ("vllm", "bfloat16"): 5.0,
}
DEEPER = 5


def limit(recipe: Recipe, device: str) -> float:
    """The largest gap that a step goes on with: rollout.max_gap, or that of the engine and the number format of now.

    device: the type of the policy's.
    """
    rollout = recipe.rollout
    if rollout.max_gap:
        return rollout.max_gap
    rounded = torch.is_autocast_enabled(device) or (rollout.engine == "vllm" and rollout.dtype == "bfloat16")
    found = LIMITS[rollout.engine, "bfloat16" if rounded else "float32"]
    deep = rollout.engine == "transformers" and recipe.model.pretrained
    return DEEPER * found if deep else found


def checked(passes: Passes, logp: Mapping[int, Tensor]) -> dict[str, float]:
    """The metrics of `sampler_gap` over some completions, before the first update.

    logp: the trainer's log-probs of their tokens, by the number of the completion.

    Raises:
        EngineError: the largest gap is above passes.max_gap; one line names the token, and the router or the kept set that
            differs.
    """
    rows = list(logp)
    completions = [passes.completions[i] for i in rows]
    own = [logp[i] for i in rows]
    metrics = sampler_gap(completions, own)
    if metrics.get("sampler_gap_max", 0.0) > passes.max_gap:
        gap = (torch.cat(own) - of_sampler(completions, own)).abs()
        place = int(gap.nan_to_num(0.0, posinf=torch.inf).argmax())
        which = next(i for i, end in enumerate(accumulate(map(len, own))) if place < end)
        place -= sum(map(len, own[:which]))
        completion, values = completions[which], own[which]
        raise EngineError(
            f"the sampler gave token {place} of sample {completion.sample_id} of problem {completion.problem.id} the log-prob "
            f"{completion.logp[place]:.6g}, and the trainer gives it {float(values[place]):.6g}; rollout.max_gap lets them differ by "
            f"{passes.max_gap:g}: {_reason(passes, completion, place)}"
        )
    return metrics


@torch.no_grad()
def _reason(passes: Passes, completion: Completion, place: int) -> str:
    """What differs between the sampler and the trainer at a token."""
    policy, config = passes.policy, passes.config
    batch = collate([completion], passes.pad, policy.device, config.replay)

    def score() -> Tensor:
        hidden = states(policy, batch)[place : place + 1]
        return head_logits(hidden, integration.output_head(policy))[0]

    with routed(policy, batch) as replay:
        logits = forward(policy, score)
    if completion.kept is None and (config.top_p < 1 or config.top_k > 0):
        return "which tokens top_p and top_k left was not told, and the trainer scores it among all"
    if completion.kept is not None:
        found = _of_set(completion, place, logits, config, passes.max_gap)
        if found:
            return found
    if replay is not None:
        for name, share in zip(integration.router_names(policy), replay.agreements, strict=True):
            if share < 1:
                return (
                    f"the router of {name} chooses other experts than were recorded for {1 - share:.0%} of the tokens of this "
                    "response"
                )
    elif has_experts(policy):
        return "the experts that the sampler chose were not replayed, and a router of the trainer may choose others"
    return "no router and no kept set differs, so the sampler has other weights, attention or numbers than the trainer"


def _of_set(completion: Completion, place: int, logits: Tensor, config: Grpo, limit: float) -> str:
    """What is wrong with the kept set of a token, of logits (V,); "" where nothing is."""
    assert completion.kept is not None
    kept, token = completion.kept.of(place), completion.token_ids[place]
    if len(kept) and token not in kept.tolist():
        return f"its kept set of {len(kept)} tokens does not hold it"
    scaled = logits.double() / config.temperature
    left = truncated((scaled - scaled.amax()).exp().unsqueeze(0), config.top_p, config.top_k)[0] > 0
    own = scaled[token] - scaled[left].logsumexp(0)
    if abs(float(own) - completion.logp[place]) > limit:
        return ""
    return (
        f"its kept set of {len(kept)} tokens is not the one that it was drawn from; of the trainer's own logits top_p and "
        f"top_k leave {int(left.sum())}"
    )
