"""The mixture-of-experts ops in plain PyTorch: the oracle, differentiable by autograd.

T tokens, H hidden size, I intermediate size, E experts, K experts per token, S = T * K routed rows, R rank of a low-rank
addition, B sequences; N inputs and M outputs of a GEMM. Arguments are those of the public functions, checked.

Where values are visible (eager on the CPU), rows are split by expert and each expert is one GEMM. Where they are not
(torch.compile, fake tensors, CUDA without a host sync), rows are spread over tiles, each with one expert, whose number
and size depend on shapes only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import checks, transforms

if TYPE_CHECKING:
    from .experts import ExpertsCall, GemmCall, Lora
    from .routing import RouteCall
    from .sort import SortCall


SCORES = ("sigmoid", "softmax", "sqrt_softplus")
# a library GEMM of few rows differs in the last bits from a large one; all tiles of this many rows agree
_INVARIANT_ROWS = 64


def route(call: RouteCall) -> tuple[Tensor, Tensor, Tensor]:
    logits, top_k, score, normalize, eps, scale, choice = call
    by_logits, bias, n_group, topk_group, two_best, indices = choice
    experts = logits.shape[1]
    logits = logits.to(_accumulator(logits)).contiguous()
    softmax = SCORES[score] == "softmax"
    scores = _scores(logits, SCORES[score])
    if indices is None:
        with torch.no_grad():
            selection = logits if by_logits else scores
            selection = selection if bias is None else selection + bias.to(scores.dtype)
            if n_group > 1:
                group_score = _sum_of_two_best if two_best else _best
                dropped = _dropped(selection, n_group, topk_group, group_score)
                indices = _descending(selection.masked_fill(dropped, -torch.inf))
                # the eligible ones first, also where they are at -inf
                indices = indices.gather(1, dropped.gather(1, indices).sort(dim=1, stable=True).indices)
            else:
                indices = _descending(selection)
            indices = indices[:, :top_k].contiguous()
    inside = (indices >= 0) & (indices < experts)
    chosen = indices.clamp(0, experts - 1)
    if softmax and normalize:
        weights = torch.where(inside, logits.gather(1, chosen), -torch.inf).softmax(dim=-1)
        weights = weights + 0.0 * scores[:, :1].detach()  # NaN if the logit of any expert is NaN or +inf
        weights = torch.where(inside, weights, 0.0)
    else:
        weights = torch.where(inside, scores.gather(1, chosen), 0.0)
        if normalize:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + eps)
    if scale != 1.0:
        weights = weights * scale
    return weights, indices, count_experts(indices, experts).to(torch.int32)


def update_router_bias(bias: Tensor, tokens_per_expert: Tensor, rate: float) -> None:
    with torch.no_grad():
        counts = tokens_per_expert.to(torch.int64)
        # mean(count) - count_e has the sign of sum(count) - E count_e, which integers hold exactly
        direction = (counts.sum() - counts.shape[0] * counts).sign().to(bias.dtype)
        step = rate * direction
        bias += step - step.mean()


def sequence_balance_loss(scores: Tensor, indices: Tensor, cu_seqlens: Tensor, alpha: float) -> Tensor:
    (tokens, experts), top_k = scores.shape, indices.shape[1]
    sequences = cu_seqlens.shape[0] - 1
    scores = scores.to(_accumulator(scores))
    position = torch.arange(tokens, device=scores.device)
    # the number of boundaries at or before a token: 0 before the first sequence, B + 1 after the last
    owner = torch.searchsorted(cu_seqlens.to(torch.int64), position, right=True)
    # 0 times NaN is NaN, in the gradient too: what no sequence holds is replaced before it enters
    scores = torch.where(((owner > 0) & (owner <= sequences)).unsqueeze(1), scores, 0.0)

    inside = (indices >= 0) & (indices < experts)
    slot = owner.unsqueeze(1) * experts + indices.clamp(0, experts - 1)
    counts = scores.new_zeros((sequences + 2) * experts)
    counts = counts.scatter_add(0, slot.reshape(-1), inside.reshape(-1).to(counts.dtype))
    counts = counts.view(sequences + 2, experts)[1:-1]

    # a token whose scores are all 0 has no shares, not NaN ones
    total = scores.sum(dim=-1, keepdim=True)
    share = torch.where(total > 0, scores / torch.where(total > 0, total, 1.0), 0.0)
    shares = share.new_zeros(sequences + 2, experts).index_add(0, owner, share)[1:-1]

    length = (cu_seqlens[1:] - cu_seqlens[:-1]).clamp(min=1).to(scores.dtype).unsqueeze(1)
    frequency = experts / (top_k * length) * counts
    return alpha * (frequency * shares / length).sum(dim=-1)


def load_balancing_loss(logits: Tensor, top_k: int, mask: Tensor | None) -> Tensor:
    experts = logits.shape[1]
    logits = logits.to(_accumulator(logits))
    keep = logits.new_ones(logits.shape[0])
    if mask is not None:
        keep = mask.to(logits.dtype)
        # 0 times NaN is NaN, in the gradient too: what is left out is replaced before it enters
        logits = torch.where((mask != 0).unsqueeze(1), logits, 0.0)
    probs = logits.softmax(dim=-1)
    rows = keep.sum().clamp(min=1)
    with torch.no_grad():
        indices = _descending(probs)[:, :top_k]
        counts = count_experts(indices, experts, keep)
    return experts * (counts / rows * ((probs * keep.unsqueeze(1)).sum(dim=0) / rows)).sum()


def router_z_loss(logits: Tensor) -> Tensor:
    return logits.to(_accumulator(logits)).logsumexp(dim=-1).square().sum() / max(logits.shape[0], 1)


def sort_by_expert(call: SortCall) -> tuple[Tensor, Tensor, Tensor]:
    return sorted_rows(*call)


def sorted_rows(expert: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(offsets, permutation, inverse) of rows (S,)."""
    expert = torch.where((expert >= 0) & (expert < num_experts), expert, num_experts)
    ordered, permutation = torch.sort(expert, stable=True)
    boundaries = torch.arange(num_experts + 1, device=expert.device)
    offsets = torch.searchsorted(ordered, boundaries, out_int32=True)
    rows = torch.arange(expert.shape[0], device=expert.device)
    return offsets, permutation, torch.empty_like(permutation).scatter_(0, permutation, rows)


