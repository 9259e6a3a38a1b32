"""The GRPO ops: inputs, exact results in float64, and everyone who computes them.

B completions of at most L tokens, N tokens packed, V vocabulary, H hidden. The loss is that of R1 with token ratios:
clip 0.2, KL (k3) with coefficient 0.04, mean over the tokens of each completion and then over completions; all
metrics are measured.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import Case, lengths
from .logprob import bare_gemms
from .numerics import Exact
from .peers import COMPILED, EAGER, Call, Inputs, Ours, Outputs, Peer, Unavailable, compiled, needs

CLIP, KL = 0.2, 0.04
_ROWS_AT_ONCE = 128
_TRL_CHUNK = 32768


# --- inputs ---


def loss_inputs(case: Case, device: torch.device) -> Inputs:
    """Log-probs of the policy, of the one that sampled and of the reference, entropies, advantages, a mask."""
    generator = torch.Generator(device).manual_seed(0)
    found = lengths(case).to(device)
    places = (int(found.sum()),) if case.layout == "packed" else (case.sizes["B"], case.sizes["L"])

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    logp = -torch.rand(places, generator=generator, device=device) * 4 - 0.01
    tensors = {
        "logp": logp,
        "old_logp": logp + 0.1 * normal(*places),
        "ref_logp": logp + 0.2 * normal(*places),
        "entropy": torch.rand(places, generator=generator, device=device) * 3,
        # off centre, so that the loss is no difference of equal sums
        "advantages": normal(case.sizes["B"]) + 0.5,
        "mask": torch.arange(case.sizes["L"], device=device) < found.unsqueeze(1),
    }
    if case.layout == "packed":
        tensors["mask"] = torch.ones(places, dtype=torch.bool, device=device)
        tensors["cu_seqlens"] = F.pad(found.cumsum(0), (1, 0)).to(torch.int32)
        tensors["sequence"] = torch.repeat_interleave(torch.arange(len(found), device=device), found)
    return Inputs(tensors, ("logp",), {"loss": torch.ones((), device=device)})


def linear_inputs(case: Case, device: torch.device) -> Inputs:
    """The same from hidden states (B, L, H) and a head (V, H)."""
    sizes = case.sizes
    generator = torch.Generator(device).manual_seed(1)
    hidden = torch.randn(sizes["B"], sizes["L"], sizes["H"], generator=generator, device=device)
    weight = torch.randn(sizes["V"], sizes["H"], generator=generator, device=device) * (2 / sizes["H"] ** 0.5)
    targets = torch.randint(sizes["V"], (sizes["B"], sizes["L"]), generator=generator, device=device)
    hidden, weight = hidden.to(case.torch_dtype), weight.to(case.torch_dtype)
    # the policy has moved a little since the sample was taken: its log-probs, give or take a tenth
    exact = weight.double()
    logp = torch.cat([_logp(h.double(), exact, t) for h, t in zip(hidden, targets, strict=True)])
    logp = logp.float().view(targets.shape)
    loss = loss_inputs(case, device).tensors
    tensors = {
        "hidden": hidden,
        "weight": weight,
        "targets": targets,
        "mask": loss["mask"],
        "advantages": loss["advantages"],
        "old_logp": logp + loss["old_logp"] - loss["logp"],
        "ref_logp": logp + loss["ref_logp"] - loss["logp"],
    }
    return Inputs(tensors, ("hidden", "weight"), {"loss": torch.ones((), device=device)})


def _logp(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.log_softmax(logits, dim=-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


# --- plain PyTorch: eager, torch.compile and, in float64, the exact result ---


def _terms(logp: Tensor, old: Tensor, ref: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per token: the loss without its weight, the ratio, the KL."""
    ratio = (logp - old).exp()
    kl = (ref - logp).exp() - (ref - logp) - 1
    policy = -torch.min(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
    return policy + KL * kl, ratio, kl


def _measured(values: Tensor, ratio: Tensor, kl: Tensor, old: Tensor, logp: Tensor, advantages: Tensor,
              entropy: Tensor | None, mask: Tensor) -> list[Tensor]:  # fmt: skip
    """The metrics that trainers log, as means over the tokens that count."""
    count = mask.sum().clamp(min=1)
    low = (ratio < 1 - CLIP) & (advantages < 0)
    high = (ratio > 1 + CLIP) & (advantages > 0)
    shown = [kl, ratio, low.to(kl.dtype), high.to(kl.dtype), (low | high).to(kl.dtype), old - logp]
    shown += [] if entropy is None else [entropy]
    means = [(value * mask).sum() / count for value in shown]
    largest = ratio.masked_fill(mask == 0, 0).max()
    ess = (ratio * mask).sum().square() / ((ratio * mask).square().sum() * count)
    return [*means, largest, ess]


def _padded(
    logp: Tensor, old: Tensor, ref: Tensor, advantages: Tensor, entropy: Tensor | None, mask: Tensor
) -> Any:
    column = advantages.unsqueeze(1)
    values, ratio, kl = _terms(logp, old, ref, column)
    loss = ((values * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()
    with torch.no_grad():
        metrics = _measured(values, ratio, kl, old, logp, column, entropy, mask)
    return loss, metrics


def _packed(
    logp: Tensor, old: Tensor, ref: Tensor, advantages: Tensor, entropy: Tensor, sequence: Tensor
) -> Any:
    each = advantages[sequence]
    values, ratio, kl = _terms(logp, old, ref, each)
    sums = values.new_zeros(len(advantages)).index_add(0, sequence, values)
    counts = values.new_zeros(len(advantages)).index_add(0, sequence, torch.ones_like(values))
    loss = (sums / counts.clamp(min=1)).mean()
    with torch.no_grad():
        metrics = _measured(values, ratio, kl, old, logp, each, entropy, torch.ones_like(values))
    return loss, metrics


def _linear(hidden: Tensor, weight: Tensor, targets: Tensor, old: Tensor, ref: Tensor, advantages: Tensor,
            mask: Tensor) -> Any:  # fmt: skip
    return _padded(_logp(hidden, weight, targets), old, ref, advantages, None, mask)


def _arguments(case: Case, inputs: Inputs) -> tuple[Tensor, ...]:
    names = ("logp", "old_logp", "ref_logp", "advantages", "entropy")
    return (*(inputs[name] for name in names), inputs["sequence" if case.layout == "packed" else "mask"])


def _torch(case: Case, wrap: Callable[..., Any]) -> Call:
    function = wrap(_packed if case.layout == "packed" else _padded)
    return lambda inputs: {"loss": function(*_arguments(case, inputs))[0]}


_LINEAR_NAMES = ("hidden", "weight", "targets", "old_logp", "ref_logp", "advantages", "mask")


def _torch_linear(wrap: Callable[..., Any]) -> Call:
    function = wrap(_linear)
    return lambda inputs: {"loss": function(*(inputs[name] for name in _LINEAR_NAMES))[0]}


def _same(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


# --- exact ---


def loss_exact(case: Case, inputs: Inputs) -> dict[str, Exact]:
    """The formulas in float64, differentiated by autograd."""
    arguments = [_double(value) for value in _arguments(case, inputs)]
    arguments[0].requires_grad_()
    loss, _ = (_packed if case.layout == "packed" else _padded)(*arguments)
    (gradient,) = torch.autograd.grad(loss, arguments[0])
    return {"loss": Exact(loss.detach()), "d logp": Exact(gradient)}


def linear_exact(case: Case, inputs: Inputs) -> dict[str, Exact]:
    """The loss on exact log-probs; then, by the chain rule, one block of tokens at a time."""
    hidden, weight = inputs["hidden"].detach().double(), inputs["weight"].detach().double()
    rows = hidden.flatten(0, 1).split(_ROWS_AT_ONCE)
    targets = inputs["targets"].flatten().split(_ROWS_AT_ONCE)
    logp = torch.cat([_logp(x, weight, y) for x, y in zip(rows, targets, strict=True)])
    logp = logp.view(inputs["targets"].shape).requires_grad_()
    others = [_double(inputs[name]) for name in ("old_logp", "ref_logp", "advantages")]
    loss, _ = _padded(logp, others[0], others[1], others[2], None, inputs["mask"])
    (upstream,) = torch.autograd.grad(loss, logp)
    d_hidden, d_weight = [], torch.zeros_like(weight)
    for x, y, g in zip(rows, targets, upstream.flatten().split(_ROWS_AT_ONCE), strict=True):
        probs = F.linear(x, weight).softmax(-1)
        d_logits = -g.unsqueeze(1) * probs
        d_logits.scatter_add_(1, y.unsqueeze(1), g.unsqueeze(1))
        d_hidden.append(d_logits @ weight)
        d_weight += d_logits.T @ x
    return {
        "loss": Exact(loss.detach()),
        "d hidden": Exact(torch.cat(d_hidden).view(hidden.shape)),
        "d weight": Exact(d_weight),
    }


def _double(value: Tensor) -> Tensor:
    return value.detach().double() if value.is_floating_point() else value


# --- ours ---


def _our_arguments(case: Case, inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args = (inputs["logp"], inputs["old_logp"], inputs["advantages"], inputs["mask"])
    options = {"ref_logp": inputs["ref_logp"], "kl_coef": KL, "entropy": inputs["entropy"]}
    if case.layout == "packed":
        options["cu_seqlens"] = inputs["cu_seqlens"]
    return args, options


OURS_LOSS = Ours("grpo_loss", _our_arguments, lambda found: {"loss": found.loss})
OURS_LINEAR = Ours(
    "linear_grpo_loss",
    lambda case, inputs: (
        tuple(inputs[name] for name in ("hidden", "weight", "targets", "old_logp", "advantages", "mask")),
        {"ref_logp": inputs["ref_logp"], "kl_coef": KL},
    ),
    lambda found: {"loss": found.loss},
)


# --- others ---


class _OneProcess:
    """What TRL's loss asks of an accelerator, for a single process."""

    num_processes = 1
    sync_gradients = True

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        return tensor

    def pad_across_processes(self, tensor: Tensor, dim: int, pad_index: int) -> Tensor:
        return tensor


def _trl(case: Case, inputs: Inputs) -> Call:
    """TRL's own ``_compute_loss`` on a stand-in for its trainer, whose model gives the log-probs of the case."""
    if case.layout == "packed":
        raise Unavailable("TRL's loss takes padded batches only")
    trainer = needs("trl.trainer.grpo_trainer", "trl").GRPOTrainer
    batch, length = inputs["mask"].shape
    ids = torch.zeros(batch, length, dtype=torch.long, device=inputs["mask"].device)
    mask = inputs["mask"].long()

    def call(inputs: Inputs) -> Outputs:
        stand_in = SimpleNamespace(
            accelerator=_OneProcess(),
            model=SimpleNamespace(training=True),
            args=SimpleNamespace(delta=None, use_bias_correction_kl=False),
            loss_type="grpo",
            importance_sampling_level="token",
            beta=KL,
            epsilon_low=CLIP,
            epsilon_high=CLIP,
            top_entropy_quantile=1.0,
            off_policy_mask_threshold=None,
            use_vllm=False,
            current_gradient_accumulation_steps=1,
            aux_loss_enabled=False,
            _entropy_bonus_enabled=False,
            _metrics=defaultdict(lambda: defaultdict(list)),
            _get_per_token_logps_and_entropies=lambda *_, **__: (inputs["logp"], inputs["entropy"], None),
        )
        given = {
            "prompt_ids": ids[:, :1],
            "prompt_mask": mask[:, :1],
            "completion_ids": ids,
            "completion_mask": mask,
            "advantages": inputs["advantages"],
            "old_per_token_logps": inputs["old_logp"],
            "ref_per_token_logps": inputs["ref_logp"],
        }
        return {"loss": trainer._compute_loss(stand_in, None, given)}

    return call


def _liger(case: Case, inputs: Inputs) -> Call:
    """The loss of Liger's fused GRPO, on log-probs."""
    if case.layout == "packed":
        raise Unavailable("Liger's loss takes padded batches only")
    function = needs(
        "liger_kernel.chunked_loss.grpo_loss", "liger-kernel"
    ).LigerFusedLinearGRPOFunction.ppo_loss_fn

    def call(inputs: Inputs) -> Outputs:
        mask = inputs["mask"].float()
        loss, _ = function(
            inputs["logp"],
            mask,
            inputs["advantages"],
            mask,
            ref_per_token_logps=inputs["ref_logp"],
            old_per_token_logps=inputs["old_logp"],
            epsilon_low=CLIP,
            epsilon_high=CLIP,
            beta=KL,
            loss_type="grpo",
        )
        return {"loss": loss}

    return call


def _liger_linear(case: Case, inputs: Inputs) -> Call:
    module = needs("liger_kernel.chunked_loss.grpo_loss", "liger-kernel").LigerFusedLinearGRPOLoss
    loss = module(beta=KL, epsilon_low=CLIP, epsilon_high=CLIP, loss_type="grpo", use_ref_model=True)

    def call(inputs: Inputs) -> Outputs:
        found = loss(
            inputs["hidden"],
            inputs["weight"],
            inputs["targets"],
            inputs["mask"].float(),
            inputs["advantages"],
            ref_per_token_logps=inputs["ref_logp"],
            old_per_token_logps=inputs["old_logp"],
        )
        return {"loss": found[0]}

    return call


def _trl_linear(case: Case, inputs: Inputs) -> Call:
    """TRL's chunked log-probs, then the loss in plain PyTorch as its trainer has it."""
    function = needs("trl.kernels", "trl").ChunkedLogProbFunction

    def call(inputs: Inputs) -> Outputs:
        hidden, targets = inputs["hidden"].flatten(0, 1), inputs["targets"].flatten()
        logp = function.apply(hidden, inputs["weight"], None, targets, 1.0, _TRL_CHUNK, None, 1.0, ())[0]
        others = (inputs["old_logp"], inputs["ref_logp"], inputs["advantages"])
        return {"loss": _padded(logp.view(inputs["targets"].shape), *others, None, inputs["mask"])[0]}

    return call


LOSS = (
    Peer(EAGER, lambda case, inputs: _torch(case, _same)),
    OURS_LOSS.peer(),
    Peer(COMPILED, lambda case, inputs: _torch(case, compiled), compiles=True),
    Peer("TRL", _trl, package="trl"),
    Peer("Liger", _liger, package="liger-kernel"),
)
LINEAR = (
    Peer(EAGER, lambda case, inputs: _torch_linear(_same)),
    OURS_LINEAR.peer(),
    Peer(COMPILED, lambda case, inputs: _torch_linear(compiled), compiles=True),
    Peer("TRL, chunked, and eager loss", _trl_linear, package="trl"),
    Peer("Liger, fused", _liger_linear, package="liger-kernel", compiles=True),
    Peer("three bare GEMMs", bare_gemms(recompute=False), kind="floor"),
)
