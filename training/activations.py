"""What autograd keeps of a forward pass, in bytes, counted on tensors that have shapes and no memory."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PretrainedConfig, masking_utils
from transformers.modeling_layers import GradientCheckpointingLayer

from r1kernels.integrations import transformers as integration
from r1kernels.integrations.prefix_tree import build
from r1kernels.integrations.transformers_experts import gate_of
from r1kernels.integrations.transformers_prefix_attention import packed
from training import adapters
from training.model import has_experts
from training.sections import Lora

DEPTH = 6  # layers that are run: more than the dense ones before the experts of a mixture


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
    config: PretrainedConfig,
    rows: int,
    length: int,
    *,
    lora: Lora,
    recomputes: bool,
    tree: bool = False,
    dtype: torch.dtype = torch.float32,
    divided: bool = False,
) -> int | None:
    """Bytes kept between the forward and the backward pass over `rows` sequences of `length` tokens, up to the head.

    Of a deep model the first layers are run, and all later ones are taken to be like the last of these.

    Args:
        recomputes: with gradient checkpointing, the inputs of all layers and what the largest of them keeps.
        tree: in the attention of shared prefixes, which keeps what fused kernels do; else in that of transformers for a CPU.
        dtype: of matrix products (autocast); copies of weights in it are kept too.
        divided: the weights come in `dtype`, gathered from the processes that divide the model, and are not kept.

    Returns:
        None where the model cannot be run without memory: what it does depends on values.
    """
    depth = config.get_text_config().num_hidden_layers
    sizes = rows, length, lora, tree, dtype, dtype if divided else torch.float32
    key = config.to_json_string(), *map(repr, sizes)
    if key not in _COUNTED:
        try:
            _COUNTED[key] = _count(config, *sizes)
        except Exception:  # of many types, by what the model does
            _COUNTED[key] = 0, []
    whole, layers = _COUNTED[key]
    if not layers:
        return None
    further = depth - len(layers)
    whole, of_layers = whole + further * layers[-1], sum(layers) + further * layers[-1]
    if not recomputes:
        return whole
    own = dtype if divided else torch.float32  # of hidden states between layers
    inputs = depth * rows * length * config.get_text_config().hidden_size * own.itemsize
    return whole - of_layers + inputs + max(layers)


# stages of a recipe have passes of the same sizes, and in float32 models that processes divide are counted as whole ones
_COUNTED: dict[tuple[object, ...], tuple[int, list[int]]] = {}


def _count(
    config: PretrainedConfig,
    rows: int,
    length: int,
    lora: Lora,
    tree: bool,
    dtype: torch.dtype,
    weights: torch.dtype,
) -> tuple[int, list[int]]:
    """Bytes kept by all of the first layers, and by each of them. weights: their dtype."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(_shallow(config)).eval()
    _drop_repeated(model)
    if has_experts(model):
        integration.patch(model)
        for module in model.modules():
            if hasattr(module, "_apply_gate"):
                gate_of(module)  # found on numbers, of which there are none below
    if lora.rank:
        adapters.attach(model, lora, 0)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        _put_on_cpu(model, weights)
    alone = build([[row] * length for row in range(rows)], [1] * rows)
    # transformers looks at positions for packed texts: of tensors without numbers it makes masks that no real pass has
    with (
        packed(model, alone) if tree else nullcontext(),
        mode,
        mock.patch(f"{masking_utils.__name__}.find_packed_sequence_indices", return_value=None),
        torch.autocast("cpu", dtype, enabled=dtype != torch.float32, cache_enabled=False),
    ):
        shape = (1, rows * length) if tree else (rows, length)
        return _pass(model, torch.zeros(shape, dtype=torch.int64))


def _shallow(config: PretrainedConfig) -> PretrainedConfig:
    """The config with its first layers alone."""
    shallow = copy.deepcopy(config)
    text = shallow.get_text_config()
    text.num_hidden_layers = min(text.num_hidden_layers, DEPTH)
    for name, value in vars(text).items():
        if name.endswith("layer_types") and isinstance(value, list):
            setattr(text, name, value[:DEPTH])
    return shallow


def _drop_repeated(model: Any) -> None:
    """Of equal layers at its end the model keeps two: what the last of these keeps all later ones would."""
    text = model.config.get_text_config()
    for stack in model.modules():
        if isinstance(stack, nn.ModuleList) and len(stack) == text.num_hidden_layers:
            kinds = [_kind(layer) for layer in stack]
            while kinds[-3:] == 3 * kinds[-1:]:
                del kinds[-1], stack[-1]
            text.num_hidden_layers = len(stack)
            return


def _kind(layer: nn.Module) -> list[object]:
    """What a layer is made of, whatever its place."""
    return [
        (
            type(part),
            [each.shape for each in part.parameters(recurse=False)],
            {k: v for k, v in vars(part).items() if isinstance(v, int | float | str) and k != "layer_idx"},
        )
        for part in layer.modules()
    ]


def _put_on_cpu(model: nn.Module, dtype: torch.dtype) -> None:
    """Parameters, in `dtype`, and buffers without memory become tensors of the mode for a CPU, whose kernels keep what they keep."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    own = dtype if isinstance(tensor, nn.Parameter) else tensor.dtype
                    new: Tensor = torch.empty(tensor.shape, dtype=own, device="cpu")
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
