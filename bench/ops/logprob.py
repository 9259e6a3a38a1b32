"""The log-prob ops: inputs, exact results in float64, and everyone who computes them.

N tokens, V vocabulary, H hidden, B completions of at most L tokens, G completions a prompt, S ids that a sampler kept.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import r1kernels

from .cases import Case, lengths
from .numerics import Exact, of_head, softmax_rows, spread, wide
from .peers import OURS, TRAINING, Call, Draw, Inputs, Op, Ours, Outputs, Peer, Plain, Unavailable, theirs

_CHECKED_ROWS = 256
TRL_CHUNK = 32768  # what TRL's trainers pass


# --- inputs ---


def token_inputs(case: Case, device: torch.device) -> Inputs:
    """Random logits (N, V) and targets, and random gradients of log-prob and entropy."""
    n, v, draw = case.sizes["N"], case.sizes["V"], Draw(device)
    tensors = {"logits": (draw.normal(n, v) * 3).to(case.torch_dtype), "targets": draw.below(v, n)}
    return Inputs(tensors, ("logits",), {"logp": draw.normal(n), "entropy": draw.normal(n)})


def linear_inputs(case: Case, device: torch.device, seed: int = 0) -> Inputs:
    """Hidden states, a head whose logits have a deviation of 2, targets; the loss is the mean negative log-prob."""
    s, dtype, draw = case.sizes, case.torch_dtype, Draw(device, seed)
    n = s["N"] if "N" in s else s["B"] * s["L"]
    tensors = {
        "hidden": draw.normal(n, s["H"]).to(dtype),
        "weight": (draw.normal(s["V"], s["H"]) * (2 / s["H"] ** 0.5)).to(dtype),
        "targets": draw.below(s["V"], n),
    }
    above = {"logp": torch.full((n,), -1.0 / n, device=device), "loss": torch.ones((), device=device)}
    return Inputs(tensors, ("hidden", "weight"), above)


def kept_inputs(case: Case, device: torch.device) -> Inputs:
    """Those of linear_logprobs, and for each token S ids, its target among them."""
    given = linear_inputs(case, device)
    ids = spread_ids(case, given["targets"])
    offsets = torch.arange(case.sizes["N"] + 1) * case.sizes["S"]
    return replace(given, tensors={**given.tensors, "ids": ids, "offsets": offsets})


def spread_ids(case: Case, targets: Tensor) -> Tensor:
    """(N, S): ids of each token, spread over the vocabulary, its target first."""
    steps = torch.arange(case.sizes["S"], device=targets.device) * (case.sizes["V"] // case.sizes["S"])
    return (targets.unsqueeze(1) + steps) % case.sizes["V"]


def grouped_inputs(case: Case, device: torch.device) -> Inputs:
    """Completions of uneven lengths, padded (B, L, V) with a mask or packed (N, V) with cu_seqlens."""
    s, draw, found = case.sizes, Draw(device), lengths(case).to(device)
    packed = case.layout == "packed"
    places = (int(found.sum()),) if packed else (s["B"], s["L"])
    tensors = {
        "logits": (draw.normal(*places, s["V"]) * 3).to(case.torch_dtype),
        "targets": draw.below(s["V"], *places),
    }
    if packed:
        tensors["cu_seqlens"] = F.pad(found.cumsum(0), (1, 0)).to(torch.int32)
    else:
        tensors["mask"] = torch.arange(s["L"], device=device) < found.unsqueeze(1)
    return Inputs(tensors, ("logits",), {"logp": draw.normal(s["B"])})


def linear_grouped_inputs(case: Case, device: torch.device) -> Inputs:
    """Those of linear_logprobs as completions of uneven lengths, padded: hidden states (B, L, H) and a mask."""
    s, given = case.sizes, linear_inputs(case, device)
    tensors = {
        "hidden": given["hidden"].view(s["B"], s["L"], -1),
        "weight": given["weight"],
        "targets": given["targets"].view(s["B"], s["L"]),
        "mask": torch.arange(s["L"], device=device) < lengths(case).to(device).unsqueeze(1),
    }
    return Inputs(tensors, given.leaves, {"logp": Draw(device, 1).normal(s["B"])})


# --- exact, in float64 ---


def token_exact(case: Case, inputs: Inputs) -> dict[str, Exact]:
    """Of up to _CHECKED_ROWS rows, the first and the last among them."""
    rows = spread(case.sizes["N"], _CHECKED_ROWS, inputs["targets"].device)
    above = (inputs.upstream[name][rows] for name in ("logp", "entropy") if name in inputs.upstream)
    found = softmax_rows(inputs["logits"][rows], inputs["targets"][rows], *above)
    return {name: Exact(values, rows) for name, values in found.items()}


def linear_exact(case: Case, inputs: Inputs) -> dict[str, Exact]:
    """Of a head, given each token the gradient of its log-prob; and the loss."""
    targets = inputs["targets"].flatten()

    def rows(logits: Tensor, which: slice) -> tuple[Tensor, Tensor]:
        found = softmax_rows(logits, targets[which], logits.new_ones(len(logits)))
        return found["logp"], found["d logits"]

    hidden = inputs["hidden"].flatten(0, -2)
    found = of_head(hidden, inputs["weight"], "logp", rows, inputs.upstream["logp"])
    return found | {"loss": Exact(-found["logp"].values.mean())}


def kept_exact(case: Case, inputs: Inputs) -> dict[str, Exact]:
    """By autograd; dW of the rows of the head that are read."""
    read, place = inputs["ids"].unique(return_inverse=True)
    parts = inputs["hidden"], inputs["weight"][read]
    hidden, head = leaves = [part.detach().double().requires_grad_() for part in parts]
    logits = (head[place] @ hidden.unsqueeze(2)).squeeze(2)
    logp = F.log_softmax(logits, -1)[:, 0]  # the target stands first
    d_hidden, d_weight = torch.autograd.grad(logp, leaves, inputs.upstream["logp"].double())
    values = {"logp": logp.detach(), "loss": -logp.detach().mean(), "d hidden": d_hidden}
    return {name: Exact(value) for name, value in values.items()} | {"d weight": Exact(d_weight, read)}


def grouped_exact(case: Case, inputs: Inputs) -> dict[str, Exact]:
    """Sums and logits gradients of a few completions, the first and the last among them."""
    found, targets = lengths(case).to(inputs["targets"].device), inputs["targets"].flatten()
    chosen = spread(case.sizes["B"], 2 * case.sizes["G"], targets.device)
    counts = (
        torch.ones_like(targets, dtype=torch.bool) if case.layout == "packed" else inputs["mask"].flatten()
    )
    of = torch.arange(len(found), device=targets.device)
    completion = of.repeat_interleave(found if case.layout == "packed" else case.sizes["L"])
    places = torch.isin(completion, chosen).nonzero().squeeze(1)
    above = inputs.upstream["logp"][completion[places]] * counts[places]
    rows = softmax_rows(inputs["logits"].flatten(0, -2)[places], targets[places], above)
    sums = rows["logp"].new_zeros(len(found)).index_add_(0, completion[places], rows["logp"] * counts[places])
    return {"logp": Exact(sums[chosen], chosen), "d logits": Exact(rows["d logits"], places)}


def linear_grouped_exact(case: Case, inputs: Inputs) -> dict[str, Exact]:
    """Sums of linear_exact, given each token the gradient of its completion, 0 where the mask is 0."""
    above = (inputs.upstream["logp"].unsqueeze(1) * inputs["mask"]).flatten()
    found = linear_exact(case, replace(inputs, upstream={"logp": above}))
    sums = (found["logp"].values.view(inputs["mask"].shape) * inputs["mask"]).sum(-1)
    return {"logp": Exact(sums), "d hidden": found["d hidden"], "d weight": found["d weight"]}


# --- plain PyTorch ---


def log_softmax(logits: Tensor, targets: Tensor) -> Tensor:
    return F.log_softmax(wide(logits), dim=-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def _with_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    log_probs = F.log_softmax(logits.float(), dim=-1)
    logp = log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return logp, -(log_probs.exp() * log_probs).sum(-1)


def of_hidden(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of logits as one of hidden states and a head."""
    return lambda hidden, weight, *others: function(F.linear(hidden, weight), *others)


