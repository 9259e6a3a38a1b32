"""Log-probs of a vocabulary sharded over a process group, exact: each rank holds some columns of the logits.

Shapes: N tokens, V the columns of this rank, R ranks. Every rank gathers four numbers a token from every other one and
merges them in rank order, so all ranks hold the same bits. With M_r, S'_r, E'_r of rank r (see ``reference.py``), M the
largest M_r, its first owner o, and w_r = e^(M_r - M):

    S' = S'_o + sum_{r != o} w_r (1 + S'_r)
    E' = sum_r w_r (E'_r + (M - M_r)(1 + S'_r))        since M - x = (M - M_r) + (M_r - x)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import checks
from . import reference


def vocabulary_size(weight: Tensor, group: dist.ProcessGroup) -> int:
    """The rows of the head over all ranks."""
    return sum(_shard_sizes(weight.shape[0], weight.device, group))


def copy_to_group(hidden: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``hidden`` itself; its gradient is the sum over the ranks, since each rank's columns give a part of it."""
    return _CopyToGroup.apply(hidden, group)


def run(
    logits: Tensor,
    targets: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    ignore_index: int,
    entropy: bool,
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy (N,) from this rank's logits (N, V) and the global targets (N,), differentiable."""
    return _ShardedLogprobs.apply(logits, targets, temperatures, temperature, ignore_index, entropy, group)


def stats(x: Tensor, targets: Tensor, group: dist.ProcessGroup) -> dict[str, Tensor]:
    """log_sum_sq_probs, mean_logits and is_top1 (N,) from this rank's scaled logits (N, V)."""
    start = _first_column(x.shape[-1], x.device, group)
    largest, position = x.max(-1)
    exponentials = (x - largest.unsqueeze(-1)).exp()
    rows = torch.stack(
        (
            largest,
            position.to(x.dtype) + start,
            exponentials.sum(-1),
            exponentials.square().sum(-1),
            x.sum(-1),
        )
    )
    maxima, positions, sums, squares, totals = _gather(rows, group).unbind(1)
    overall, owner = maxima.max(0)
    weights = (maxima - overall).exp()
    size = sum(_shard_sizes(x.shape[-1], x.device, group))
    top = positions.gather(0, owner.unsqueeze(0)).squeeze(0)
    return {
        "log_sum_sq_probs": (weights.square() * squares).sum(0).log() - 2 * (weights * sums).sum(0).log(),
        "mean_logits": totals.sum(0) / size,
        "is_top1": top == targets,
    }


class _CopyToGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _gather(grads[0].contiguous(), ctx.group).sum(0), None


class _ShardedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        temperatures: Tensor | None,
        temperature: float,
        ignore_index: int,
        entropy: bool,
        group: dist.ProcessGroup,
    ) -> tuple[Tensor, Tensor]:
        start = _first_column(logits.shape[-1], logits.device, group)
        here = (targets >= start) & (targets < start + logits.shape[-1])
        local = torch.where(here, targets - start, 0)
        scale = temperature if temperatures is None else temperatures
        _, _, shard = reference.forward(logits, local, temperatures, temperature, -1, entropy)
        chosen = logits.gather(-1, local.unsqueeze(-1)).squeeze(-1) / scale
        chosen = torch.where(here, chosen, 0.0)
        gathered = _gather(torch.cat((shard, chosen.unsqueeze(0), here.to(shard.dtype).unsqueeze(0))), group)
        maxima, sums, spreads, targets_x, owners = gathered.unbind(1)

        largest, owner = maxima.max(0)
        distance = largest - maxima
        weights = torch.where(maxima == -torch.inf, 0.0, (-distance).exp())
        owned = torch.arange(maxima.shape[0], device=maxima.device).unsqueeze(-1) == owner
        sum_others = torch.where(owned, sums, torch.where(weights == 0, 0.0, weights * (1 + sums))).sum(0)
        spread = torch.where(weights == 0, 0.0, weights * (spreads + distance * (1 + sums))).sum(0)
        # NaN or +inf on any rank, or -inf alone on every one, makes the row NaN on all of them
        broken = maxima.isnan().any(0) | largest.isinf()
        found = owners.sum(0) > 0
        ignored = targets == ignore_index
        logp = (targets_x.sum(0) - largest) - sum_others.log1p()
        logp = torch.where(broken | ~found, torch.nan, logp).masked_fill(ignored, 0.0)
        value = logp.new_empty(0)
        if entropy:
            value = sum_others.log1p() + spread / (1 + sum_others)
            value = torch.where(broken | ~found, torch.nan, value).masked_fill(ignored, 0.0)
        ctx.save_for_backward(logits, local, here, ignored, temperatures, logp)
        ctx.stats = torch.stack((largest, sum_others, spread))
        ctx.temperature = temperature
        ctx.entropy = entropy
        ctx.set_materialize_grads(False)
        return logp, value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, local, here, ignored, temperatures, logp = ctx.saved_tensors
        grad_logp = grads[0]
        grad_entropy = grads[1] if ctx.entropy else None
        if grad_logp is None and grad_entropy is None:
            return (None,) * 7
        with torch.no_grad():
            x = logits / (ctx.temperature if temperatures is None else temperatures.unsqueeze(-1))
            largest, sum_others, spread = ctx.stats.unsqueeze(-1).unbind(0)
            probs = (x - largest).exp() / (1 + sum_others)
            grad = torch.zeros_like(x)
            if grad_logp is not None:
                # d logp / d x_v = 1[v = y] - p_v, with 1 - p_y = -expm1(logp) on the rank that holds the target
                at_target = torch.where(
                    here.unsqueeze(-1), -logp.expm1().unsqueeze(-1), -probs.gather(-1, local.unsqueeze(-1))
                )
                grad = grad_logp.unsqueeze(-1) * (-probs).scatter(-1, local.unsqueeze(-1), at_target)
            if grad_entropy is not None:
                # d H / d x_v = p_v ((M - x_v) - E' / (1 + S'))
                inner = torch.where(probs > 0, probs * (largest - x - spread / (1 + sum_others)), 0.0)
                grad = grad + grad_entropy.unsqueeze(-1) * torch.where(probs.isnan(), probs, inner)
            grad = grad / (ctx.temperature if temperatures is None else temperatures.unsqueeze(-1))
            grad = grad.masked_fill(ignored.unsqueeze(-1), 0.0)
        return checks.first_derivative_only("linear_logprobs", grad, logits), *(None,) * 6


def _gather(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``rows`` of every rank, stacked in rank order."""
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, rows.contiguous(), group=group)
    return torch.stack(parts)


def _shard_sizes(columns: int, device: torch.device, group: dist.ProcessGroup) -> list[int]:
    return [int(size) for size in _gather(torch.tensor([columns], device=device), group)]


def _first_column(columns: int, device: torch.device, group: dist.ProcessGroup) -> int:
    return sum(_shard_sizes(columns, device, group)[: dist.get_rank(group)])
