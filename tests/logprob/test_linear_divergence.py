"""linear_divergence on every backend, against torch.nn.functional.kl_div in float64 and mpmath. N tokens, H hidden, V vocabulary."""

from __future__ import annotations

import functools
import math
from itertools import product

import mpmath
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from r1kernels import linear_divergence
from tests.support.numerics import assert_as_exact_as, same_bits

OP = "linear_divergence"
KINDS = ("forward_kl", "reverse_kl", "jsd")
PLAIN = {"temperature": 1.0}
RICH = {
    "temperature": 1.3,
    "teacher_temperature": 0.9,
    "softcap": 5.0,
    "teacher_softcap": 4.0,
    "logit_scale": 0.7,
    "teacher_logit_scale": -0.8,
    "beta": 0.3,
}


class Problem:
    """Student and teacher of different widths; every fourth token is ignored."""

    def __init__(self, tokens=11, hidden=6, vocabulary=37, dtype=torch.float32, device="cpu", seed=0):
        generator = torch.Generator().manual_seed(seed)

        def head(width):
            sizes, scale = ((tokens, width), (vocabulary, width), (vocabulary,)), (1, 2 / width**0.5, 1)
            drawn = [a * torch.randn(size, generator=generator) for a, size in zip(scale, sizes, strict=True)]
            return [value.to(device, dtype) for value in drawn]

        self.student, self.teacher = head(hidden), head(hidden + 3)
        for leaf in self.student:
            leaf.requires_grad_()
        self.targets = torch.zeros(tokens, dtype=torch.int64, device=device)
        self.targets[1::4] = -100

    def call(self, **options):
        """The op as a function of hidden, weight and bias of the student."""
        x, w, b = self.teacher
        options = {"targets": self.targets, "teacher_bias": b} | options
        return lambda hidden, weight, bias: linear_divergence(hidden, weight, x, w, bias=bias, **options)

    def exact(self, kind="forward_kl", **options):
        """(divergence, gradients) in float64 on the CPU."""
        leaves = [leaf.detach().double().cpu().requires_grad_() for leaf in self.student]
        teacher = [value.double().cpu() for value in self.teacher]
        return values_and_gradients(
            lambda *leaves: textbook(leaves, teacher, kind=kind, targets=self.targets.cpu(), **options),
            leaves,
        )


def textbook(student, teacher, *, kind, targets, beta=0.5, linear=F.linear, **options):
    """By kl_div of log_softmax."""

    def log_probs(head, whose):
        logits = linear(*head) * options.get(f"{whose}logit_scale", 1.0)
        cap = options.get(f"{whose}softcap")
        logits = cap * torch.tanh(logits / cap) if cap else logits
        temperature = options.get(f"{whose}temperature", options.get("temperature", 1.0))
        if isinstance(temperature, Tensor):
            temperature = temperature.to(logits).unsqueeze(-1)
        return torch.log_softmax(logits / temperature, -1)

    p, q = log_probs(teacher, "teacher_"), log_probs(student, "")
    if kind == "forward_kl":
        value = kl(p, q)
    elif kind == "reverse_kl":
        value = kl(q, p)
    else:
        mean = torch.logaddexp(p + math.log(beta), q + math.log(1 - beta))
        value = beta * kl(p, mean) + (1 - beta) * kl(q, mean)
    return value.masked_fill(targets == -100, 0.0)


def kl(p, q):
    """KL(p | q) of log-probs"""
    terms = F.kl_div(q, p, log_target=True, reduction="none")
    return torch.where(p == -torch.inf, 0.0, terms).sum(-1)


def jsd(p, q, beta=0.5):
    mean = torch.logaddexp(p + math.log(beta), q + math.log(1 - beta))
    return beta * kl(p, mean) + (1 - beta) * kl(q, mean)


def values_and_gradients(function, leaves):
    value = function(*leaves)
    value = value[0] if isinstance(value, tuple) else value
    upstream = torch.linspace(-1, 2, value.numel(), dtype=value.dtype, device=value.device).view_as(value)
    return value.detach(), *torch.autograd.grad((value * upstream).sum(), leaves)


def assert_close(ours, exact, tolerance=1e-5):
    for mine, truth in zip(ours, exact, strict=True):
        scale = float(truth.abs().max()) if truth.numel() else 0.0
        torch.testing.assert_close(mine.cpu().double(), truth, rtol=tolerance, atol=tolerance * scale)


