"""The model that a stage goes on training: where it comes from and what the stage leaves behind."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from training import adapters, checkpoint, seeding
from training.context import StageContext
from training.model import check_head, load
from training.sections import Lora


def load_policy(context: StageContext) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The checkpoint that the stage starts from and its tokenizer, with new adapters where the recipe has `model.lora`.

    Raises:
        UserError: it cannot be loaded, or adapted as the recipe says.
    """
    model, tokenizer = load(context.checkpoint(context.config.start))
    return adapted(model, context, context.recipe.model.lora), tokenizer


def adapted(
    model: PreTrainedModel, context: StageContext, lora: Lora, setting: str = "model.lora"
) -> PreTrainedModel:
    """`model`, with new adapters where `lora` has a rank, drawn by seed and stage. setting: as messages name `lora`."""
    if lora.rank:
        adapters.attach(model, lora, seeding.key(context.recipe.seed, context.name, "adapters"), setting)
        check_head(model)
    return model


def save_policy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    context: StageContext,
    style: Mapping[str, Any] | None = None,
) -> Path:
    """Writes checkpoint, adapters merged, and beside it the adapters as PEFT has them; returns the checkpoint's folder."""
    folder = context.stage.path / "checkpoint"
    save(model, tokenizer, folder, start_of(context), style)
    return folder


def start_of(context: StageContext) -> str:
    """The folder or the name on the hub of the model that the stage starts from."""
    start, pretrained = context.config.start, context.recipe.model.pretrained
    # base holds a pretrained model as it is
    return pretrained if start == "base" and pretrained else str(context.checkpoint(start))


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    base: str,
    style: Mapping[str, Any] | None = None,
) -> None:
    """Writes a checkpoint, adapters merged, and beside it the adapters as PEFT has them. base: what they began with."""
    checkpoint.save_model(model, tokenizer, folder, style)
    if adapters.has(model):
        adapters.save(model, adapters.beside(folder), base)
