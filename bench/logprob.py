"""The log-prob ops: inputs, exact results in float64, and everyone who computes them.

N tokens, V vocabulary, H hidden, B completions of at most L tokens, G completions a prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import Case, lengths
from .numerics import Exact
from .peers import (
    COMPILED,
    EAGER,
    OURS,
    TRAINING,
    Call,
    Inputs,
    Ours,
    Outputs,
    Peer,
    Unavailable,
    compiled,
    needs,
    only_on_cuda,
)

CHECKED_ROWS = 256
CHECKED_COLUMNS = 512
_ROWS_AT_ONCE = 128
# what TRL's trainers pass
_TRL_CHUNK = 32768


# --- inputs ---


def token_inputs(case: Case, device: torch.device) -> Inputs:
    """Random logits (N, V) and targets, and random gradients of log-prob and entropy."""
    tokens, vocabulary = case.sizes["N"], case.sizes["V"]
    generator = torch.Generator(device).manual_seed(0)
    normal = _normal(generator, device)
    return Inputs(
        {
            "logits": (normal(tokens, vocabulary) * 3).to(case.torch_dtype),
            "targets": torch.randint(vocabulary, (tokens,), generator=generator, device=device),
        },
        ("logits",),
        {"logp": normal(tokens), "entropy": normal(tokens)},
    )


def linear_inputs(case: Case, device: torch.device) -> Inputs:
    """Hidden states, a head whose logits have a deviation of 2, targets; the loss is the mean negative log-prob."""
    tokens, vocabulary, hidden = case.sizes["N"], case.sizes["V"], case.sizes["H"]
    generator = torch.Generator(device).manual_seed(0)
    normal = _normal(generator, device)
    return Inputs(
        {
            "hidden": normal(tokens, hidden).to(case.torch_dtype),
            "weight": (normal(vocabulary, hidden) * (2 / hidden**0.5)).to(case.torch_dtype),
            "targets": torch.randint(vocabulary, (tokens,), generator=generator, device=device),
        },
        ("hidden", "weight"),
        {"logp": torch.full((tokens,), -1.0 / tokens, device=device), "loss": torch.ones((), device=device)},
    )


def grouped_inputs(case: Case, device: torch.device) -> Inputs:
    """Completions of uneven lengths, padded (B, L, V) with a mask or packed (N, V) with cu_seqlens."""
    sizes = case.sizes
    generator = torch.Generator(device).manual_seed(0)
    normal = _normal(generator, device)
    found = lengths(case).to(device)
    places = (int(found.sum()),) if case.layout == "packed" else (sizes["B"], sizes["L"])
    tensors = {
        "logits": (normal(*places, sizes["V"]) * 3).to(case.torch_dtype),
        "targets": torch.randint(sizes["V"], places, generator=generator, device=device),
    }
    if case.layout == "packed":
        tensors["cu_seqlens"] = F.pad(found.cumsum(0), (1, 0)).to(torch.int32)
    else:
        tensors["mask"] = torch.arange(sizes["L"], device=device) < found.unsqueeze(1)
    return Inputs(tensors, ("logits",), {"logp": normal(sizes["B"] // sizes["G"], sizes["G"])})


def linear_grouped_inputs(case: Case, device: torch.device) -> Inputs:
    """Those of linear_logprobs as completions of uneven lengths, padded: hidden states (B, L, H) and a mask."""
    sizes = case.sizes
    tokens = replace(case, sizes={**sizes, "N": sizes["B"] * sizes["L"]})
    given = linear_inputs(tokens, device).tensors
    normal = _normal(torch.Generator(device).manual_seed(1), device)
    tensors = {
        "hidden": given["hidden"].view(sizes["B"], sizes["L"], -1),
        "weight": given["weight"],
        "targets": given["targets"].view(sizes["B"], sizes["L"]),
        "mask": torch.arange(sizes["L"], device=device) < lengths(case).to(device).unsqueeze(1),
    }
    above = normal(sizes["B"] // sizes["G"], sizes["G"])
    return Inputs(tensors, ("hidden", "weight"), {"logp": above})


def _normal(generator: torch.Generator, device: torch.device) -> Callable[..., Tensor]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    return draw


# --- exact, in float64 ---


def token_exact(case: Case, inputs: Inputs) -> dict[str, Exact]:
    """Of up to CHECKED_ROWS rows, the first and the last among them."""
    rows = spread(case.sizes["N"], CHECKED_ROWS, inputs["targets"].device)
    found = softmax_rows(
        inputs["logits"][rows],
        inputs["targets"][rows],
        inputs.upstream["logp"][rows],
        inputs.upstream["entropy"][rows],
    )
    return {name: Exact(values, rows) for name, values in found.items()}


def linear_exact(case: Case, inputs: Inputs) -> dict[str, Exact]:
    """Log-prob, loss and dX of every token, dW of up to CHECKED_COLUMNS rows of the head."""
    hidden, weight = inputs["hidden"], inputs["weight"].double()
    columns = spread(case.sizes["V"], CHECKED_COLUMNS, weight.device)
    d_weight = torch.zeros(len(columns), weight.shape[1], dtype=torch.float64, device=weight.device)
    logp, d_hidden = [], []
    for start in range(0, hidden.shape[0], _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        x = hidden[rows].double()
        found = softmax_rows(x @ weight.T, inputs["targets"][rows], inputs.upstream["logp"][rows])
        logp.append(found["logp"])
        d_hidden.append(found["d logits"] @ weight)
        d_weight += found["d logits"][:, columns].T @ x
    every = torch.cat(logp)
    return {
        "logp": Exact(every),
        "loss": Exact(-every.mean()),
        "d hidden": Exact(torch.cat(d_hidden)),
        "d weight": Exact(d_weight, columns),
    }


def grouped_exact(case: Case, inputs: Inputs) -> dict[str, Exact]:
    """Sums and logits gradients of two prompts, the first and the last."""
    group, prompts = case.sizes["G"], case.sizes["B"] // case.sizes["G"]
    places = spread(prompts, 2, inputs["targets"].device)
    completions = [int(prompt) * group + member for prompt in places for member in range(group)]
    found = lengths(case)
    starts = F.pad(found.cumsum(0), (1, 0))
    sums, gradients = [], []
    packed_rows: list[int] = []
    for completion in completions:
        size = int(found[completion])
        if case.layout == "packed":
            tokens = slice(int(starts[completion]), int(starts[completion]) + size)
            logits, targets = inputs["logits"][tokens], inputs["targets"][tokens]
            packed_rows += range(tokens.start, tokens.stop)
        else:
            logits, targets = inputs["logits"][completion, :size], inputs["targets"][completion, :size]
        upstream = inputs.upstream["logp"].flatten()[completion].expand(size)
        exact = softmax_rows(logits, targets, upstream)
        sums.append(exact["logp"].sum())
        pad = 0 if case.layout == "packed" else case.sizes["L"] - size
        gradients.append(F.pad(exact["d logits"], (0, 0, 0, pad)))
    gradient = torch.cat(gradients) if case.layout == "packed" else torch.stack(gradients)
    rows = packed_rows if case.layout == "packed" else completions
    return {
        "logp": Exact(torch.stack(sums).view(-1, group), places),
        "d logits": Exact(gradient, torch.tensor(rows, device=gradient.device)),
    }


def linear_grouped_exact(case: Case, inputs: Inputs) -> dict[str, Exact]:
    """Sums of linear_exact, given each token the gradient of its completion, 0 where the mask is 0."""
    mask, shape = inputs["mask"], inputs["targets"].shape
    above = (inputs.upstream["logp"].reshape(-1, 1) * mask).flatten()
    tokens = {
        "hidden": inputs["hidden"].flatten(0, 1),
        "weight": inputs["weight"],
        "targets": inputs["targets"].flatten(),
    }
    found = linear_exact(case, Inputs(tokens, (), {"logp": above}))
    sums = (found["logp"].values.view(shape) * mask).sum(-1)
    return {
        "logp": Exact(sums.view(-1, case.sizes["G"])),
        "d hidden": Exact(found["d hidden"].values.view(inputs["hidden"].shape)),
        "d weight": found["d weight"],
    }


def softmax_rows(
    logits: Tensor, targets: Tensor, grad_logp: Tensor, grad_entropy: Tensor | None = None
) -> dict[str, Tensor]:
    """In float64 from differences to the target: with S = sum over the others of e^(z - z_y), log p_y = -log1p(S)."""
    z, column = logits.double(), targets.unsqueeze(1)
    shifted = z - z.gather(1, column)
    others = shifted.exp().scatter(1, column, 0.0).sum(1)
    logp = -others.log1p()
    log_probs = shifted + logp.unsqueeze(1)
    probs = log_probs.exp()
    # d log p_y / d z_v = 1[v = y] - p_v, and 1 - p_y = S / (1 + S)
    above = grad_logp.double()
    gradient = (-above.unsqueeze(1) * probs).scatter(1, column, (above * others / (1 + others)).unsqueeze(1))
    entropy = -(probs * log_probs).sum(1)
    if grad_entropy is not None:
        gradient -= grad_entropy.double().unsqueeze(1) * probs * (log_probs + entropy.unsqueeze(1))
    return {"logp": logp, "entropy": entropy, "d logits": gradient}


def spread(size: int, count: int, device: torch.device) -> Tensor:
    """Up to ``count`` places out of ``size``, evenly spread, first and last included."""
    return torch.linspace(0, size - 1, min(size, count), dtype=torch.float64, device=device).round().long()


# --- plain PyTorch, which eager and torch.compile share ---


def _log_softmax(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    log_probs = F.log_softmax(logits.float(), dim=-1)
    logp = log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return logp, -(log_probs.exp() * log_probs).sum(-1)


def _linear_log_softmax(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    log_probs = F.log_softmax(F.linear(hidden, weight).float(), dim=-1)
    return log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def _masked_sums(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    log_probs = F.log_softmax(logits.float(), dim=-1)
    return (log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1) * mask).sum(-1)


def _linear_masked_sums(hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    return (_linear_log_softmax(hidden, weight, targets) * mask).sum(-1)


def _packed_sums(logits: Tensor, targets: Tensor, cu_seqlens: Tensor) -> Tensor:
    log_probs = F.log_softmax(logits.float(), dim=-1)
    logp = log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    completion = torch.bucketize(torch.arange(len(logp), device=logp.device), cu_seqlens[1:], right=True)
    return logp.new_zeros(len(cu_seqlens) - 1).index_add(0, completion, logp)


def _token_torch(function: Callable[..., Any]) -> Call:
    def call(inputs: Inputs) -> Outputs:
        logp, entropy = function(inputs["logits"], inputs["targets"])
        return {"logp": logp, "entropy": entropy}

    return call


def _linear_torch(function: Callable[..., Any]) -> Call:
    return lambda inputs: {"logp": function(inputs["hidden"], inputs["weight"], inputs["targets"])}


def _grouped_torch(case: Case, wrap: Callable[..., Any]) -> Call:
    packed = case.layout == "packed"
    function = wrap(_packed_sums if packed else _masked_sums)

    def call(inputs: Inputs) -> Outputs:
        sums = function(inputs["logits"], inputs["targets"], inputs["cu_seqlens" if packed else "mask"])
        return {"logp": sums.view(-1, case.sizes["G"])}

    return call


def _linear_grouped_torch(case: Case, wrap: Callable[..., Any]) -> Call:
    function, names = wrap(_linear_masked_sums), ("hidden", "weight", "targets", "mask")
    return lambda inputs: {"logp": function(*map(inputs.__getitem__, names)).view(-1, case.sizes["G"])}


def _same(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


# --- ours ---


def _grouped_arguments(case: Case, inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    layout: dict[str, Any] = {name: inputs[name] for name in ("mask", "cu_seqlens") if name in inputs.tensors}
    return (inputs["logits"], inputs["targets"]), {**layout, "group_size": case.sizes["G"]}


OURS_TOKEN = Ours(
    "token_logprobs",
    lambda case, inputs: ((inputs["logits"], inputs["targets"]), {"return_entropy": True}),
    lambda found: {"logp": found[0], "entropy": found[1]},
)
OURS_LINEAR = Ours(
    "linear_logprobs",
    lambda case, inputs: ((inputs["hidden"], inputs["weight"], inputs["targets"]), {}),
    lambda found: {"logp": found},
)
OURS_GROUPED = Ours("grouped_logprobs", _grouped_arguments, lambda found: {"logp": found.logp})

OURS_LINEAR_GROUPED = Ours(
    "linear_grouped_logprobs",
    lambda case, inputs: (
        (inputs["hidden"], inputs["weight"], inputs["targets"]),
        {"mask": inputs["mask"], "group_size": case.sizes["G"]},
    ),
    lambda found: {"logp": found.logp},
)


def _overwritable(inputs: Inputs) -> Inputs:
    """A copy of the logits for a backward that overwrites them; as the result of an op it is no leaf, as those of a model."""
    logits = inputs["logits"].detach().requires_grad_().clone()
    return replace(inputs, tensors={**inputs.tensors, "logits": logits})


# --- others ---


def _trl_token(case: Case, inputs: Inputs) -> Call:
    return _token_torch(needs("trl.trainer.utils", "trl").selective_log_softmax_and_entropy)


def _trl_linear(case: Case, inputs: Inputs) -> Call:
    function = needs("trl.kernels", "trl").ChunkedLogProbFunction

    def call(inputs: Inputs) -> Outputs:
        arguments = (inputs["hidden"], inputs["weight"], None, inputs["targets"], 1.0, _TRL_CHUNK)
        return {"logp": function.apply(*arguments, None, 1.0, ())[0]}

    return call


def _torch_linear(chunked: bool) -> Callable[[Case, Inputs], Call]:
    def make(case: Case, inputs: Inputs) -> Call:
        function = getattr(F, "linear_cross_entropy", None)
        if function is None:
            raise Unavailable(f"torch {torch.__version__} has no F.linear_cross_entropy")
        options = torch.nn.LinearCrossEntropyOptions() if chunked else None

        def call(inputs: Inputs) -> Outputs:
            loss = function(inputs["hidden"], inputs["weight"], inputs["targets"], options=options)
            return {"loss": loss}

        return call

    return make


def _liger_linear(case: Case, inputs: Inputs) -> Call:
    only_on_cuda(case, "Liger's fused linear cross-entropy (Triton)")
    module = needs("liger_kernel.ops.fused_linear_cross_entropy", "liger-kernel")
    function = module.LigerFusedLinearCrossEntropyFunction

    def call(inputs: Inputs) -> Outputs:
        found = function.apply(inputs["hidden"], inputs["weight"], inputs["targets"])
        return {"loss": found[0] if isinstance(found, tuple) else found}

    return call


def _liger_cute(case: Case, inputs: Inputs) -> Call:
    """Log-probs of each token by Liger's Hopper kernel; on other devices its name stands for a loop over chunks."""
    only_on_cuda(case, "Liger's fused linear log-probs (CuTe)")
    if torch.cuda.get_device_capability() != (9, 0):
        raise Unavailable("Liger's fused linear log-probs (CuTe) need sm_90")
    module = needs("liger_kernel.ops.fused_linear_scaled_cross_entropy", "liger-kernel")
    function = module.LigerFusedLinearScaledCrossEntropyFunction

    def call(inputs: Inputs) -> Outputs:
        return {"logp": -function.apply(inputs["hidden"], inputs["weight"], inputs["targets"])}

    return call


