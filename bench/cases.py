"""What is measured: one table of cases, each an op at the shape of a real model, with its algorithmic work.

Sizes: N tokens, V vocabulary, H hidden, B completions of at most L tokens, G completions a prompt, T tokens that are
routed, I intermediate size of an expert, E experts, K experts per token, R rank of a low-rank addition, S ids of a token,
that a sampler kept or a teacher named, D hidden size of a teacher.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

FAMILIES: Mapping[str, tuple[str, ...]] = {
    "logprob": (
        "token_logprobs",
        "linear_logprobs",
        "grouped_logprobs",
        "linear_grouped_logprobs",
        "kept_logprobs",
        "topk_divergence",
        "linear_topk_divergence",
        "linear_divergence",
    ),
    "grpo": ("grpo_loss", "linear_grpo_loss"),
    "moe": ("moe_experts", "lora_experts", "grouped_gemm", "route", "router_logits"),
    "step": ("grpo_step",),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# DeepSeek-V3's router
GROUPS, GROUPS_PER_TOKEN, SCALE = 8, 4, 2.5


@dataclass(frozen=True)
class Work:
    """What a phase cannot do without: each input read once and each output written once, GEMM FLOPs, exponentials."""

    bytes: float = 0.0
    flops: float = 0.0
    exps: float = 0.0


@dataclass(frozen=True)
class Case:
    """One op at one shape, on one kind of device ("cpu" or "cuda").

    layout: "padded" or "packed" where both exist; of a router "softmax" or "softmax-plain" (not normalised), "" for
    DeepSeek-V3's; of a divergence its kind. quick: part of a quick run. model: whose shape it is.
    """

    op: str
    device: str
    dtype: str
    sizes: Mapping[str, int] = field(hash=False)
    layout: str = ""
    quick: bool = False
    model: str = ""

    @property
    def family(self) -> str:
        return next(name for name, ops in FAMILIES.items() if self.op in ops)

    @property
    def shape(self) -> str:
        """ "N 2048, V 32768" """
        return ", ".join(f"{name} {size}" for name, size in self.sizes.items())

    @property
    def id(self) -> str:
        parts = [self.op, *(f"{name}{size}" for name, size in self.sizes.items()), self.dtype, self.layout]
        return "-".join(part for part in parts if part)

    @property
    def bytes_per_value(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def work(self) -> dict[str, Work]:
        """The work of the phases "forward" and "backward"; empty for a whole step of the trainer."""
        return WORK[self.op](self) if self.op in WORK else {}

    def need_bytes(self) -> float:
        """About how much memory the case takes, which decides whether it fits the machine.

        On a CPU it is that of the hungriest implementation. A GPU tells when its memory is full, and whoever fills it is
        left out alone: there it is that of the leanest.
        """
        sizes = self.sizes
        a_logit = 24.0 if self.device == "cpu" else 4.0 * self.bytes_per_value
        if self.op in ("token_logprobs", "grouped_logprobs", "topk_divergence"):
            return a_logit * positions(self) * sizes["V"]
        if "V" in sizes and "H" in sizes:
            a_logit *= 2 if self.op == "linear_divergence" else 1
            logits = a_logit * positions(self) * sizes["V"] if self.device == "cpu" else 0.0
            return logits + 20.0 * sizes["V"] * sizes["H"]
        if self.op in ("moe_experts", "lora_experts"):
            weights = 3 * sizes["E"] * sizes["I"] * sizes["H"]
            return 3.0 * weights * self.bytes_per_value + 30.0 * sizes["T"] * sizes["K"] * (
                sizes["H"] + sizes["I"]
            )
        if self.op == "grouped_gemm":
            return 6.0 * self.bytes_per_value * sizes["E"] * sizes["I"] * sizes["H"]
        return 100.0 * positions(self)


def lengths(case: Case) -> Tensor:
    """(B,) int64: how many tokens each completion has, between a quarter of L and L, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    longest = case.sizes["L"]
    found = torch.randint(max(longest // 4, 1), longest + 1, (case.sizes["B"],), generator=generator)
    found[0] = longest
    return found


def positions(case: Case) -> int:
    """Places that a tensor of the case holds: N or T; B * L padded; the tokens alone if packed."""
    if "L" not in case.sizes:
        return case.sizes.get("N", case.sizes.get("T", 1))
    return int(lengths(case).sum()) if case.layout == "packed" else case.sizes["B"] * case.sizes["L"]


def counted(case: Case) -> int:
    """Tokens that count: all of them, or those that the mask keeps."""
    return int(lengths(case).sum()) if "L" in case.sizes else positions(case)


def _logits(case: Case) -> dict[str, Work]:
    """Logits are read once; the backward writes a gradient for every place, the masked ones too."""
    read = float(counted(case)) * case.sizes["V"]
    written = float(positions(case)) * case.sizes["V"]
    size = case.bytes_per_value
    return {
        "forward": Work(bytes=size * read, exps=read),
        "backward": Work(bytes=size * (read + written), exps=read),
    }


def _linear(case: Case) -> dict[str, Work]:
    """One GEMM forward, two backward (the logits are kept), one exponential a logit in each."""
    tokens, vocabulary, hidden = counted(case), case.sizes["V"], case.sizes["H"]
    logits = float(tokens) * vocabulary
    inputs = case.bytes_per_value * float(tokens * hidden + vocabulary * hidden)
    return {
        "forward": Work(bytes=inputs, flops=2 * logits * hidden, exps=logits),
        "backward": Work(bytes=2 * inputs, flops=4 * logits * hidden, exps=logits),
    }


def _kept(case: Case) -> dict[str, Work]:
    """S rows of the head for each token, read forward and backward; the gradient of the whole head is written."""
    s = case.sizes
    entries, tokens = float(s["N"] * s["S"]), float(s["N"] * s["H"])
    # of rows drawn at random, those that are hit
    rows = s["H"] * s["V"] * (1 - (1 - 1 / s["V"]) ** entries)
    size = case.bytes_per_value
    return {
        "forward": Work(bytes=size * (tokens + rows), flops=2 * entries * s["H"], exps=entries),
        "backward": Work(
            bytes=size * (2 * tokens + rows + s["V"] * s["H"]), flops=4 * entries * s["H"], exps=entries
        ),
    }


def _divergence(case: Case) -> dict[str, Work]:
    """Two GEMMs forward, two backward (the slopes are kept), two exponentials an id forward."""
    s = case.sizes
    logits, both = float(s["N"]) * s["V"], s["H"] + s["D"]
    size = case.bytes_per_value
    return {
        "forward": Work(
            bytes=size * float((s["N"] + s["V"]) * both), flops=2 * logits * both, exps=2 * logits
        ),
        "backward": Work(bytes=size * 2.0 * (s["N"] + s["V"]) * s["H"], flops=4 * logits * s["H"]),
    }


def _grpo(case: Case) -> dict[str, Work]:
    """float32 log-probs x, old, reference and entropy, a mask byte; the backward reads x, old, reference, writes dx."""
    places, tokens = float(positions(case)), float(counted(case))
    mask = places if case.layout != "packed" else 0.0
    return {
        "forward": Work(bytes=16 * tokens + mask, exps=2 * tokens),
        "backward": Work(bytes=12 * tokens + mask + 4 * places, exps=2 * tokens),
    }


def _moe(case: Case) -> dict[str, Work]:
    """6TKHI FLOPs forward, 12TKHI backward; the weights of the experts that are hit, tokens in and out."""
    s = case.sizes
    gemms = float(s["T"]) * s["K"] * s["H"] * s["I"]
    hit = s["E"] * (1 - (1 - s["K"] / s["E"]) ** s["T"])
    weights, tokens = 3 * hit * s["I"] * s["H"], float(s["T"] * s["H"])
    all_weights = 3.0 * s["E"] * s["I"] * s["H"]
    size = case.bytes_per_value
    return {
        "forward": Work(
            bytes=size * (weights + 2 * tokens), flops=6 * gemms, exps=float(s["T"] * s["K"] * s["I"])
        ),
        "backward": Work(
            bytes=size * (weights + all_weights + 3 * tokens),
            flops=12 * gemms,
            exps=float(s["T"] * s["K"] * s["I"]),
        ),
    }


def _gemm(case: Case) -> dict[str, Work]:
    """2THI FLOPs forward, of a router with I = E, 4THI backward; the matrices that are hit are read, all gradients written."""
    s = case.sizes
    each = s["H"] * s.get("I", s["E"])
    hit, every = (s["E"] * (1 - (1 - 1 / s["E"]) ** s["T"]), s["E"]) if "I" in s else (1, 1)
    rows, size = float(s["T"]) * (s["H"] + s.get("I", s["E"])), case.bytes_per_value
    return {
        "forward": Work(bytes=size * (rows + hit * each), flops=2.0 * s["T"] * each),
        "backward": Work(bytes=size * (2 * rows + (hit + every) * each), flops=4.0 * s["T"] * each),
    }


def _lora(case: Case) -> dict[str, Work]:
    """Weights are frozen: 6TKHI FLOPs forward and as many backward; of each factor a product forward and two backward."""
    s, size = case.sizes, case.bytes_per_value
    forward, whole = _moe(case)["forward"], _moe(case)["backward"]
    factors = float(s["R"]) * (2 * s["H"] + 3 * s["I"])
    flops = 2 * s["T"] * s["K"] * factors
    frozen = 3.0 * s["E"] * s["I"] * s["H"] * size
    return {
        "forward": Work(forward.bytes, forward.flops + flops, forward.exps),
        "backward": Work(
            whole.bytes - frozen + s["E"] * factors * size, whole.flops / 2 + 2 * flops, whole.exps
        ),
    }


def _route(case: Case) -> dict[str, Work]:
    """float32 logits in, K weights and indices out; the backward writes a dense gradient."""
    tokens, experts, chosen = case.sizes["T"], case.sizes["E"], case.sizes["K"]
    return {
        "forward": Work(bytes=4.0 * tokens * experts + 12.0 * tokens * chosen, exps=float(tokens * experts)),
        "backward": Work(bytes=4.0 * tokens * experts + 16.0 * tokens * chosen, exps=float(tokens * chosen)),
    }


WORK = {
    "token_logprobs": _logits,
    "grouped_logprobs": _logits,
    "linear_logprobs": _linear,
    "linear_grouped_logprobs": _linear,
    "kept_logprobs": _kept,
    "topk_divergence": _logits,
    "linear_topk_divergence": _linear,
    "linear_divergence": _divergence,
    "linear_grpo_loss": _linear,
    "grpo_loss": _grpo,
    "moe_experts": _moe,
    "grouped_gemm": _gemm,
    "lora_experts": _lora,
    "route": _route,
    "router_logits": _gemm,
}

F32, BF16 = "float32", "bfloat16"
MODELS = {
    "DeepSeek-V3": {"H": 7168, "I": 2048, "E": 256, "K": 8},
    "Qwen3-30B-A3B": {"H": 2048, "I": 768, "E": 128, "K": 8},
    "Qwen3-Next-80B": {"H": 2048, "I": 512, "E": 512, "K": 10},
    "OLMoE-1B-7B": {"H": 2048, "I": 1024, "E": 64, "K": 8},
    "Mixtral-8x7B": {"H": 4096, "I": 14336, "E": 8, "K": 2},
}


def _grpo_cases(device: str, quick: int) -> list[Case]:
    shapes = ({"B": 64, "L": 64}, {"B": 64, "L": 1024}, {"B": 256, "L": 4096})
    return [
        Case(
            "grpo_loss",
            device,
            F32,
            sizes,
            layout,
            quick=sizes["B"] * sizes["L"] == quick and layout == "padded",
        )
        for sizes in shapes
        for layout in ("padded", "packed")
    ]


def _cpu() -> list[Case]:
    small, large = {"N": 2048, "V": 32768}, {"N": 512, "V": 151936}
    group = {"B": 1024, "L": 64, "G": 16, "V": 2048}
    experts = {"T": 256, "H": 512, "I": 256, "E": 64, "K": 4}
    router = {"T": 2048, "E": 256, "K": 8}
    return [
        Case("token_logprobs", "cpu", F32, small, quick=True),
        Case("token_logprobs", "cpu", BF16, small, quick=True),
        Case("token_logprobs", "cpu", F32, large, model="Qwen3's vocabulary"),
        Case("token_logprobs", "cpu", BF16, large, model="Qwen3's vocabulary"),
        Case("linear_logprobs", "cpu", F32, {**small, "H": 512}, quick=True),
        Case("linear_logprobs", "cpu", BF16, {**small, "H": 512}),
        Case("linear_logprobs", "cpu", F32, {"N": 1024, "V": 151936, "H": 896}, model="Qwen2.5-0.5B"),
        Case("linear_logprobs", "cpu", BF16, {"N": 1024, "V": 151936, "H": 896}, model="Qwen2.5-0.5B"),
        *(
            Case("kept_logprobs", "cpu", dtype, {"N": 1024, "V": 151936, "H": 896, "S": 20}, model="top-k 20")
            for dtype in (F32, BF16)
        ),
        Case("topk_divergence", "cpu", F32, {**small, "S": 64}),
        Case("topk_divergence", "cpu", BF16, {**small, "S": 64}),
        *(
            Case(
                "linear_topk_divergence",
                "cpu",
                dtype,
                {"N": 1024, "V": 151936, "H": 896, "S": 64},
                model="Qwen2.5-0.5B",
            )
            for dtype in (F32, BF16)
        ),
        *(
            Case("linear_divergence", "cpu", dtype, {"N": 1024, **sizes}, kind, model=model)
            for sizes, model in (
                ({"V": 32768, "H": 512, "D": 512}, ""),
                ({"V": 151936, "H": 896, "D": 896}, "Qwen2.5-0.5B"),
            )
            for dtype, kind in ((F32, "forward_kl"), (F32, "jsd"), (BF16, "jsd"))
        ),
        *(
            Case("grouped_logprobs", "cpu", dtype, group, layout)
            for dtype in (F32, BF16)
            for layout in ("padded", "packed")
        ),
        Case(
            "linear_grouped_logprobs", "cpu", F32, {"B": 32, "L": 64, "G": 8, "V": 32768, "H": 512}, "padded"
        ),
        Case("linear_grpo_loss", "cpu", BF16, {"B": 16, "L": 128, "V": 32768, "H": 512}, "padded"),
        *_grpo_cases("cpu", quick=65536),
        Case("linear_grpo_loss", "cpu", F32, {"B": 16, "L": 128, "V": 32768, "H": 512}, "padded"),
        *(
            Case("moe_experts", "cpu", dtype, sizes, quick=sizes is experts, model=model)
            for sizes, model in (
                (experts, ""),
                ({**experts, "T": 64}, ""),
                ({"T": 2048, "H": 512, "I": 256, "E": 16, "K": 4}, ""),
                ({"T": 2048, "H": 128, "I": 64, "E": 128, "K": 8}, "Qwen3-30B-A3B, scaled down"),
                ({"T": 256, "H": 1024, "I": 512, "E": 8, "K": 2}, "Mixtral-8x7B, scaled down"),
            )
            for dtype in (F32, BF16)
        ),
        *(
            Case("moe_experts", "cpu", dtype, {**experts, "T": 1}, quick=True, model="decode")
            for dtype in (F32, BF16)
        ),
        Case("grouped_gemm", "cpu", F32, {"T": 1024, "H": 512, "I": 256, "E": 64}),
        Case("grouped_gemm", "cpu", BF16, {"T": 1024, "H": 512, "I": 256, "E": 64}),
        Case("router_logits", "cpu", F32, {"T": 256, "H": 2048, "E": 128}, model="Qwen3-30B-A3B"),
        *(
            Case("lora_experts", "cpu", dtype, {**sizes, "R": 16}, quick=sizes is experts, model=model)
            for sizes, model in (
                (experts, ""),
                ({"T": 2048, "H": 512, "I": 256, "E": 16, "K": 4}, ""),
                ({"T": 256, "H": 1024, "I": 512, "E": 8, "K": 2}, "Mixtral-8x7B, scaled down"),
            )
            for dtype in (F32, BF16)
        ),
        Case("route", "cpu", F32, router, quick=True, model="DeepSeek-V3"),
        Case("route", "cpu", F32, router, "softmax", quick=True, model="Qwen3, Mixtral"),
        Case("route", "cpu", F32, router, "softmax-plain", model="OLMoE"),
        Case("route", "cpu", F32, {**router, "T": 1}, model="DeepSeek-V3, decode"),
        Case("grpo_step", "cpu", F32, {"B": 32, "L": 64}, quick=True, model="recipe tiny"),
        Case("grpo_step", "cpu", F32, {"B": 16, "L": 32, "H": 256, "I": 128, "E": 32}, model="random"),
    ]


def _cuda() -> list[Case]:
    logits = ((8192, 151936), (8192, 129280), (32768, 151936))
    heads = (
        (8192, 151936, 2048),
        (8192, 129280, 7168),
        (16384, 248320, 2048),
        (1024, 151936, 2048),
        (8192, 131072, 4096),
    )
    group = {"B": 1024, "L": 128, "G": 16, "V": 32768}
    return [
        *(
            Case("token_logprobs", "cuda", BF16, {"N": n, "V": v}, quick=(n, v) == logits[0])
            for n, v in logits
        ),
        *(
            Case("linear_logprobs", "cuda", BF16, {"N": n, "V": v, "H": h}, quick=(n, v, h) in heads[2:])
            for n, v, h in heads
        ),
        Case("kept_logprobs", "cuda", BF16, {"N": 8192, "V": 151936, "H": 2048, "S": 20}, model="top-k 20"),
        Case("topk_divergence", "cuda", BF16, {"N": 8192, "V": 151936, "S": 64}),
        Case("linear_topk_divergence", "cuda", BF16, {"N": 8192, "V": 151936, "H": 2048, "S": 64}),
        Case("linear_divergence", "cuda", BF16, {"N": 8192, "V": 151936, "H": 2048, "D": 4096}, "jsd"),
        Case("grouped_logprobs", "cuda", BF16, group, "padded"),
        Case("grouped_logprobs", "cuda", BF16, group, "packed"),
        *_grpo_cases("cuda", quick=65536),
        Case(
            "linear_grouped_logprobs",
            "cuda",
            BF16,
            {"B": 64, "L": 128, "G": 16, "V": 151936, "H": 2048},
            "padded",
        ),
        Case("linear_grpo_loss", "cuda", BF16, {"B": 16, "L": 512, "V": 151936, "H": 2048}, "padded"),
        *(
            Case(
                "moe_experts",
                "cuda",
                BF16,
                {"T": tokens, **sizes},
                quick=tokens != 256 and model == "Qwen3-30B-A3B",
                model=model,
            )
            for model, sizes in MODELS.items()
            for tokens in (32768, 4096, 256, 1)
        ),
        Case(
            "grouped_gemm", "cuda", BF16, {"T": 32768, "H": 2048, "I": 1536, "E": 128}, model="Qwen3-30B-A3B"
        ),
        Case("router_logits", "cuda", BF16, {"T": 4096, "H": 2048, "E": 128}, model="Qwen3-30B-A3B"),
        *(
            Case("lora_experts", "cuda", BF16, {"T": tokens, **MODELS[model], "R": 16}, model=model)
            for model in ("Qwen3-30B-A3B", "Mixtral-8x7B")
            for tokens in (32768, 4096)
        ),
        Case("route", "cuda", F32, {"T": 4096, "E": 256, "K": 8}, quick=True, model="DeepSeek-V3"),
        Case("grpo_step", "cuda", F32, {"B": 32, "L": 64}, model="recipe tiny"),
        Case("grpo_step", "cuda", F32, {"B": 64, "L": 128, "H": 1024, "I": 512, "E": 64}, model="random"),
    ]


CASES: tuple[Case, ...] = (*_cpu(), *_cuda())


def smallest(case: Case) -> Case:
    """The same op at a shape that takes next to no work."""
    small = {
        "N": 24, "V": 199, "H": 16, "B": 4, "L": 6, "G": 2, "T": min(case.sizes.get("T", 1), 24), "I": 8, "E": 16, "K": 2, "R": 3, "S": 5,
        "D": 12,
    }  # fmt: skip
    sizes = {name: small[name] for name in case.sizes}
    if case.op == "grpo_step":
        sizes["B"] = 16  # two groups
    return Case(case.op, case.device, case.dtype, sizes, case.layout, quick=True)


def tiny(device: str = "cpu") -> list[Case]:
    """Every op, dtype and layout of a device at a shape that takes milliseconds: what the smoke test runs."""
    cases = {case.id: case for case in map(smallest, CASES) if case.device == device}
    return list(cases.values())
