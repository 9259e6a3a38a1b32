"""Every op that is measured: its inputs, its exact results, its implementations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from . import divergence, grpo, kept, logprob, lora, moe, products, topk
from .cases import Case
from .numerics import Exact
from .peers import Inputs, Ours, Peer


def _as_they_are(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return found


@dataclass(frozen=True)
class Op:
    """comparable: brings the results of an implementation into the form of the exact ones."""

    ours: Ours
    inputs: Callable[[Case, torch.device], Inputs]
    exact: Callable[[Case, Inputs], dict[str, Exact]]
    peers: tuple[Peer, ...]
    comparable: Callable[[dict[str, Tensor]], dict[str, Tensor]] = _as_they_are

    def peers_on(self, device: str, compiles: bool = True, ours: bool = False) -> tuple[Peer, ...]:
        """The implementations, and on a GPU each backend of ours by name too; or only those that need no compilation, or are
        ours."""
        every = (*self.peers, *self.ours.forced(device))
        return tuple(
            peer for peer in every if (compiles or not peer.compiles) and (peer.kind == "ours" or not ours)
        )


OPS: Mapping[str, Op] = {
    "token_logprobs": Op(logprob.OURS_TOKEN, logprob.token_inputs, logprob.token_exact, logprob.TOKEN),
    "linear_logprobs": Op(logprob.OURS_LINEAR, logprob.linear_inputs, logprob.linear_exact, logprob.LINEAR),
    "topk_divergence": Op(topk.OURS_LOGITS, topk.inputs, topk.exact, topk.LOGITS),
    "linear_topk_divergence": Op(topk.OURS_LINEAR, topk.inputs, topk.exact, topk.LINEAR),
    "kept_logprobs": Op(kept.OURS_KEPT, kept.inputs, kept.exact, kept.KEPT),
    "grouped_logprobs": Op(
        logprob.OURS_GROUPED, logprob.grouped_inputs, logprob.grouped_exact, logprob.GROUPED
    ),
    "linear_grouped_logprobs": Op(
        logprob.OURS_LINEAR_GROUPED,
        logprob.linear_grouped_inputs,
        logprob.linear_grouped_exact,
        logprob.LINEAR_GROUPED,
    ),
    "linear_divergence": Op(
        divergence.OURS_DIVERGENCE, divergence.inputs, divergence.exact, divergence.DIVERGENCE
    ),
    "grpo_loss": Op(grpo.OURS_LOSS, grpo.loss_inputs, grpo.loss_exact, grpo.LOSS),
    "linear_grpo_loss": Op(grpo.OURS_LINEAR, grpo.linear_inputs, grpo.linear_exact, grpo.LINEAR),
    "moe_experts": Op(moe.OURS_EXPERTS, moe.expert_inputs, moe.expert_exact, moe.EXPERTS),
    "lora_experts": Op(lora.OURS_LORA, lora.inputs, lora.exact, lora.LORA),
    "route": Op(moe.OURS_ROUTE, moe.route_inputs, moe.route_exact, moe.ROUTE, moe.dense_weights),
    "grouped_gemm": Op(products.OURS_GEMM, products.gemm_inputs, products.gemm_exact, products.GEMM),
    "router_logits": Op(products.OURS_GATE, products.gate_inputs, products.gate_exact, products.GATE),
}