def grouped_gemm(call: GemmCall) -> Tensor:
    weight = call.weight.mT if call.transposed else call.weight
    return _gemm(call.x, weight, call.offsets, call.batch_invariant)


def _gemm(x: Tensor, weight: Tensor, offsets: Tensor, batch_invariant: bool) -> Tensor:
    if checks.values_visible(x, offsets):
        return _gemm_by_expert(x, weight, offsets, batch_invariant)
    return _gemm_by_tile(x, weight, offsets, batch_invariant)


def moe_experts(call: ExpertsCall) -> Tensor:
    arguments = (*call[:-2], call.lora)
    if not call.keep and torch.is_grad_enabled() and not transforms.active():
        return checkpoint(_moe_experts, *arguments, use_reentrant=False, preserve_rng_state=False)
    return _moe_experts(*arguments)


def _moe_experts(
    hidden: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: int,
    alpha: float,
    limit: float,
    shift: float,
    batch_invariant: bool,
    lora: Lora,
) -> Tensor:
    (tokens, size), experts, top_k = hidden.shape, down.shape[0], indices.shape[1]
    offsets, permutation, inverse = sorted_rows(indices.reshape(-1), experts)
    # Expanded before it is permuted: the backward is then one sum over K, with a float32 accumulator, and no
    # addition into rows that several experts share.
    rows = hidden.unsqueeze(1).expand(tokens, top_k, size).reshape(tokens * top_k, size)

    def product(x: Tensor, weight: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
        out = _gemm(x, weight, offsets, batch_invariant)
        if a is None or b is None:
            return out
        # wide, so that the sum of the two products is rounded once
        x, a, b = (one.to(_accumulator(hidden)) for one in (x, a, b))
        low = _gemm(x, a, offsets, batch_invariant) * lora.scale
        return (out + _gemm(low, b, offsets, batch_invariant)).to(out.dtype)

    pre_activation = product(rows.index_select(0, permutation), gate_up, lora.up_a, lora.up_b)
    activated = gated(pre_activation.to(_accumulator(hidden)), activation, alpha, limit, shift)
    out = product(activated.to(hidden.dtype), down, lora.down_a, lora.down_b)
    out = out.index_select(0, inverse).view(tokens, top_k, size).to(_accumulator(hidden))
    inside = (indices >= 0) & (indices < experts)
    scale = torch.where(inside, weights.to(out.dtype), 0.0)
    return (out * scale.unsqueeze(-1)).sum(dim=1).to(hidden.dtype)


def count_experts(indices: Tensor, num_experts: int, keep: Tensor | None = None) -> Tensor:
    """How often each expert occurs in indices (T, K), over the tokens with keep (T,) 1: (E,) in keep's dtype or int64."""
    inside = (indices >= 0) & (indices < num_experts)
    bins = torch.where(inside, indices, num_experts).reshape(-1)
    ones = torch.ones_like(bins) if keep is None else keep.unsqueeze(1).expand(indices.shape).reshape(-1)
    return ones.new_zeros(num_experts + 1).scatter_add_(0, bins, ones)[:num_experts]


def _scores(logits: Tensor, score: str) -> Tensor:
    """Rounded once, from float64: torch's vector and scalar loops differ in the last bit, and would undo ties."""
    wide = logits.to(torch.float64)
    if score == "softmax":
        wide = wide.softmax(dim=-1)
    elif score == "sigmoid":
        wide = wide.sigmoid()
    else:
        wide = _root(torch.logaddexp(wide, wide.new_zeros(())))
    return wide.to(logits.dtype)


def _root(value: Tensor) -> Tensor:
    """sqrt, with the slope 0 at 0: that of sqrt(softplus(l)) goes there as l does to -inf."""
    zero = value == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, value).sqrt())