def _liger_chunked(case: Case, inputs: Inputs) -> Call:
    base = needs("liger_kernel.chunked_loss.fused_linear_ppo", "liger-kernel").LigerFusedLinearPPOBase

    def call(inputs: Inputs) -> Outputs:
        logp = base.chunk_forward(
            inputs["hidden"].unsqueeze(0), inputs["weight"], inputs["targets"].unsqueeze(0), temperature=1.0
        )
        return {"logp": logp.squeeze(0)}

    return call


def _cce(filter_eps: str | None) -> Callable[[Case, Inputs], Call]:
    def make(case: Case, inputs: Inputs) -> Call:
        only_on_cuda(case, "cut-cross-entropy (Triton)")
        module = needs("cut_cross_entropy", "cut-cross-entropy")

        def call(inputs: Inputs) -> Outputs:
            arguments = (inputs["hidden"], inputs["weight"], inputs["targets"])
            return {"loss": module.linear_cross_entropy(*arguments, filter_eps=filter_eps)}

        return call

    return make


def _quack(case: Case, inputs: Inputs) -> Call:
    only_on_cuda(case, "quack (CuTe)")
    module = needs("quack.linear_cross_entropy", "quack-kernels")

    def call(inputs: Inputs) -> Outputs:
        arguments = (inputs["hidden"], inputs["weight"], inputs["targets"])
        return {"loss": module.chunked_linear_cross_entropy(*arguments)}

    return call


