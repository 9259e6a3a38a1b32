"""The linear ops over a process group: each of two ranks holds some rows of the head. N tokens, H hidden, V vocabulary.

The ranks compute every case of CASES in one go, once a backend; the tests compare them with the whole vocabulary.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist

from r1kernels import (
    extension,
    linear_divergence,
    linear_grouped_logprobs,
    linear_grpo_loss,
    linear_logprobs,
    linear_topk_divergence,
)
from tests.support import linear_oracle as oracle
from tests.support.kept_case import in_csr
from tests.support.numerics import same_bits
from tests.support.ranks import on_ranks

STATS = ("log_sum_sq_probs", "mean_logits", "is_top1")
HEAD = {"temperature": 1.3, "softcap": 5.0, "logit_scale": 0.7}
TOKENS = {"temperature": torch.linspace(0.5, 2.0, 12)}
# sets of either rank, of both, and the whole vocabulary; some do not hold the target
KEPT = in_csr([[], [1, 2], [20, 30, 36], [3, 13, 12], [], *([v, 36 - v, v + 9] for v in range(7))])
# name: (N, where the vocabulary is cut, dtype, options)
CASES = {
    "everything": (12, (0, 13, 37), torch.float32, HEAD | {"stats": STATS}),
    "temperatures": (12, (0, 36, 37), torch.float32, TOKENS),
    "recomputed": (12, (0, 13, 37), torch.float32, HEAD | {"save_logits": False, "chunk_size": 5}),
    "tiles": (1030, (0, 2100, 4300), torch.float32, HEAD | {"stats": STATS}),
    "bfloat16": (1030, (0, 2100, 4300), torch.bfloat16, HEAD),
    "masked": (12, (0, 13, 37), torch.float32, {"stats": STATS}),
    "kept": (12, (0, 13, 37), torch.float32, HEAD | {"stats": STATS, "kept": KEPT}),
}
BACKENDS = [
    "reference",
    pytest.param("cpu", marks=pytest.mark.skipif(extension.missing() is not None, reason="no extension")),
]


def problem(name):
    """(leaves, targets); "masked": the first rank's logits are -inf, and two targets among them."""
    tokens, cuts, dtype, _ = CASES[name]
    generator = torch.Generator().manual_seed(0)
    sizes = (tokens, 6), (cuts[-1], 6), (cuts[-1],)
    x, weight, bias = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    targets = torch.randint(0, cuts[-1], (tokens,), generator=generator)
    if name == "masked":
        bias[: cuts[1]] = -torch.inf
        targets[:] = targets.clamp(min=cuts[1])
        targets[:2] = 0
    targets[2::4] = -100
    return (x, weight, bias), targets


def results_and_gradients(x, weight, bias, targets, **options):
    """Log-prob, entropy, [stats], then the gradients; a target at -inf takes no part in the loss."""
    leaves = [leaf.detach().requires_grad_() for leaf in (x, weight, bias)]
    found = linear_logprobs(leaves[0], leaves[1], targets, bias=leaves[2], return_entropy=True, **options)
    logp, entropy, *extra = found
    grads = torch.autograd.grad(loss_of(logp, entropy), leaves)
    return [*(value.detach() for value in (logp, entropy)), *grads, *(extra[0].values() if extra else ())]


def loss_of(logp, entropy):
    upstream = torch.linspace(-1, 1, len(logp), dtype=logp.dtype)
    return (torch.where(logp.isfinite(), logp, 0.0) * upstream).sum() + (entropy * upstream.flip(0)).sum()


def completions(x, weight, bias, targets, **options):
    """Means over four completions of three tokens, and gradients."""
    leaves = [leaf.detach().requires_grad_() for leaf in (x.view(4, 3, -1), weight, bias)]
    found = linear_grouped_logprobs(
        leaves[0], leaves[1], targets.view(4, 3), bias=leaves[2], group_size=2, reduce="mean", **options
    )
    upstream = torch.tensor([[1.0, -2.0], [3.0, 0.5]])
    return [found.logp.detach(), *torch.autograd.grad((found.logp * upstream).sum(), leaves)]


