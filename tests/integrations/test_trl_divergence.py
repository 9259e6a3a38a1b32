"""TRL's divergence for distillation with r1kernels behind it: TRL's own loss, entropy and gradients, and what undoes it.

B completions of L tokens, V vocabulary; student and teacher differ in hidden size.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: nothing to adapt")
pytest.importorskip("trl.kernels.chunked_divergence", reason="this TRL has no chunked divergence")

from trl.kernels import chunked_divergence
from trl.trainer import distillation_trainer

from r1kernels.integrations import trl as r1

OWN = chunked_divergence.ChunkedDivergenceFunction
B, L, V = 3, 7, 53
HEADS = {
    "plain": {},
    "scaled": {"student_logit_scale": 0.6, "teacher_logit_scale": 1.4},
    "capped": {"student_final_logit_softcapping": 4.0, "teacher_final_logit_softcapping": 6.0},
}


def problem(dtype=torch.float32):
    """(student's hidden, weight and bias as leaves, teacher's, the mask)"""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    student = [normal(B, L, 12), normal(V, 12), normal(V)]
    teacher = [normal(B, L, 20), normal(V, 20), normal(V)]
    mask = torch.arange(L) < torch.tensor([[7], [3], [0]])
    return [leaf.requires_grad_() for leaf in student], teacher, mask.int()


def loss_of(student, teacher, mask, **options):
    """What ``DistillationTrainer`` computes: (loss, sum of entropies, tokens), and the gradients of the student."""
    (x, w, b), (tx, tw, tb) = student, teacher
    found = distillation_trainer._chunked_divergence_loss(
        x, tx, w, tw, mask, student_lm_head_bias=b, teacher_lm_head_bias=tb, **options
    )
    return [*found, *torch.autograd.grad(found[0], student)]


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("items", [None, 25], ids=["mean", "over the batch"])
def test_the_loss_of_the_trainer_is_its_own(beta, head, items):
    problem_of = problem()
    options = HEADS[head] | {"beta": beta, "temperature": 1.3, "num_items_in_batch": items}
    theirs = loss_of(*problem_of, **options)
    with r1.patch_divergence():
        assert distillation_trainer.ChunkedDivergenceFunction is not OWN
        ours = loss_of(*problem_of, **options)
    assert (
        distillation_trainer.ChunkedDivergenceFunction is OWN is chunked_divergence.ChunkedDivergenceFunction
    )
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=2e-6)


def test_where_a_logit_leads_by_30_nats_the_patched_one_keeps_its_digits():
    student, teacher = torch.zeros(1, V), torch.zeros(1, V)
    student[0, 3], teacher[0, 3] = 30.0, 29.0
    one = torch.ones(1, 1)
    call = (one, student.t().contiguous(), None, one, teacher.t().contiguous(), None, 0.0)
    p = torch.log_softmax(teacher.double(), -1)
    exact = (p.exp() * (p - torch.log_softmax(student.double(), -1))).sum()
    with r1.patch_divergence():
        ours, entropy = chunked_divergence.ChunkedDivergenceFunction.apply(*call)
    assert ours.item() == pytest.approx(exact.item(), rel=1e-3) and entropy.item() > 0
    assert abs(OWN.apply(*call)[0].item() - exact.item()) > 0.5 * exact.item()


def test_patch_takes_it_along_and_refuses_another_signature(monkeypatch):
    with r1.patch():
        assert chunked_divergence.ChunkedDivergenceFunction is not OWN
        with pytest.raises(ValueError, match="expected a library that is not patched yet"):
            r1.patch_divergence()
    assert chunked_divergence.ChunkedDivergenceFunction is OWN

    class Other(torch.autograd.Function):
        @staticmethod
        def forward(ctx, student_hidden, beta):
            return student_hidden

    monkeypatch.setattr(chunked_divergence, "ChunkedDivergenceFunction", Other)
    with pytest.raises(RuntimeError, match=r"the installed version has \(ctx, student_hidden, beta\)"):
        r1.patch_divergence()


def test_a_bfloat16_head_under_float32_states_and_a_partitioned_one():
    student, teacher, _ = problem()
    weight = student[1].detach().bfloat16().requires_grad_()
    call = (
        student[0].flatten(0, 1),
        weight,
        None,
        teacher[0].flatten(0, 1),
        teacher[1].bfloat16(),
        None,
        0.5,
    )
    with r1.patch_divergence():
        function = chunked_divergence.ChunkedDivergenceFunction
        divergence, entropy = function.apply(*call)
        assert divergence.dtype == torch.float32 and not entropy.requires_grad
        (grad,) = torch.autograd.grad(divergence.sum(), weight)
        assert grad.dtype == torch.bfloat16
        weight.ds_id = 0
        with pytest.raises(ValueError, match="DeepSpeed ZeRO-3"):
            function.apply(*call)
