"""Every op that is measured: its inputs, its exact results, its implementations."""

from . import divergence, grpo, logprob, moe
from .peers import Op

OPS: dict[str, Op] = {**logprob.OPS, **divergence.OPS, **grpo.OPS, **moe.OPS}
FAMILIES = {
    "logprob": (*logprob.OPS, *divergence.OPS),
    "grpo": grpo.OPS,
    "moe": moe.OPS,
    "step": ("grpo_step",),
}
