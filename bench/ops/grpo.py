"""The GRPO ops: inputs, exact results in float64, and everyone who computes them.

B completions of at most L tokens, V vocabulary, H hidden. The loss is that of R1 with token ratios: clip 0.2, KL (k3) with
coefficient 0.04, mean over the tokens of each completion and then over completions; all metrics are measured.
"""

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import Case, lengths
from .logprob import bare_gemms, linear_exact, linear_inputs, log_softmax, of_hidden, trl_logp
from .numerics import Exact
from .peers import Call, Draw, Inputs, Op, Ours, Outputs, Peer, Plain, Unavailable, needs, theirs

CLIP, KL = 0.2, 0.04


# --- inputs ---


def loss_inputs(case: Case, device: torch.device) -> Inputs:
    """Log-probs of the policy, of the one that sampled and of the reference, entropies, advantages; which token counts."""
    draw, found, packed = Draw(device), lengths(case).to(device), case.layout == "packed"
    places = (int(found.sum()),) if packed else (case.sizes["B"], case.sizes["L"])
    logp = -draw.uniform(*places) * 4 - 0.01
    tensors = {
        "logp": logp,
        "old_logp": logp + 0.1 * draw.normal(*places),
        "ref_logp": logp + 0.2 * draw.normal(*places),
        "entropy": draw.uniform(*places) * 3,
        # off centre, so that the loss is no difference of equal sums
        "advantages": draw.normal(case.sizes["B"]) + 0.5,
        "mask": torch.arange(case.sizes["L"], device=device) < found.unsqueeze(1),
    }
    tensors["where"] = tensors["mask"]
    if packed:
        tensors["mask"] = torch.ones(places, dtype=torch.bool, device=device)
        tensors["cu_seqlens"] = F.pad(found.cumsum(0), (1, 0)).to(torch.int32)
        tensors["where"] = torch.repeat_interleave(torch.arange(len(found), device=device), found)
    return Inputs(tensors, ("logp",), {"loss": torch.ones((), device=device)})


def head_inputs(case: Case, device: torch.device) -> Inputs:
    """The same from hidden states (B, L, H) and a head (V, H): the policy has moved a little since the sample was taken."""
    head, loss = linear_inputs(case, device, seed=1), loss_inputs(case, device)
    shape = (case.sizes["B"], case.sizes["L"])
    logp = linear_exact(case, head)["logp"].values.float().view(shape)
    moved = {name: logp + loss[name] - loss["logp"] for name in ("old_logp", "ref_logp")}
    tensors = {
        "hidden": head["hidden"].view(*shape, -1),
        "weight": head["weight"],
        "targets": head["targets"].view(shape),
        **moved,
        **{name: loss[name] for name in ("advantages", "mask")},
    }
    return Inputs(tensors, head.leaves, loss.upstream)


# --- plain PyTorch ---


def _loss(
    logp: Tensor, old: Tensor, ref: Tensor, advantages: Tensor, entropy: Tensor | None, where: Tensor
) -> Any:
    """The loss, and the metrics that trainers log, as means over the tokens that count. where: a mask, or of packed tokens the
    number of the completion."""
    packed = where.dtype == torch.int64
    each = advantages[where] if packed else advantages.unsqueeze(1)
    ratio = (logp - old).exp()
    kl = (ref - logp).exp() - (ref - logp) - 1
    values = KL * kl - torch.min(ratio * each, ratio.clamp(1 - CLIP, 1 + CLIP) * each)
    if packed:
        mask = torch.ones_like(values)
        sums = values.new_zeros(len(advantages)).index_add(0, where, values)
        counts = values.new_zeros(len(advantages)).index_add(0, where, mask)
    else:
        mask = where
        sums, counts = (values * mask).sum(-1), mask.sum(-1)
    loss = (sums / counts.clamp(min=1)).mean()
    with torch.no_grad():
        count = mask.sum().clamp(min=1)
        low = (ratio < 1 - CLIP) & (each < 0)
        high = (ratio > 1 + CLIP) & (each > 0)
        shown = [kl, ratio, low.to(kl.dtype), high.to(kl.dtype), (low | high).to(kl.dtype), old - logp]
        shown += [] if entropy is None else [entropy]
        means = [(value * mask).sum() / count for value in shown]
        largest = ratio.masked_fill(mask == 0, 0).max()
        ess = (ratio * mask).sum().square() / ((ratio * mask).square().sum() * count)
    return loss, [*means, largest, ess]


def _loss_of_logits(
    logits: Tensor, targets: Tensor, old: Tensor, ref: Tensor, advantages: Tensor, mask: Tensor
) -> Any:
    return _loss(log_softmax(logits, targets), old, ref, advantages, None, mask)


# --- exact ---


def head_exact(case: Case, inputs: Inputs) -> dict[str, Exact]:
    """The loss on exact log-probs; then, by the chain rule, that of the head."""
    none = inputs["targets"].new_zeros(inputs["targets"].numel())
    logp = linear_exact(case, replace(inputs, upstream={"logp": none}))["logp"].values.view(
        inputs["targets"].shape
    )
    old, ref, advantages = (value.double() for value in inputs.of("old_logp,ref_logp,advantages"))
    loss, _ = _loss(logp.requires_grad_(), old, ref, advantages, None, inputs["mask"])
    (above,) = torch.autograd.grad(loss, logp)
    found = linear_exact(case, replace(inputs, upstream={"logp": above.flatten()}))
    return {"loss": Exact(loss.detach()), "d hidden": found["d hidden"], "d weight": found["d weight"]}


