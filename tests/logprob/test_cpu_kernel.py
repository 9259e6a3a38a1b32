"""The C++ kernel of token_logprobs: what is special to it, beyond the contract that every backend is tested for.

B, T leading dimensions, N = B * T tokens, V vocabulary. The kernel sums blocks of 4096 logits and chunks of 16384; every
instruction set has its own copy, and test_instruction_sets.py runs this file once for each.
"""

from __future__ import annotations

import pytest
import torch

from r1kernels import extension, token_logprobs
from r1kernels.logprob.token import Rows, plain_rows
from tests.support import logprob_oracle as oracle
from tests.support.numerics import assert_as_exact_as, same_bits

pytestmark = pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))

INF = float("inf")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ops = torch.ops.r1kernels


def forward(logits, targets, temperatures=None, temperature=1.0, entropy=True):
    rows = plain_rows(logits, targets, temperatures, temperature, -100)
    return ops.token_logprobs_cpu(logits, *rows, entropy, False)[:3]


def backward(logits, targets, logp, stats, grad_logp, grad_entropy=None, temperature=1.0):
    rows = plain_rows(logits, targets, None, temperature, -100)
    return ops.token_logprobs_cpu_backward(logits, *rows, logp, stats, grad_logp, grad_entropy, None)


def backward_(logits, targets, logp, stats, grad_logp, grad_entropy=None):
    rows = plain_rows(logits, targets, None, 1.0, -100)
    ops.token_logprobs_cpu_backward_(logits, *rows, logp, stats, grad_logp, grad_entropy, None)


def eager(logits, targets):
    logp = torch.log_softmax(logits, dim=-1)
    return logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1), -(logp.exp() * logp).sum(-1)


