"""linear_logprobs: the same as token_logprobs of the head's logits. N tokens, H hidden, V vocabulary."""

from __future__ import annotations

import itertools
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from r1kernels import linear_logprobs, token_logprobs
from tests.support.numerics import assert_as_exact_as, same_bits

OPTIONS = {"temperature": 1.3, "softcap": 5.0, "logit_scale": 0.7, "return_entropy": True}


def problem(tokens=11, hidden=6, vocabulary=37, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    weight = (
        torch.randn(vocabulary, hidden, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    )
    bias = torch.randn(vocabulary, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    targets[1::4] = -100
    return x, weight, bias, targets


def results_and_gradients(function, *leaves):
    logp, entropy = function(*leaves)
    upstream = torch.linspace(-1, 1, logp.numel(), dtype=logp.dtype)
    return (
        logp,
        entropy,
        *torch.autograd.grad((logp * upstream).sum() + (entropy * upstream.flip(0)).sum(), leaves),
    )


def in_float64(x, weight, bias, targets):
    leaves = [leaf.detach().double().requires_grad_() for leaf in (x, weight, bias)]

    def function(x, weight, bias):
        logits = 0.7 * (x @ weight.T + bias)
        return token_logprobs(5.0 * torch.tanh(logits / 5.0), targets, temperature=1.3, return_entropy=True)

    return results_and_gradients(function, *leaves)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"chunk_size": 1},
        {"chunk_size": 4, "save_logits": False},
        {"save_logits": True},
        {"batch_invariant": True},
        {"batch_invariant": True, "chunk_size": 3, "save_logits": False},
    ],
    ids=str,
)
def test_however_it_is_cut_it_is_token_logprobs_of_the_logits(how):
    x, weight, bias, targets = problem()
    ours = results_and_gradients(
        lambda x, w, b: linear_logprobs(x, w, targets, bias=b, **OPTIONS, **how), x, weight, bias
    )
    torch.testing.assert_close(ours, in_float64(x, weight, bias, targets), rtol=1e-11, atol=1e-12)


