"""The log-probs of TRL's GRPOTrainer with each prompt computed once for its completions.

B rows of prompt and completion, in any order: equal prompts are found wherever they stand. T completion tokens at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from trl.trainer.grpo_trainer import GRPOTrainer

from ..moe import load_balancing_loss
from .patching import check_reads, check_signature
from .prefix_tree import PrefixTree, prefix_tree
from .transformers_logprobs import unwrapped
from .transformers_prefix import logprobs_and_outputs, shared_prefix_states

METHOD = "_get_per_token_logps_and_entropies"
_PARAMETERS = ("self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy",
               "compute_aux_loss", "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask",
               "spatial_shapes", "num_tiles", "image_sizes", "token_type_ids", "mm_token_type_ids",
               "image_position_ids")  # fmt: skip
_READS = {"self.accelerator"}


def check_trainer() -> None:
    """Check that the installed ``GRPOTrainer`` takes its log-probs as ``logps_and_entropies`` does.

    Raises:
        ValueError: it is patched already. RuntimeError: it has other parameters, or depends on what is not known here.
    """
    method = getattr(GRPOTrainer, METHOD)
    check_signature(f"trl.GRPOTrainer.{METHOD}", method, _PARAMETERS)
    check_reads(f"trl.GRPOTrainer.{METHOD}", method, _READS)


def logps_and_entropies(
    self: Any,
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    logits_to_keep: int,
    batch_size: int | None = None,
    compute_entropy: bool = False,
    compute_aux_loss: bool = False,
    **images: Any,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """In place of ``GRPOTrainer._get_per_token_logps_and_entropies``: the same log-probs, entropies, (B, T), and auxiliary loss.

    A chunk of ``batch_size`` rows holds those whose prompts are equal or begin alike, so that the auxiliary loss, a mean over
    chunks, is that of other chunks than TRL's. TRL asks for it without chunks.

    Raises:
        ValueError: images or another input beside the tokens, padding that does not stand in front of the prompts and behind
            the completions, a model that cannot share prefixes.
    """
    given = [name for name, value in images.items() if value is not None]
    if given:
        raise ValueError(
            f"{given[0]}: expected None with shared prefixes, which know tokens alone, got a value"
        )
    prompts, completions = _rows(input_ids, attention_mask, logits_to_keep)
    order = sorted(range(len(prompts)), key=lambda row: (prompts[row], completions[row]))
    inputs = {"output_router_logits": True} if compute_aux_loss else {}
    logps, entropies, aux_losses = [], [], []
    for start in range(0, len(order), batch_size or len(order)):
        rows = order[start : start + (batch_size or len(order))]
        tree = prefix_tree([prompts[row] for row in rows], [completions[row] for row in rows])
        with self.accelerator.autocast():
            results, outputs = logprobs_and_outputs(model, tree, self.temperature, compute_entropy, **inputs)
        logp, entropy = results if isinstance(results, tuple) else (results, None)
        logps.append(F.pad(logp, (0, logits_to_keep - logp.shape[1])))
        if entropy is not None:
            entropies.append(F.pad(entropy, (0, logits_to_keep - entropy.shape[1])))
        if compute_aux_loss:
            aux_losses.append(_aux_loss(model, tree, outputs.router_logits))
    places = torch.tensor(order, device=input_ids.device).argsort()
    return (
        torch.cat(logps)[places],
        torch.cat(entropies)[places] if entropies else None,
        torch.stack(aux_losses).mean() if aux_losses else None,
    )


def _aux_loss(model: Any, tree: PrefixTree, router_logits: Sequence[Tensor]) -> Tensor:
    """transformers' load-balancing loss of all layers together, with every token as often as rows have it."""
    counts = tree.multiplicity.to(router_logits[0].device).repeat(len(router_logits))
    top_k = unwrapped(model).config.get_text_config().num_experts_per_tok
    return load_balancing_loss(torch.cat([each.flatten(0, -2) for each in router_logits]), top_k, counts)


def states(model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int) -> Tensor:
    """The states (B, T, H) that predict the completion tokens, 0 at padding."""
    tree = prefix_tree(*_rows(input_ids, attention_mask, logits_to_keep))
    found = shared_prefix_states(model, tree)
    real = attention_mask[:, -logits_to_keep:].bool().unsqueeze(2)
    return found.new_zeros(*real.shape[:2], found.shape[1]).masked_scatter(real, found)


def _rows(
    input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int
) -> tuple[list[list[int]], list[list[int]]]:
    """The token ids of prompts and completions, without their padding."""
    length = input_ids.shape[1] - logits_to_keep
    steps = (attention_mask != 0).int().diff(dim=1)
    # 1 begins and 0 ends in a prompt and a completion, and nowhere else
    if bool((steps[:, : length - 1] < 0).any()) or bool((steps[:, length - 1 :] > 0).any()):
        raise ValueError(
            "attention_mask: expected padding in front of the prompts and behind the completions, got some in between"
        )
    kept = [
        [token for token, real in zip(ids, mask, strict=True) if real]
        for ids, mask in zip(input_ids.tolist(), attention_mask.tolist(), strict=True)
    ]
    prompts = (attention_mask[:, :length] != 0).sum(dim=1).tolist()
    return (
        [ids[:count] for ids, count in zip(kept, prompts, strict=True)],
        [ids[count:] for ids, count in zip(kept, prompts, strict=True)],
    )
