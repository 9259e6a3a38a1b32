"""What is measured: one table of cases, each an op at the shape of a real model, with its algorithmic work.

Sizes: N tokens, V vocabulary, H hidden, B completions of at most L tokens, G completions a prompt, T tokens that are
routed, I intermediate size of an expert, E experts, K experts per token, R rank of a low-rank addition, S ids of a token,
that a sampler kept or a teacher named, D hidden size of a teacher.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# DeepSeek-V3's router
GROUPS, GROUPS_PER_TOKEN, SCALE = 8, 4, 2.5


@dataclass(frozen=True)
class Work:
    """What a phase cannot do without: each input read once and each output written once, GEMM FLOPs, exponentials."""

    bytes: float = 0.0
    flops: float = 0.0
    exps: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops, self.exps + other.exps)


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
    def shape(self) -> str:
        """ "N 2048, V 32768" """
        return ", ".join(f"{name} {size}" for name, size in self.sizes.items())

    @property
    def id(self) -> str:
        parts = [self.op, *(f"{name}{size}" for name, size in self.sizes.items()), self.dtype, self.layout]
        return "-".join(part for part in parts if part)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def bytes_per_value(self) -> int:
        return self.torch_dtype.itemsize

    def work(self) -> dict[str, Work]:
        """The work of each phase; empty for a whole step of the trainer."""
        if self.op not in WORK:
            return {}
        forward, backward = WORK[self.op](self)
        both = forward + backward
        return {"forward": forward, "backward": backward, "inference": forward, "forward+backward": both}

    def need_bytes(self) -> float:
        """About how much memory the case takes, which decides whether it fits the machine.

        On a CPU it is that of the hungriest implementation. A GPU tells when its memory is full, and whoever fills it is
        left out alone: there it is that of the leanest.
        """
        s, cpu = self.sizes, self.device == "cpu"
        a_logit = (48.0 if self.op == "linear_divergence" else 24.0) if cpu else 4.0 * self.bytes_per_value
        if "V" in s and "H" in s:
            return cpu * a_logit * positions(self) * s["V"] + 20.0 * s["V"] * s["H"]
        if "V" in s:
            return a_logit * positions(self) * s["V"]
        if "I" in s and "T" in s:
            rows = 30.0 * s["T"] * s.get("K", 1) * (s["H"] + s["I"])
            return 9.0 * self.bytes_per_value * s["E"] * s["I"] * s["H"] + rows
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


# --- work, forward and backward ---

Both = tuple[Work, Work]


def _logits(case: Case) -> Both:
    """Logits are read once; the backward writes a gradient for every place, the masked ones too."""
    size, v = case.bytes_per_value, float(case.sizes["V"])
    read, written = v * counted(case), v * positions(case)
    return Work(size * read, exps=read), Work(size * (read + written), exps=read)


def _linear(case: Case) -> Both:
    """One GEMM forward, two backward (the logits are kept), one exponential a logit in each."""
    tokens, v, h = float(counted(case)), case.sizes["V"], case.sizes["H"]
    logits, inputs = tokens * v, case.bytes_per_value * (tokens + v) * h
    return Work(inputs, 2 * logits * h, logits), Work(2 * inputs, 4 * logits * h, logits)


def _kept(case: Case) -> Both:
    """S rows of the head for each token, read forward and backward; the gradient of the whole head is written."""
    s, size = case.sizes, case.bytes_per_value
    entries, tokens, head = float(s["N"] * s["S"]), float(s["N"] * s["H"]), float(s["V"] * s["H"])
    rows = head * _hit(s["V"], entries)
    return (
        Work(size * (tokens + rows), 2 * entries * s["H"], entries),
        Work(size * (2 * tokens + rows + head), 4 * entries * s["H"], entries),
    )


def _hit(of: float, draws: float) -> float:
    """The share of rows, or experts, that is hit where so many are drawn at random."""
    return 1 - (1 - 1 / of) ** draws


def _divergence(case: Case) -> Both:
    """Two GEMMs forward, two backward (the slopes are kept), two exponentials an id forward."""
    s, size = case.sizes, case.bytes_per_value
    logits, both, rows = float(s["N"]) * s["V"], s["H"] + s["D"], float(s["N"] + s["V"])
    forward = Work(size * rows * both, 2 * logits * both, 2 * logits)
    return forward, Work(2 * size * rows * s["H"], 4 * logits * s["H"])


def _grpo(case: Case) -> Both:
    """float32 log-probs x, old, reference and entropy, a mask byte; the backward reads x, old, reference, writes dx."""
    places, tokens = float(positions(case)), float(counted(case))
    mask = places if case.layout != "packed" else 0.0
    return Work(16 * tokens + mask, exps=2 * tokens), Work(12 * tokens + mask + 4 * places, exps=2 * tokens)


def _moe(case: Case) -> Both:
    """6TKHI FLOPs forward, 12TKHI backward; the weights of the experts that are hit, tokens in and out."""
    s, size = case.sizes, case.bytes_per_value
    gemms, exps = float(s["T"]) * s["K"] * s["H"] * s["I"], float(s["T"] * s["K"] * s["I"])
    weights, tokens = 3.0 * s["E"] * s["I"] * s["H"], float(s["T"] * s["H"])
    hit = weights * _hit(s["E"] / s["K"], s["T"])
    forward = Work(size * (hit + 2 * tokens), 6 * gemms, exps)
    return forward, Work(size * (hit + weights + 3 * tokens), 12 * gemms, exps)


def _lora(case: Case) -> Both:
    """Weights are frozen: 6TKHI FLOPs forward and as many backward; of each factor a product forward and two backward."""
    s, size = case.sizes, case.bytes_per_value
    forward, whole = _moe(case)
    factors = float(s["R"]) * (2 * s["H"] + 3 * s["I"])
    flops, weights = 2 * s["T"] * s["K"] * factors, 3.0 * s["E"] * s["I"] * s["H"]
    bytes_ = whole.bytes + size * (s["E"] * factors - weights)
    return forward + Work(flops=flops), Work(bytes_, whole.flops / 2 + 2 * flops, whole.exps)


def _gemm(case: Case) -> Both:
    """2THI FLOPs forward, of a router with I = E, 4THI backward; the matrices that are hit are read, all gradients written."""
    s, size = case.sizes, case.bytes_per_value
    columns, matrices = (s["I"], s["E"]) if "I" in s else (s["E"], 1)
    each, rows = s["H"] * columns, float(s["T"]) * (s["H"] + columns)
    hit = matrices * _hit(matrices, s["T"])
    forward = Work(size * (rows + hit * each), 2.0 * s["T"] * each)
    return forward, Work(size * (2 * rows + (hit + matrices) * each), 2 * forward.flops)


def _route(case: Case) -> Both:
    """float32 logits in, K weights and indices out; the backward writes a dense gradient."""
    logits, chosen = float(case.sizes["T"] * case.sizes["E"]), float(case.sizes["T"] * case.sizes["K"])
    return Work(4 * logits + 12 * chosen, exps=logits), Work(4 * logits + 16 * chosen, exps=chosen)


WORK = {
    **dict.fromkeys(("token_logprobs", "grouped_logprobs", "topk_divergence"), _logits),
    **dict.fromkeys(("linear_logprobs", "linear_grouped_logprobs", "linear_topk_divergence", "linear_grpo_loss"), _linear),
    "kept_logprobs": _kept, "linear_divergence": _divergence, "grpo_loss": _grpo, "moe_experts": _moe, "lora_experts": _lora,
    "grouped_gemm": _gemm, "router_logits": _gemm, "route": _route,
}  # fmt: skip

# --- the table ---

MODELS = {
    "DeepSeek-V3": {"H": 7168, "I": 2048, "E": 256, "K": 8},
    "Qwen3-30B-A3B": {"H": 2048, "I": 768, "E": 128, "K": 8},
    "Qwen3-Next-80B": {"H": 2048, "I": 512, "E": 512, "K": 10},
    "OLMoE-1B-7B": {"H": 2048, "I": 1024, "E": 64, "K": 8},
    "Mixtral-8x7B": {"H": 4096, "I": 14336, "E": 8, "K": 2},
}
CPU = """
token_logprobs | f32* bf16* | N2048 V32768
token_logprobs | f32 bf16 | N512 V151936 | | Qwen3's vocabulary
linear_logprobs | f32* bf16 | N2048 V32768 H512
linear_logprobs | f32 bf16 | N1024 V151936 H896 | | Qwen2.5-0.5B
kept_logprobs | f32 bf16 | N1024 V151936 H896 S20 | | top-k 20
topk_divergence | f32 bf16 | N2048 V32768 S64
linear_topk_divergence | f32 bf16 | N1024 V151936 H896 S64 | | Qwen2.5-0.5B
linear_divergence | f32 | N1024 V32768 H512 D512 | forward_kl jsd
linear_divergence | bf16 | N1024 V32768 H512 D512 | jsd
linear_divergence | f32 | N1024 V151936 H896 D896 | forward_kl jsd | Qwen2.5-0.5B
linear_divergence | bf16 | N1024 V151936 H896 D896 | jsd | Qwen2.5-0.5B
grouped_logprobs | f32 bf16 | B1024 L64 G16 V2048 | padded packed
linear_grouped_logprobs | f32 | B32 L64 G8 V32768 H512 | padded
linear_grpo_loss | bf16 | B16 L128 V32768 H512 | padded
grpo_loss | f32 | B64 L64 | padded packed
grpo_loss | f32 | B64 L1024 | padded* packed
grpo_loss | f32 | B256 L4096 | padded packed
linear_grpo_loss | f32 | B16 L128 V32768 H512 | padded
moe_experts | f32* bf16* | T256 H512 I256 E64 K4
moe_experts | f32 bf16 | T64 H512 I256 E64 K4
moe_experts | f32 bf16 | T2048 H512 I256 E16 K4
moe_experts | f32 bf16 | T2048 H128 I64 E128 K8 | | Qwen3-30B-A3B, scaled down
moe_experts | f32 bf16 | T256 H1024 I512 E8 K2 | | Mixtral-8x7B, scaled down
moe_experts | f32* bf16* | T1 H512 I256 E64 K4 | | decode
grouped_gemm | f32 bf16 | T1024 H512 I256 E64
router_logits | f32 | T256 H2048 E128 | | Qwen3-30B-A3B
lora_experts | f32* bf16* | T256 H512 I256 E64 K4 R16
lora_experts | f32 bf16 | T2048 H512 I256 E16 K4 R16
lora_experts | f32 bf16 | T256 H1024 I512 E8 K2 R16 | | Mixtral-8x7B, scaled down
route | f32* | T2048 E256 K8 | | DeepSeek-V3
route | f32* | T2048 E256 K8 | softmax | Qwen3, Mixtral
route | f32 | T2048 E256 K8 | softmax-plain | OLMoE
route | f32 | T1 E256 K8 | | DeepSeek-V3, decode
grpo_step | f32* | B32 L64 | | recipe tiny
grpo_step | f32 | B16 L32 H256 I128 E32 | | random
"""
CUDA = """
token_logprobs | bf16* | N8192 V151936
token_logprobs | bf16 | N8192 V129280
token_logprobs | bf16 | N32768 V151936
linear_logprobs | bf16 | N8192 V151936 H2048
linear_logprobs | bf16 | N8192 V129280 H7168
linear_logprobs | bf16* | N16384 V248320 H2048
linear_logprobs | bf16* | N1024 V151936 H2048
linear_logprobs | bf16* | N8192 V131072 H4096
kept_logprobs | bf16 | N8192 V151936 H2048 S20 | | top-k 20
topk_divergence | bf16 | N8192 V151936 S64
linear_topk_divergence | bf16 | N8192 V151936 H2048 S64
linear_divergence | bf16 | N8192 V151936 H2048 D4096 | jsd
grouped_logprobs | bf16 | B1024 L128 G16 V32768 | padded packed
grpo_loss | f32 | B64 L64 | padded packed
grpo_loss | f32 | B64 L1024 | padded* packed
grpo_loss | f32 | B256 L4096 | padded packed
linear_grouped_logprobs | bf16 | B64 L128 G16 V151936 H2048 | padded
linear_grpo_loss | bf16 | B16 L512 V151936 H2048 | padded
moe_experts | bf16 | T32768,4096,256,1 DeepSeek-V3
moe_experts | bf16 | T32768*,4096*,256,1* Qwen3-30B-A3B
moe_experts | bf16 | T32768,4096,256,1 Qwen3-Next-80B
moe_experts | bf16 | T32768,4096,256,1 OLMoE-1B-7B
moe_experts | bf16 | T32768,4096,256,1 Mixtral-8x7B
grouped_gemm | bf16 | T32768 H2048 I1536 E128 | | Qwen3-30B-A3B
router_logits | bf16 | T4096 H2048 E128 | | Qwen3-30B-A3B
lora_experts | bf16 | T32768,4096 Qwen3-30B-A3B R16
lora_experts | bf16 | T32768,4096 Mixtral-8x7B R16
route | f32* | T4096 E256 K8 | | DeepSeek-V3
grpo_step | f32 | B32 L64 | | recipe tiny
grpo_step | f32 | B64 L128 H1024 I512 E64 | | random
"""


def _sizes(text: str) -> dict[str, int]:
    """Of names with numbers, and of models."""
    found: dict[str, int] = {}
    for word in text.split():
        found |= MODELS[word] if word in MODELS else {word[0]: int(word[1:])}
    return found


def _cases(device: str, table: str) -> Iterator[Case]:
    """A line: op, dtypes, sizes (or a model that has them), layouts, model; what has a star is part of a quick run."""
    names = {"f32": "float32", "bf16": "bfloat16"}
    for line in table.strip().splitlines():
        op, dtypes, sizes, layouts, model = ([part.strip() for part in line.split("|")] + ["", ""])[:5]
        first, _, others = sizes.partition(" ")
        fixed = _sizes(others)
        model = next((name for name in MODELS if name in others), model)
        parts = itertools.product(first[1:].split(","), dtypes.split(), layouts.split() or [""])
        for count, dtype, layout in parts:
            given = {first[0]: int(count.strip("*")), **fixed}
            quick = "*" in count + dtype + layout
            yield Case(op, device, names[dtype.strip("*")], given, layout.strip("*"), quick, model)


CASES: tuple[Case, ...] = (*_cases("cpu", CPU), *_cases("cuda", CUDA))


def smallest(case: Case) -> Case:
    """The same op at a shape that takes next to no work."""
    small = _sizes("N24 V199 H16 B4 L6 G2 T24 I8 E16 K2 R3 S5 D12")
    sizes = {
        name: min(small[name], size) if name == "T" else small[name] for name, size in case.sizes.items()
    }
    if case.op == "grpo_step":
        sizes["B"] = 16  # two groups
    return Case(case.op, case.device, case.dtype, sizes, case.layout, quick=True)


def tiny(device: str = "cpu") -> list[Case]:
    """Every op, dtype and layout of a device at a shape that takes milliseconds: what the smoke test runs."""
    return list({case.id: case for case in map(smallest, CASES) if case.device == device}.values())
