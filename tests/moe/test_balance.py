"""Selection bias and balance losses. T tokens, E experts, K experts per token."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from r1kernels.moe import (
    load_balancing_loss,
    route,
    router_z_loss,
    sequence_balance_loss,
    update_router_bias,
)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def compiled(function):
    return torch.compile(function, backend="aot_eager", fullgraph=True)


def test_bias_update_by_hand():
    bias = torch.tensor([0.5, 0.0, -0.25, 0.0])
    pointer = bias.data_ptr()
    # the mean count is 4: d = 0.1 * (1, -1, 0, 1), minus its mean 0.025
    update_router_bias(bias, torch.tensor([1, 8, 4, 3], dtype=torch.int32), 0.1)
    torch.testing.assert_close(bias, torch.tensor([0.575, -0.125, -0.275, 0.075]))
    assert bias.data_ptr() == pointer


def test_bias_update_compares_exactly():
    # in float32 both counts are 2^24
    bias = torch.zeros(2)
    update_router_bias(bias, torch.tensor([2**24, 2**24 + 1]), 1.0)
    assert bias.tolist() == [1.0, -1.0]


def test_bias_update_without_tokens_or_rate_does_nothing():
    bias = torch.tensor([0.5, -0.5], requires_grad=True)
    update_router_bias(bias, torch.zeros(2, dtype=torch.int32), 0.1)
    update_router_bias(bias, torch.tensor([3, 1]), 0.0)
    assert bias.tolist() == [0.5, -0.5]


def test_bias_updates_even_the_load_out():
    logits = normal(512, 8, dtype=torch.float32) + torch.linspace(-1, 1, 8)
    bias = torch.zeros(8)
    before = route(logits, 2, bias=bias).tokens_per_expert
    for _ in range(200):
        update_router_bias(bias, route(logits, 2, bias=bias).tokens_per_expert, 0.01)
    after = route(logits, 2, bias=bias).tokens_per_expert
    assert before.max() > 200 and after.max() < 150  # 128 is even


def test_bias_update_compiled():
    bias = torch.zeros(4)
    compiled(lambda b, c: update_router_bias(b, c, 0.1))(bias, torch.tensor([1, 8, 4, 3]))
    torch.testing.assert_close(bias, torch.tensor([0.075, -0.125, -0.025, 0.075]))


def sequence_loss_by_hand(scores, indices, bounds, alpha):
    experts, top_k = scores.shape[1], indices.shape[1]
    losses = []
    for start, stop in pairwise(bounds):
        length = stop - start
        loss = scores.new_zeros(())
        for expert in range(experts if length else 0):
            frequency = experts / (top_k * length) * int((indices[start:stop] == expert).sum())
            share = scores[start:stop, expert] / scores[start:stop].sum(1)
            loss = loss + frequency * share.mean()
        losses.append(alpha * loss)
    return torch.stack(losses)


BOUNDS = [1, 4, 4, 9]  # one token of padding at either end and an empty sequence


def test_sequence_loss_and_gradient():
    scores = normal(10, 6).sigmoid().requires_grad_()
    indices = route(scores.detach(), 2).indices
    loss = sequence_balance_loss(scores, indices, torch.tensor(BOUNDS), 0.1)
    plain = scores.detach().clone().requires_grad_()
    expected = sequence_loss_by_hand(plain, indices, BOUNDS, 0.1)
    torch.testing.assert_close(loss, expected)
    assert loss[1] == 0
    weights = torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64)
    (grad,) = torch.autograd.grad(loss @ weights, scores)
    (grad_by_hand,) = torch.autograd.grad(expected @ weights, plain)
    torch.testing.assert_close(grad, grad_by_hand)
    assert (grad[0] == 0).all() and (grad[9] == 0).all()
    traced = compiled(lambda s, i, c: sequence_balance_loss(s, i, c, 0.1))
    torch.testing.assert_close(traced(scores, indices, torch.tensor(BOUNDS, dtype=torch.int32)), loss)
    assert torch.autograd.gradcheck(
        lambda s: sequence_balance_loss(s, indices, torch.tensor(BOUNDS), 0.1), scores
    )


def test_sequence_loss_of_an_even_load_is_alpha():
    # f_e = 1 for every expert, and the shares sum to 1
    loss = sequence_balance_loss(torch.ones(4, 4), torch.arange(4)[:, None], torch.tensor([0, 4]), 0.3)
    torch.testing.assert_close(loss, torch.tensor([0.3]))


def test_sequence_loss_edges():
    empty = sequence_balance_loss(
        torch.zeros(0, 4), torch.zeros(0, 2, dtype=torch.int64), torch.tensor([0, 0]), 1.0
    )
    assert empty.tolist() == [0.0]
    none = sequence_balance_loss(
        torch.ones(2, 4), torch.zeros(2, 2, dtype=torch.int64), torch.tensor([0]), 1.0
    )
    assert none.shape == (0,)
    scores = torch.zeros(2, 4, dtype=torch.bfloat16, requires_grad=True)  # all scores underflowed
    loss = sequence_balance_loss(scores, torch.zeros(2, 2, dtype=torch.int64), torch.tensor([0, 2]), 1.0)
    assert loss.dtype == torch.float32 and loss.tolist() == [0.0]
    loss.sum().backward()
    assert torch.isfinite(scores.grad).all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
def test_load_balancing_loss_is_that_of_transformers(masked, layers):
    logits = [normal(24, 8, seed=layer, dtype=torch.float32).requires_grad_() for layer in range(layers)]
    mask = (normal(24, seed=9) > 0).long() if masked else None
    everything = torch.cat(logits)
    loss = load_balancing_loss(everything, 2, None if mask is None else mask.repeat(layers))
    expected = load_balancing_loss_func(
        tuple(logits), num_experts=8, top_k=2, attention_mask=None if mask is None else mask.view(4, 6)
    )
    torch.testing.assert_close(loss, expected)
    ours = torch.autograd.grad(loss, logits, retain_graph=True)
    theirs = torch.autograd.grad(expected, logits)
    for grad, grad_expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(grad, grad_expected)


def test_load_balancing_loss_of_equal_logits():
    # ties go to expert 0: count (T, 0, 0), softmax 1/3 each, so 3 * 1 * 1/3
    torch.testing.assert_close(load_balancing_loss(torch.zeros(5, 3), 1), torch.tensor(1.0))


def test_losses_without_tokens_are_zero():
    empty = torch.zeros(0, 4, requires_grad=True)
    loss = load_balancing_loss(empty, 2) + router_z_loss(empty)
    assert loss.item() == 0.0
    loss.backward()
    assert empty.grad.shape == (0, 4)
    assert load_balancing_loss(normal(5, 4), 2, torch.zeros(5, dtype=torch.bool)).item() == 0.0


def test_z_loss():
    # logsumexp(0, 0) = ln 2, logsumexp(1, 1) = 1 + ln 2
    value = router_z_loss(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    torch.testing.assert_close(value, torch.tensor((0.693147**2 + 1.693147**2) / 2))
    large = router_z_loss(torch.full((2, 4), 1000.0))  # no overflow
    torch.testing.assert_close(large, torch.tensor((1000.0 + 1.386294) ** 2))


@pytest.mark.parametrize(
    "loss",
    [
        lambda z: load_balancing_loss(z, 2),
        lambda z: load_balancing_loss(z, 2, torch.tensor([True, False] * 5)),
        router_z_loss,
    ],
    ids=["balance", "masked balance", "z"],
)
def test_gradients_and_compile(loss):
    logits = normal(10, 6).requires_grad_()
    assert torch.autograd.gradcheck(loss, logits)
    torch.testing.assert_close(compiled(loss)(logits), loss(logits))
    half = logits.detach().bfloat16().requires_grad_()
    value = loss(half)
    value.backward()
    assert value.dtype == torch.float32 and half.grad.dtype == torch.bfloat16
    torch.testing.assert_close(value, loss(half.detach().float()))


INDICES = torch.zeros(4, 2, dtype=torch.int64)
BAD = [
    ("tokens_per_expert: expected shape", ValueError, lambda: update_router_bias(torch.zeros(3), torch.zeros(2, dtype=torch.int32), 0.1)),
    ("tokens_per_expert: expected dtype", TypeError, lambda: update_router_bias(torch.zeros(3), torch.zeros(3), 0.1)),
    ("rate: expected a number of at least 0", ValueError, lambda: update_router_bias(torch.zeros(2), torch.zeros(2, dtype=torch.int32), -0.1)),
    ("indices: expected shape", ValueError, lambda: sequence_balance_loss(torch.ones(4, 3), INDICES[:3], torch.tensor([0, 4]), 1.0)),
    ("indices: expected values", IndexError, lambda: sequence_balance_loss(torch.ones(4, 3), INDICES + 3, torch.tensor([0, 4]), 1.0)),
    ("cu_seqlens: expected ascending values in .*got 2 at position 2", ValueError, lambda: sequence_balance_loss(torch.ones(4, 3), INDICES, torch.tensor([0, 3, 2]), 1.0)),
    ("cu_seqlens: expected ascending values in .*got 5 at position 1", ValueError, lambda: sequence_balance_loss(torch.ones(4, 3), INDICES, torch.tensor([0, 5]), 1.0)),
    ("cu_seqlens: expected shape", ValueError, lambda: sequence_balance_loss(torch.ones(4, 3), INDICES, torch.zeros(0, dtype=torch.int32), 1.0)),
    ("top_k: expected at most", ValueError, lambda: load_balancing_loss(torch.zeros(4, 3), 4)),
    ("mask: expected shape", ValueError, lambda: load_balancing_loss(torch.zeros(4, 3), 2, torch.ones(2, 2))),
    ("logits: expected shape", ValueError, lambda: router_z_loss(torch.zeros(4, 0))),
]  # fmt: skip


@pytest.mark.parametrize(("message", "error", "call"), BAD, ids=[case[0] for case in BAD])
def test_bad_input(message, error, call):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf])
def test_what_is_left_out_of_a_balance_loss_may_hold_anything(garbage):
    logits, indices = normal(6, 4), torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0], [0, 1], [1, 2]])
    dirty = logits.clone()
    dirty[4:] = garbage
    mask = torch.tensor([1, 1, 1, 1, 0, 0])
    bounds = torch.tensor([0, 3, 4])
    losses = {
        "load": (lambda z, m: load_balancing_loss(z, 2, m), mask),
        "sequences": (lambda z, m: sequence_balance_loss(z, indices[: len(z)], bounds, 0.1).sum(), None),
    }
    for name, (loss, of_all) in losses.items():
        plain = logits[:4].sigmoid() if name == "sequences" else logits[:4]
        given = torch.cat((plain, dirty[4:])).requires_grad_()
        plain = plain.clone().requires_grad_()
        expected, ours = loss(plain, None), loss(given, of_all)
        torch.testing.assert_close(ours, expected)
        (grad,), (exact,) = torch.autograd.grad(ours, given), torch.autograd.grad(expected, plain)
        torch.testing.assert_close(grad[:4], exact)
        assert (grad[4:] == 0).all()
