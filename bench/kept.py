"""linear_logprobs with kept sets: inputs, exact results in float64, and whoever computes them.

N tokens, V vocabulary, H hidden, S ids that a sampler kept for each token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import r1kernels

from . import logprob
from .cases import Case
from .numerics import Exact
from .peers import COMPILED, EAGER, OURS, Call, Inputs, Ours, Outputs, Peer, compiled


def inputs(case: Case, device: torch.device) -> Inputs:
    """Those of linear_logprobs, and for each token S ids, its target among them, spread over the vocabulary."""
    given = logprob.linear_inputs(case, device)
    size, vocabulary = case.sizes["S"], case.sizes["V"]
    steps = torch.arange(size, device=device) * (vocabulary // size)
    ids = (given["targets"].unsqueeze(1) + steps) % vocabulary
    offsets = torch.arange(case.sizes["N"] + 1) * size
    return replace(given, tensors={**given.tensors, "ids": ids, "offsets": offsets})


def exact(case: Case, inputs: Inputs) -> dict[str, Exact]:
    """Log-prob, loss and dX of every token, dW of up to CHECKED_COLUMNS rows of the head."""
    hidden, ids = inputs["hidden"].double(), inputs["ids"]
    rows = inputs["weight"][ids].double()
    first = torch.zeros_like(inputs["targets"])  # where the target stands
    logits = (rows @ hidden.unsqueeze(2)).squeeze(2)
    found = logprob.softmax_rows(logits, first, inputs.upstream["logp"])
    columns = ids.flatten()[logprob.spread(ids.numel(), logprob.CHECKED_COLUMNS, ids.device)].unique()
    d_weight = torch.zeros(len(columns), hidden.shape[1], dtype=torch.float64, device=ids.device)
    for place, column in enumerate(columns):
        token, entry = (ids == column).nonzero(as_tuple=True)
        d_weight[place] = found["d logits"][token, entry] @ hidden[token]
    return {
        "logp": Exact(found["logp"]),
        "loss": Exact(-found["logp"].mean()),
        "d hidden": Exact((found["d logits"].unsqueeze(1) @ rows).squeeze(1)),
        "d weight": Exact(d_weight, columns),
    }


def _masked(hidden: Tensor, weight: Tensor, targets: Tensor, ids: Tensor) -> Tensor:
    logits = F.linear(hidden, weight).float()
    others = torch.ones_like(logits, dtype=torch.bool).scatter_(1, ids, False)
    log_probs = F.log_softmax(logits.masked_fill(others, -torch.inf), dim=-1)
    return log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def _torch(function: Callable[..., Any]) -> Call:
    return lambda inputs: {
        "logp": function(inputs["hidden"], inputs["weight"], inputs["targets"], inputs["ids"])
    }


def _whole_head(case: Case, inputs: Inputs) -> Call:
    """All logits by torch's GEMM, of which token_logprobs reads the kept ones."""

    def call(inputs: Inputs) -> Outputs:
        logits = F.linear(inputs["hidden"], inputs["weight"])
        kept = (inputs["ids"].flatten(), inputs["offsets"])
        logp = r1kernels.token_logprobs(logits, inputs["targets"], kept=kept)
        assert isinstance(logp, Tensor)
        return {"logp": logp}

    return call


OURS_KEPT = Ours(
    "linear_logprobs",
    lambda case, inputs: (
        (inputs["hidden"], inputs["weight"], inputs["targets"]),
        {"kept": (inputs["ids"].flatten(), inputs["offsets"])},
    ),
    lambda found: {"logp": found},
)
KEPT = (
    Peer(EAGER, lambda case, inputs: _torch(_masked)),
    OURS_KEPT.peer(),
    Peer(f"{OURS}, whole head", _whole_head, kind="ours"),
    Peer(COMPILED, lambda case, inputs: _torch(compiled(_masked)), compiles=True),
    Peer("three bare GEMMs of the whole head", logprob.bare_gemms(recompute=False), kind="floor"),
)