def _masked(logits: Tensor, targets: Tensor, ids: Tensor) -> Tensor:
    logits = logits.float()
    others = torch.ones_like(logits, dtype=torch.bool).scatter_(1, ids, False)
    return log_softmax(logits.masked_fill(others, -torch.inf), targets)


def _sums(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    return (log_softmax(logits, targets) * mask).sum(-1)


def _packed_sums(logits: Tensor, targets: Tensor, cu_seqlens: Tensor) -> Tensor:
    logp = log_softmax(logits, targets)
    completion = torch.bucketize(torch.arange(len(logp), device=logp.device), cu_seqlens[1:], right=True)
    return logp.new_zeros(len(cu_seqlens) - 1).index_add(0, completion, logp)


# --- others ---


def head(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return inputs["hidden"], inputs["weight"], inputs["targets"]


def trl_logp(trl: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """By TRL's chunked kernel."""
    found: Tensor = trl.ChunkedLogProbFunction.apply(
        hidden, weight, None, targets, 1.0, TRL_CHUNK, None, 1.0, ()
    )[0]
    return found


def _trl_token(trl: Any, inputs: Inputs, case: Case) -> Outputs:
    logp, entropy = trl.selective_log_softmax_and_entropy(*inputs.of("logits,targets"))
    return {"logp": logp, "entropy": entropy}


def _cce(filter_eps: str | None) -> Callable[[Any, Inputs, Case], Outputs]:
    return lambda cce, inputs, case: {"loss": cce.linear_cross_entropy(*head(inputs), filter_eps=filter_eps)}


def _torch_linear(chunked: bool) -> Callable[[Case, Inputs], Call]:
    def make(case: Case, inputs: Inputs) -> Call:
        function = getattr(F, "linear_cross_entropy", None)
        if function is None:
            raise Unavailable(f"torch {torch.__version__} has no F.linear_cross_entropy")
        options = torch.nn.LinearCrossEntropyOptions() if chunked else None
        return lambda inputs: {"loss": function(*head(inputs), options=options)}

    return make


def _liger_triton(module: Any, inputs: Inputs, case: Case) -> Outputs:
    found = module.LigerFusedLinearCrossEntropyFunction.apply(*head(inputs))
    return {"loss": found[0] if isinstance(found, tuple) else found}


def _liger_cute(module: Any, inputs: Inputs, case: Case) -> Outputs:
    """Log-probs of each token by Liger's Hopper kernel; on other devices its name stands for a loop over chunks."""
    if torch.cuda.get_device_capability() != (9, 0):
        raise Unavailable("Liger's fused linear log-probs (CuTe) need sm_90")
    return {"logp": -module.LigerFusedLinearScaledCrossEntropyFunction.apply(*head(inputs))}


def _liger_chunked(module: Any, inputs: Inputs, case: Case) -> Outputs:
    hidden, weight, targets = head(inputs)
    found = module.LigerFusedLinearPPOBase.chunk_forward(hidden[None], weight, targets[None], temperature=1.0)
    return {"logp": found.squeeze(0)}


def _whole_head(case: Case, inputs: Inputs) -> Call:
    """All logits by torch's GEMM, of which token_logprobs reads the kept ones."""

    def call(inputs: Inputs) -> Outputs:
        logits = F.linear(inputs["hidden"], inputs["weight"])
        logp: Any = r1kernels.token_logprobs(logits, inputs["targets"], **_kept_options(case, inputs))
        return {"logp": logp}

    return call


def bare_gemms(name: str, recompute: bool = False) -> Peer:
    """The GEMMs of a head alone, or of two, in the dtype of the inputs: forward, of the first backward, nothing between."""

    def make(case: Case, inputs: Inputs) -> Any:
        hidden, weight, *teacher = (
            one.detach() for one in inputs.of("hidden,weight,teacher_hidden,teacher_weight")
        )
        hidden = hidden.flatten(0, -2)
        gradient = hidden.new_ones(len(hidden), len(weight))

        def forward() -> object:
            return hidden @ weight.T, teacher[0] @ teacher[1].T if teacher else None

        def backward() -> object:
            return forward() if recompute else None, gradient @ weight, gradient.T @ hidden

        return {"forward": forward, "backward": backward}

    return Peer(name, make, kind="floor")


# --- who computes them ---


def _overwritable(inputs: Inputs) -> Inputs:
    """A copy of the logits for a backward that overwrites them; as the result of an op it is no leaf, as those of a model."""
    logits = inputs["logits"].detach().requires_grad_().clone()
    return replace(inputs, tensors={**inputs.tensors, "logits": logits})


def _kept_options(case: Case, inputs: Inputs) -> dict[str, Any]:
    return {"kept": (inputs["ids"].flatten(), inputs["offsets"])}


def _grouped_options(case: Case, inputs: Inputs) -> dict[str, Any]:
    layout = "mask" if "mask" in inputs.tensors else "cu_seqlens"
    return {layout: inputs[layout], "group_size": case.sizes["G"]}


_TOKEN = Ours(
    "token_logprobs", "logits,targets", "logp,entropy", lambda case, inputs: {"return_entropy": True}
)
_LINEAR = Ours("linear_logprobs", "hidden,weight,targets", "logp")
_KEPT = Ours("linear_logprobs", "hidden,weight,targets", "logp", _kept_options)
_GROUPED = Ours("grouped_logprobs", "logits,targets", "logp", _grouped_options)
_LINEAR_GROUPED = Ours("linear_grouped_logprobs", "hidden,weight,targets", "logp", _grouped_options)
_IN_PLACE = replace(_TOKEN.peer("in place", inplace_backward=True), prepare=_overwritable, phases=TRAINING)


_THREE = bare_gemms("three bare GEMMs")
TOKEN = (
    *Plain(lambda case: _with_entropy, "logits,targets", "logp,entropy").around(_TOKEN.peer(), _IN_PLACE),
    theirs("TRL", "trl", "trl.trainer.utils", _trl_token),
)
LINEAR = (
    *Plain(lambda case: of_hidden(log_softmax), "hidden,weight,targets", "logp").around(
        _LINEAR.peer("logits saved", save_logits=True), _LINEAR.peer("logits recomputed", save_logits=False)),
    Peer("F.linear_cross_entropy", _torch_linear(chunked=False)),
    Peer("F.linear_cross_entropy, chunked", _torch_linear(chunked=True)),
    theirs("TRL, chunked", "trl", "trl.kernels", lambda trl, x, case: {"logp": trl_logp(trl, *head(x))}),
    theirs("Liger, chunked", "liger-kernel", "liger_kernel.chunked_loss.fused_linear_ppo", _liger_chunked),
    theirs("Liger, Triton", "liger-kernel", "liger_kernel.ops.fused_linear_cross_entropy", _liger_triton, gpu=True),
    theirs("Liger, CuTe", "liger-kernel", "liger_kernel.ops.fused_linear_scaled_cross_entropy", _liger_cute, gpu=True),
    theirs("cut-cross-entropy, exact", "cut-cross-entropy", "cut_cross_entropy", _cce(None), gpu=True),
    theirs("cut-cross-entropy, filtered", "cut-cross-entropy", "cut_cross_entropy", _cce("high"), gpu=True),
    theirs("quack", "quack-kernels", "quack.linear_cross_entropy",
           lambda quack, x, case: {"loss": quack.chunked_linear_cross_entropy(*head(x))}, gpu=True),
    theirs("verl", "verl", "verl.utils.kernel.linear_cross_entropy",
           lambda verl, x, case: {"logp": verl.linear_cross_entropy(*head(x), 1.0, "none")[0]}, gpu=True),
    _THREE,
    bare_gemms("four bare GEMMs", recompute=True),
)  # fmt: skip
KEPT = (
    *Plain(lambda case: of_hidden(_masked), "hidden,weight,targets,ids", "logp").around(
        _KEPT.peer(), Peer(f"{OURS}, whole head", _whole_head, kind="ours", package=OURS)
    ),
    bare_gemms("three bare GEMMs of the whole head"),
)
GROUPED = Plain(
    lambda case: _packed_sums if case.layout == "packed" else _sums, "logits,targets,mask,cu_seqlens", "logp"
).around(_GROUPED.peer())
LINEAR_GROUPED = (
    *Plain(lambda case: of_hidden(_sums), "hidden,weight,targets,mask", "logp").around(
        _LINEAR_GROUPED.peer()
    ),
    _THREE,
)
OPS = {
    "token_logprobs": Op(_TOKEN, token_inputs, token_exact, TOKEN),
    "linear_logprobs": Op(_LINEAR, linear_inputs, linear_exact, LINEAR),
    "kept_logprobs": Op(_KEPT, kept_inputs, kept_exact, KEPT),
    "grouped_logprobs": Op(_GROUPED, grouped_inputs, grouped_exact, GROUPED),
    "linear_grouped_logprobs": Op(
        _LINEAR_GROUPED, linear_grouped_inputs, linear_grouped_exact, LINEAR_GROUPED
    ),
}