def test_gradcheck():
    x, weight, bias, targets = problem(tokens=4, hidden=3, vocabulary=5)
    assert torch.autograd.gradcheck(
        lambda x, w, b: linear_logprobs(x, w, targets, bias=b, **OPTIONS, chunk_size=3), (x, weight, bias)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_inputs_are_as_exact_as_eager(dtype):
    x, weight, bias, targets = problem(tokens=64, hidden=48, vocabulary=211, dtype=dtype)
    targets = targets.clamp(min=0)
    options = {"temperature": 0.8, "return_entropy": True}
    ours = results_and_gradients(
        lambda x, w, b: linear_logprobs(x, w, targets, bias=b, **options), x, weight, bias
    )

    def eager(x, w, b):
        logp = torch.log_softmax(torch.nn.functional.linear(x, w, b) / 0.8, -1)
        return logp.gather(-1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

    theirs = results_and_gradients(eager, x, weight, bias)
    leaves = [leaf.detach().double().requires_grad_() for leaf in (x, weight, bias)]
    exact = results_and_gradients(lambda x, w, b: linear_logprobs(x, w, targets, bias=b, **options), *leaves)
    assert [value.dtype for value in ours] == [torch.float32, torch.float32, dtype, dtype, dtype]
    for mine, peer, truth in zip(ours, theirs, exact, strict=True):
        assert_as_exact_as(mine.detach(), peer.detach(), truth.detach(), mine.dtype)


def test_the_gradient_of_the_head_is_not_summed_in_16_bits():
    tokens = 4096
    hidden = torch.full((tokens, 1), 1.0, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(tokens, dtype=torch.int64)
    linear_logprobs(hidden, weight, targets, chunk_size=1).sum().backward()
    # d sum logp / d w_0 = tokens (1 - 1/2); sums of ones in bfloat16 stop growing at 256
    assert weight.grad.flatten().tolist() == [tokens / 2, -tokens / 2]


def test_a_frozen_head_or_frozen_hidden_states_get_no_gradient():
    x, weight, _, targets = problem()
    linear_logprobs(x, weight.detach(), targets).sum().backward()
    frozen_head = x.grad.clone()
    x.grad = None
    linear_logprobs(x.detach(), weight, targets).sum().backward()
    assert x.grad is None and weight.grad is not None
    linear_logprobs(x, weight, targets).sum().backward()
    torch.testing.assert_close(x.grad, frozen_head)


def test_batch_invariant_rows_have_the_same_bits_in_any_company():
    x, weight, _, targets = problem(tokens=150, hidden=70, vocabulary=333, dtype=torch.float32)
    targets = targets.clamp(min=0)
    options = {"batch_invariant": True, "return_entropy": True}
    with torch.no_grad():
        every = linear_logprobs(x, weight, targets, **options)
        order = torch.randperm(150)
        shuffled = linear_logprobs(x[order], weight, targets[order], chunk_size=13, **options)
        few = linear_logprobs(x[5:7], weight, targets[5:7], **options)
    for values, mixed, pair in zip(every, shuffled, few, strict=True):
        assert same_bits(values[order], mixed) and same_bits(values[5:7], pair)


def test_statistics_that_come_along():
    x, weight, bias, targets = problem()
    logits = (x @ weight.T + bias).detach() / 1.3
    targets[0] = logits[0].argmax()
    logp, stats = linear_logprobs(
        x, weight, targets, bias=bias, temperature=1.3, stats=("is_top1", "log_sum_sq_probs", "mean_logits")
    )
    counted = targets != -100
    assert list(stats) == ["is_top1", "log_sum_sq_probs", "mean_logits"]
    torch.testing.assert_close(stats["mean_logits"][counted], logits.mean(-1)[counted])
    torch.testing.assert_close(
        stats["log_sum_sq_probs"][counted], logits.softmax(-1).square().sum(-1).log()[counted]
    )
    assert (
        torch.equal(stats["is_top1"][counted], (logits.argmax(-1) == targets)[counted])
        and stats["is_top1"][0]
    )
    assert all((value[~counted] == 0).all() and not value.requires_grad for value in stats.values())
    assert logp.requires_grad


def test_autocast_casts_as_linear_does():
    x, weight, bias, targets = problem(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = linear_logprobs(x, weight, targets, bias=bias)
    by_hand = linear_logprobs(x.bfloat16(), weight.bfloat16(), targets, bias=bias.bfloat16())
    assert under.dtype == torch.float32 and same_bits(under, by_hand)


def test_no_tokens():
    x, weight, _, targets = problem()
    logp = linear_logprobs(x[:0], weight, targets[:0])
    logp.sum().backward()
    assert logp.shape == (0,) and (weight.grad == 0).all()


def test_it_compiles_in_one_graph():
    x, weight, bias, targets = problem(dtype=torch.float32)

    def function(x, w, b):
        return linear_logprobs(x, w, targets, bias=b, **OPTIONS)

    plain = results_and_gradients(function, x, weight, bias)
    compiled = results_and_gradients(
        torch.compile(function, fullgraph=True, backend="aot_eager"), x, weight, bias
    )
    torch.testing.assert_close(compiled, plain)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"weight": torch.zeros(5, 4)}, ValueError, r"weight: expected shape \(any, 3\), got \(5, 4\)"),
        ({"weight": torch.zeros(5, 3).bfloat16()}, TypeError, "weight: expected the dtype of hidden"),
        ({"weight": torch.zeros(0, 3)}, ValueError, r"weight: expected shape \(V, H\) with V >= 1"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias: expected shape \(5\), got \(4,\)"),
        (
            {"targets": torch.tensor([0, 5])},
            IndexError,
            r"targets: expected values in \[0, 5\) or -100, got 5",
        ),
        ({"softcap": -1.0}, ValueError, "softcap: expected a number above 0"),
        ({"stats": ("entropy",)}, ValueError, "stats: expected one of 'log_sum_sq_probs'"),
        ({"chunk_size": 0}, ValueError, "chunk_size: expected at least 1, got 0"),
        ({"save_logits": 1}, TypeError, "save_logits: expected a bool"),
    ],
)
def test_bad_arguments_are_named(change, error, text):
    arguments = {
        "hidden": torch.zeros(2, 3),
        "weight": torch.zeros(5, 3),
        "targets": torch.tensor([0, 1]),
    } | change
    with pytest.raises(error, match=text):
        linear_logprobs(**arguments)


def _on_rank(rank, port, bounds, directory):
    """One rank of a vocabulary cut at ``bounds``; saves its results and gradients."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=len(bounds) - 1
    )
    x, weight, bias, targets = problem(vocabulary=bounds[-1])
    shard = slice(bounds[rank], bounds[rank + 1])
    leaves = [x, weight.detach()[shard].requires_grad_(), bias.detach()[shard].requires_grad_()]
    stats = ("log_sum_sq_probs", "mean_logits", "is_top1")
    results = results_and_gradients(
        lambda x, w, b: linear_logprobs(x, w, targets, bias=b, group=dist.group.WORLD, **OPTIONS), *leaves
    )
    extra = linear_logprobs(
        x, leaves[1], targets, bias=leaves[2], group=dist.group.WORLD, stats=stats, **OPTIONS
    )[-1]
    torch.save([value.detach() for value in (*results, *extra.values())], f"{directory}/{rank}.pt")
    dist.destroy_process_group()


def test_a_vocabulary_on_two_ranks_gives_the_whole_one(tmp_path):
    bounds = (0, 13, 37)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_on_rank, args=(port, bounds, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    x, weight, bias, targets = problem()
    logp, entropy, dx, dw, db = in_float64(x, weight, bias, targets)
    extra = linear_logprobs(
        x, weight, targets, bias=bias, stats=("log_sum_sq_probs", "mean_logits", "is_top1"), **OPTIONS
    )[-1]
    for rank, (start, stop) in enumerate(itertools.pairwise(bounds)):
        expected = (logp, entropy, dx, dw[start:stop], db[start:stop], *extra.values())
        for mine, whole in zip(ranks[rank], expected, strict=True):
            torch.testing.assert_close(mine, whole.detach(), rtol=1e-11, atol=1e-12)
    assert all(same_bits(first, second) for first, second in zip(ranks[0][:3], ranks[1][:3], strict=True))
