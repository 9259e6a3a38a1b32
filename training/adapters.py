"""LoRA (arXiv 2106.09685) through PEFT: two small matrices beside each chosen weight are trained, and all else stands still.

PEFT puts its layers into the model, which keeps its class: loops, engines and kernels see the model that they know. Every stage
begins new adapters on the weights that it starts from, the merged ones of the stage before, and at first they change nothing. So
the model without them is the reference policy, and adapters on the weights they began with are the whole result. Beside those of
a reward model its new scalar head is trained as it is.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from training import files, optional
from training.errors import UserError
from training.parallel import ranks
from training.sections import Lora

NAME = "default"  # of the adapters, as PEFT calls them
FOLDER = "adapter"  # of a stage, beside its checkpoint; of a part of it with what follows "checkpoint"
HEAD = "score"  # of a reward model
EXPERT_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")  # of all experts of a layer in one parameter
# what PEFT takes for the router and the experts of a mixture, as older transformers had them, whatever else is called so
OF_EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


def attach(model: nn.Module, lora: Lora, key: int, setting: str = "model.lora") -> None:
    """Puts new adapters into `model`, in place, and freezes its own weights, but for the head of a reward model.

    key: of the random numbers that they begin with (training.seeding.key); they change nothing until they are trained. setting:
        as messages name `lora`.

    Raises:
        UserError: PEFT is not installed, or the model has nothing that the settings name.
    """
    peft = optional.load("peft", setting)
    experts = _expert_weights(model) if lora.experts else []
    if lora.experts and not experts:
        raise UserError(
            f"{setting}.experts: expected a mixture whose layers hold their experts in one parameter"
        )
    scores = hasattr(model, HEAD)
    layers, parameters = _targets(model, lora)
    if not layers and not parameters:
        raise UserError(
            f"{setting}.targets: expected layers beside the experts, which {setting}.experts is for, got {lora.targets}: it has "
            f"{', '.join(_matrices(model))}"
        )
    if lora.dropout and parameters:
        raise UserError(
            f"{setting}.dropout: expected 0 with adapters of {', '.join(parameters)}, for PEFT has none there: leave them out of "
            f"{setting}.targets, got {lora.dropout:g}"
        )
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha or 2 * lora.rank,
        lora_dropout=lora.dropout,
        target_modules=layers,
        target_parameters=[*parameters, *experts] or None,
        task_type="SEQ_CLS" if scores else "CAUSAL_LM",
    )
    # PEFT draws from torch's global generator: set it from the key, and put it back
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # of patterns for names of older transformers, and of layers that are transposed
        torch.manual_seed(key)
        try:
            peft.inject_adapter_in_model(config, model, NAME)
        except ValueError as error:
            said = str(error).splitlines()[0].partition(". Please")[0]
            there = f": it has {', '.join(_matrices(model))}" if lora.targets else ""
            raise UserError(f"{setting}: {said}{there}") from None
    if scores:
        model.get_submodule(HEAD).requires_grad_(True)


def _targets(model: nn.Module, lora: Lora) -> tuple[list[str] | str, list[str]]:
    """PEFT's target_modules and, for layers of a mixture that it would take for experts, target_parameters."""
    if not _expert_weights(model):
        return list(lora.targets) or "all-linear", []
    whole: Any = model
    head = getattr(model, HEAD, None) or whole.get_output_embeddings()
    modules = {name: each for name, each in model.named_modules() if each is not head}
    linear = {name for name, each in modules.items() if isinstance(each, nn.Linear)}
    wanted = set(lora.targets) or {name.rpartition(".")[2] for name in linear}
    parameters = {
        ".".join([*name.split(".")[-2:], "weight"])
        for name in (modules if lora.targets else linear)
        if (last := name.rpartition(".")[2]) in wanted and last in OF_EXPERTS
    }
    return sorted(wanted - set(OF_EXPERTS)), sorted(parameters)


def _matrices(model: nn.Module) -> list[str]:
    """Names of layers that are a matrix."""
    layers = [
        name for name, each in model.named_modules() if getattr(getattr(each, "weight", None), "ndim", 0) == 2
    ]
    return sorted({name.rpartition(".")[2] for name in layers})


def _expert_weights(model: nn.Module) -> list[str]:
    """Names of experts' parameters as PEFT's target_parameters, "mlp.experts.down_proj": each ends the names of all layers."""
    found = {
        ".".join([*name.split(".")[-2:], weight])
        for name, module in model.named_modules()
        for weight in EXPERT_WEIGHTS
        if isinstance(parameter := getattr(module, weight, None), nn.Parameter) and parameter.ndim == 3
    }
    return sorted(found)


def has(model: nn.Module) -> bool:
    """Whether adapters are in the model."""
    return bool(getattr(model, "peft_config", None))


def is_adapter(name: str) -> bool:
    """Whether a tensor of a state dict is one of an adapter."""
    return any(part.startswith("lora_") for part in name.split("."))


def is_trained(name: str) -> bool:
    """Whether a tensor of the state dict of a model with adapters is trained."""
    return is_adapter(name) or name.startswith(f"{HEAD}.")


def beside(checkpoint: Path) -> Path:
    """The folder of the adapters whose merged model is the folder `checkpoint`."""
    return checkpoint.with_name(FOLDER + checkpoint.name.removeprefix("checkpoint"))


@contextmanager
def off(model: nn.Module) -> Iterator[None]:
    """Inside the block the model computes without its adapters."""
    layers = list(_layers(model).values())
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def _layers(model: nn.Module) -> dict[str, Any]:
    """Name of a weight, as the model without adapters has it -> PEFT's layer that adapts it."""
    from peft.tuners.lora import LoraLayer

    return {
        f"{_own_name(name)}.{getattr(module, 'parameter_name', 'weight')}": module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def _own_name(name: str) -> str:
    return name.replace(".base_layer", "")


@torch.no_grad()
def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the model without adapters that computes what this one does: W + alpha / rank * B A for each of them."""
    state: Mapping[str, Tensor] = model.state_dict()
    if not has(model):
        return dict(state)
    layers = _layers(model)
    merged = {_own_name(name): tensor for name, tensor in state.items() if not is_adapter(name)}
    return {
        name: tensor + layers[name].get_delta_weight(NAME) if name in layers else tensor
        for name, tensor in merged.items()
    }


@ranks.by_main
def save(model: nn.Module, folder: Path, base: str) -> None:
    """Writes the adapters in PEFT's layout, atomically: `peft.AutoPeftModelForCausalLM.from_pretrained(folder)` reads them, and
    those of a reward model `AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1)`.

    base: the folder or the name on the hub of the model that they began with.
    """
    from peft import get_peft_model_state_dict

    state = dict(get_peft_model_state_dict(model, adapter_name=NAME, save_embedding_layers=False))
    state |= {name: tensor for name, tensor in model.state_dict().items() if name.startswith(f"{HEAD}.")}
    adapted: Any = model
    config = copy.copy(adapted.peft_config[NAME])
    config.base_model_name_or_path, config.inference_mode = base, True
    config.modules_to_save = [HEAD] if hasattr(model, HEAD) else None
    if not isinstance(config.target_modules, str):
        config.target_modules = sorted(config.target_modules)  # a set would be written in any order
    with files.replacing(folder) as temporary:
        temporary.mkdir()
        tensors = {f"base_model.model.{name}": tensor.cpu().contiguous() for name, tensor in state.items()}
        save_file(tensors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(str(temporary))
