"""Students of the distillation: small dense models of a public architecture, from random weights or a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from training import seeding
from training.errors import UserError
from training.model import prepare
from training.pretrained import load_pretrained

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from training.sections import Student

CONFIGS = {"qwen2": Qwen2Config, "llama": LlamaConfig}


def build(
    sizes: Student, tokenizer: PreTrainedTokenizerBase, seed: int, max_length: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The student's start and its tokenizer: `sizes.pretrained`, or random weights keyed by seed and architecture.

    A student from random weights uses the teacher's tokenizer; a pretrained one keeps its own. Input and output
    embeddings are tied, as in the small models of both families.

    Raises:
        UserError: the hidden size is not divisible by the heads, or a pretrained folder holds no checkpoint.
    """
    if sizes.pretrained:
        model, own = load_pretrained(sizes.pretrained, "distill.students")
        return prepare(model), own
    config = config_of(
        sizes,
        len(tokenizer),
        max_position_embeddings=max_length,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeding.key(seed, "distill", sizes.architecture, "weights"))
        return prepare(AutoModelForCausalLM.from_config(config)), tokenizer


def config_of(sizes: Student, vocab_size: int, **more: int) -> PretrainedConfig:
    """transformers' config of a student from random weights; UserError: hidden size not divisible by the heads."""
    if sizes.hidden_size % sizes.heads:
        raise UserError(
            f"distill.students: hidden_size {sizes.hidden_size} is not divisible by heads {sizes.heads}"
        )
    return CONFIGS[sizes.architecture](
        vocab_size=vocab_size,
        hidden_size=sizes.hidden_size,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        intermediate_size=sizes.intermediate_size,
        tie_word_embeddings=True,
        **more,
    )
