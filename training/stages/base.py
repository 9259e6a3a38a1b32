"""base: pretrains the small model on the corpus, or takes a pretrained checkpoint as it is."""

from __future__ import annotations

from typing import Any

from training import checkpoint, corpus, responses
from training.context import StageContext
from training.loops import next_token
from training.model import build_model
from training.pretrained import load_pretrained
from training.tokenizer import build_tokenizer


def run(context: StageContext) -> dict[str, Any]:
    """Train from nothing on `steps` x `batch_size` documents, each seen once; writes checkpoint."""
    recipe, config = context.recipe, context.config
    if recipe.model.pretrained:
        model, tokenizer = load_pretrained(recipe.model.pretrained)
        metrics: dict[str, Any] = {"steps": 0}
    else:
        tokenizer = build_tokenizer()
        model = build_model(recipe.model, tokenizer, recipe.seed)
        options = recipe.task_options.get("arithmetic", {})
        documents = corpus.documents(
            recipe.seed, config.steps * config.batch_size, mix=config.corpus, **options
        )
        metrics = next_token.train(model, tokenizer, documents, config, context)
    style = responses.style_of(context.name, recipe)
    checkpoint.save_model(model, tokenizer, context.stage.path / "checkpoint", style)
    return {**metrics, "parameters": sum(parameter.numel() for parameter in model.parameters())}
