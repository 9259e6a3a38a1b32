"""The model that a stage goes on training: where it comes from and what the stage leaves behind."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from training import adapters, checkpoint, seeding
from training.context import StageContext
from training.model import check_head, load


def load_policy(context: StageContext) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The checkpoint that the stage starts from and its tokenizer, with new adapters where the recipe has `model.lora`.

    Raises:
        UserError: it cannot be loaded, or adapted as the recipe says.
    """
    model, tokenizer = load(context.checkpoint(context.config.start))
    return adapted(model, context), tokenizer


def adapted(model: PreTrainedModel, context: StageContext) -> PreTrainedModel:
    """`model`, with new adapters where the recipe has `model.lora`, drawn by seed and stage."""
    lora = context.recipe.model.lora
    if lora.rank:
        adapters.attach(model, lora, seeding.key(context.recipe.seed, context.name, "adapters"))
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
    checkpoint.save_model(model, tokenizer, folder, style)
    if adapters.has(model):
        start, pretrained = context.config.start, context.recipe.model.pretrained
        # base holds a pretrained model as it is
        base = pretrained if start == "base" and pretrained else str(context.checkpoint(start))
        adapters.save(model, context.stage.path / adapters.FOLDER, base)
    return folder
