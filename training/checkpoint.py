"""Checkpoints: a folder in Hugging Face's layout (config.json, model.safetensors, tokenizer.json) with a manifest.

Buffers such as the router bias are part of it. The folder appears whole or not at all, nothing in it is pickled,
and manifest.json holds the SHA-256 of every file, which `load_model` verifies.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from training import adapters, files
from training.errors import UserError
from training.parallel import ranks

MANIFEST = "manifest.json"
SHARD = "5GB"  # a larger model is several files of safetensors with an index
STYLE = "prompt.json"  # the prompt that a checkpoint was trained with
# Layers whose cache is keys and values; every other kind keeps a state that the sampler cannot select rows of.
ATTENTION_LAYERS = ("full_attention", "sliding_attention", "chunked_attention")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
# "No code of the folder" is said outright: transformers would ask on stdin.
_OWN_FILES: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}

# A run shows its own progress; transformers' bars for a load or a save would break it.
transformers.utils.logging.disable_progress_bar()


@ranks.by_main
def save_model(model: Any, tokenizer: Any, path: Path, style: Mapping[str, Any] | None = None) -> None:
    """Writes model, its buffers and the tokenizer to the folder `path`, atomically.

    Args:
        model: a transformers `PreTrainedModel`. One that `widen` made float32 is written in the dtypes it had before, adapters
            in it are merged.
        tokenizer: a transformers tokenizer, or None.
        path: the folder; one that exists is replaced.
        style: the prompt that the model was trained with, as `read_style` gives it back; None writes nothing.

    Raises:
        UserError: the disk is full; the folder that was there stays.
    """
    with files.replacing(path) as temporary:
        temporary.mkdir()
        with _written_by_this_rank(model):
            model.save_pretrained(temporary, state_dict=_narrowed(model), max_shard_size=SHARD)
        kept = getattr(model, "kept_dtype", None)
        if kept is not None:  # transformers notes the dtype of the float32 weights
            config = files.read_json(temporary / "config.json")
            files.write_json(temporary / "config.json", {**config, "dtype": str(kept).removeprefix("torch.")})
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        if style is not None:
            files.write_json(temporary / STYLE, dict(style))
        files.write_json(temporary / MANIFEST, files.folder_hashes(temporary))


@contextmanager
def _written_by_this_rank(model: Any) -> Iterator[None]:
    """Inside the block `save_pretrained` writes: by itself transformers does so on rank 0 alone, which may be busy otherwise."""
    model.should_save_on_this_rank = lambda is_main_process: is_main_process
    try:
        yield
    finally:
        del model.should_save_on_this_rank


def widen(model: Any) -> None:
    """Makes the weights of a model float32, in place, and notes the dtypes for `save_model`.

    Small updates of bfloat16 weights would be lost to rounding, and so would moments in bfloat16.
    """
    kept = {name: tensor.dtype for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    if any(dtype != torch.float32 for dtype in kept.values()):
        model.kept_dtype, model.kept_dtypes = model.dtype, kept
        model.float()


def _narrowed(model: Any) -> dict[str, torch.Tensor]:
    """The tensors of a model, adapters merged, in the dtypes they had before `widen`; tied ones stay one tensor."""
    kept: dict[str, torch.dtype] = getattr(model, "kept_dtypes", {})
    cast: dict[tuple[int, torch.dtype], torch.Tensor] = {}
    state = adapters.merged_state(model)
    for name, tensor in state.items():
        dtype = kept.get(name, tensor.dtype)
        if dtype != tensor.dtype:
            state[name] = cast.setdefault((tensor.data_ptr(), dtype), tensor.to(dtype))
    return state


def read_style(path: Path) -> dict[str, Any] | None:
    """The prompt that a checkpoint was trained with ({"prompt": "zero", "examples": [...]}); None where none is noted."""
    return dict(files.read_json(path / STYLE)) if (path / STYLE).is_file() else None


def load_config(path: Path) -> Any:
    """The config of a checkpoint folder.

    Raises:
        UserError: it cannot be read, asks for code of its own, is quantized, or names a state-space or hybrid model.
    """
    name = path / "config.json"
    written = files.read_json(name)
    kind = written.get("model_type") if isinstance(written, dict) else None
    if kind not in transformers.CONFIG_MAPPING:
        if isinstance(written, dict) and written.get("auto_map"):
            raise UserError(
                f"{name}: model_type {kind!r} needs code that lies in the folder, which is never run"
            )
        raise UserError(f"{name}: transformers {transformers.__version__} knows no model_type {kind!r}")
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{name} cannot be read: {_first_line(error)}") from None
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"{name}: the weights are quantized, and training needs float32, bfloat16 or float16")
    model_class = transformers.AutoModelForCausalLM._model_mapping.get(type(config), None)
    layers = set(getattr(config.get_text_config(), "layer_types", None) or ()) - set(ATTENTION_LAYERS)
    if layers or getattr(model_class, "_is_stateful", False):
        raise UserError(
            f"{name}: {config.model_type} is a state-space or hybrid model, and only models whose cache is keys and "
            "values are served" + (f" (it has layers of {', '.join(sorted(layers))})" if layers else "")
        )
    return config


def load_model(path: Path, dtype: str = "auto") -> tuple[Any, Any]:
    """The model (of the class its config names, in its saved dtype, on the CPU, in eval mode) and the tokenizer.

    No code of the folder is run. A config that names no class is a causal language model of its model_type.

    Args:
        path: a folder that `save_model` wrote, or any local Hugging Face checkpoint in safetensors.
        dtype: of the weights in memory, "bfloat16"; what a model always keeps in float32 stays so. "auto": as they are saved.

    Returns:
        (model, tokenizer); the tokenizer is None where the folder holds none.

    Raises:
        UserError: a file is missing or damaged (it is named), the architecture is unknown, or see `load_config`.
    """
    path = Path(path)
    verify(path)
    config = load_config(path)
    architecture = (config.architectures or [""])[0]
    model_class = getattr(transformers, architecture or "AutoModelForCausalLM", None)
    if model_class is None:
        raise UserError(f"{path / 'config.json'}: transformers has no architecture {architecture!r}")
    try:
        model, info = model_class.from_pretrained(
            path,
            config=config,
            use_safetensors=True,
            dtype=dtype,
            output_loading_info=True,
            **_OWN_FILES,
        )
        tokenizer = load_tokenizer(path)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{path} cannot be loaded as a checkpoint: {_first_line(error)}") from None
    if info["missing_keys"]:
        raise UserError(
            f"{path} cannot be loaded as a checkpoint: it lacks {sorted(info['missing_keys'])[0]}"
        )
    return model.eval(), tokenizer


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a folder, or None where it holds none."""
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        return None
    tokenizer = _tokenizer_class(path).from_pretrained(path, **_OWN_FILES)
    for remark in ("is_local", *_OWN_FILES):  # how it was loaded would be saved with it
        tokenizer.init_kwargs.pop(remark, None)
    return tokenizer


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else repr(error)


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
    """What training changes, by name, for `StageDir.save_state`: parameters and persistent buffers; of a model with adapters
    what is trained of it alone."""
    adapted = adapters.has(model)
    return {
        prefix + name: tensor
        for name, tensor in model.state_dict().items()
        if not adapted or adapters.is_trained(name)
    }


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, prefix: str = "optimizer."
) -> dict[str, torch.Tensor]:
    """The optimizer's state as tensors named "<prefix><index of the parameter>.<name>"; a counter is one without dimensions.

    Learning rates and other settings are not in it: they are functions of the step.

    Raises:
        TypeError: the optimizer keeps something that is neither a tensor nor a whole number.
    """
    return dict(_leaves(prefix.removesuffix("."), optimizer.state_dict()["state"]))


