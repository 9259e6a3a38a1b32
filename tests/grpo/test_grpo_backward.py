"""The backward of grpo_loss, called in every way that autograd has: the gradients are those of the formulas each time.

A kernel backend writes the gradients in its forward; where a backward frees the graph it may hand them out, else not.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from r1kernels import extension
from r1kernels.grpo import grpo_loss
from tests.support.grpo_loss_kernel import check, gradients, random_call
from tests.support.numerics import same_bits

pytestmark = pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))


def leaves_of(arguments, keywords):
    """The call with log-probs and entropies that are leaves, and these."""
    logp = arguments[0].detach().clone().requires_grad_()
    entropy = keywords["entropy"].detach().clone().requires_grad_()
    return (logp, *arguments[1:]), {**keywords, "entropy": entropy}, (logp, entropy)


@pytest.fixture
def call():
    """Arguments, keywords, leaves and the gradients of the reference."""
    arguments, keywords = random_call(0)
    _, expected = gradients(
        lambda *v, **o: grpo_loss(*v, **o, backend="reference"), arguments, keywords, upstream=1.0
    )
    arguments, keywords, leaves = leaves_of(arguments, keywords)
    return arguments, keywords | {"backend": "cpu"}, leaves, expected


def assert_equal(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("ratio", ["token", "sequence", "output"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("upstream", [1.0, -1.0, 0.0, 0.25])
def test_every_upstream_gradient(ratio, packed, upstream):
    arguments, keywords = random_call(1, packed=packed)
    keywords |= {"ratio": ratio}
    _, grads = gradients(
        lambda *v, **o: grpo_loss(*v, **o, backend="cpu"), arguments, keywords, upstream=upstream
    )
    _, expected = gradients(
        lambda *v, **o: grpo_loss(*v, **o, backend="reference"), arguments, keywords, upstream=upstream
    )
    assert_equal(grads, expected)
    check("cpu", arguments, keywords)


def test_again_after_the_first_gradients_were_overwritten(call):
    arguments, keywords, leaves, expected = call
    loss = grpo_loss(*arguments, **keywords).loss
    for retain in (True, True, False):
        grads = torch.autograd.grad(loss, leaves, retain_graph=retain)
        assert_equal(grads, expected)
        for grad in grads:
            grad.fill_(7.0)


def test_a_freed_graph_has_no_second_backward(call):
    arguments, keywords, leaves, expected = call
    loss = grpo_loss(*arguments, **keywords).loss
    loss.backward()
    kept = [leaf.grad.clone() for leaf in leaves]
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    assert_equal(kept, expected)
    assert all(same_bits(leaf.grad, grad) for leaf, grad in zip(leaves, kept, strict=True))


def test_gradients_accumulate_over_calls_and_within_one(call):
    arguments, keywords, leaves, expected = call
    for _ in range(2):
        grpo_loss(*arguments, **keywords).loss.backward()
    (grpo_loss(*arguments, **keywords).loss + grpo_loss(*arguments, **keywords).loss).backward()
    assert_equal([leaf.grad for leaf in leaves], [4 * grad for grad in expected])


def test_log_probs_that_are_used_elsewhere_too(call):
    arguments, keywords, leaves, expected = call
    logp, mask = arguments[0] * 1.0, arguments[3]
    loss = grpo_loss(logp, *arguments[1:], **keywords).loss
    (loss + torch.where(mask, logp, 0.0).sum()).backward()
    assert_equal([leaf.grad for leaf in leaves], (expected[0] + mask.float(), expected[1]))


def test_a_hook_sees_the_gradient_and_may_replace_it(call):
    arguments, keywords, leaves, expected = call
    seen = []
    leaves[0].register_hook(lambda grad: seen.append(grad) or grad * 2)
    grpo_loss(*arguments, **keywords).loss.backward()
    assert_equal([seen[0], leaves[0].grad, leaves[1].grad], [expected[0], 2 * expected[0], expected[1]])


def test_whoever_holds_the_saved_tensors_finds_them_unchanged(call):
    arguments, keywords, leaves, _ = call
    held = []

    def pack(tensor):
        held.append((tensor, tensor.clone()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = grpo_loss(*arguments, **keywords).loss
    loss.backward()
    for leaf in leaves:
        leaf.grad.fill_(7.0)
    assert len(held) > 2 and all(same_bits(tensor, before) for tensor, before in held)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(call, use_reentrant):
    arguments, keywords, leaves, expected = call

    def loss_of(logp, entropy):
        return grpo_loss(logp * 1.0, *arguments[1:], **keywords | {"entropy": entropy * 1.0}).loss

    checkpoint(loss_of, *leaves, use_reentrant=use_reentrant).backward()
    assert_equal([leaf.grad for leaf in leaves], expected)


def test_checkpointing_of_a_graph_that_is_kept(call):
    arguments, keywords, leaves, expected = call
    loss = checkpoint(
        lambda logp, entropy: grpo_loss(logp, *arguments[1:], **keywords | {"entropy": entropy}).loss,
        *leaves,
        use_reentrant=False,
    )
    for retain in (True, False):
        grads = torch.autograd.grad(loss, leaves, retain_graph=retain)
        assert_equal(grads, expected)
        for grad in grads:
            grad.fill_(7.0)


@pytest.mark.parametrize("retain", [True, False])
def test_a_second_derivative_is_refused_however_the_graph_is_kept(call, retain):
    arguments, keywords, leaves, expected = call
    loss = grpo_loss(*arguments, **keywords).loss
    grads = torch.autograd.grad(loss, leaves, retain_graph=retain, create_graph=True)
    assert_equal(grads, expected)
    with pytest.raises(RuntimeError, match="second derivative"):
        grads[0].sum().backward()


def test_a_backward_that_frees_its_graph_needs_no_other_memory(call):
    arguments, keywords, leaves, _ = call
    loss = grpo_loss(*arguments, **keywords).loss
    saved = {tensor.data_ptr() for tensor in loss.grad_fn.saved_tensors if tensor is not None}
    loss.backward()
    assert leaves[0].grad.data_ptr() in saved and leaves[1].grad.data_ptr() in saved
