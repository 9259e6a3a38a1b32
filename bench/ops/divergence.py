"""linear_divergence, topk_divergence, linear_topk_divergence: inputs, exact results in float64, and everyone who computes them.

N tokens, V vocabulary, H hidden size of the student, D of the teacher, S ids of a teacher for each token. The layout of a case
of linear_divergence is the kind of its divergence.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from . import logprob
from .cases import Case
from .numerics import Exact, of_head, of_logits
from .peers import Call, Draw, Inputs, Op, Ours, Peer, Plain, needs, theirs

BETA = 0.5
_TRL_BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": BETA}  # TRL's names of the kinds
_SHARE = 0.9  # that a teacher gives to its ids together
_FOUR = "hidden,weight,teacher_hidden,teacher_weight"


# --- inputs ---


def inputs(case: Case, device: torch.device) -> Inputs:
    """Hidden states and heads whose logits have a deviation of 2; the loss is the mean divergence."""
    s, draw, dtype = case.sizes, Draw(device), case.torch_dtype
    tensors = {}
    for who, size in (("", s["H"]), ("teacher_", s["D"])):
        tensors[f"{who}hidden"] = draw.normal(s["N"], size).to(dtype)
        tensors[f"{who}weight"] = draw.normal(s["V"], size).to(dtype) * (2 / size**0.5)
    above = {
        "divergence": torch.full((s["N"],), 1.0 / s["N"], device=device),
        "loss": torch.ones((), device=device),
    }
    return Inputs(tensors, ("hidden", "weight"), above)


def topk_inputs(case: Case, device: torch.device) -> Inputs:
    """Logits (N, V), or hidden states and a head, and log-probs of S ids of each token, spread over the vocabulary."""
    given = (logprob.linear_inputs if "H" in case.sizes else logprob.token_inputs)(case, device)
    scores = 2 * Draw(device, 1).normal(case.sizes["N"], case.sizes["S"])
    stored = {
        "ids": logprob.spread_ids(case, given.tensors.pop("targets")),
        "logp": F.log_softmax(scores, -1) + torch.tensor(_SHARE).log(),
    }
    above = {"divergence": torch.full((len(scores),), 1.0 / len(scores), device=device)}
    return replace(given, tensors=given.tensors | stored, upstream=above)


# --- exact, in float64 ---


def exact(case: Case, inputs: Inputs) -> dict[str, Exact]:
    """Of both heads, and the loss."""
    hidden, weight, teacher_hidden, teacher_weight = (one.detach() for one in inputs.of(_FOUR))
    wide = teacher_weight.double()

    def rows(logits: Tensor, which: slice) -> tuple[Tensor, Tensor]:
        return divergence_rows(logits, teacher_hidden[which].double() @ wide.T, case.layout)

    found = of_head(hidden, weight, "divergence", rows, inputs.upstream["divergence"])
    return found | {"loss": Exact(found["divergence"].values.mean())}


def topk_exact(case: Case, inputs: Inputs) -> dict[str, Exact]:
    """Of logits, or of a head."""

    def rows(logits: Tensor, which: slice) -> tuple[Tensor, Tensor]:
        return _topk_rows(logits, inputs["ids"][which], inputs["logp"][which].double())

    asked = "divergence", rows, inputs.upstream["divergence"]
    if "logits" in inputs.tensors:
        return of_logits(inputs["logits"], *asked)
    return of_head(inputs["hidden"], inputs["weight"], *asked)


def _topk_rows(logits: Tensor, ids: Tensor, logp: Tensor) -> tuple[Tensor, Tensor]:
    """(forward KL with all other ids as one event, its slope in the logits (N, V)) in float64."""
    q = F.log_softmax(logits, -1)
    other = torch.ones_like(q, dtype=torch.bool).scatter(1, ids, False)
    rest = torch.where(other, q, -torch.inf).logsumexp(1, keepdim=True)
    teacher_rest = (-logp.exp().sum(1, keepdim=True)).log1p()
    of_ids = (logp.exp() * (logp - q.gather(1, ids))).sum(1)
    of_rest = (teacher_rest.exp() * (teacher_rest - rest)).squeeze(1)
    slope = torch.where(other, q.exp() * -(teacher_rest - rest).expm1(), 0.0)
    return of_ids + of_rest, slope.scatter(1, ids, q.gather(1, ids).exp() - logp.exp())


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


# --- plain PyTorch ---


def _textbook(case: Case) -> Callable[..., Tensor]:
    def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
        return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)

    def divergence(hidden: Tensor, weight: Tensor, x: Tensor, w: Tensor) -> Tensor:
        q = F.log_softmax(F.linear(hidden, weight).float(), -1)
        p = F.log_softmax(F.linear(x, w).float(), -1)
        if case.layout != "jsd":
            return kl(p, q) if case.layout == "forward_kl" else kl(q, p)
        mean = (BETA * p.exp() + (1 - BETA) * q.exp()).log()
        return BETA * kl(p, mean) + (1 - BETA) * kl(q, mean)

    return divergence


def _topk(logits: Tensor, ids: Tensor, logp: Tensor) -> Tensor:
    """What people write: the rest is 1 - sum, kept away from 0."""
    q = F.log_softmax(logits.float(), -1).gather(-1, ids)
    rest, teacher_rest = ((1 - each.exp().sum(-1)).clamp(min=1e-8) for each in (q, logp))
    of_rest = teacher_rest * (teacher_rest / rest).log()
    return (logp.exp() * (logp - q)).sum(-1) + of_rest


# --- who computes them ---


def _liger(case: Case, inputs: Inputs) -> Call:
    """Its beta is one of JSD, whose ends 0 and 1 are the forward and the reverse KL; the loss is the mean over the tokens."""
    module = needs("liger_kernel.chunked_loss", "liger-kernel")
    loss = module.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=_TRL_BETA[case.layout]
    )
    targets = torch.zeros(case.sizes["N"], dtype=torch.int64, device=inputs["hidden"].device)
    return lambda inputs: {"loss": loss(*inputs.of(_FOUR), targets)}


_OURS = Ours(
    "linear_divergence", _FOUR, "divergence", lambda case, inputs: {"kind": case.layout, "beta": BETA}
)
_OURS_TOPK = Ours("topk_divergence", "logits,ids,logp", "divergence")
_OURS_LINEAR_TOPK = Ours("linear_topk_divergence", "hidden,weight,ids,logp", "divergence")
DIVERGENCE = (
    *Plain(_textbook, _FOUR, "divergence").around(
        _OURS.peer("slopes saved", save_logits=True), _OURS.peer("logits recomputed", save_logits=False)),
    theirs("TRL, chunked", "trl", "trl.kernels.chunked_divergence", lambda trl, x, case: {
        "divergence": trl.ChunkedDivergenceFunction.apply(
            x["hidden"], x["weight"], None, x["teacher_hidden"], x["teacher_weight"], None, _TRL_BETA[case.layout])[0]}),
    Peer("Liger, chunked", _liger, package="liger-kernel", compiles=True),
    logprob.bare_gemms("four bare GEMMs"),
    logprob.bare_gemms("six bare GEMMs", recompute=True),
)  # fmt: skip
TOPK = Plain(lambda case: _topk, "logits,ids,logp", "divergence").around(_OURS_TOPK.peer())
LINEAR_TOPK = (
    *Plain(lambda case: logprob.of_hidden(_topk), "hidden,weight,ids,logp", "divergence").around(
        _OURS_LINEAR_TOPK.peer()
    ),
    logprob.bare_gemms("three bare GEMMs"),
)
OPS = {
    "topk_divergence": Op(_OURS_TOPK, topk_inputs, topk_exact, TOPK),
    "linear_topk_divergence": Op(_OURS_LINEAR_TOPK, topk_inputs, topk_exact, LINEAR_TOPK),
    "linear_divergence": Op(_OURS, inputs, exact, DIVERGENCE),
}
