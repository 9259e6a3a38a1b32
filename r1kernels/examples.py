"""One small call of every op that has backends, for ``python -m r1kernels`` and the tests.

Shapes: B sequences of T tokens, N = B * T, V vocabulary, H hidden, I intermediate, E experts, K chosen experts.
"""

from __future__ import annotations

from typing import Any

import torch

from .attention import DecodeLayout, SharedPrefix

Call = tuple[tuple[Any, ...], dict[str, Any]]


def calls(device: torch.device | str, dtype: torch.dtype = torch.float32) -> dict[str, Call]:
    """The name of each op -> the (args, kwargs) of a valid call on ``device``; parameters and states are of ``dtype``."""
    B, T, V, H, I, E, K = 2, 3, 16, 8, 4, 4, 2  # noqa: E741
    N = B * T
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    targets = (torch.arange(N) % V).view(B, T).to(device)
    mask = torch.ones(B, T, dtype=torch.bool, device=device)
    logp = -torch.rand(B, T, generator=generator).to(device)
    advantages = torch.tensor([1.0, -1.0], device=device)
    experts = torch.stack((torch.arange(N) % E, (torch.arange(N) + 1) % E), dim=-1).to(device)
    shares = torch.full((N, K), 0.5, device=device)
    offsets = torch.arange(0, N + 1, N // 2, device=device)
    teacher_ids = torch.stack((targets, (targets + 1) % V), dim=-1)
    teacher_logp = torch.full(teacher_ids.shape, -1.0, device=device)
    drawn = torch.ones(N, dtype=torch.int64, device=device)
    prompts = SharedPrefix.of([row // T for row in range(N)], [2] * N, device)
    return {
        "decode_attention": (
            (normal(N, 4, H), normal(N, 2, H), normal(N, 2, H), (normal(N, 2, T, H), normal(N, 2, T, H))),
            {
                "layout": DecodeLayout(drawn, 1, [prompts]),
                "prefixes": [(normal(B, 2, T, H), normal(B, 2, T, H))],
            },
        ),
        "token_logprobs": ((normal(B, T, V), targets), {"return_entropy": True}),
        "linear_logprobs": ((normal(B, T, H), normal(V, H), targets), {"return_entropy": True}),
        "linear_divergence": (
            (normal(B, T, H), normal(V, H), normal(B, T, I), normal(V, I)),
            {"kind": "jsd", "return_entropy": True},
        ),
        "grouped_logprobs": ((normal(B, T, V), targets), {"mask": mask, "group_size": 2}),
        "linear_grouped_logprobs": (
            (normal(B, T, H), normal(V, H), targets),
            {"mask": mask, "group_size": 2},
        ),
        "topk_divergence": ((normal(B, T, V), teacher_ids, teacher_logp), {}),
        "linear_topk_divergence": ((normal(B, T, H), normal(V, H), teacher_ids, teacher_logp), {}),
        "sample_tokens": ((normal(N, V), torch.linspace(0, 0.9, N, dtype=torch.float64, device=device)), {}),
        "group_advantages": ((advantages,), {"group_size": 2}),
        "grpo_loss": ((logp, None, advantages, mask), {}),
        "linear_grpo_loss": ((normal(B, T, H), normal(V, H), targets, None, advantages, mask), {}),
        "route": ((normal(N, E), K), {}),
        "router_logits": ((normal(N, H), normal(E, H)), {}),
        "sort_by_expert": ((experts, E), {}),
        "grouped_gemm": ((normal(N, H), normal(2, I, H), offsets), {}),
        "moe_experts": ((normal(N, H), experts, shares, normal(E, 2 * I, H), normal(E, H, I)), {}),
        "load_balancing_loss": ((normal(N, E), K), {}),
        "router_z_loss": ((normal(N, E),), {}),
        "sequence_balance_loss": ((normal(N, E).sigmoid(), experts, offsets, 1e-4), {}),
        "update_router_bias": ((torch.zeros(E, device=device), experts.flatten().bincount(), 1e-3), {}),
    }