def _verl(case: Case, inputs: Inputs) -> Call:
    only_on_cuda(case, "verl's fused head (Triton)")
    function = needs("verl.utils.kernel.linear_cross_entropy", "verl").linear_cross_entropy

    def call(inputs: Inputs) -> Outputs:
        logp, _ = function(inputs["hidden"], inputs["weight"], inputs["targets"], 1.0, "none")
        return {"logp": logp}

    return call


def bare_gemms(recompute: bool) -> Callable[[Case, Inputs], Any]:
    """The GEMMs of the head alone, in the dtype of the inputs: one forward, two or three backward, nothing between."""

    def make(case: Case, inputs: Inputs) -> Any:
        hidden, weight = inputs["hidden"].detach(), inputs["weight"].detach()
        hidden = hidden.reshape(-1, hidden.shape[-1])
        gradient = torch.ones(hidden.shape[0], weight.shape[0], dtype=hidden.dtype, device=hidden.device)

        def forward() -> object:
            return hidden @ weight.T

        def backward() -> object:
            again = hidden @ weight.T if recompute else None
            return again, gradient @ weight, gradient.T @ hidden

        return {"forward": forward, "backward": backward}

    return make


TOKEN = (
    Peer(EAGER, lambda case, inputs: _token_torch(_log_softmax)),
    OURS_TOKEN.peer(),
    OURS_TOKEN.peer(f"{OURS}, in place", _overwritable, TRAINING, inplace_backward=True),
    Peer(COMPILED, lambda case, inputs: _token_torch(compiled(_log_softmax)), compiles=True),
    Peer("TRL", _trl_token, package="trl"),
)
LINEAR = (
    Peer(EAGER, lambda case, inputs: _linear_torch(_linear_log_softmax)),
    OURS_LINEAR.peer(f"{OURS}, logits saved", save_logits=True),
    OURS_LINEAR.peer(f"{OURS}, logits recomputed", save_logits=False),
    Peer(COMPILED, lambda case, inputs: _linear_torch(compiled(_linear_log_softmax)), compiles=True),
    Peer("F.linear_cross_entropy", _torch_linear(chunked=False)),
    Peer("F.linear_cross_entropy, chunked", _torch_linear(chunked=True)),
    Peer("TRL, chunked", _trl_linear, package="trl"),
    Peer("Liger, chunked", _liger_chunked, package="liger-kernel"),
    Peer("Liger, Triton", _liger_linear, package="liger-kernel"),
    Peer("Liger, CuTe", _liger_cute, package="liger-kernel"),
    Peer("cut-cross-entropy, exact", _cce(None), package="cut-cross-entropy"),
    Peer("cut-cross-entropy, filtered", _cce("high"), package="cut-cross-entropy"),
    Peer("quack", _quack, package="quack-kernels"),
    Peer("verl", _verl, package="verl"),
    Peer("three bare GEMMs", bare_gemms(recompute=False), kind="floor"),
    Peer("four bare GEMMs", bare_gemms(recompute=True), kind="floor"),
)
GROUPED = (
    Peer(EAGER, lambda case, inputs: _grouped_torch(case, _same)),
    OURS_GROUPED.peer(),
    Peer(COMPILED, lambda case, inputs: _grouped_torch(case, compiled), compiles=True),
)
LINEAR_GROUPED = (
    Peer(EAGER, lambda case, inputs: _linear_grouped_torch(case, _same)),
    OURS_LINEAR_GROUPED.peer(),
    Peer(COMPILED, lambda case, inputs: _linear_grouped_torch(case, compiled), compiles=True),
    Peer("three bare GEMMs", bare_gemms(recompute=False), kind="floor"),
)
