"""Kept sets in plain PyTorch: logits outside of them are -inf, and what follows is that of all logits.

N tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .completions import EACH_TOKEN
from .events import PADDING
from .kept import EntriesCall, Kept, allowed, entries, with_verdict

if TYPE_CHECKING:
    from .token import Rows, TokenCall


def among_kept(kept: Kept, rows: Rows) -> tuple[Rows, Tensor]:
    """(rows whose targets are members of their sets, or PADDING where ignored; the verdict on those that were not)"""
    found = entries(EntriesCall(*kept, rows.targets, rows.ignore_index, rows.vocabulary))
    first = kept.ids[kept.offsets[:-1].clamp(max=kept.ids.shape[0] - 1)].clamp(0, rows.vocabulary - 1)
    targets = torch.where(found.verdict == 0, rows.targets, first)
    # a member may be ``ignore_index``; one below 0 is an error, not padding
    targets = torch.where(targets < 0, rows.vocabulary, targets)
    targets = torch.where(rows.targets == rows.ignore_index, PADDING, targets)
    return rows._replace(targets=targets, ignore_index=PADDING), found.verdict


def of_logits(call: TokenCall, dense: Callable[[TokenCall], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    assert call.kept is not None
    rows, verdict = among_kept(call.kept, call.rows)
    logits = call.logits
    mask = allowed(call.kept, 0, logits.shape[-1]).view(logits.shape)
    masked = torch.where(mask, logits, -torch.inf)
    logp, entropy = dense(call._replace(logits=masked, rows=rows, completions=EACH_TOKEN, kept=None))
    logp, entropy, _ = with_verdict(verdict, logp, entropy, logp.new_empty((0, 0)))
    reduce = call.completions.reduced
    return reduce(logp), reduce(entropy) if call.with_entropy else entropy