def of_logits(student, teacher, **options):
    """The divergence of logits (N, V): heads of ones on a diagonal, so that the hidden states are the logits."""
    head = torch.eye(student.shape[-1], dtype=student.dtype, device=student.device)
    return linear_divergence(student, head, teacher, head, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        PLAIN,
        RICH,
        RICH | {"temperature": torch.linspace(0.5, 2, 11)},
        PLAIN | {"teacher_temperature": torch.linspace(2, 0.7, 11)},
    ],
    ids=["plain", "rich", "token", "token of the teacher"],
)
@pytest.mark.parametrize(
    "how", [{}, {"chunk_size": 4, "save_logits": False}, {"chunk_size": 4, "save_logits": True}], ids=str
)
def test_however_it_is_cut_it_is_that_of_the_textbook(place, kind, options, how):
    backend, device = place
    problem = Problem(device=device)
    given = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    ours = values_and_gradients(problem.call(kind=kind, backend=backend, **given, **how), problem.student)
    assert_close(ours, problem.exact(kind, **options))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(1, 1, 1), (2, 3, 1), (1, 17, 1003), (65, 33, 515)], ids=str)
@pytest.mark.parametrize("save_logits", [False, True])
def test_any_size(place, kind, size, save_logits):
    backend, device = place
    problem = Problem(*size, device=device)
    call = problem.call(kind=kind, backend=backend, save_logits=save_logits)
    for mine, truth in zip(values_and_gradients(call, problem.student), problem.exact(kind), strict=True):
        scale = max(float(truth.abs().max()), 1e-3)  # one id alone: all is 0
        torch.testing.assert_close(mine.cpu().double(), truth, rtol=2e-5, atol=2e-5 * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_blocks_of_tokens_and_slabs_of_the_vocabulary(place, dtype):
    backend, device = place
    if backend == "reference":
        pytest.skip("the reference knows no slabs")
    problem = Problem(140, 5, 16400, dtype, device)
    exact = problem.exact("jsd")
    for save_logits in (False, True):
        call = problem.call(kind="jsd", backend=backend, save_logits=save_logits, chunk_size=130)
        ours = values_and_gradients(call, problem.student)
        assert_close(ours[:1], exact[:1])
        assert_close(ours[1:], exact[1:], 1e-5 if dtype == torch.float32 else 2e-2)


def test_beta_is_exact_in_float64():
    student, teacher = torch.randn(2, 4, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = jsd(teacher.log_softmax(-1), student.log_softmax(-1), beta=0.1)
    torch.testing.assert_close(of_logits(student, teacher, kind="jsd", beta=0.1), exact, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_of_the_reference(kind):
    problem = Problem(3, 2, 5, dtype=torch.float64)
    call = problem.call(kind=kind, chunk_size=2, **RICH)
    assert torch.autograd.gradcheck(call, problem.student)


@functools.cache  # every backend asks for the same rows
def by_mpmath(student, teacher, kind, beta):
    """(divergence, its gradient in the student's logits) of one row of numbers each, in 60 digits."""
    with mpmath.workdps(60):

        def softmax(row):
            powers = [mpmath.exp(mpmath.mpf(value)) for value in row]
            total = mpmath.fsum(powers)
            return [power / total for power in powers]

        def kl(p, q):
            return mpmath.fsum(a * mpmath.log(a / b) for a, b in zip(p, q, strict=True))

        p, q = softmax(teacher), softmax(student)
        if kind == "forward_kl":
            return float(kl(p, q)), [float(b - a) for a, b in zip(p, q, strict=True)]
        mean, share = p, mpmath.mpf(1)
        if kind == "jsd":
            beta = mpmath.mpf(beta)
            mean, share = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)], 1 - beta
        from_mean = kl(q, mean)
        slopes = [share * b * (mpmath.log(b / m) - from_mean) for b, m in zip(q, mean, strict=True)]
        value = share * from_mean + (beta * kl(p, mean) if kind == "jsd" else 0)
        return float(value), [float(slope) for slope in slopes]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lead", [0, 5, 15, 22, 30])
@pytest.mark.parametrize("save_logits", [False, True])
def test_it_keeps_its_digits_where_logits_lead(place, kind, lead, save_logits):
    """One logit leads by so many nats: of both, of the teacher, of the student, or another one of each; one call each."""
    backend, device = place
    generator = torch.Generator().manual_seed(lead)
    betas = (0.5, 0.1) if kind == "jsd" else (0.5,)
    for beta, (of_student, of_teacher) in product(betas, ((3, 3), (None, 3), (3, None), (3, 7))):
        student, teacher = torch.randn(2, 2, 24, generator=generator).unbind(0)
        for logits, leader in ((student, of_student), (teacher, of_teacher)):
            if leader is not None:
                logits[:, leader] += lead
        leaf = student.to(device).requires_grad_()
        head = torch.eye(24, device=device, requires_grad=True)
        options = {"kind": kind, "beta": beta, "save_logits": save_logits, "backend": backend}
        value = linear_divergence(leaf, head, teacher.to(device), head, **options)
        (grad,) = torch.autograd.grad(value.sum(), leaf)
        for row in range(2):
            truth, slopes = by_mpmath(*(tuple(x[row].tolist()) for x in (student, teacher)), kind, beta)
            assert abs(value[row].item() - truth) <= 2e-5 * truth
            slopes = torch.tensor(slopes, dtype=torch.float64)
            error = (grad[row].cpu().double() - slopes).abs()
            assert (error <= 2e-5 * slopes.abs() + 2e-6 * slopes.abs().max()).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_it_is_0_where_teacher_and_student_agree(place, kind, scale):
    backend, device = place
    logits = scale * torch.randn(5, 2100, generator=torch.Generator().manual_seed(0)).to(device)
    leaf = logits.clone().requires_grad_()
    # the teacher's logits are the same but for a constant, as those of another temperature and scale may be
    for teacher, options in ((logits, {}), (logits + 2, {}), (2 * logits, {"teacher_temperature": 2.0})):
        value = of_logits(leaf, teacher, kind=kind, backend=backend, **options)
        (grad,) = torch.autograd.grad(value.sum(), leaf)
        assert (value >= 0).all() and value.max() <= 1e-7 and grad.abs().max() <= 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("noise", [1e-1, 1e-2, 1e-3])
def test_small_divergences_have_digits_and_are_not_negative(place, kind, noise):
    backend, device = place
    student, teacher = torch.randn(2, 6, 500, generator=torch.Generator().manual_seed(0))
    teacher = student + noise * teacher
    value = of_logits(student.to(device), teacher.to(device), kind=kind, backend=backend).cpu()
    p, q = (torch.log_softmax(x.double(), -1) for x in (teacher, student))
    exact = {"forward_kl": kl(p, q), "reverse_kl": kl(q, p), "jsd": jsd(p, q)}[kind]
    assert (value >= 0).all()
    torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=0)


