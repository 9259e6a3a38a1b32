"""linear_divergence on Triton in Triton's interpreter, against the reference in float64. Run by test_interpreter.py.
N tokens, V vocabulary."""

import pytest
import torch

from r1kernels import linear_divergence
from tests.support import interpreter_bfloat16
from tests.support.numerics import CAP

interpreter_bfloat16.repair()

RICH = {"softcap": 5.0, "teacher_logit_scale": 0.5, "teacher_temperature": 0.8}


def run(kind, dtype=torch.float32, vocabulary=1100, backend="triton", **options):
    """(divergence, entropy, gradients of hidden and weight)"""
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=generator).to(dtype)

    given = [normal(5, 6), normal(vocabulary, 6), normal(5, 9), normal(vocabulary, 9), normal(vocabulary)]
    if backend == "reference":
        given = [value.double() for value in given]
    *given, bias = given
    leaves = [value.requires_grad_() for value in given[:2]]
    targets = torch.tensor([0, -100, 0, 0, 0])
    value, entropy = linear_divergence(
        *given, teacher_bias=bias, kind=kind, targets=targets, return_entropy=True, backend=backend, **options
    )
    upstream = torch.linspace(-1, 2, 5, dtype=value.dtype)
    return value.detach(), entropy, *torch.autograd.grad((value * upstream).sum(), leaves)


@pytest.mark.parametrize(
    ("kind", "vocabulary", "save_logits"),
    [
        ("forward_kl", 1100, False),
        ("reverse_kl", 1100, False),
        ("jsd", 1100, False),
        ("jsd", 31, False),  # no vectors
        ("reverse_kl", 1100, True),
    ],
)
def test_it_is_that_of_the_reference(kind, vocabulary, save_logits):
    options = {**RICH, "beta": 0.2, "temperature": torch.linspace(0.5, 2, 5), "vocabulary": vocabulary}
    ours = run(kind, save_logits=save_logits, **options)
    for mine, truth in zip(ours, run(kind, backend="reference", **options), strict=True):
        assert (mine.double() - truth).abs().max() <= 1e-5 * truth.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_inputs_of_16_bits(dtype):
    ours = run("jsd", dtype)
    tolerances = (1e-5, 1e-5, 2 * CAP[dtype], 2 * CAP[dtype])
    for mine, truth, tolerance in zip(ours, run("jsd", dtype, backend="reference"), tolerances, strict=True):
        assert (mine.double() - truth).abs().max() <= tolerance * truth.abs().max()


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("lead", [0, 22])
def test_what_leads_keeps_its_digits_and_what_agrees_is_0(kind, lead):
    generator = torch.Generator().manual_seed(lead)
    student, teacher = torch.randn(2, 2, 40, generator=generator).unbind(0)
    for logits in (student, teacher):
        logits[:, 3] += lead
    head = torch.eye(40)

    def both_ways(x, y, backend):
        leaf = x.clone().requires_grad_()
        to = torch.float64 if backend == "reference" else torch.float32
        eye = head.to(to)
        value = linear_divergence(leaf.to(to), eye, y.to(to), eye, kind=kind, backend=backend)
        return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]

    ours, exact = both_ways(student, teacher, "triton"), both_ways(student, teacher, "reference")
    for mine, truth in zip(ours, exact, strict=True):
        assert ((mine - truth).abs() <= 2e-5 * truth.abs() + 2e-6 * truth.abs().max()).all()
    value, grad = both_ways(student, student, "triton")
    assert (value == 0).all() and (grad == 0).all()