def forward_and_gradient(function, logits, targets, grad_logp, grad_entropy):
    z = logits.detach().clone().requires_grad_()
    logp, entropy = function(z, targets)
    (logp * grad_logp + entropy * grad_entropy).sum().backward()
    return logp.detach(), entropy.detach(), z.grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "vocabulary", [1, 3, 15, 16, 17, 4095, 4096, 4097, 16383, 16384, 16385, 32003, 151665]
)
def test_every_size_is_as_exact_as_eager(dtype, vocabulary):
    generator = torch.Generator().manual_seed(vocabulary)
    logits = (3 * torch.randn(2, vocabulary, generator=generator)).to(dtype)
    targets = torch.tensor([0, vocabulary - 1])
    upstream = torch.randn(2, 2, generator=generator)
    ours = forward_and_gradient(
        lambda z, y: token_logprobs(z, y, return_entropy=True, backend="cpu"), logits, targets, *upstream
    )
    theirs = forward_and_gradient(eager, logits, targets, *upstream)
    exact = forward_and_gradient(eager, logits.double(), targets, *upstream.double())
    for mine, peer, truth, precision in zip(
        ours, theirs, exact, (torch.float32, torch.float32, dtype), strict=True
    ):
        assert_as_exact_as(mine, peer, truth, precision)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_value_of_a_narrow_dtype_is_read_right(dtype):
    """Rows [v, 0] for all 65536 bit patterns v: their log-probs follow from v alone."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    logits = torch.stack((patterns, torch.zeros_like(patterns)), dim=-1)
    logp, _, _ = forward(logits[None], torch.zeros(len(patterns), dtype=torch.int64))
    v = patterns.double()
    exact = torch.where(v == INF, torch.nan, torch.minimum(v, torch.zeros_like(v)) - (-v.abs()).exp().log1p())
    torch.testing.assert_close(logp.double(), exact, rtol=2e-7, atol=2.0**-149, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_rounded_to_nearest_even(dtype):
    """Rows [0, 0] give gradients of g / 2 and -g / 2, rounded once, for g over the whole range of the dtype."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (20000,), generator=generator).to(torch.int32)
    narrow = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(
        dtype if dtype.itemsize == 2 else torch.float16
    )
    # many of these lie between two values of the dtype, some right at the middle
    halfway = narrow.float() * (1 + 2.0**-9)
    grad = torch.cat((bits.view(torch.float32), halfway, torch.tensor([0.0, 131008.0, 131040.0, INF])))
    if dtype == torch.bfloat16:
        grad = grad[~(grad.abs() < 2.0**-120)]  # the bf16 instructions flush subnormal numbers to 0
    logits = torch.zeros(1, len(grad), 2, dtype=dtype)
    targets = torch.zeros(len(grad), dtype=torch.int64)
    logp, _, stats = forward(logits, targets)
    half = backward(logits, targets, torch.full_like(logp, -(2.0**-1)), stats, grad)[0, :, 1]
    torch.testing.assert_close(half, (grad * -0.5).to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("order", ["ascending", "descending", "equal", "last", "two"])
def test_the_largest_logit_may_stand_anywhere_and_more_than_once(order):
    vocabulary = 40000
    logits = {
        "ascending": torch.linspace(-40, 40, vocabulary),
        "descending": torch.linspace(40, -40, vocabulary),
        "equal": torch.full((vocabulary,), 7.25),
        "last": torch.cat((torch.zeros(vocabulary - 1), torch.tensor([25.0]))),
        "two": torch.zeros(vocabulary).index_fill(0, torch.tensor([5, 39000]), 25.0),
    }[order][None]
    for target in (0, 5, vocabulary - 1):
        targets = torch.tensor([target])
        ours = forward_and_gradient(
            lambda z, y: token_logprobs(z, y, return_entropy=True, backend="cpu"),
            logits,
            targets,
            torch.ones(1),
            torch.ones(1),
        )
        exact = forward_and_gradient(eager, logits.double(), targets, torch.ones(1), torch.ones(1))
        torch.testing.assert_close(ours[0].double(), exact[0], rtol=3e-6, atol=1e-9)
        torch.testing.assert_close(ours[1].double(), exact[1], rtol=3e-6, atol=1e-9)
        scale = float(exact[2].abs().max())
        torch.testing.assert_close(ours[2].double(), exact[2], rtol=1e-5, atol=3e-6 * scale)


@pytest.mark.parametrize("lead", [60.0, 86.0, 88.0, 95.0, 103.0])
def test_probabilities_down_to_the_smallest_float_are_kept(lead):
    """p of the runner-up is e^-lead, down to subnormal numbers: no sudden jump to 0."""
    logits = torch.zeros(1, 50)
    logits[0, 3] = lead
    targets = torch.tensor([3])
    logp, entropy, stats = forward(logits[None], targets)
    exact_logp, exact_entropy = oracle.rows(logits, targets)
    smallest = 2.0**-149
    # each of the 49 terms is off by half of the smallest float at most
    torch.testing.assert_close(logp.double(), exact_logp, rtol=1e-5, atol=25 * smallest)
    torch.testing.assert_close(entropy.double(), exact_entropy, rtol=1e-5, atol=25 * 104 * smallest)
    grad = backward(logits[None], targets, logp, stats, torch.ones(1))
    exact = torch.tensor(oracle.gradient(logits[0].tolist(), 3, 1.0, 0.0)).double()
    torch.testing.assert_close(grad.flatten().double(), exact, rtol=1e-5, atol=26 * smallest)


def test_whole_blocks_of_masked_vocabulary():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 40000, generator=generator)
    logits[0, :30000] = -INF  # the first chunk and more
    logits[1, 5000:] = -INF  # the last chunks
    logits[2, :] = -INF
    logits[2, 20000] = 3.0  # one alone
    logits[3, :20000] = -INF
    logits[3, 100] = float("nan")  # hidden among -inf
    logits[4, :] = -INF
    logits[5, 39999] = INF
    targets = torch.tensor([35000, 7, 20000, 35000, 1, 5])
    logp, entropy, stats = forward(logits[None], targets)
    masked = logits[:3].double().clone().requires_grad_()
    exact = torch.log_softmax(masked, -1)
    exact_logp = exact.gather(-1, targets[:3, None])[:, 0]
    terms = torch.where(exact > -INF, exact.exp() * exact.masked_fill(exact == -INF, 0), 0.0)
    torch.testing.assert_close(logp[:3].double(), exact_logp, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy[:3].double(), -terms.sum(-1), rtol=1e-6, atol=1e-6)
    assert logp[3:].isnan().all() and entropy[3:].isnan().all()
    grad = backward(logits[None], targets, logp, stats, torch.ones(6), torch.ones(6))[0]
    assert torch.isfinite(grad[:3]).all() and (grad[:3][logits[:3] == -INF] == 0).all()
    assert grad[3:].isnan().all()


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7F800001], ids=hex)
def test_a_nan_of_any_bits_makes_its_row_nan(bits):
    logits = torch.randn(2, 40)
    logits.view(torch.int32)[1, 5] = bits
    logits.requires_grad_()
    logp, entropy = token_logprobs(logits, torch.tensor([3, 4]), return_entropy=True, backend="cpu")
    (logp + entropy).sum().backward()
    for result in (logp, entropy, logits.grad):
        assert result[0].isfinite().all() and result[1].isnan().all()


