"""A two-level tree through one attention kernel, against softmax over each token's own keys in float64."""

from __future__ import annotations

import torch

from r1kernels.integrations.prefix_attention import Call, attention, split
from r1kernels.integrations.prefix_kernels import Kernel, Options
from r1kernels.integrations.prefix_tree import build

ROWS = [
    [*range(100), *range(200, 240)],
    [*range(100), *range(300, 307)],
    [*range(100), 400],
    [*range(500, 520)],
]


def inputs(dtype, device, heads=4, key_heads=2, size=16, value_size=16):
    tree = build(ROWS, [1] * len(ROWS))
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, size), (key_heads, size), (key_heads, value_size))
    q, k, v = (torch.randn(1, n, tree.tokens, d, generator=generator) for n, d in shapes)
    do, sinks = (
        torch.randn(1, heads, tree.tokens, value_size, generator=generator),
        torch.randn(heads, generator=generator),
    )
    return tree, [t.to(device, dtype) for t in (q, k, v, sinks, do)]


def run(kernel: Kernel, tree, tensors, window=0, softcap=None):
    """(output, gradients) by the parts of the tree."""
    q, k, v, sinks, do = tensors
    parts = split(tree.nodes, window, q.device)
    call = Call(parts, tree.position_ids.to(q.device), window, Options(0.3, softcap), kernel, kernel)
    leaves = [t.detach().requires_grad_() for t in (q, k, v, sinks)]
    out = attention(*leaves, call)
    return [out, *torch.autograd.grad(out, leaves, do)]


def expected(tree, tensors, window=0, softcap=None):
    """The same in float64, over all tokens of the tree at once."""
    q, k, v, sinks, do = (t.cpu().double() for t in tensors)
    leaves = q, k, v, sinks = [t.requires_grad_() for t in (q, k, v, sinks)]
    seen = torch.zeros(tree.tokens, tree.tokens, dtype=torch.bool)
    for path in tree.paths():
        apart = torch.arange(len(path)).unsqueeze(1) - torch.arange(len(path))
        seen[path.unsqueeze(1), path] = (apart >= 0) & (apart < (window or len(path)))
    groups = q.shape[1] // k.shape[1]
    scores = 0.3 * q @ k.repeat_interleave(groups, 1).mT
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(~seen, float("-inf"))
    scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(1, -1, tree.tokens, 1)], -1)
    out = scores.softmax(-1)[..., :-1] @ v.repeat_interleave(groups, 1)
    return [out, *torch.autograd.grad(out, leaves, do)]


@torch.no_grad()
def errors(found, expected):
    """The relative error of the output and of each gradient."""
    return [
        float((one.cpu().double() - other).norm() / other.norm())
        for one, other in zip(found, expected, strict=True)
    ]
