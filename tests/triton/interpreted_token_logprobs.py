"""The Triton kernels of token_logprobs in Triton's interpreter. Run by test_interpreter.py."""

import pytest
import torch

from r1kernels import token_logprobs
from r1kernels.logprob import token
from r1kernels.logprob import triton as backend
from r1kernels.logprob.token import Upstream, plain_rows
from tests.support import interpreter_bfloat16
from tests.support.numerics import same_bits
from tests.support.row_ops_kernel import RowOpsKernel
from tests.support.token_logprobs_kernel import DTYPES, IGNORED, LAYOUTS, TokenLogprobsKernel, random_case

interpreter_bfloat16.repair()
SCHEMA = ("test_schema", "test_faketensor")


class InterpretedKernel:
    device = "cpu"

    @staticmethod
    def rows_forward_into(logits, rows, with_entropy, *outputs):
        nothing = logits.new_empty(0, dtype=torch.float32)
        outputs = [nothing if output is None else output for output in outputs]
        backend.forward_into(logits, rows, with_entropy, *outputs)

    @staticmethod
    def rows_backward_into(grad, logits, rows, *upstream):
        backend.backward_into(grad, logits, rows, Upstream(*upstream))

    @classmethod
    def forward_into(cls, logits, targets, temperatures, temperature, ignore_index, logp, entropy, stats):
        rows = plain_rows(logits, targets, temperatures, temperature, ignore_index)
        cls.rows_forward_into(logits, rows, entropy is not None, logp, entropy, stats, None)

    @classmethod
    def backward_into(cls, grad, logits, targets, temperatures, temperature, ignore_index, *saved):
        rows = plain_rows(logits, targets, temperatures, temperature, ignore_index)
        cls.rows_backward_into(grad, logits, rows, *saved, None)


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(token, "SEGMENT", 4096)
    return InterpretedKernel


class TestTokenLogprobsTriton(TokenLogprobsKernel):
    """The interpreter is slow and knows no alignment: each layout in one dtype, one odd address.

    Gradients over the logits are asked of the row ops in every layout; the interpreter has the same bits each time.
    """

    test_twice_the_same_bits = None

    @pytest.mark.parametrize(
        ("dtype", "layout"), zip(DTYPES, (None, "vocabulary slice", "transposed"), strict=True), ids=str
    )
    def test_the_gradient_over_the_logits(self, kernel, dtype, layout):
        super().test_the_gradient_over_the_logits(kernel, dtype, layout)

    @pytest.mark.parametrize("vocabulary", [67])
    @pytest.mark.parametrize(
        ("layout", "dtype"), [(layout, DTYPES[place % 3]) for place, layout in enumerate(LAYOUTS)], ids=str
    )
    def test_any_layout_gives_the_same_bits(self, kernel, layout, dtype, vocabulary):
        super().test_any_layout_gives_the_same_bits(kernel, layout, dtype, vocabulary)

    @pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
    @pytest.mark.parametrize("offset", [1])
    def test_a_row_keeps_its_bits_wherever_it_lies(self, kernel, offset, dtype):
        super().test_a_row_keeps_its_bits_wherever_it_lies(kernel, offset, dtype)


class TestRowOpsTriton(RowOpsKernel):
    """Each size, each cut and each transform in one dtype."""

    @pytest.fixture
    def long_row(self):
        return 9001

    @pytest.mark.parametrize(
        ("name", "dtype"),
        [("bias", torch.float16), ("scale", torch.bfloat16), *(("all", dtype) for dtype in DTYPES)],
        ids=str,
    )
    def test_a_transformed_logit_is_as_exact_as_eager(self, kernel, name, dtype):
        super().test_a_transformed_logit_is_as_exact_as_eager(kernel, name, dtype)

    @pytest.mark.parametrize(("shape", "dtype"), [
        ((1, 1, 1), torch.float32), ((2, 2, 19), torch.bfloat16), ((1, 2, 1031), torch.float16),
        ((1, 2, 5003), torch.bfloat16),
    ], ids=str)  # fmt: skip
    def test_extra_statistics(self, kernel, shape, dtype):
        super().test_extra_statistics(kernel, shape, dtype)

    @pytest.mark.parametrize(("cuts", "dtype"), [
        ((64,), torch.bfloat16), ((1, 200), torch.float32), ((7, 8, 100), torch.float16),
    ], ids=str)  # fmt: skip
    def test_slabs_give_the_whole(self, kernel, cuts, dtype):
        super().test_slabs_give_the_whole(kernel, cuts, dtype)


def test_the_public_op_and_its_gradient():
    logits, targets, grad_logp, grad_entropy = random_case(2, 3, 50)
    targets[2] = IGNORED
    results = []
    for name in ("triton", "reference"):
        z = logits.clone().requires_grad_()
        logp, entropy = token_logprobs(
            z, targets.view(2, 3), temperature=0.7, return_entropy=True, backend=name
        )
        (logp.flatten() * grad_logp + entropy.flatten() * grad_entropy).sum().backward()
        results.append((logp.detach(), entropy.detach(), z.grad))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_logits_that_are_not_contiguous_in_the_vocabulary():
    logits, targets, *_ = random_case(1, 3, 50)
    turned = logits[0].t().contiguous().t()
    assert turned.stride() == (1, 3)
    expected = token_logprobs(logits[0], targets, backend="triton")
    assert same_bits(token_logprobs(turned, targets, backend="triton"), expected)


@pytest.mark.parametrize("entropy", [False, True])
def test_the_ops_keep_their_schemas(entropy):
    logits, targets, grad_logp, grad_entropy = random_case(2, 3, 20)
    ops = torch.ops.r1kernels
    shared = plain_rows(logits, targets, None, 0.7, IGNORED)
    torch.library.opcheck(
        ops.token_logprobs_triton.default, (logits, *shared, entropy, False), test_utils=SCHEMA
    )
    logp, _, stats, _ = ops.token_logprobs_triton(logits, *shared, entropy, False)
    saved = (logp, stats, grad_logp, grad_entropy if entropy else None, None)
    torch.library.opcheck(
        ops.token_logprobs_triton_backward.default, (logits, *shared, *saved), test_utils=SCHEMA
    )
    torch.library.opcheck(
        ops.token_logprobs_triton_backward_.default, (logits.clone(), *shared, *saved), test_utils=SCHEMA
    )