def test_beta_turns_teacher_and_student_round(place):
    """m and the two terms of the divergence stay the same."""
    backend, device = place
    student, teacher = torch.randn(2, 4, 30, generator=torch.Generator().manual_seed(0)).to(device)
    one = of_logits(student, teacher, kind="jsd", beta=0.2, backend=backend)
    other = of_logits(teacher, student, kind="jsd", beta=0.8, backend=backend)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert (one <= torch.tensor(2.0).log()).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_masked_vocabulary(place, kind):
    """Ids at -inf on both sides are no ids; on one side they have probability 0 there."""
    backend, device = place
    student, teacher = torch.randn(2, 4, 30, generator=torch.Generator().manual_seed(0)).to(device)
    head, masked = torch.eye(30, device=device), torch.zeros(30, device=device)
    masked[10:20] = -torch.inf
    ids = [v for v in range(30) if not 10 <= v < 20]

    def call(leaf, **biases):
        return linear_divergence(leaf, head, teacher, head, kind=kind, backend=backend, **biases)

    leaf = student.clone().requires_grad_()
    both = call(leaf, bias=masked, teacher_bias=masked)
    (grad,) = torch.autograd.grad(both.sum(), leaf)
    small = student[:, ids].clone().requires_grad_()
    alone = of_logits(small, teacher[:, ids], kind=kind, backend=backend)
    (expected,) = torch.autograd.grad(alone.sum(), small)
    torch.testing.assert_close(both, alone, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad[:, ids], expected, rtol=1e-5, atol=1e-6)
    assert (grad[:, 10:20] == 0).all()

    for biases, infinite in (({"bias": masked}, "forward_kl"), ({"teacher_bias": masked}, "reverse_kl")):
        value = call(student, **biases)
        assert (value == torch.inf).all() if kind == infinite else torch.isfinite(value).all()
        p = torch.log_softmax(teacher.double() + biases.get("teacher_bias", 0), -1)
        q = torch.log_softmax(student.double() + biases.get("bias", 0), -1)
        exact = {"forward_kl": kl(p, q), "reverse_kl": kl(q, p), "jsd": jsd(p, q)}[kind]
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)


