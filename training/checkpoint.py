"""Checkpoints: a folder in Hugging Face's layout (config.json, model.safetensors, tokenizer.json) with a manifest.

Buffers such as the router bias are part of it. The folder appears whole or not at all, nothing in it is pickled,
and manifest.json holds the SHA-256 of every file, which `load_model` verifies.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from training import files
from training.errors import UserError

MANIFEST = "manifest.json"

# A run shows its own progress; transformers' bars for a load or a save would break it.
transformers.utils.logging.disable_progress_bar()


def save_model(model: Any, tokenizer: Any, path: Path) -> None:
    """Writes model, its buffers and the tokenizer to the folder `path`, atomically.

    Args:
        model: a transformers `PreTrainedModel`.
        tokenizer: a transformers tokenizer, or None.
        path: the folder; one that exists is replaced.

    Raises:
        UserError: the disk is full; the folder that was there stays.
    """
    with files.replacing(path) as temporary:
        temporary.mkdir()
        model.save_pretrained(temporary, safe_serialization=True)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        files.write_json(temporary / MANIFEST, files.folder_hashes(temporary))


def load_model(path: Path) -> tuple[Any, Any]:
    """The model (of the class its config names, in its saved dtype, on the CPU, in eval mode) and the tokenizer.

    Args:
        path: a folder that `save_model` wrote, or any local Hugging Face checkpoint in safetensors.

    Returns:
        (model, tokenizer); the tokenizer is None where the folder holds none.

    Raises:
        UserError: a file is missing or damaged (it is named), or the architecture is unknown.
    """
    path = Path(path)
    verify(path)
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        architecture = (config.architectures or [""])[0]
        model_class = getattr(transformers, architecture, None)
        if model_class is None:
            raise UserError(f"{path / 'config.json'}: transformers has no architecture {architecture!r}")
        model = model_class.from_pretrained(path, local_files_only=True, use_safetensors=True, dtype="auto")
        tokenizer = None
        if (path / "tokenizer.json").is_file():
            tokenizer = _tokenizer_class(path).from_pretrained(path, local_files_only=True)
            for remark in ("is_local", "local_files_only"):  # how it was loaded would be saved with it
                tokenizer.init_kwargs.pop(remark, None)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).strip().splitlines()
        raise UserError(
            f"{path} cannot be loaded as a checkpoint: {reason[0] if reason else error!r}"
        ) from None
    return model.eval(), tokenizer


def _tokenizer_class(path: Path) -> Any:
    """The class that reads tokenizer.json as it is, unless the folder names a class of its own.

    `AutoTokenizer` would pick the class by the model: a Qwen2 student would read its teacher's words by Qwen's rules.
    """
    config = path / "tokenizer_config.json"
    named = files.read_json(config).get("tokenizer_class") if config.is_file() else None
    plain = ("PreTrainedTokenizerFast", "TokenizersBackend")
    return transformers.PreTrainedTokenizerFast if named in plain else transformers.AutoTokenizer


def verify(path: Path) -> None:
    """Checks a checkpoint folder against its manifest; a folder without a manifest only needs a config.json.

    Raises:
        UserError: the folder or a file is missing, or a file is not what was written.
    """
    if not (path / "config.json").is_file():
        raise UserError(f"{path} holds no checkpoint (no config.json)")
    if not (path / MANIFEST).is_file():
        return
    for name, digest in files.read_json(path / MANIFEST).items():
        if not (path / name).is_file():
            raise UserError(f"{path / name} is missing from the checkpoint")
        if files.file_hash(path / name) != digest:
            raise UserError(f"{path / name} is damaged: it is not what was written")


def checkpoint_hash(path: Path) -> str:
    """SHA-256 over names and bytes of all files of a checkpoint folder."""
    return files.value_hash(files.folder_hashes(Path(path)))


def model_tensors(model: torch.nn.Module, prefix: str = "model.") -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name, for `StageDir.save_state`."""
    return {prefix + name: tensor for name, tensor in model.state_dict().items()}


def load_model_tensors(
    model: torch.nn.Module, tensors: Mapping[str, torch.Tensor], prefix: str = "model."
) -> None:
    """Puts what `model_tensors` gave back into `model`, in place and exactly."""
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    model.load_state_dict(own, strict=True)


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, prefix: str = "optimizer."
) -> dict[str, torch.Tensor]:
    """The optimizer's state as tensors named "<prefix><index of the parameter>.<name>".

    Learning rates and other settings are not in it: they are functions of the step.

    Raises:
        TypeError: the optimizer keeps something that is not a tensor.
    """
    tensors = {}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"optimizer state {name!r} is {type(value).__name__}, expected a tensor")
            tensors[f"{prefix}{index}.{name}"] = value
    return tensors


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], prefix: str = "optimizer."
) -> None:
    """Puts what `optimizer_tensors` gave back into an optimizer over the same parameters."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            index, key = name.removeprefix(prefix).split(".", 1)
            state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
