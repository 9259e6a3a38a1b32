"""linear_divergence of the backend cuda without a GPU: its engine and its kernels under the emulator, torch's GEMM on the CPU.

N tokens, H hidden, V vocabulary.
"""

import pytest
import torch

from r1kernels import linear_divergence
from r1kernels.logprob import divergence, divergence_rows, divergence_tiles, token
from tests.support.emulated_rows import ENGINE, EmulatedKernel, address
from tests.support.numerics import CAP, same_bits

IGNORED = -100


class EmulatedRows(EmulatedKernel):
    """The rows of divergences too."""

    def divergence_call(self, call):
        pair = call.pair
        of_teacher = pair.teacher_rows.beside(pair.rows)
        return self.module.DivergenceCall(
            self.call(call.logits, pair.rows),
            self.call(call.teacher_logits, of_teacher),
            address(pair.stats),
            address(pair.teacher_stats),
            pair.kind,
            pair.beta,
        )

    def sums(self, call):
        results = call.logits.new_full((4, call.logits.shape[1]), torch.nan)
        assert self.module.divergence(self.divergence_call(call), address(results)) == 0
        return results

    def gradient_over(self, call):
        places = (address(x) for x in (call.mean, call.grad, call.logits))
        assert self.module.divergence_backward(self.divergence_call(call), *places) == 0


@pytest.fixture
def rows(emulated):
    """The row ops of the backend cuda take CPU tensors, by the emulator, while a test runs."""
    kernel = EmulatedRows(emulated("token_logprobs"))

    def forward(call):
        logits, rows, with_entropy, with_extra = call
        results = token.row_results(logits, logits.shape[1], logits.shape[2], rows, with_entropy, with_extra)
        places = [result if result.numel() else None for result in results]
        kernel.rows_forward_into(logits, rows, with_entropy, *places)
        return results

    library = torch.library.Library("r1kernels", "IMPL")
    for op, function in (
        (token.FORWARD, forward),
        (divergence_rows.FORWARD, kernel.sums),
        (divergence_rows.BACKWARD_OVER, kernel.gradient_over),
    ):
        library.impl(op._names["cuda"], op._of_row(function), "CPU")
    for op, function in (
        (divergence.FORWARD, divergence_tiles.forward),
        (divergence.BACKWARD, divergence_tiles.backward),
    ):
        library.impl(op._names["cuda"], op._of_row(lambda call, run=function: run(ENGINE, call)), "CPU")
    yield kernel
    library._destroy()


class Case:
    def __init__(self, dtype=torch.float32, tokens=19, vocabulary=600):
        generator = torch.Generator().manual_seed(0)

        def normal(*size):
            return torch.randn(size, generator=generator)

        self.student = [normal(tokens, 24), 0.3 * normal(vocabulary, 24), normal(vocabulary)]
        self.student = [leaf.to(dtype).requires_grad_() for leaf in self.student]
        self.teacher = [
            normal(tokens, 9).to(dtype),
            normal(vocabulary, 9).to(dtype),
            normal(vocabulary).to(dtype),
        ]
        self.targets = torch.zeros(tokens, dtype=torch.int64)
        self.targets[3] = IGNORED
        self.grads = normal(tokens)

    def run(self, monkeypatch=None, leaves=None, **options):
        """(divergence, entropy, gradients), by the kernels, or where there is no monkeypatch by the reference in float64."""
        leaves = self.student if leaves is None else leaves
        x, w, b = self.teacher
        if monkeypatch is None:
            leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
            x, w, b = (value.double() for value in self.teacher)
            options["backend"] = "reference"
        else:
            monkeypatch.setattr(
                divergence, "LINEAR_DIVERGENCE", lambda backend, call: divergence.on_kernels("cuda", call)
            )
        value, entropy = linear_divergence(
            *leaves[:2],
            x,
            w,
            bias=leaves[2],
            teacher_bias=b,
            targets=self.targets,
            return_entropy=True,
            **options,
        )
        needed = [leaf for leaf in leaves if leaf.requires_grad]
        return value.detach(), entropy, *torch.autograd.grad((value * self.grads).sum(), needed)