@pytest.mark.parametrize("temperature", [1e-3, 0.6, 1.0, 1e3])
def test_temperatures(temperature):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(3, 300, generator=generator)
    targets = torch.tensor([0, 150, 299])
    upstream = torch.randn(2, 3, generator=generator)
    logp, entropy, stats = forward(logits[None], targets, temperature=temperature)
    grad = backward(logits[None], targets, logp, stats, *upstream, temperature=temperature)[0]
    torch.testing.assert_close(
        (logp.double(), entropy.double()), oracle.rows(logits, targets, temperature), rtol=1e-5, atol=1e-6
    )
    exact = oracle.gradients(logits, targets, *upstream, temperature)
    torch.testing.assert_close(grad.double(), exact, rtol=1e-5, atol=3e-6 * float(exact.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 100000), (5, 40000), (70, 3000), (9000, 40)])
def test_results_do_not_depend_on_threads_or_company(dtype, shape):
    tokens, vocabulary = shape
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(1, *shape, generator=generator).to(dtype)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    upstream = torch.randn(2, tokens, generator=generator)

    def everything(z, y, g, h):
        logp, entropy, stats = forward(z, y)
        return logp, entropy, stats.mT, backward(z, y, logp, stats, g, h)[0]

    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(everything(logits, targets, *upstream))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(same_bits(first, second) for first, second in zip(results[0], other, strict=True))
    row = tokens // 2
    alone = everything(logits[:, row : row + 1], targets[row : row + 1], *upstream[:, row : row + 1])
    assert all(same_bits(every[row : row + 1], one) for every, one in zip(results[0], alone, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_outside_the_logits_is_read_or_written(dtype):
    """The logits lie in a larger buffer of NaN: finite results, and after an in-place backward the NaN still stand."""
    generator = torch.Generator().manual_seed(4)
    buffer = torch.full((4, 7, 60), float("nan"), dtype=dtype)
    inside = buffer[1:3, 2:5, 9:46]
    inside.copy_(torch.randn(2, 3, 37, generator=generator))
    outside = buffer.isnan()
    targets = torch.randint(0, 37, (6,), generator=generator)
    packed = inside.clone()
    upstream = torch.randn(2, 6, generator=generator)
    logp, entropy, stats = forward(inside, targets)
    assert torch.isfinite(logp).all() and torch.isfinite(entropy).all()
    grad = backward(packed, targets, logp, stats, *upstream)
    backward_(inside, targets, logp, stats, *upstream)
    assert same_bits(inside, grad)
    assert torch.equal(buffer.isnan(), outside)


def test_offsets_beyond_two_to_the_thirtyone():
    far = 2**31 + 64
    # the operating system gives memory only where it is touched
    buffer = torch.empty(far + 100, dtype=torch.bfloat16)
    logits = buffer.as_strided((1, 2, 100), (0, far, 1))
    logits.copy_(torch.randn(2, 100, generator=torch.Generator().manual_seed(5)))
    packed = logits.clone()
    targets = torch.tensor([0, 99])
    for mine, plain in zip(forward(logits, targets), forward(packed, targets), strict=True):
        assert same_bits(mine, plain)
    logp, _, stats = forward(packed, targets)
    grad = backward(packed, targets, logp, stats, torch.ones(2))
    backward_(logits, targets, logp, stats, torch.ones(2))
    assert same_bits(logits, grad)


def test_bad_values_in_a_compiled_graph_are_errors_and_nothing_is_written():
    logits = torch.randn(1, 3, 10)
    good = torch.tensor([0, 9, -100])
    logp, _, stats = forward(logits, good)
    before = logits.clone()
    for bad in (torch.tensor([0, 10, 1]), torch.tensor([0, -1, 1])):
        with pytest.raises(
            RuntimeError, match=r"targets: expected values in \[0, 10\) or -100, got .* at position 1"
        ):
            forward(logits, bad)
        with pytest.raises(RuntimeError, match="targets: expected values"):
            backward_(logits, bad, logp, stats, torch.ones(3))
    for temperatures in (torch.tensor([1.0, 0.0, 1.0]), torch.tensor([1.0, float("nan"), 1.0])):
        with pytest.raises(RuntimeError, match="temperature: expected values above 0, got .* at position 1"):
            forward(logits, good, temperatures)
    assert same_bits(logits, before)

    compiled = torch.compile(
        lambda z, y: token_logprobs(z, y, backend="cpu"), fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(RuntimeError, match="targets: expected values"):
        compiled(logits[0], torch.tensor([0, 10, 1]))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"logits": torch.zeros(3, 10)}, "logits: expected 3 dimensions"),
        (
            {"logits": torch.zeros(1, 3, 10, dtype=torch.float64)},
            "logits: expected float32, bfloat16 or float16",
        ),
        ({"logits": torch.zeros(1, 3, 20)[..., ::2]}, "logits: expected stride 1 on V, got 2"),
        ({"logits": torch.zeros(1, 3, 0)}, "logits: expected V >= 1"),
        ({"targets": torch.zeros(2, dtype=torch.int64)}, "targets: expected 3 contiguous values, got 2"),
        ({"targets": torch.zeros(3, dtype=torch.int32)}, "targets: wrong dtype"),
        ({"temperatures": torch.ones(1)}, "temperatures: expected 3 contiguous values, got 1"),
        ({"temperature": 0.0}, "temperature: expected a number above 0, got 0"),
    ],
)
def test_the_op_itself_checks_what_the_kernel_trusts(change, text):
    call = {
        "logits": torch.zeros(1, 3, 10),
        "bias": None,
        "logit_scale": 1.0,
        "softcap": 0.0,
        "targets": torch.zeros(3, dtype=torch.int64),
        "temperatures": None,
        "temperature": 1.0,
        "ignore_index": -100,
        "first": 0,
        "vocabulary": 10,
        "with_entropy": True,
        "with_extra": False,
    }
    with pytest.raises(RuntimeError, match=text):
        ops.token_logprobs_cpu(**(call | change))


