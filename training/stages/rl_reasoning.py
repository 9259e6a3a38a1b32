"""rl_reasoning: GRPO from sft1 with accuracy, format and language consistency."""

from __future__ import annotations

from typing import Any

from training import prompts
from training.context import StageContext
from training.stages.zero import reinforce


def run(context: StageContext) -> dict[str, Any]:
    """Train the SFT model with the plain prompt; writes checkpoint."""
    return reinforce(context, prompts.chat)
