"""linear_logprobs over a process group: each rank holds some rows of the head."""

from __future__ import annotations

import itertools
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from r1kernels import linear_logprobs
from tests.support import linear_oracle as oracle
from tests.support.numerics import same_bits

OPTIONS = {"temperature": 1.3, "softcap": 5.0, "logit_scale": 0.7, "return_entropy": True}
STATS = ("log_sum_sq_probs", "mean_logits", "is_top1")


def problem(vocabulary):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(11, 6, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(vocabulary, 6, dtype=torch.float64, generator=generator)
    bias = torch.randn(vocabulary, dtype=torch.float64, generator=generator)
    targets = torch.randint(0, vocabulary, (11,), generator=generator)
    targets[1::4] = -100
    return x, weight, bias, targets


def gradients(logp, entropy, leaves):
    upstream = torch.linspace(-1, 1, 11, dtype=torch.float64)
    return torch.autograd.grad((logp * upstream).sum() + (entropy * upstream.flip(0)).sum(), leaves)


def _on_rank(rank, port, bounds, directory):
    """One rank of a vocabulary cut at ``bounds``; saves its results and gradients."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=len(bounds) - 1
    )
    x, weight, bias, targets = problem(bounds[-1])
    shard = slice(bounds[rank], bounds[rank + 1])
    w, b = weight[shard].requires_grad_(), bias[shard].requires_grad_()
    logp, entropy, extra = linear_logprobs(
        x, w, targets, bias=b, group=dist.group.WORLD, stats=STATS, **OPTIONS
    )
    results = (logp, entropy, *gradients(logp, entropy, (x, w, b)), *extra.values())
    torch.save([value.detach() for value in results], f"{directory}/{rank}.pt")
    dist.destroy_process_group()


def test_a_vocabulary_on_two_ranks_gives_the_whole_one(tmp_path):
    bounds = (0, 13, 37)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_on_rank, args=(port, bounds, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    x, weight, bias, targets = problem(bounds[-1])
    weight.requires_grad_(), bias.requires_grad_()
    head = oracle.Head(bias, OPTIONS["logit_scale"], OPTIONS["softcap"])
    values = oracle.of_logits(x @ weight.T, head, targets, OPTIONS["temperature"])
    dx, dw, db = gradients(*values[:2], (x, weight, bias))
    for rank, (start, stop) in enumerate(itertools.pairwise(bounds)):
        expected = (*values[:2], dx, dw[start:stop], db[start:stop], *values[2:])
        for mine, whole in zip(ranks[rank], expected, strict=True):
            torch.testing.assert_close(mine, whole.detach(), rtol=1e-11, atol=1e-12)
    assert all(same_bits(first, second) for first, second in zip(ranks[0][:3], ranks[1][:3], strict=True))