def test_opcheck():
    # not float32, which the other results are in
    logits = torch.randn(2, 4, 33).bfloat16()[:, :-1]
    targets = torch.tensor([0, 1, 2, -100, 4, 32])
    for temperature, entropy in ((None, True), (torch.rand(6) + 0.5, False)):
        rows = plain_rows(logits, targets, temperature, 0.7, -100)
        arguments = (logits, *rows, entropy, False)
        torch.library.opcheck(ops.token_logprobs_cpu.default, arguments)
        logp, _, stats, _ = ops.token_logprobs_cpu(*arguments)
        grads = (logp, stats, torch.ones(6), torch.ones(6) if entropy else None, None)
        saved = (logits, *rows, *grads)
        torch.library.opcheck(ops.token_logprobs_cpu_backward.default, saved)
        torch.library.opcheck(ops.token_logprobs_cpu_backward_.default, (logits.clone(), *saved[1:]))


def test_opcheck_of_heads_and_slabs():
    bias = torch.linspace(-1, 1, 33)
    logits, targets = torch.randn(1, 4, 33).bfloat16(), torch.tensor([12, 40, 32, -100])
    rows = Rows(bias, 0.7, 3.0, targets, None, 0.7, -100, 10, 50)
    torch.library.opcheck(ops.token_logprobs_cpu.default, (logits, *rows, True, True))
    grads = (torch.zeros(4), torch.ones(3, 4), torch.ones(2), None, torch.tensor([0, 0, 1, 1]).int())
    torch.library.opcheck(ops.token_logprobs_cpu_backward.default, (logits, *rows, *grads))
    torch.library.opcheck(ops.token_logprobs_cpu_backward_.default, (logits.clone(), *rows, *grads))


def test_opcheck_of_the_linear_ops():
    hidden, weight = torch.randn(6, 8).bfloat16(), torch.randn(33, 8).bfloat16()
    targets = torch.tensor([0, 1, 2, -100, 4, 32])
    rows = Rows(torch.randn(33), 0.7, 3.0, targets, None, 0.7, -100, 0, 33)
    forwarded = (hidden, weight, *rows, True, True, 0, True, False)
    torch.library.opcheck(ops.linear_logprobs_cpu.default, forwarded)
    logp, _, stats, _, logits = ops.linear_logprobs_cpu(*forwarded)
    grads = (logp, stats, torch.ones(6), None, None)
    arguments = (hidden, weight, *rows, 0, *grads, True, True, False)
    torch.library.opcheck(ops.linear_logprobs_cpu_backward.default, arguments)
    torch.library.opcheck(ops.linear_logprobs_cpu_backward_.default, (logits.clone(), *arguments))
    torch.library.opcheck(ops.linear_logprobs_cpu_frozen.default, (hidden, weight, *rows, True, 0))
    slab = (hidden, weight, *rows._replace(first=10, vocabulary=50), 0, *grads, True, True, False)
    torch.library.opcheck(ops.linear_logprobs_cpu_backward.default, slab)


def test_it_is_chosen_on_the_cpu_and_float64_goes_to_the_reference():
    from r1kernels import explain

    targets = torch.tensor([0])
    assert "cpu        runs" in explain("token_logprobs", torch.zeros(1, 4), targets)
    text = explain("token_logprobs", torch.zeros(1, 4, dtype=torch.float64), targets)
    assert "cpu        cannot run: logits: float64 is served by the reference alone" in text
    assert "reference  runs" in text
