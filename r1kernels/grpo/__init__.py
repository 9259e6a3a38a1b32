"""GRPO: advantages, losses with their KL and entropy terms, reductions and off-policy corrections."""

from functools import partial

from .. import backends
from ..logprob import cpu as cpu_head
from ..logprob import cuda as cuda_head
from ..logprob import triton_linear as triton_head
from . import advantages, autograd, cpu, cuda, linear_autograd, linear_ops, reference, triton
from .advantages import group_advantages
from .corrections import importance_weights, off_policy_mask, top_entropy_mask
from .linear import linear_grpo_loss
from .loss import grpo_loss
from .metrics import GRPOOutput, Metrics
from .presets import grpo_preset
from .reductions import reduction_weights

__all__ = [
    "GRPOOutput",
    "Metrics",
    "group_advantages",
    "grpo_loss",
    "grpo_preset",
    "importance_weights",
    "linear_grpo_loss",
    "off_policy_mask",
    "reduction_weights",
    "top_entropy_mask",
]

for _name, _module in (("cuda", cuda), ("triton", triton), ("cpu", cpu)):
    backends.register("group_advantages", _name, partial(advantages.run, _name), _module.reasons)
    backends.register("grpo_loss", _name, partial(autograd.run, _name), _module.reasons)
backends.register("group_advantages", "reference", reference.group_advantages)
backends.register("grpo_loss", "reference", reference.grpo_loss)
for _refuses, _module, _engines in (
    (cuda_head.linear_reasons, cuda, {"CUDA": cuda_head.ENGINE}),
    (triton_head.reasons, triton, {"CUDA": triton_head.ENGINE, "CPU": triton_head.INTERPRETED_ENGINE}),
    (cpu_head.linear_reasons, cpu, {"CPU": cpu_head.ENGINE}),
):
    for _key, _engine in _engines.items():
        linear_ops.implement(_engine, _key)
    _name, _reasons = _engine.backend, partial(linear_autograd.reasons, _refuses, _module.reasons)
    backends.register("linear_grpo_loss", _name, partial(linear_autograd.run, _name), _reasons)
backends.register("linear_grpo_loss", "reference", partial(linear_autograd.run, "reference"))