def test_a_row_without_a_distribution_is_nan_alone(place):
    backend, device = place
    student, teacher = torch.randn(2, 4, 30, generator=torch.Generator().manual_seed(0)).to(device)
    student[1, 3], teacher[2, 5] = torch.nan, torch.nan
    for kind in KINDS:
        value = of_logits(student, teacher, kind=kind, backend=backend)
        assert value.isnan().tolist() == [False, True, True, False]


@pytest.mark.parametrize("sizes", [(40, 37), (37, 40)], ids=str)
def test_padding_of_the_vocabulary_takes_no_part(place, sizes):
    """Student and teacher have rows that the other one lacks: 37 ids are common."""
    backend, device = place
    problem = Problem(vocabulary=40, device=device)
    student = [
        problem.student[0],
        *(leaf.detach()[: sizes[0]].requires_grad_() for leaf in problem.student[1:]),
    ]
    problem.teacher[1:] = [value[: sizes[1]] for value in problem.teacher[1:]]
    ours = values_and_gradients(problem.call(backend=backend), student)
    assert all((grad[37:] == 0).all() for grad in ours[2:])
    problem.student = [student[0], *(leaf[:37] for leaf in student[1:])]
    problem.teacher[1:] = [value[:37] for value in problem.teacher[1:]]
    assert_close([*ours[:2], *(grad[:37] for grad in ours[2:])], problem.exact())


def test_a_head_without_padding_gets_its_gradient_without_a_copy(place):
    backend, device = place
    problem = Problem(device=device)
    value = problem.call(backend=backend)(*problem.student)
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            made.append((function.name(), getattr(result, "shape", None)))
            return result

    with Watch():
        value.sum().backward()
    assert made and ("aten::slice_backward", problem.student[1].shape) not in made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_inputs_are_as_exact_as_eager(place, kind, dtype):
    backend, device = place
    problem = Problem(64, 48, 2100, dtype, device)
    ours = values_and_gradients(problem.call(kind=kind, backend=backend), problem.student)

    def eager(*student):
        return textbook(
            student,
            problem.teacher,
            kind=kind,
            targets=problem.targets,
            linear=lambda *head: F.linear(*head).float(),
        )

    theirs = values_and_gradients(eager, problem.student)
    assert [value.dtype for value in ours] == [torch.float32, dtype, dtype, dtype]
    for mine, peer, truth in zip(ours, theirs, problem.exact(kind), strict=True):
        assert_as_exact_as(mine.cpu(), peer.cpu(), truth, mine.dtype)


def test_a_frozen_head_in_float16_under_another_default_dtype(place):
    backend, device = place
    problem = Problem(dtype=torch.float16, device=device)
    head = [leaf.detach() for leaf in problem.student[1:]]
    call, found = problem.call(backend=backend), []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            value = call(problem.student[0], *head)
            found.append((value, *torch.autograd.grad(value.sum(), problem.student[0])))
        finally:
            torch.set_default_dtype(torch.float32)
    assert all(same_bits(one, other) for one, other in zip(*found, strict=True))


def test_a_teacher_of_another_dtype(place):
    backend, device = place
    problem = Problem(device=device)
    problem.teacher = [value.bfloat16() for value in problem.teacher]
    ours = values_and_gradients(problem.call(backend=backend), problem.student)
    assert_close(ours, problem.exact())


@pytest.mark.parametrize("save_logits", [False, True])
def test_only_what_needs_a_gradient_gets_one(place, save_logits):
    backend, device = place
    problem = Problem(300, 7, 1003, device=device)
    full = torch.autograd.grad(
        problem.call(kind="jsd", backend="reference")(*problem.student).sum(), problem.student
    )
    for needed in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1)):
        leaves = [
            leaf.detach().requires_grad_(wanted == 1)
            for leaf, wanted in zip(problem.student, needed, strict=True)
        ]
        problem.call(kind="jsd", save_logits=save_logits, backend=backend)(*leaves).sum().backward()
        for leaf, whole, wanted in zip(leaves, full, needed, strict=True):
            assert (leaf.grad is not None) == wanted, needed
            if wanted:
                assert_close([leaf.grad], [whole.cpu().double()])