def _descending(scores: Tensor) -> Tensor:
    """Column indices in descending order of score, the lowest index first among equals (torch.topk leaves that open)."""
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices


def _best(grouped: Tensor) -> Tensor:
    return grouped.amax(dim=-1)


def _sum_of_two_best(grouped: Tensor) -> Tensor:
    return grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(dim=-1)


def _dropped(
    selection: Tensor, n_group: int, topk_group: int, group_score: Callable[[Tensor], Tensor]
) -> Tensor:
    """(T, E) bool: the experts outside the ``topk_group`` best groups of a token."""
    grouped = selection.unflatten(1, (n_group, -1))
    best = _descending(group_score(grouped))[:, :topk_group]
    dropped = torch.ones_like(grouped[:, :, 0], dtype=torch.bool).scatter_(1, best, False)
    return dropped.unsqueeze(-1).expand(grouped.shape).flatten(1)


def gated(
    pre_activation: Tensor,
    activation: int,
    alpha: float = 1.0,
    limit: float = math.inf,
    shift: float = 0.0,
) -> Tensor:
    """act(gate) * (up + shift) of (..., 2 * I), the gate first, both clamped; activation is the place in experts.ACTIVATIONS."""
    gate, up = pre_activation.chunk(2, dim=-1)
    if limit != math.inf:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if activation:
        activated = F.gelu(gate, approximate="tanh")
    else:
        activated = F.silu(gate) if alpha == 1.0 else gate * (alpha * gate).sigmoid()
    return activated * (up + shift if shift else up)


def _product(rows: Tensor, matrix: Tensor, batch_invariant: bool) -> Tensor:
    if not batch_invariant:
        return F.linear(rows, matrix)
    tiles = F.pad(rows, (0, 0, 0, -rows.shape[0] % _INVARIANT_ROWS)).split(_INVARIANT_ROWS)
    return torch.cat([F.linear(tile, matrix) for tile in tiles])[: rows.shape[0]]


def _gemm_by_expert(x: Tensor, weight: Tensor, offsets: Tensor, batch_invariant: bool) -> Tensor:
    bounds = offsets.tolist()
    sizes = [stop - start for start, stop in pairwise(bounds)]
    *rows, rest = x.split([*sizes, x.shape[0] - bounds[-1]])
    # unbind, not weight[e]: its backward writes the gradient of all experts once, and zeros for those without rows.
    # The first expert always takes part, so that gradients exist without any row too.
    used = [
        _product(row, matrix, batch_invariant)
        for expert, (row, matrix) in enumerate(zip(rows, weight.unbind(0), strict=True))
        if sizes[expert] or expert == 0
    ]
    return torch.cat([*used, rest.new_zeros(rest.shape[0], weight.shape[1])])


def _gemm_by_tile(x: Tensor, weight: Tensor, offsets: Tensor, batch_invariant: bool) -> Tensor:
    """The rows of each expert start a new tile of ``height`` rows; at most S // height + E tiles are needed."""
    rows, experts = x.shape[0], weight.shape[0]
    # plain: with symbolic sizes torch.compile reasons long about each rounding
    height = _INVARIANT_ROWS if batch_invariant else rows // experts + 1
    tiles = rows // height + experts
    # no one could check them: an offset below an earlier one counts as that one
    offsets = offsets.to(torch.int64).clamp(0, rows).cummax(0).values

    row = torch.arange(rows, device=x.device)
    expert = torch.searchsorted(offsets[1:], row, right=True)  # E for rows behind the last expert
    expert = torch.where(row < offsets[0], experts, expert)
    used = (offsets[1:] - offsets[:-1] + height - 1) // height
    last_tile = used.cumsum(0)
    first_row = torch.cat(((last_tile - used) * height, row.new_full((1,), tiles * height)))
    # rows of no expert all go to one extra slot, which is never read
    slot = torch.where(expert < experts, first_row[expert] + row - offsets[expert], tiles * height)
    spread = x.new_zeros(tiles * height + 1, x.shape[1]).index_copy(0, slot, x)[:-1]
    tile = torch.arange(tiles, device=x.device)
    owner = torch.searchsorted(last_tile, tile, right=True).clamp(max=experts - 1)
    out = torch.bmm(spread.view(tiles, height, x.shape[1]), weight.index_select(0, owner).transpose(1, 2))
    return torch.cat((out.flatten(0, 1), out.new_zeros(1, weight.shape[1]))).index_select(0, slot)


def _accumulator(value: Tensor) -> torch.dtype:
    return torch.float64 if value.dtype == torch.float64 else torch.float32