# --- others ---


def _trl(module: Any, inputs: Inputs, case: Case) -> Outputs:
    """TRL's own ``_compute_loss`` on a stand-in for its trainer, whose model gives the log-probs of the case."""
    if case.layout == "packed":
        raise Unavailable("TRL's loss takes padded batches only")
    mask = inputs["mask"].long()
    accelerator = SimpleNamespace(
        num_processes=1, sync_gradients=True, gather=lambda tensor: tensor, reduce=lambda tensor, reduction: tensor,
        pad_across_processes=lambda tensor, dim, pad_index: tensor,
    )  # fmt: skip
    stand_in = SimpleNamespace(
        accelerator=accelerator, model=SimpleNamespace(training=True),
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False), loss_type="grpo",
        importance_sampling_level="token", beta=KL, epsilon_low=CLIP, epsilon_high=CLIP, top_entropy_quantile=1.0,
        off_policy_mask_threshold=None, use_vllm=False, current_gradient_accumulation_steps=1, aux_loss_enabled=False,
        _entropy_bonus_enabled=False, _metrics=defaultdict(lambda: defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *_, **__: (inputs["logp"], inputs["entropy"], None),
    )  # fmt: skip
    given = {
        "prompt_ids": mask[:, :1], "prompt_mask": mask[:, :1], "completion_ids": mask, "completion_mask": mask,
        "advantages": inputs["advantages"], "old_per_token_logps": inputs["old_logp"],
        "ref_per_token_logps": inputs["ref_logp"],
    }  # fmt: skip
    return {"loss": module.GRPOTrainer._compute_loss(stand_in, None, given)}


def _others(inputs: Inputs) -> dict[str, Tensor]:
    return {"ref_per_token_logps": inputs["ref_logp"], "old_per_token_logps": inputs["old_logp"]}


def _liger(module: Any, inputs: Inputs, case: Case) -> Outputs:
    """The loss of Liger's fused GRPO, on log-probs."""
    if case.layout == "packed":
        raise Unavailable("Liger's loss takes padded batches only")
    mask = inputs["mask"].float()
    options = {"epsilon_low": CLIP, "epsilon_high": CLIP, "beta": KL, "loss_type": "grpo", **_others(inputs)}
    function = module.LigerFusedLinearGRPOFunction.ppo_loss_fn
    return {"loss": function(inputs["logp"], mask, inputs["advantages"], mask, **options)[0]}


def _liger_head(case: Case, inputs: Inputs) -> Call:
    module = needs("liger_kernel.chunked_loss.grpo_loss", "liger-kernel").LigerFusedLinearGRPOLoss
    loss = module(beta=KL, epsilon_low=CLIP, epsilon_high=CLIP, loss_type="grpo", use_ref_model=True)

    def call(inputs: Inputs) -> Outputs:
        mask = inputs["mask"].float()
        found = loss(*inputs.of("hidden,weight,targets"), mask, inputs["advantages"], **_others(inputs))
        return {"loss": found[0]}

    return call


def _trl_head(trl: Any, inputs: Inputs, case: Case) -> Outputs:
    """TRL's chunked log-probs, then the loss in plain PyTorch as its trainer has it."""
    targets = inputs["targets"]
    logp = trl_logp(trl, inputs["hidden"].flatten(0, 1), inputs["weight"], targets.flatten()).view(
        targets.shape
    )
    old, ref, advantages = inputs.of("old_logp,ref_logp,advantages")
    return {"loss": _loss(logp, old, ref, advantages, None, inputs["mask"])[0]}


# --- who computes them ---


def _options(case: Case, inputs: Inputs) -> dict[str, Any]:
    names = ("ref_logp", "entropy", "cu_seqlens")
    return {"kl_coef": KL} | {name: inputs[name] for name in names if name in inputs.tensors}


_OURS = Ours("grpo_loss", "logp,old_logp,advantages,mask", "loss", _options)
_OURS_HEAD = Ours("linear_grpo_loss", "hidden,weight,targets,old_logp,advantages,mask", "loss", _options)
_PLAIN = Plain(lambda case: _loss, "logp,old_logp,ref_logp,advantages,entropy,where", "loss")
_PLAIN_HEAD = Plain(
    lambda case: of_hidden(_loss_of_logits), "hidden,weight,targets,old_logp,ref_logp,advantages,mask", "loss"
)
LOSS = (
    *_PLAIN.around(_OURS.peer()),
    theirs("TRL", "trl", "trl.trainer.grpo_trainer", _trl),
    theirs("Liger", "liger-kernel", "liger_kernel.chunked_loss.grpo_loss", _liger),
)
HEAD = (
    *_PLAIN_HEAD.around(_OURS_HEAD.peer()),
    theirs("TRL, chunked, and eager loss", "trl", "trl.kernels", _trl_head),
    Peer("Liger, fused", _liger_head, package="liger-kernel", compiles=True),
    bare_gemms("three bare GEMMs"),
)
OPS = {
    "grpo_loss": Op(_OURS, loss_inputs, _PLAIN.exact, LOSS),
    "linear_grpo_loss": Op(_OURS_HEAD, head_inputs, head_exact, HEAD),
}
