"""sft1 and sft2: next-token training on sampled and selected responses, with the loss on the response alone.

sft1 learns the cold-start data, sft2 the mix of rejection, or either a file of traces; both start where the recipe says.
"""

from __future__ import annotations

from typing import Any

from training import prompts, responses, traces
from training.context import StageContext
from training.document import Document
from training.loops import next_token
from training.policy import load_policy, save_policy

DATA = {"sft1": "cold_start", "sft2": "rejection"}


def run(context: StageContext) -> dict[str, Any]:
    """Train on the data of the parent; writes checkpoint."""
    data, system = context.config.data, context.recipe.system_prompt
    documents = traces.read(data, system) if data else _drawn(context)
    model, tokenizer = load_policy(context)
    metrics = next_token.train(model, tokenizer, documents, context.config, context)
    save_policy(model, tokenizer, context, responses.style_of(context.name, context.recipe))
    return {**metrics, "documents": len(documents)}


def _drawn(context: StageContext) -> list[Document]:
    rows = context.inputs[DATA[context.name]].read_data("data.jsonl")
    return [
        Document(
            row["response_text"],
            [*(prompts.Turn(*turn) for turn in row.get("turns_before", ())), *prompts.ask(row["question"])],
        )
        for row in rows
    ]