def _leaves(place: str, state: Mapping[Any, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in state.items():
        if isinstance(value, Mapping):
            yield from _leaves(f"{place}.{name}", value)
        elif isinstance(value, torch.Tensor):
            yield f"{place}.{name}", value
        elif isinstance(value, int):
            yield f"{place}.{name}", torch.tensor(value)
        else:
            raise TypeError(f"optimizer state {name!r} is {type(value).__name__}, expected a tensor")


def empty_optimizer_tensors(
    optimizer: torch.optim.Optimizer, described: Mapping[str, torch.Tensor], prefix: str = "optimizer."
) -> dict[str, torch.Tensor]:
    """Tensors of the optimizer's state to be filled: those of `described` (by name, of any memory) that `optimizer_tensors` gave,
    divided as the parameters are."""
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    tensors = {}
    for name, like in sorted(described.items()):
        if name.startswith(prefix):
            parameter = parameters[int(name.removeprefix(prefix).split(".")[0])]
            alike = (like.shape, like.dtype) == (parameter.shape, parameter.dtype)
            tensors[name] = torch.zeros_like(parameter) if alike else torch.zeros_like(like, device="cpu")
    return tensors


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], prefix: str = "optimizer."
) -> None:
    """Puts what `optimizer_tensors` gave back into an optimizer over the same parameters."""
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            index, *path, last = name.removeprefix(prefix).split(".")
            place = state.setdefault(int(index), {})
            for part in path:
                place = place.setdefault(part, {})
            counter = tensor.ndim == 0 and tensor.dtype == torch.int64
            place[last] = int(tensor) if counter else tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
