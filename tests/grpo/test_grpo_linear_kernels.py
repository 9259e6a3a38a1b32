"""linear_grpo_loss on the kernel backends of this machine: one pass over the logits, or the two ops in a row.

N tokens, H hidden, V vocabulary. The oracle is the reference in float64, itself tested in test_grpo_linear.py.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from r1kernels import explain, extension
from r1kernels.grpo import grpo_loss, grpo_preset, linear_grpo_loss
from r1kernels.grpo.linear import FORWARD
from r1kernels.grpo.one_pass import one_pass_of_all
from r1kernels.logprob import cpu, linear_logprobs
from tests.support.host_reads import NoHostReads
from tests.support.numerics import assert_as_exact_as, same_bits
from tests.support.ranks import on_ranks

pytestmark = pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))

PRESETS = ("r1", "grpo", "dapo", "dr_grpo", "dual_clip", "gspo", "cispo", "sapo", "vespo", "gmpo", "gpg")
VOCABULARY, WIDTH = 37, 6


def call_of(batch, seed=0, vocabulary=VOCABULARY, dtype=torch.float32, **keywords):
    """(leaves, targets, tensors, keywords): hidden, weight and bias, what stands beside them, KL and entropy bonus."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (*batch.mask.shape, WIDTH), (vocabulary, WIDTH), (vocabulary,)
    leaves = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
    targets = torch.randint(0, vocabulary, batch.mask.shape, generator=generator)
    logits = leaves[0].double() @ leaves[1].double().T + leaves[2].double()
    logp = torch.log_softmax(logits, -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    old = (logp + 0.3 * torch.randn(logp.shape, generator=generator)).float()
    ref = (logp + 0.3 * torch.randn(logp.shape, generator=generator)).float()
    given = {"ref_logp": ref, "kl_coef": 0.1, "entropy_coef": 0.05}
    return leaves, targets, (old, batch.advantages.float(), batch.mask), {**given, **keywords}


def run(backend, leaves, targets, tensors, keywords, dtype=torch.float32, upstream=1.0):
    """The output and the gradients of hidden, weight and bias."""

    def moved(value):
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    leaves = [moved(leaf).detach().requires_grad_() for leaf in leaves]
    hidden, weight, bias = leaves
    output = linear_grpo_loss(
        hidden, weight, targets, *map(moved, tensors), bias=bias, backend=backend,
        **{name: moved(value) for name, value in keywords.items()},
    )  # fmt: skip
    return output, torch.autograd.grad(output.loss * upstream, leaves)


def compare(call, backend="cpu", **how):
    output, grads = run(backend, *call, **how)
    exact, exact_grads = run("reference", *call, dtype=torch.float64, **how)
    assert list(output.metrics) == list(exact.metrics)
    torch.testing.assert_close(output.loss.double(), exact.loss, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(output.metrics.tensor.double(), exact.metrics.tensor, rtol=1e-5, atol=2e-6)
    for ours, expected in zip(grads, exact_grads, strict=True):
        scale = float(expected.abs().max())
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize(
    "options", [{}, {"softcap": 5.0, "logit_scale": 0.7, "temperature": 0.8, "chunk_size": 4}]
)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_the_numbers_of_the_reference(batch_of, preset, options):
    call = call_of(batch_of(seed=1), **grpo_preset(preset) | {"kl_coef": 0.1}, **options)
    compare(call, upstream=-1.5)


@pytest.mark.parametrize("chunk_size", [None, 1, 7, 45, 1000])
def test_packed_with_everything_given_for_each_token(batch_of, chunk_size):
    batch = batch_of(seed=2)
    leaves, targets, (old, _, mask), keywords = call_of(batch, variant="sapo", chunk_size=chunk_size)
    generator = torch.Generator().manual_seed(3)
    noise = torch.rand(4, *mask.shape, generator=generator)
    keywords |= {
        "policy_weights": noise[0], "entropy_weights": noise[1], "weights": noise[2],
        "temperature": 0.5 + noise[3],
    }  # fmt: skip
    keywords = {
        name: batch.packed(value) if isinstance(value, torch.Tensor) else value
        for name, value in keywords.items()
    }
    advantages = torch.randn(mask.shape, generator=generator)
    tensors = [batch.packed(values) for values in (old, advantages, mask)]
    leaves[0] = batch.packed(leaves[0])
    compare((leaves, batch.packed(targets), tensors, keywords | {"cu_seqlens": batch.cu_seqlens()}))


@pytest.mark.parametrize("reduction", ["sequence", "token", "constant", "sequence-sum"])
def test_reductions_and_policy_weights_of_sequences(batch_of, reduction):
    weights = torch.linspace(0, 2, 5).unsqueeze(1)
    total = {"num_tokens": torch.tensor(50)} if reduction == "token" else {"num_sequences": 7.0}
    compare(call_of(batch_of(seed=4), reduction=reduction, policy_weights=weights, **total))


def test_it_is_the_two_ops(batch_of):
    """The loss and the metrics come from the same kernel on the same log-probs."""
    leaves, targets, tensors, keywords = call_of(batch_of(seed=5), variant="cispo")
    output, grads = run("cpu", leaves, targets, tensors, keywords)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    logp, entropy = linear_logprobs(
        leaves[0], leaves[1], targets, bias=leaves[2], return_entropy=True, backend="cpu"
    )
    expected = grpo_loss(logp, *tensors, entropy=entropy, **keywords, backend="cpu")
    torch.testing.assert_close(output.metrics.tensor, expected.metrics.tensor)
    for one, other in zip(grads, torch.autograd.grad(expected.loss, leaves), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("preset", ["grpo", "gspo"])
@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_garbage_in_masked_places_changes_nothing(batch_of, garbage, preset):
    batch = batch_of(seed=6)
    leaves, targets, tensors, keywords = call_of(
        batch, **grpo_preset(preset), temperature=torch.full((5, 9), 0.9)
    )
    clean, grads = run("cpu", leaves, targets, tensors, keywords)

    def spoil(value):
        return torch.where(batch.mask, value, garbage)

    leaves[0] = torch.where(batch.mask.unsqueeze(-1), leaves[0], garbage)
    keywords |= {name: spoil(keywords[name]) for name in ("ref_logp", "temperature")}
    tensors = (spoil(tensors[0]), *tensors[1:])
    dirty, dirty_grads = run("cpu", leaves, torch.where(batch.mask, targets, -7), tensors, keywords)
    assert same_bits(dirty.metrics.tensor, clean.metrics.tensor)
    assert all(same_bits(one, other) for one, other in zip(dirty_grads, grads, strict=True))


def test_one_sequence_and_strided_tensors(batch_of):
    """Values that stand once a sequence, or between others, are one a token in a row for the op."""
    batch = batch_of(seed=19, num_sequences=1, num_tokens=11)
    for packed in (False, True):
        leaves, targets, (old, advantages, _), keywords = call_of(batch, policy_weights=torch.tensor([[0.5]]))
        mask = torch.ones_like(batch.mask)
        if packed:
            leaves[0], targets, old, mask = leaves[0][0], targets[0], old[0], mask[0]
            keywords |= {"ref_logp": keywords["ref_logp"][0], "cu_seqlens": torch.tensor([0, 11])}
        compare((leaves, targets, (old, advantages, mask), keywords))

        def between(value):
            return torch.stack((value, torch.full_like(value, 7)), -1).flatten(-2)[..., ::2]

        keywords |= {
            name: between(keywords["ref_logp"]) for name in ("ref_logp", "weights", "entropy_weights")
        }
        keywords["policy_weights"] = between(old.abs())
        compare((leaves, between(targets), (between(old), between(old), between(mask)), keywords))


@pytest.fixture
def poisoned(monkeypatch):
    """What the extension allocates without writing to it holds NaN."""

    def empty(shape, dtype):
        return torch.full(tuple(shape), torch.nan if dtype.is_floating_point else -1, dtype=dtype)

    monkeypatch.setattr(extension, "empty", empty)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preset", ["grpo", "gspo"])
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (1, 1)])
def test_sizes_and_batches_without_counted_tokens(batch_of, preset, shape, dtype, poisoned):
    batch = batch_of(seed=7, num_sequences=shape[0], num_tokens=shape[1])
    leaves, targets, tensors, keywords = call_of(batch, **grpo_preset(preset))
    for mask in (batch.mask, torch.zeros_like(batch.mask)):
        output, grads = run("cpu", leaves, targets, (*tensors[:2], mask), keywords, dtype=dtype)
        if not mask.any():
            assert output.loss == 0 and not any(grad.any() for grad in grads)
        assert output.loss.isfinite() and all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("preset", ["grpo", "gspo"])
@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
def test_only_what_needs_a_gradient_gets_one(batch_of, trained, preset):
    leaves, targets, tensors, keywords = call_of(batch_of(seed=8), **grpo_preset(preset))
    _, everything = run("cpu", leaves, targets, tensors, keywords)
    place = ("hidden", "weight", "bias").index(trained)
    leaves[place].requires_grad_()
    loss = linear_grpo_loss(
        leaves[0], leaves[1], targets, *tensors, bias=leaves[2], backend="cpu", **keywords
    ).loss
    (grad,) = torch.autograd.grad(loss, leaves[place])
    assert same_bits(grad, everything[place])


def test_without_gradients_nothing_is_kept(batch_of):
    leaves, targets, tensors, keywords = call_of(batch_of(seed=9))
    expected, _ = run("cpu", leaves, targets, tensors, keywords)
    leaves[1].requires_grad_()
    with torch.no_grad():
        output = linear_grpo_loss(
            leaves[0], leaves[1], targets, *tensors, bias=leaves[2], backend="cpu", **keywords
        )
    assert not output.loss.requires_grad
    torch.testing.assert_close(output.metrics.tensor, expected.metrics.tensor)


def test_a_second_backward_and_a_second_derivative(batch_of):
    leaves, targets, tensors, keywords = call_of(batch_of(seed=10))
    hidden = leaves[0].requires_grad_()
    loss = linear_grpo_loss(hidden, leaves[1], targets, *tensors, backend="cpu", **keywords).loss
    (one,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (two,) = torch.autograd.grad(2 * loss, hidden, retain_graph=True)
    assert same_bits(2 * one, two)
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_grpo_loss: a second derivative is not implemented"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_as_exact_as_eager(batch_of, dtype):
    leaves, targets, tensors, _ = call_of(batch_of(seed=11), dtype=dtype)
    results = []
    for backend, kind in (("cpu", dtype), ("reference", dtype), ("reference", torch.float64)):
        inputs = [leaf.to(kind).requires_grad_() for leaf in leaves[:2]]
        others = [
            value.to(kind) if kind == torch.float64 and value.is_floating_point() else value
            for value in tensors
        ]
        output = linear_grpo_loss(*inputs, targets, *others, backend=backend)
        results.append((output.loss.detach().reshape(1), *torch.autograd.grad(output.loss, inputs)))
    assert results[0][0].dtype == torch.float32 and results[0][1].dtype == dtype
    for ours, eager, exact in zip(*results, strict=True):
        assert_as_exact_as(ours, eager, exact, torch.float32 if ours.dtype == torch.float32 else dtype)


def test_the_same_bits_every_time(batch_of):
    call = call_of(batch_of(seed=12, num_sequences=6, num_tokens=50), vocabulary=501, chunk_size=64)
    first, *others = (run("cpu", *call) for _ in range(3))
    for output, grads in others:
        assert same_bits(output.metrics.tensor, first[0].metrics.tensor)
        assert all(same_bits(one, other) for one, other in zip(grads, first[1], strict=True))


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation gives back."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for result in results if isinstance(results, (tuple, list)) else (results,):
            if isinstance(result, torch.Tensor):
                self.largest = max(self.largest, result.numel())
        return results


def test_no_logits_of_all_tokens_stand_in_memory(batch_of):
    """With chunks of 8 of 200 tokens: nothing larger than a chunk's logits or the head; kept are inputs and gradients."""
    vocabulary, chunk = 300, 8
    batch = batch_of(seed=13, num_sequences=5, num_tokens=40)
    leaves, targets, tensors, keywords = call_of(batch, vocabulary=vocabulary, chunk_size=chunk)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    with LargestTensor() as memory, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = linear_grpo_loss(
            leaves[0], leaves[1], targets, *tensors, bias=leaves[2], backend="cpu", **keywords
        )
        output.loss.backward()
    assert memory.largest <= max(chunk * vocabulary, vocabulary * WIDTH)
    assert sum(kept) <= 2 * sum(leaf.numel() for leaf in leaves) + 10


def arguments_of_the_op(leaves, targets, tensors, keywords):
    """What the one call of the CPU op gets that a call of linear_grpo_loss makes."""
    seen = []

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.r1kernels.linear_grpo_loss_cpu.default:
                seen.append(args)
            return function(*args, **(kwargs or {}))

    with Recorded():
        run("cpu", leaves, targets, tensors, keywords)
    (arguments,) = seen
    return tuple(value.detach() if isinstance(value, torch.Tensor) else value for value in arguments)


def test_the_op_keeps_its_schema(batch_of):
    leaves, targets, tensors, keywords = call_of(batch_of(seed=14, num_sequences=2, num_tokens=5))
    arguments = arguments_of_the_op(leaves, targets, tensors, keywords)
    torch.library.opcheck(torch.ops.r1kernels.linear_grpo_loss_cpu.default, arguments)


def test_no_reason_is_given_twice(batch_of):
    leaves, targets, tensors, _ = call_of(batch_of(seed=14), dtype=torch.float64)
    for line in explain(linear_grpo_loss, *leaves[:2], targets, *tensors).splitlines()[1:]:
        reasons = line.partition("cannot run: ")[2].split("; ")
        assert len(set(reasons)) == len(reasons)


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_on_a_gpu_nothing_asks_which_tokens_count(batch_of, chunk_size):
    """The implementation for GPUs on the engine of the CPU: all tokens are computed, and nothing of what is masked stays."""
    batch = batch_of(seed=17)
    temperature = torch.full((5, 9), 0.9)
    call = call_of(batch, temperature=temperature, chunk_size=chunk_size)
    leaves, targets, (old, advantages, mask), keywords = call
    leaves[0] = torch.where(mask.unsqueeze(-1), leaves[0], torch.nan)
    keywords |= {name: torch.where(mask, keywords[name], torch.nan) for name in ("ref_logp", "temperature")}
    tensors = (torch.where(mask, old, torch.inf), advantages, mask)
    arguments = arguments_of_the_op(leaves, torch.where(mask, targets, -7), tensors, keywords)
    with NoHostReads():
        results = one_pass_of_all(cpu.ENGINE, FORWARD.fields.back(arguments))
    for ours, expected in zip(results, torch.ops.r1kernels.linear_grpo_loss_cpu(*arguments), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("preset", ["dapo", "gspo"])
def test_a_compiled_call_has_the_same_numbers(batch_of, preset):
    call = call_of(batch_of(seed=15, dtype=torch.float32), **grpo_preset(preset))
    leaves, targets, tensors, keywords = call

    def function(hidden, weight, bias):
        output = linear_grpo_loss(hidden, weight, targets, *tensors, bias=bias, backend="cpu", **keywords)
        return output.loss, output.metrics.tensor

    results = []
    for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        inputs = [leaf.detach().requires_grad_() for leaf in leaves]
        loss, metrics = call(*inputs)
        results.append((metrics, *torch.autograd.grad(loss, inputs)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_other_numbers_and_shapes_do_not_recompile(batch_of, ratio):
    """One graph for any numbers and sizes."""
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(linear_grpo_loss, fullgraph=True, backend=counter, dynamic=True)
    for k in range(3):
        batch = batch_of(seed=k, num_sequences=3 + k, num_tokens=7 + 2 * k, dtype=torch.float32)
        changes = {"clip_high": 0.2 + k / 50, "kl_coef": 0.1 + k / 11, "entropy_coef": 0.1 + k / 13}
        changes |= {"temperature": 0.8 + k / 7, "num_sequences": 5.5 + k, "ratio": ratio}
        (hidden, weight, bias), targets, tensors, keywords = call_of(batch, seed=k, **changes)
        hidden.requires_grad_()
        output, expected = (
            loss(hidden, weight, targets, *tensors, bias=bias, backend="cpu", **keywords)
            for loss in (compiled, linear_grpo_loss)
        )
        torch.testing.assert_close(output.loss, expected.loss)
        torch.testing.assert_close(
            *(torch.autograd.grad(loss, hidden)[0] for loss in (output.loss, expected.loss))
        )
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": torch.zeros(5, 9)}, "temperature"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"softcap": -1.0}, "softcap"),
        ({"bias": torch.zeros(3)}, "bias"),
    ],
)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_bad_arguments_are_named(batch_of, backend, change, message):
    leaves, targets, tensors, _ = call_of(batch_of(seed=16))
    with pytest.raises(ValueError, match=message):
        linear_grpo_loss(leaves[0], leaves[1], targets, *tensors, backend=backend, **change)


def test_two_ranks_give_the_gradient_of_one_batch(batch_of, tmp_path):
    """Data parallel: uneven shares of the sequences, totals of the whole step over the ranks, gradients averaged."""
    batch = batch_of(seed=18, num_sequences=5)
    calls, expected = [], []
    for preset in ("grpo", "dapo", "gspo"):
        leaves, targets, tensors, _ = call_of(batch)
        keywords = grpo_preset(preset)
        expected += run("cpu", leaves, targets, tensors, keywords)[1][1:]
        total = {"num_tokens": int(batch.mask.sum())} if preset == "dapo" else {"num_sequences": 5}
        per_rank = {name: value / 2 for name, value in total.items()}
        calls.append((leaves, targets, tensors, keywords | per_rank))

    def averaged():
        mine, found = slice(0, 2) if dist.get_rank() == 0 else slice(2, 5), []
        for (hidden, *head), targets, tensors, keywords in calls:
            leaves = [hidden[mine], *head]
            _, grads = run("cpu", leaves, targets[mine], [value[mine] for value in tensors], keywords)
            for grad in grads[1:]:  # of the head, which all ranks share
                dist.all_reduce(grad)
                found.append(grad / 2)
        return found

    for ours in on_ranks(2, averaged, tmp_path / "meeting"):
        for grad, one in zip(ours, expected, strict=True):
            torch.testing.assert_close(grad, one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("entropy_coef", [0.0, 0.05])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1e3, 1e6, 1e9])
def test_a_small_weight_of_a_token_costs_no_digits_of_16_bit_gradients(dtype, tokens, entropy_coef):
    """A loss over many tokens of which this call has few, scaled up again, as gradient scaling does."""
    generator = torch.Generator().manual_seed(7)
    hidden, weight = (torch.randn(size, generator=generator).to(dtype) for size in ((4, 64, 32), (1000, 32)))
    targets = torch.randint(0, 1000, (4, 64), generator=generator)
    old = -7 + 0.3 * torch.randn(4, 64, generator=generator)
    advantages, mask = torch.tensor([0.01, -0.02, 0.03, -0.01]), torch.ones(4, 64, dtype=torch.bool)
    keywords = {"reduction": "token", "num_tokens": tokens, "entropy_coef": entropy_coef}

    def gradients(leaves, old, advantages, **how):
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        output = linear_grpo_loss(*leaves, targets, old, advantages, mask, **keywords, **how)
        return torch.autograd.grad(output.loss * tokens, leaves)

    ours = gradients((hidden, weight), old, advantages, backend="cpu")
    exact = gradients((hidden.double(), weight.double()), old.double(), advantages.double())
    for grad, expected in zip(ours, exact, strict=True):
        assert grad.dtype == dtype
        error = (grad.double() - expected).norm() / expected.norm()
        assert error < {torch.float16: 1e-3, torch.bfloat16: 5e-3}[dtype]