def several(x, weight, bias, targets, **options):
    """Two targets per token, some of them on either rank, and gradients."""
    leaves = [leaf.detach().requires_grad_() for leaf in (x, weight, bias)]
    both = torch.stack((targets, (7 * targets + 3) % 37), 1).masked_fill(targets.unsqueeze(1) < 0, -100)
    logp, entropy = linear_logprobs(*leaves[:2], both, bias=leaves[2], return_entropy=True, **options)
    loss = loss_of(logp[:, 0], entropy) + loss_of(logp[:, 1], -entropy / 2)
    return [logp.detach(), *torch.autograd.grad(loss, leaves), entropy.detach()]


def topk(x, weight, bias, targets, **options):
    """The divergence from a teacher's log-probs of two ids per token, and gradients."""
    leaves = [leaf.detach().requires_grad_() for leaf in (x, weight, bias)]
    ids = torch.stack((targets, (7 * targets + 3) % 37), 1).masked_fill(targets.unsqueeze(1) < 0, -1)
    logp = torch.tensor([-0.5, -3.0]).expand(ids.shape)
    found = linear_topk_divergence(*leaves[:2], ids, logp, bias=leaves[2], **options)
    loss = (found * torch.linspace(-1, 1, len(found))).sum()
    return [found.detach(), *torch.autograd.grad(loss, leaves)]


def divergence(x, weight, bias, targets, **options):
    """That from a teacher whose head is the student's turned round, and gradients; the entropy comes along."""
    leaves = [leaf.detach().requires_grad_() for leaf in (x, weight, bias)]
    found, entropy = linear_divergence(
        *leaves[:2],
        x.flip(1) * 1.2,
        weight.flip(1),
        bias=leaves[2],
        teacher_bias=-bias,
        kind="jsd",
        beta=0.3,
        targets=targets,
        return_entropy=True,
        **options,
    )
    loss = (found * torch.linspace(-1, 1, len(found), dtype=found.dtype)).sum()
    return [found.detach(), *torch.autograd.grad(loss, leaves), entropy]


def leading(x, weight, bias, targets, **options):
    """Divergences where an id of the first rank leads by 30 nats at the student, and one of the second at the teacher."""
    found = []
    for kind in ("reverse_kl", "jsd"):
        leaves = [leaf.detach().requires_grad_() for leaf in (x, weight, bias)]
        # the head of a rank does not know its place: 13 rows are the first ones, and 37 are all
        first = 0 if len(bias) in (13, 37) else 13
        ids = torch.arange(first, first + len(bias))
        of_student, of_teacher = (bias.new_tensor(30.0) * (ids == leader) for leader in (5, 20))
        value = linear_divergence(
            *leaves[:2], x, weight, bias=leaves[2] + of_student, teacher_bias=bias + of_teacher, kind=kind, **options
        )  # fmt: skip
        found += [value.detach(), *torch.autograd.grad(value.sum(), leaves)]
    return found


def grpo(x, weight, bias, targets, **options):
    """The loss with an entropy bonus, and gradients."""
    leaves = [leaf.detach().requires_grad_() for leaf in (x.view(4, 3, -1), weight, bias)]
    mask = (targets != -100).view(4, 3)
    old, advantages = torch.full((4, 3), -3.0), torch.tensor([1.0, -1.0, 0.5, -0.5])
    output = linear_grpo_loss(
        leaves[0],
        leaves[1],
        targets.view(4, 3),
        old,
        advantages,
        mask,
        bias=leaves[2],
        entropy_coef=0.1,
        **options,
    )
    return [output.loss.detach(), *torch.autograd.grad(output.loss, leaves)]


def everything(backend):
    """What the rank that calls it finds."""
    found, rank = {}, dist.get_rank()
    for name, (_, cuts, _, options) in CASES.items():
        (x, weight, bias), targets = problem(name)
        mine = slice(cuts[rank], cuts[rank + 1])
        call = (x, weight[mine], bias[mine], targets)
        where = {"group": dist.group.WORLD, "backend": backend}
        found[name] = results_and_gradients(*call, **options, **where)
        if name == "everything":
            with torch.no_grad():
                found["no gradient"] = linear_logprobs(
                    x, weight[mine], targets, bias=bias[mine], **HEAD, **where
                )
            found["completions"] = completions(*call, **HEAD, **where)
            found["grpo"] = grpo(*call, **HEAD, **where)
            found["divergence"] = divergence(*call, **HEAD, **where)
            found["topk"] = topk(*call, **HEAD, **where)
            found["leading"] = leading(*call, **where)
            found["several"] = several(*call, **HEAD, **where)
            if backend == "reference":
                double = (tensor.double() for tensor in call[:3])
                found["float64"] = results_and_gradients(*double, targets, **options, **where)
    return found


