"""Every op on every backend that serves the device, forward and backward, at small shapes: what compute-sanitizer watches.

    compute-sanitizer --tool memcheck python -m bench sanitize

What is most likely to go wrong comes first: bfloat16, the experts, and of every op the backend cuda; calls that are cut into
several tiles, pieces or launches, at sizes that kernels for one architecture take too; then the smallest call of every op. A
call that fails, or that a backend refuses, is named, and the next one follows; after a fault on the device every later call
fails: the first one named is the one to look at.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch

import r1kernels
from r1kernels import backends, devices, examples

from ..studies.overhead import LEADING

TOKENS = 10_300  # 20,600 routed rows: more tiles of them than an H200 has multiprocessors


def main(device: Literal["cpu", "cuda"] = "cuda") -> int:
    before = backends.strict()
    backends.set_strict(True)
    try:
        return 1 if _failed(device) else 0
    finally:
        backends.set_strict(before)


def _failed(device: str) -> int:
    """How many calls fail or are refused."""
    failed = 0
    for dtype in (torch.bfloat16, torch.float32):
        small = ((op, *call) for op, call in examples.calls(device, dtype).items())
        for op, args, kwargs in (*larger(device, dtype), *small):
            every = backends.registered(op)
            names = [name for name in every if device in devices.SERVED.get(name, (device,))]
            for backend in names:
                try:
                    with r1kernels.use_backend(backend, op):
                        _both_ways(op, args, kwargs)
                    if device == "cuda":
                        torch.cuda.synchronize()  # a fault is that of this call
                except Exception as problem:
                    failed += 1
                    print(f"FAILED {op} {dtype} {backend}: {type(problem).__name__}: {problem}", flush=True)
            print(f"{op} {dtype}: {', '.join(names)}", flush=True)
    return failed


def larger(device: str, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """(op, args, kwargs): rows in pieces, vocabularies in slabs, sequences in blocks, experts in tiles."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    def below(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=generator).to(device)

    # a block of the Hopper kernels gets several tiles of eight k tiles, two rounds of its stages; of the gradients of the
    # weights tiles of none, one and many, for the experts have different numbers of rows
    tokens = TOKENS if dtype == torch.bfloat16 else 400
    uneven = (4 * torch.rand(tokens, 2, generator=generator) ** 3).long()
    uneven[0] = 6  # no one's, as expert parallelism has it
    experts = (normal(tokens, 512), uneven.to(device), torch.rand(tokens, 2, generator=generator).to(device))
    weights = normal(6, 256, 512), normal(6, 512, 128)
    factors = normal(6, 16, 512), normal(6, 256, 16), normal(6, 24, 128), normal(6, 512, 24)
    yield "moe_experts", (*experts, *weights), {}
    yield "moe_experts", (*experts, *weights), {"lora": (*(one.requires_grad_() for one in factors), 2.0)}
    bounds = torch.tensor([0, 4, 6], device=device)
    logp = -torch.rand(2, 2100, generator=generator).to(device)
    mask = torch.ones(2, 2100, dtype=torch.bool, device=device)
    grpo = {"ratio": "sequence", "ref_logp": logp - 0.1, "kl_coef": 0.1}
    yield "token_logprobs", (normal(1, 3, 40_009), below(40_009, 1, 3)), {"return_entropy": True}
    yield "linear_logprobs", (normal(300, 64), normal(5000, 64), below(5000, 300)), {"save_logits": False}
    yield "linear_logprobs", (normal(70, 64), normal(1000, 64), below(1000, 70)), {"softcap": 5.0}
    yield "grouped_logprobs", (normal(6, 3001), below(3001, 6)), {"cu_seqlens": bounds, "group_size": 2}
    yield "grpo_loss", (logp, logp + 0.1, torch.tensor([1.0, -1.0], device=device), mask), grpo
    yield "route", (normal(70, 256), 8), {"n_group": 8, "topk_group": 4}
    yield "sort_by_expert", (below(17, 9000), 16), {}
    yield (
        "grouped_gemm",
        (normal(300, 64), normal(3, 128, 64), torch.tensor([0, 9, 9, 290], device=device)),
        {},
    )


def _both_ways(op: str, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    """One call, and its backward from the sum of every result that has one."""
    leading = LEADING.get(op, len(args))
    leaves = [
        value.detach().clone().requires_grad_()
        if torch.is_tensor(value) and value.is_floating_point()
        else value
        for value in args[:leading]
    ]
    found = getattr(r1kernels, op)(*leaves, *args[leading:], **kwargs)
    parts = found if isinstance(found, tuple) else (found,)
    results = [part for part in parts if isinstance(part, torch.Tensor) and part.requires_grad]
    if results:
        torch.stack([result.sum().float() for result in results]).sum().backward()
