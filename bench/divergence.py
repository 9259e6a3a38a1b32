"""linear_divergence: inputs, exact results in float64, and everyone who computes it.

N tokens, V vocabulary, H hidden size of the student, D of the teacher. The layout of a case is the kind of its divergence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import Case
from .logprob import CHECKED_COLUMNS, spread
from .numerics import Exact
from .peers import COMPILED, EAGER, OURS, Call, Inputs, Ours, Outputs, Peer, compiled, needs

BETA = 0.5
_ROWS_AT_ONCE = 128
# TRL's names of the kinds
_TRL_BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": BETA}


def inputs(case: Case, device: torch.device) -> Inputs:
    """Hidden states and heads whose logits have a deviation of 2; the loss is the mean divergence."""
    sizes = case.sizes
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(case.torch_dtype)

    tokens = sizes["N"]
    return Inputs(
        {
            "hidden": normal(tokens, sizes["H"]),
            "weight": normal(sizes["V"], sizes["H"]) * (2 / sizes["H"] ** 0.5),
            "teacher_hidden": normal(tokens, sizes["D"]),
            "teacher_weight": normal(sizes["V"], sizes["D"]) * (2 / sizes["D"] ** 0.5),
        },
        ("hidden", "weight"),
        {
            "divergence": torch.full((tokens,), 1.0 / tokens, device=device),
            "loss": torch.ones((), device=device),
        },
    )


def exact(case: Case, inputs: Inputs) -> dict[str, Exact]:
    """Divergence, loss and dX of every token, dW of up to CHECKED_COLUMNS rows of the head."""
    hidden, weight = inputs["hidden"], inputs["weight"].double()
    teacher_weight = inputs["teacher_weight"].double()
    columns = spread(case.sizes["V"], CHECKED_COLUMNS, weight.device)
    d_weight = torch.zeros(len(columns), weight.shape[1], dtype=torch.float64, device=weight.device)
    divergence, d_hidden = [], []
    for start in range(0, hidden.shape[0], _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        x = hidden[rows].double()
        found, slopes = divergence_rows(
            x @ weight.T, inputs["teacher_hidden"][rows].double() @ teacher_weight.T, case.layout
        )
        slopes *= inputs.upstream["divergence"][rows].double().unsqueeze(1)
        divergence.append(found)
        d_hidden.append(slopes @ weight)
        d_weight += slopes[:, columns].T @ x
    every = torch.cat(divergence)
    return {
        "divergence": Exact(every),
        "loss": Exact(every.mean()),
        "d hidden": Exact(torch.cat(d_hidden)),
        "d weight": Exact(d_weight, columns),
    }


def divergence_rows(student: Tensor, teacher: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """(divergence, its slope in the student's logits) of logits (N, V) in float64."""
    q, p = (_log_probs(logits) for logits in (student, teacher))
    if kind == "forward_kl":
        return _kl(p, q), p.exp() * torch.expm1(q - p)
    if kind == "reverse_kl":
        value = _kl(q, p)
        return value, q.exp() * (q - p - value.unsqueeze(1))
    from_mean = _kl(q, p, share=BETA)
    value = BETA * _kl(p, q, share=1 - BETA) + (1 - BETA) * from_mean
    log_ratio = -torch.log1p(BETA * torch.expm1(p - q))
    return value, (1 - BETA) * q.exp() * (log_ratio - from_mean.unsqueeze(1))


def _log_probs(logits: Tensor) -> Tensor:
    """From differences to the largest, without which they would cancel where it leads."""
    largest, place = logits.max(1, keepdim=True)
    shifted = logits - largest
    return shifted - shifted.exp().scatter(1, place, 0.0).sum(1, keepdim=True).log1p()


def _kl(p: Tensor, q: Tensor, share: float = 1.0) -> Tensor:
    """KL(p | share q + (1 - share) p) of log-probs: sum p (y - log(1 + y)), y = share (q / p - 1); no term is negative."""
    y = share * torch.expm1(q - p)
    log = q - p if share == 1.0 else torch.log1p(y)
    return (p.exp() * (y - log)).sum(1)


# --- plain PyTorch, which eager and torch.compile share ---


def _textbook(kind: str) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    def divergence(hidden: Tensor, weight: Tensor, x: Tensor, w: Tensor) -> Tensor:
        q = F.log_softmax(F.linear(hidden, weight).float(), -1)
        p = F.log_softmax(F.linear(x, w).float(), -1)
        if kind == "forward_kl":
            return F.kl_div(q, p, log_target=True, reduction="none").sum(-1)
        if kind == "reverse_kl":
            return F.kl_div(p, q, log_target=True, reduction="none").sum(-1)
        mean = (BETA * p.exp() + (1 - BETA) * q.exp()).log()
        of_teacher = F.kl_div(mean, p, log_target=True, reduction="none").sum(-1)
        of_student = F.kl_div(mean, q, log_target=True, reduction="none").sum(-1)
        return BETA * of_teacher + (1 - BETA) * of_student

    return divergence


def _four(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return inputs["hidden"], inputs["weight"], inputs["teacher_hidden"], inputs["teacher_weight"]


def _torch(function: Callable[..., Tensor]) -> Call:
    return lambda inputs: {"divergence": function(*_four(inputs))}


# --- others ---


def _trl(case: Case, inputs: Inputs) -> Call:
    function = needs("trl.kernels.chunked_divergence", "trl").ChunkedDivergenceFunction

    def call(inputs: Inputs) -> Outputs:
        hidden, weight, x, w = _four(inputs)
        return {"divergence": function.apply(hidden, weight, None, x, w, None, _TRL_BETA[case.layout])[0]}

    return call


def _liger(case: Case, inputs: Inputs) -> Call:
    """Its beta is one of JSD, whose ends 0 and 1 are the forward and the reverse KL; the loss is the mean over the tokens."""
    module = needs("liger_kernel.chunked_loss", "liger-kernel")
    loss = module.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=_TRL_BETA[case.layout]
    )
    targets = torch.zeros(case.sizes["N"], dtype=torch.int64, device=inputs["hidden"].device)
    return lambda inputs: {"loss": loss(*_four(inputs), targets)}


def bare_gemms(recompute: bool) -> Callable[[Case, Inputs], Any]:
    """The GEMMs of both heads alone: two forward, two or four backward, nothing between."""

    def make(case: Case, inputs: Inputs) -> Any:
        hidden, weight, x, w = (value.detach() for value in _four(inputs))
        gradient = torch.ones(hidden.shape[0], weight.shape[0], dtype=hidden.dtype, device=hidden.device)

        def forward() -> object:
            return hidden @ weight.T, x @ w.T

        def backward() -> object:
            again = forward() if recompute else None
            return again, gradient @ weight, gradient.T @ hidden

        return {"forward": forward, "backward": backward}

    return make


OURS_DIVERGENCE = Ours(
    "linear_divergence",
    lambda case, inputs: (_four(inputs), {"kind": case.layout, "beta": BETA}),
    lambda found: {"divergence": found},
)
DIVERGENCE = (
    Peer(EAGER, lambda case, inputs: _torch(_textbook(case.layout))),
    OURS_DIVERGENCE.peer(f"{OURS}, slopes saved", save_logits=True),
    OURS_DIVERGENCE.peer(f"{OURS}, logits recomputed", save_logits=False),
    Peer(COMPILED, lambda case, inputs: _torch(compiled(_textbook(case.layout))), compiles=True),
    Peer("TRL, chunked", _trl, package="trl"),
    Peer("Liger, chunked", _liger, package="liger-kernel", compiles=True),
    Peer("four bare GEMMs", bare_gemms(recompute=False), kind="floor"),
    Peer("six bare GEMMs", bare_gemms(recompute=True), kind="floor"),
)