@pytest.fixture(scope="module", params=BACKENDS)
def ranks(request, tmp_path_factory):
    """(backend, what each of the two ranks found)"""
    folder = tmp_path_factory.mktemp("ranks") / "meeting"
    return request.param, on_ranks(2, lambda: everything(request.param), folder)


def assert_shares(ranks, found, expected, cuts, tolerance, count=2):
    """What the ranks found against the whole: ``count`` results, gradients of hidden, weight and bias, other results.

    What every rank has is the same bits on both.
    """
    for rank, values in enumerate(ranks):
        mine = slice(cuts[rank], cuts[rank + 1])
        wanted = list(expected)
        wanted[count + 1], wanted[count + 2] = wanted[count + 1][mine], wanted[count + 2][mine]
        for value, whole in zip(values[found], wanted, strict=True):
            assert value.shape == whole.shape
            finite = whole.double()[whole.double().isfinite()]
            scale = float(finite.abs().max()) if finite.numel() else 0.0
            torch.testing.assert_close(value.double(), whole.double(), rtol=tolerance, atol=tolerance * scale)
    first, second = (values[found] for values in ranks)
    for place in {*range(len(first))} - {count + 1, count + 2}:
        assert same_bits(first[place], second[place])


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_have_what_one_has(ranks, name):
    """In float64: by torch's log_softmax, or by the reference on one rank where a target is at -inf or outside its set."""
    _, found = ranks
    _, cuts, dtype, _ = CASES[name]
    assert_shares(found, name, exact(name), cuts, 2.0**-7 if dtype == torch.bfloat16 else 1e-5)
    assert found[0][name][2].dtype == dtype


@functools.cache  # every backend asks for the same
def exact(name):
    leaves, targets = problem(name)
    options = CASES[name][3]
    if name in ("masked", "kept"):
        double = [leaf.double() for leaf in leaves]
        expected = results_and_gradients(*double, targets, backend="reference", **options)
        assert (expected[0] == -torch.inf).any()
        return expected
    x, weight, bias = (leaf.double().requires_grad_() for leaf in leaves)
    head = oracle.Head(bias, options.get("logit_scale", 1.0), options.get("softcap"))
    temperature = options["temperature"]
    temperature = temperature.double() if isinstance(temperature, torch.Tensor) else temperature
    logp, entropy, *extra = oracle.of_logits(x @ weight.T, head, targets, temperature)
    grads = torch.autograd.grad(loss_of(logp, entropy), (x, weight, bias))
    return [value.detach() for value in (logp, entropy, *grads, *(extra if "stats" in options else ()))]


def test_in_float64(ranks):
    backend, found = ranks
    if backend != "reference":
        pytest.skip("kernels serve no float64")
    assert_shares(found, "float64", exact("everything"), CASES["everything"][1], 1e-11)


def test_without_a_gradient(ranks):
    _, found = ranks
    for values in found:
        assert same_bits(values["no gradient"], values["everything"][0])


def test_slopes_of_shards_keep_their_digits_where_a_logit_leads(ranks):
    _, found = ranks
    leaves, targets = problem("everything")
    expected = leading(*(leaf.double() for leaf in leaves), targets, backend="reference")
    for start in (0, 4):
        shares = [{"leading": values["leading"][start : start + 4]} for values in found]
        assert_shares(shares, "leading", expected[start : start + 4], (0, 13, 37), 1e-4, count=1)


@pytest.mark.parametrize("op", [completions, divergence, grpo, several, topk])
def test_ops_above_it(ranks, op):
    _, found = ranks
    leaves, targets = problem("everything")
    double = [leaf.double() for leaf in leaves]
    expected = op(*double, targets, backend="reference", **HEAD)
    assert_shares(found, op.__name__, expected, CASES["everything"][1], 1e-5, count=1)