def assert_close(ours, exact, tolerance):
    assert (ours.double() - exact).abs().max() <= tolerance * exact.abs().max()


# the kernels take float32 of any dtype
@pytest.mark.parametrize("save_logits", [False, True])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("forward_kl", torch.float32),
        ("reverse_kl", torch.float32),
        ("jsd", torch.float32),
        ("forward_kl", torch.bfloat16),
        ("jsd", torch.float16),
    ],
    ids=str,
)
def test_tiles_give_the_whole(rows, monkeypatch, dtype, kind, save_logits):
    case = Case(dtype)
    options = {"kind": kind, "beta": 0.2, "temperature": 1.2, "softcap": 9.0, "teacher_logit_scale": 0.5}
    ours, exact = case.run(monkeypatch, save_logits=save_logits, **options), case.run(**options)
    for mine, truth in zip(ours[:2], exact[:2], strict=True):
        assert_close(mine, truth, 1e-5)
    for mine, truth in zip(ours[2:], exact[2:], strict=True):
        assert_close(mine, truth, 2 * CAP[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_frozen_head(rows, monkeypatch, dtype):
    case = Case(dtype)
    case.student[1].requires_grad_(False), case.student[2].requires_grad_(False)
    ours = case.run(monkeypatch, kind="reverse_kl")
    leaves = [case.student[0], *(leaf.detach() for leaf in case.student[1:])]
    exact = case.run(leaves=leaves, kind="reverse_kl")
    assert_close(ours[2], exact[2], 2 * CAP[dtype])


@pytest.mark.parametrize("vocabulary", [1, 31, 1027, 2100])
def test_rows_wherever_they_begin_with_canaries_around(rows, vocabulary):
    """Every kind, in rows that are no multiple of a vector; what lies beside a row stays as it was."""
    generator = torch.Generator().manual_seed(1)
    spare = vocabulary + 5
    student, teacher = (
        torch.full((1, 3, spare), 777.0)[:, :, 2 : 2 + vocabulary].copy_(
            3 * torch.randn(3, vocabulary, generator=generator)
        )
        for _ in range(2)
    )
    of_rows = token.plain_rows(
        student, torch.tensor([0, IGNORED, 0]), torch.tensor([0.7, 1.0, 2.0]), 1.0, IGNORED
    )
    of_teacher = divergence_rows.TeacherRows.of(of_rows)
    stats = [torch.empty(3, 3) for _ in range(2)]
    for logits, found in zip((student, teacher), stats, strict=True):
        rows.rows_forward_into(logits, of_rows, False, torch.empty(3), None, found, None)
    grad = torch.tensor([1.0, 5.0, -2.0])
    for kind, name in enumerate(("forward_kl", "reverse_kl", "jsd")):
        pair = divergence_rows.Pair(of_rows, of_teacher, *stats, kind, 0.3)
        runs = []
        for seed in range(2):
            rows.seed = seed
            sums = rows.sums(divergence_rows.PairCall(student, teacher, pair))
            value, mean = divergence_rows.finish(sums, stats[0])
            buffer = torch.full((1, 3, spare), 777.0)
            over = buffer[:, :, 2 : 2 + vocabulary].copy_(student)
            rows.gradient_over(divergence_rows.PairBackwardCall(over, teacher, pair, mean, grad))
            assert (buffer[:, :, :2] == 777).all() and (buffer[:, :, 2 + vocabulary :] == 777).all()
            runs.append((value, over.clone()))
        assert same_bits(runs[0][0], runs[1][0]) and same_bits(runs[0][1], runs[1][1])
        leaf = student[0].double().requires_grad_()
        exact = linear_divergence(
            leaf,
            torch.eye(vocabulary).double(),
            teacher[0].double(),
            torch.eye(vocabulary).double(),
            kind=name,
            beta=0.3,
            temperature=of_rows.temperatures,
            targets=of_rows.targets,
        )
        (slope,) = torch.autograd.grad((exact * grad).sum(), leaf)
        torch.testing.assert_close(runs[0][0].double(), exact.detach(), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(runs[0][1][0].double(), slope, rtol=1e-4, atol=1e-6)