def test_the_teacher_gets_no_gradient(place):
    backend, device = place
    problem = Problem(device=device)
    for value in problem.teacher:
        value.requires_grad_()
    problem.call(backend=backend)(*problem.student).sum().backward()
    assert all(value.grad is None for value in problem.teacher) and problem.student[0].grad is not None


@pytest.mark.parametrize("save_logits", [False, True])
def test_a_graph_that_is_kept_gives_the_same_gradient_twice(place, save_logits):
    backend, device = place
    problem = Problem(device=device)
    value = problem.call(save_logits=save_logits, backend=backend)(*problem.student)
    first = torch.autograd.grad(value.sum(), problem.student, retain_graph=True)
    second = torch.autograd.grad(value.sum(), problem.student)
    assert all(same_bits(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("save_logits", [False, True])
def test_a_second_derivative_is_refused(place, save_logits):
    backend, device = place
    problem = Problem(device=device)
    value = problem.call(save_logits=save_logits, backend=backend)(*problem.student)
    (grad,) = torch.autograd.grad(value.sum(), problem.student[0], create_graph=True)
    with pytest.raises(RuntimeError, match="linear_divergence: a second derivative is not implemented"):
        grad.square().sum().backward()


@pytest.mark.parametrize("save_logits", [False, True])
def test_the_hidden_states_of_ignored_tokens_may_hold_anything(place, save_logits):
    backend, device = place
    problem = Problem(device=device)
    exact = problem.exact("jsd")
    dirty = problem.student[0].detach().clone()
    dirty[1], dirty[5] = torch.nan, torch.inf
    problem.teacher[0][5], problem.teacher[0][9] = torch.nan, torch.inf
    call = problem.call(kind="jsd", save_logits=save_logits, return_entropy=True, backend=backend)
    ours = values_and_gradients(call, [dirty.requires_grad_(), *problem.student[1:]])
    assert_close(ours, exact)
    assert (ours[0][1::4] == 0).all() and (ours[1][1::4] == 0).all()


def test_the_entropy_is_the_students(place):
    backend, device = place
    problem = Problem(device=device)
    call = problem.call(return_entropy=True, backend=backend, temperature=1.3)
    value, entropy = call(*problem.student)
    x, w, b = (leaf.detach().double().cpu() for leaf in problem.student)
    exact = torch.distributions.Categorical(logits=(x @ w.T + b) / 1.3).entropy()
    exact = exact.masked_fill(problem.targets.cpu() == -100, 0.0)
    assert_close([entropy], [exact])
    assert value.requires_grad and not entropy.requires_grad


@pytest.mark.parametrize(
    "layout", ["expanded hidden", "sliced hidden", "turned weights", "strided targets", "batch"]
)
def test_any_strides(place, layout):
    backend, device = place
    problem = Problem(12, device=device)
    x, w, b = (leaf.detach() for leaf in problem.student)
    y, v, c = problem.teacher
    if layout == "expanded hidden":
        x, y = x[:1].expand(12, 6), y[:1].expand(12, 9)
    elif layout == "sliced hidden":
        x, y = x.repeat(1, 2)[:, 1:12:2], y.repeat(1, 2)[:, 1:18:2]
    elif layout == "turned weights":
        w, v = w.t().contiguous().t(), v.t().contiguous().t()
    elif layout == "strided targets":
        problem.targets = problem.targets.repeat_interleave(2)[::2]
    else:
        x, y = x.view(3, 4, 6).transpose(0, 1), y.view(3, 4, 9).transpose(0, 1)
        problem.targets = problem.targets.view(3, 4).t()
    problem.student = [x, w, b]
    problem.teacher = [y, v, c]
    views = [leaf.requires_grad_() for leaf in (x, w, b)]
    ours = values_and_gradients(problem.call(backend=backend), views)
    problem.teacher = [value.contiguous() for value in problem.teacher]
    packed = [leaf.detach().contiguous().clone().requires_grad_() for leaf in views]
    plain = values_and_gradients(problem.call(backend=backend), packed)
    assert ours[0].shape == problem.targets.shape
    assert_close(ours, [value.cpu().double() for value in plain], 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_agree_bit_for_bit(place, dtype):
    backend, device = place
    problem = Problem(300, 40, 2100, dtype, device)
    first, second = (
        values_and_gradients(problem.call(kind="jsd", backend=backend), problem.student) for _ in range(2)
    )
    assert all(same_bits(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)], ids=str)
def test_no_tokens(place, shape, dtype):
    backend, device = place
    x = torch.zeros(*shape, 6, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(37, 6, device=device, dtype=dtype, requires_grad=True)
    value, entropy = linear_divergence(x, weight, x, weight, return_entropy=True, backend=backend)
    value.sum().backward()
    assert value.shape == entropy.shape == shape and x.grad.shape == x.shape and (weight.grad == 0).all()


def test_autocast_casts_as_linear_does(place):
    backend, device = place
    problem = Problem(device=device)
    call = problem.call(backend=backend)
    with torch.autocast(device, dtype=torch.bfloat16):
        under = call(*problem.student)
    problem.teacher = [value.bfloat16() for value in problem.teacher]
    by_hand = problem.call(backend=backend)(*(leaf.bfloat16() for leaf in problem.student))
    assert under.dtype == torch.float32 and same_bits(under.detach(), by_hand.detach())
    grads = torch.autograd.grad(under.sum(), problem.student)
    assert all(grad.dtype == torch.float32 and torch.isfinite(grad).all() for grad in grads)


def test_it_compiles_in_one_graph(place):
    backend, device = place
    problem = Problem(device=device)
    # in a graph the reference takes None for True, the kernels for False
    for save_logits in (None,) if backend == "reference" else (None, True):
        call = problem.call(kind="jsd", backend=backend, save_logits=save_logits, return_entropy=True, **RICH)
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        plain = values_and_gradients(call, problem.student)
        torch.testing.assert_close(values_and_gradients(compiled, problem.student), plain)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"kind": "kl"}, ValueError, "kind: expected one of 'forward_kl', 'reverse_kl', 'jsd', got 'kl'"),
        ({"kind": "jsd", "beta": 0}, ValueError, r'beta: expected a number inside \(0, 1\), got 0.*kind="forward_kl"'),
        ({"kind": "jsd", "beta": 1.0}, ValueError, r'beta: .*got 1.0.*kind="reverse_kl" for 1'),
        ({"kind": "forward_kl", "beta": 7.0}, ValueError, r"beta: expected a number in \[0, 1\], got 7.0"),
        ({"kind": "jsd", "beta": "half"}, TypeError, "beta: expected a number, got str"),
        ({"teacher_hidden": torch.zeros(2, 4)}, ValueError, r"teacher_hidden: expected shape \(3, any\), got \(2, 4\)"),
        ({"teacher_weight": torch.zeros(7, 5)}, ValueError, r"teacher_weight: expected shape \(any, 4\), got \(7, 5\)"),
        ({"teacher_weight": torch.zeros(7, 4).half()}, TypeError, "teacher_weight: expected the dtype of teacher_hidden"),
        ({"teacher_bias": torch.zeros(6)}, ValueError, r"teacher_bias: expected shape \(7\), got \(6,\)"),
        ({"bias": torch.zeros(6)}, ValueError, r"bias: expected shape \(8\), got \(6,\)"),
        ({"teacher_softcap": 0}, ValueError, "teacher_softcap: expected a number above 0, got 0"),
        ({"teacher_logit_scale": "1"}, TypeError, "teacher_logit_scale: expected a number, got str"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a number above 0, got 0.0"),
        ({"teacher_temperature": torch.tensor([1.0, -1, 1])}, ValueError, "teacher_temperature: expected values above 0"),
        ({"targets": torch.zeros(3)}, TypeError, "targets: expected dtype int64, got torch.float32"),
        ({"targets": torch.zeros(2).long()}, ValueError, r"targets: expected shape \(3\), got \(2,\)"),
        ({"chunk_size": 0}, ValueError, "chunk_size: expected at least 1, got 0"),
        ({"save_logits": 1}, TypeError, "save_logits: expected a bool, got int"),
        ({"return_entropy": 1}, TypeError, "return_entropy: expected a bool, got int"),
        ({"group": 1}, ValueError, "teacher_weight: expected the 8 rows that weight has on this rank of group, got 7"),
        ({"group": 1, "teacher_weight": torch.zeros(8, 4)}, TypeError, "group: expected a torch.distributed.ProcessGroup"),
        ({"weight": torch.zeros(0, 5)}, ValueError, r"weight: expected shape \(V, H\) with V >= 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_errors_name_the_argument(changed, error, message):
    arguments = {
        "hidden": torch.zeros(3, 5),
        "weight": torch.zeros(8, 5),
        "teacher_hidden": torch.zeros(3, 4),
        "teacher_weight": torch.zeros(7, 4),
    }
    with pytest.raises(error, match=message):
        linear_divergence(**{**arguments, **changed})
