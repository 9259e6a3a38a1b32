"""GRPOTrainer under truncated sampling: its log-probs are those among the tokens that its own generation drew from.

B rows, T completion tokens at most. TRL samples by top_p, top_k, min_p and temperature and scores the whole vocabulary, so that
its ratios against a sampler are off by the mass that was kept (trl#6789).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from trl.trainer.grpo_trainer import GRPOTrainer

from ..logprob import linear_logprobs
from .patching import check_signature
from .transformers_kept import record_kept
from .transformers_logprobs import IGNORED, output_head
from .trl_prefix import METHOD as LOGPROBS
from .trl_prefix import check_trainer as check_logprobs

KEY = (
    "kept_sets"  # in the inputs of the loss: a list of B, (ids, sizes of the sets of its tokens) of each row
)
_OWN = {
    name: getattr(GRPOTrainer, name) for name in ("_generate_single_turn", "_generate_and_score_completions")
}
_PARAMETERS = {
    "_generate_single_turn": ("self", "prompt_ids", "images", "multimodal_fields", "num_generations", "has_tool_images"),
    "_generate_and_score_completions": ("self", "inputs"),
}  # fmt: skip

Rows = list[tuple[Tensor, Tensor]]


def check_trainer() -> None:
    """Check that the installed ``GRPOTrainer`` generates and takes its log-probs as the methods of this file do.

    Raises:
        ValueError: it is patched already. RuntimeError: it has other parameters, or depends on what is not known here.
    """
    check_logprobs()
    for name, parameters in _PARAMETERS.items():
        check_signature(f"trl.GRPOTrainer.{name}", getattr(GRPOTrainer, name), parameters)


def methods(
    compute_loss: Callable[..., Tensor], states_of: Callable[..., Tensor]
) -> list[tuple[type, str, Callable[..., Any]]]:
    """What ``patch(kept=True)`` replaces: the loss is ``compute_loss``, and ``states_of`` gives the states before the head."""

    def loss(self: Any, model: Any, inputs: dict[str, Any]) -> Tensor:
        self._r1kernels_kept = inputs.get(KEY)
        return compute_loss(self, model, inputs)

    def logps_and_entropies(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _logps_and_entropies(states_of, self, *args, **kwargs)

    return [
        (GRPOTrainer, "_generate_single_turn", generate_single_turn),
        (GRPOTrainer, "_generate_and_score_completions", generate_and_score_completions),
        (GRPOTrainer, LOGPROBS, logps_and_entropies),
        (GRPOTrainer, "_compute_loss", loss),
    ]


def generate_single_turn(self: Any, *args: Any, **kwargs: Any) -> Any:
    """In place of ``GRPOTrainer._generate_single_turn``: the same completions, and what they were drawn from.

    Raises:
        ValueError: a generation whose sets are not known, by vLLM or continuous batching, or completions with tools.
    """
    for name in ("use_vllm", "use_transformers_continuous_batching", "tools"):
        if getattr(self, name):
            raise ValueError(
                f"{name}: expected none with kept sets, which transformers' generate tells, got it"
            )
    with record_kept(self.accelerator.unwrap_model(self.model_wrapped)) as record:
        completions, logprobs = _OWN["_generate_single_turn"](self, *args, **kwargs)
    lengths = torch.tensor([len(ids) for ids in completions])
    ids, offsets = record.sets(torch.arange(int(lengths.max())) < lengths[:, None])
    sizes = offsets.diff().view(len(completions), -1)
    parts = ids.split(sizes.sum(dim=1).tolist())
    self._r1kernels_kept = list(zip(parts, sizes, strict=True))
    return completions, logprobs


def generate_and_score_completions(self: Any, inputs: Any) -> dict[str, Any]:
    """In place of ``GRPOTrainer._generate_and_score_completions``: its inputs of the loss, and the sets of every row."""
    self._r1kernels_kept = None
    found: dict[str, Any] = _OWN["_generate_and_score_completions"](self, inputs)
    if self._r1kernels_kept is None:
        raise ValueError(
            "rollout_func: expected none with kept sets, which transformers' generate tells, got one"
        )
    return {**found, KEY: self._r1kernels_kept}


def _logps_and_entropies(
    states_of: Callable[..., Tensor],
    self: Any,
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    logits_to_keep: int,
    batch_size: int | None = None,
    compute_entropy: bool = False,
    compute_aux_loss: bool = False,
    **images: Any,
) -> tuple[Tensor, Tensor | None, None]:
    """In place of ``GRPOTrainer._get_per_token_logps_and_entropies``: log-probs and entropies (B, T) among the kept sets."""
    given = [name for name, value in images.items() if value is not None]
    if given or compute_aux_loss:
        name = given[0] if given else "compute_aux_loss"
        raise ValueError(f"{name}: expected none with kept sets, got it")
    logps, entropies = [], []
    for start in range(0, len(input_ids), batch_size or len(input_ids)):
        rows = slice(start, start + (batch_size or len(input_ids)))
        ids, mask = input_ids[rows], attention_mask[rows]
        targets = ids[:, -logits_to_keep:].masked_fill(mask[:, -logits_to_keep:] == 0, IGNORED)
        with self.accelerator.autocast():
            results = linear_logprobs(
                states_of(model, ids, mask, logits_to_keep),
                targets=targets,
                temperature=self.temperature,
                return_entropy=compute_entropy,
                kept=joined(self._r1kernels_kept[rows], logits_to_keep),
                **output_head(model)._asdict(),
            )
        logps.append(results[0] if compute_entropy else results)
        entropies += [results[1]] if compute_entropy else []
    return torch.cat(logps), torch.cat(entropies) if entropies else None, None


def joined(rows: Sequence[tuple[Tensor, Tensor]] | None, tokens: int) -> tuple[Tensor, Tensor] | None:
    """``kept`` of the ops for completions (B, T) of ``tokens`` each, of which a row may have fewer sets."""
    if rows is None:
        return None
    sizes = rows[0][1].new_zeros(len(rows), tokens)
    for row, (_, own) in zip(sizes, rows, strict=True):
        row[: own.shape[0]] = own[:tokens]
    ids = torch.cat([ids for ids, _ in rows])
    return ids, torch.cat((sizes.new_zeros(1), sizes.flatten().cumsum(0)))
