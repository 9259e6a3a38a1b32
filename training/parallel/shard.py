"""FSDP2: weights, gradients and moments of a model that is trained are divided among ranks.

The ranks are a mesh of `parallel.replicate` x `parallel.shard`: those of a row hold one model together, each column holds the
same part of it. Each layer is gathered for its own passes, embeddings and head for a whole pass. Gradients are sums over all
ranks, as those of whole models are. Sampling asks an undivided copy, which is brought up to date once per step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from training.parallel import ranks
from training.sections import Recipe

T = TypeVar("T")


def learner_of(model: PreTrainedModel, recipe: Recipe) -> PreTrainedModel:
    """What a loop trains in the place of `model`: itself, or where the recipe divides models, a divided copy of it."""
    return model if recipe.parallel.shard == 1 else divided(copy.deepcopy(model), recipe)


def divided(model: PreTrainedModel, recipe: Recipe, offload: bool = False) -> PreTrainedModel:
    """The model, divided in place where the recipe divides models.

    offload: its parts stay in the memory of the CPU between passes.
    """
    if recipe.parallel.shard == 1:
        return model
    device = model.device.type
    halves = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options: dict[str, Any] = {
        "mesh": _mesh(device, ranks.world() // recipe.parallel.shard, recipe.parallel.shard),
        "mp_policy": halves if recipe.dtype == "bfloat16" else MixedPrecisionPolicy(),
        "offload_policy": CPUOffloadPolicy() if offload and device != "cpu" else OffloadPolicy(),
    }
    for layer in [each for each in model.modules() if isinstance(each, GradientCheckpointingLayer)]:
        fully_shard(layer, **options)
    fully_shard(model, **options)  # the head and the embeddings, which may be one tensor, stand together
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # sums, not means: a loss is divided by the totals of the step
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    model.pass_of = MethodType(_pass_of, model)
    register_fsdp_forward_method(model, "pass_of")
    return model


def _pass_of(model: PreTrainedModel, work: Callable[[], T]) -> T:
    return work()


@lru_cache
def _mesh(device: str, replicate: int, shard: int) -> DeviceMesh:
    mesh = init_device_mesh(device, (replicate, shard), mesh_dim_names=("replicate", "shard"))
    return mesh if replicate > 1 else mesh["shard"]


def is_divided(model: torch.nn.Module) -> bool:
    """Whether a model is divided among ranks."""
    return isinstance(model, FSDPModule)


def forward(model: PreTrainedModel, work: Callable[[], T]) -> T:
    """`work()`, a forward pass of `model` in which its head is a plain tensor, though the model may be divided.

    Every rank has to make as many passes of a divided model.
    """
    return model.pass_of(work) if is_divided(model) else work()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be divided; every rank calls it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def bring_up_to_date(model: PreTrainedModel, learner: PreTrainedModel) -> None:
    """Gives `model` the weights and buffers of the divided copy of it that is trained, if that is one."""
    if learner is model:
        return
    learnt = learner.state_dict()
    for name, tensor in model.state_dict().items():
        tensor.copy_(whole(learnt[name]))
