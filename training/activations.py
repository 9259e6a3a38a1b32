"""What autograd keeps of a forward pass, in bytes, counted on tensors that have shapes and no memory."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PretrainedConfig, masking_utils
from transformers.modeling_layers import GradientCheckpointingLayer

from r1kernels.integrations import transformers as integration
from r1kernels.integrations.transformers_experts import gate_of
from training import adapters
from training.model import has_experts
from training.sections import Lora

DEPTH = 6  # layers that are run: more than the dense ones before the experts of a mixture
BYTES = 4  # hidden states are float32


class _Kept:
    """Storages that are saved for the backward pass while it listens, without those of parameters."""

    def __init__(self, model: nn.Module) -> None:
        self._own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self._held: list[Tensor] = []  # alive, so that no storage is counted under the name of another
        self.bytes = 0
        self._seen: set[int] = set()

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._own | self._seen:
            self._seen.add(storage._cdata)
            self._held.append(tensor)
            self.bytes += storage.nbytes()
        return tensor


def kept_bytes(
    config: PretrainedConfig, rows: int, length: int, *, lora: Lora, recomputes: bool
) -> int | None:
    """Bytes kept between the forward and the backward pass over `rows` sequences of `length` tokens, up to the head.

    Of a deep model the first layers are run, and all later ones are taken to be like the last of these.

    Args:
        recomputes: with gradient checkpointing, the inputs of all layers and what the largest of them keeps.

    Returns:
        None where the model cannot be run without memory: what it does depends on values.
    """
    depth, key = (
        config.get_text_config().num_hidden_layers,
        (config.to_json_string(), rows, length, repr(lora)),
    )
    if key not in _COUNTED:
        try:
            _COUNTED[key] = _count(config, rows, length, lora)
        except Exception:  # of many types, by what the model does
            _COUNTED[key] = 0, []
    whole, layers = _COUNTED[key]
    if not layers:
        return None
    further = depth - len(layers)
    whole, of_layers = whole + further * layers[-1], sum(layers) + further * layers[-1]
    if not recomputes:
        return whole
    inputs = depth * rows * length * config.get_text_config().hidden_size * BYTES
    return whole - of_layers + inputs + max(layers)


_COUNTED: dict[
    tuple[object, ...], tuple[int, list[int]]
] = {}  # stages of a recipe have passes of the same sizes


def _count(config: PretrainedConfig, rows: int, length: int, lora: Lora) -> tuple[int, list[int]]:
    """Bytes kept by all of the first layers, and by each of them."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(_shallow(config)).eval()
    if has_experts(model):
        integration.patch(model)
        for module in model.modules():
            if hasattr(module, "_apply_gate"):
                gate_of(module)  # found on numbers, of which there are none below
    if lora.rank:
        adapters.attach(model, lora, 0)
    # transformers looks at positions for packed texts: of tensors without numbers it makes masks that no real pass has
    with (
        FakeTensorMode(),
        mock.patch(f"{masking_utils.__name__}.find_packed_sequence_indices", return_value=None),
    ):
        _put_on_cpu(model)
        return _pass(model, torch.zeros(rows, length, dtype=torch.int64))


def _shallow(config: PretrainedConfig) -> PretrainedConfig:
    """The config with its first layers alone."""
    shallow = copy.deepcopy(config)
    text = shallow.get_text_config()
    text.num_hidden_layers = min(text.num_hidden_layers, DEPTH)
    for name, value in vars(text).items():
        if name.endswith("layer_types") and isinstance(value, list):
            setattr(text, name, value[:DEPTH])
    return shallow


def _put_on_cpu(model: nn.Module) -> None:
    """Parameters and buffers without memory take those of the mode's tensors for a CPU, whose kernels keep what they keep."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    new: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    if isinstance(tensor, nn.Parameter):
                        new = nn.Parameter(new, tensor.requires_grad)
                    made[id(tensor)] = new
                held[name] = made[id(tensor)]  # type: ignore[assignment]


def _pass(model: nn.Module, ids: Tensor) -> tuple[int, list[int]]:
    """Bytes kept by all, and by each layer."""
    kept = _Kept(model)
    layers: list[int] = []
    handles = []
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            before: list[int] = []
            handles.append(
                module.register_forward_pre_hook(lambda *_, before=before: before.append(kept.bytes))
            )
            handles.append(
                module.register_forward_hook(
                    lambda *_, before=before: layers.append(kept.bytes - before.pop())
                )
            )
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
        model.base_model(input_ids=ids, use_cache=False)  # type: ignore[operator]
    for handle in handles:
        handle.remove()
    return kept.bytes, layers
