"""What every kernel backend of grpo_loss has to show, against the reference in float64.

A test class inherits ``GrpoLossKernel`` and has a fixture ``backend``: the name of a backend whose ops take CPU tensors
there (by themselves, under an emulator or an interpreter), or GPU ones with ``device``.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from r1kernels.grpo import grpo_loss
from tests.support.forced import public_on
from tests.support.numerics import same_bits

RATIO_VARIANTS = ("grpo", "dual_clip", "cispo", "sapo")
TERMS = [*itertools.product(RATIO_VARIANTS, ("token", "sequence", "output"))]
TERMS += [("vespo", None), ("gmpo", None), ("reinforce", None)]
ESTIMATORS = ("k1", "abs", "k2", "k3", "k3_plus", "unbiased")
REDUCTIONS = ("sequence", "token", "constant", "sequence-sum")
GARBAGE = (torch.nan, torch.inf, -torch.inf)


# upstream gradients, views, and the number that a backward on the CPU looks at
OF_THE_TEST = {"aten::mul", "aten::ones_like", "aten::detach", "aten::unsqueeze", "aten::_local_scalar_dense"}


class Ops(TorchDispatchMode):
    """Notes the names of the ops that torch runs inside it, but not those within an op."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name().partition(".")[0])
        return function(*args, **(kwargs or {}))


def on_backend(backend, logp, old_logp, advantages, mask, **keywords):
    """``grpo_loss`` on a backend that may not serve such tensors outside of a test."""
    return public_on(backend, grpo_loss, logp, old_logp, advantages, mask, **keywords)


def random_call(seed, sequences=4, tokens=37, packed=False, per_token=False, policy=None, drift=0.3):
    """(arguments, keywords) of a call with everything but a variant; what stands in masked places is garbage."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, tokens + 1, (sequences,), generator=generator)
    shape = (int(lengths.sum()),) if packed else (sequences, tokens)

    def noise(*sizes):
        return torch.randn(*sizes, generator=generator)

    mask = torch.rand(shape, generator=generator) > 0.3
    if not packed and sequences > 2:
        mask[1] = False
    spoiled = torch.tensor([GARBAGE[i % 3] for i in range(mask.numel())]).view(shape)

    def spoil(values):
        return torch.where(mask, values, spoiled)

    counts = torch.stack(
        [part.sum() for part in (mask.split(lengths.tolist()) if packed else mask)] or [mask.sum()]
    )

    def spoil_sequences(values):
        """Garbage where no token of a sequence counts."""
        nothing = counts.view(-1, *[1] * (values.ndim - 1)) == 0
        return torch.where(nothing[: len(values)], GARBAGE[seed % 3], values)

    old = -noise(*shape).abs() - 0.05
    keywords = {"ref_logp": spoil(old + drift * noise(*shape)), "kl_coef": 0.2}
    keywords |= {"entropy": spoil(noise(*shape).abs()), "entropy_coef": 0.1}
    if packed:
        keywords["cu_seqlens"] = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    if policy == "token":
        keywords["policy_weights"] = spoil(torch.rand(shape, generator=generator) * 2)
    elif policy == "sequence":
        keywords["policy_weights"] = spoil_sequences(torch.rand(sequences, 1, generator=generator) * 2)
    advantages = spoil(noise(*shape)) if per_token else spoil_sequences(noise(sequences))
    return (spoil(old + drift * noise(*shape)), spoil(old), advantages, mask), keywords


def converted(values, dtype):
    if isinstance(values, torch.Tensor) and values.is_floating_point():
        return values.to(dtype)
    return values


def gradients(run, arguments, keywords, upstream=1.7):
    """The output and the gradients of log-probs and entropies; ``run`` has the arguments of grpo_loss."""
    logp = arguments[0].detach().requires_grad_()
    leaves = [logp]
    if keywords.get("entropy") is not None:
        keywords = {**keywords, "entropy": keywords["entropy"].detach().requires_grad_()}
        leaves.append(keywords["entropy"])
    output = run(logp, *arguments[1:], **keywords)
    return output, torch.autograd.grad(output.loss * upstream, leaves, materialize_grads=True)


def assert_close(ours, exact, scale):
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double().cpu(), exact.double(), rtol=2e-5, atol=4e-6 * scale)


def check(backend, arguments, keywords, device="cpu"):
    """Loss, metrics and gradients of a call against the float64 reference."""

    def kernel(*values, **options):
        return on_backend(backend, *values, **options)

    moved = [value if value is None else value.to(device) for value in arguments]
    options = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in keywords.items()
    }
    output, grads = gradients(kernel, moved, options)
    exact, exact_grads = gradients(
        lambda *values, **options: grpo_loss(*values, **options, backend="reference"),
        [converted(value, torch.float64) for value in arguments],
        {name: converted(value, torch.float64) for name, value in keywords.items()},
    )
    # sums over tokens of either sign: their error goes with the largest of them, not with what is left
    size = float(max(1.0, *(abs(value) for value in exact.metrics.floats().values() if value == value)))
    size = size if keywords.get("reduction") == "sequence-sum" else min(size, 10.0)
    assert list(output.metrics) == list(exact.metrics)
    assert_close(output.loss, exact.loss, size)
    for name in exact.metrics:
        assert_close(output.metrics[name], exact.metrics[name], size)
    for ours, expected in zip(grads, exact_grads, strict=True):
        largest = float(expected.abs().max()) if expected.numel() else 0.0
        assert_close(ours, expected, largest)


BOUNDED = [("grpo", (0, 1)), ("dual_clip", (-1, 0, 1)), ("cispo", (-1, 0, 1)), ("sapo", (-1, 0, 1))]
"""Variants with the signs of the advantage for which they bound the ratio."""


def check_overflow(run, variant, signs, ratio, device="cpu"):
    """Ratios beyond float32 in a bounded term: the loss and the gradient of float64, where they are finite."""
    logp = torch.tensor([[-1.0, -2.0, -0.5]]).expand(len(signs), 3).contiguous()
    arguments = (
        logp,
        logp - 100,
        torch.tensor(signs, dtype=torch.float32),
        torch.ones(logp.shape, dtype=torch.bool),
    )
    keywords = {"variant": variant, "ratio": ratio}
    output, (grad,) = gradients(run, [value.to(device) for value in arguments], keywords)
    exact, (exact_grad,) = gradients(
        lambda *values, **options: grpo_loss(*values, **options, backend="reference"),
        [converted(value, torch.float64) for value in arguments],
        keywords,
    )
    assert_close(output.loss, exact.loss, 1.0)
    assert_close(grad, exact_grad, 1.0)
    assert output.metrics["ratio/max"] == output.metrics["ratio/mean"] == torch.inf


def check_unbounded_overflow(run, ratio, device="cpu"):
    """A punished token whose ratio is beyond float32: loss and gradient are infinite, as -c A is; the others are as before."""
    logp = torch.tensor([[-1.0, -2.0], [-1.0, -2.0]])
    arguments = (
        logp,
        torch.tensor([[-101.0, -102.0], [-1.5, -2.5]]),
        torch.tensor([-1.0, -1.0]),
        torch.ones(2, 2, dtype=torch.bool),
    )
    leaf, *others = (value.to(device) for value in arguments)
    loss = run(leaf.requires_grad_(), *others, ratio=ratio).loss
    (grad,) = torch.autograd.grad(loss, leaf)
    assert loss == torch.inf
    assert (grad[0] == torch.inf).all()
    # e^0.5 / 4 for each of two tokens of one of two sequences
    torch.testing.assert_close(grad[1].cpu(), torch.full((2,), 0.41218), rtol=1e-4, atol=0)


def check_far_reference(run, device="cpu"):
    """The unbiased KL of a token whose k3 is beyond float32 has the gradient c (x - r) all the same."""
    logp = torch.tensor([[-100.0, -40.0, -3.0, -1.0]])
    ref = torch.tensor([[-1.0, -1.0, -1.0, -9.0]])
    old = logp - torch.tensor([[0.0, 0.5, -0.5, 1.0]])
    arguments = (logp, old, torch.zeros(1), torch.ones(1, 4, dtype=torch.bool))
    keywords = {"ref_logp": ref.to(device), "kl": "unbiased", "kl_coef": 1.0, "reduction": "sequence-sum"}
    leaf, *others = (value.to(device) for value in arguments)
    loss = run(leaf.requires_grad_(), *others, **keywords).loss
    (grad,) = torch.autograd.grad(loss, leaf)
    assert loss == torch.inf
    expected = ((logp - old).double().exp() * (logp - ref)).detach()
    torch.testing.assert_close(grad.double().cpu(), expected, rtol=1e-5, atol=0)


class GrpoLossKernel:
    device = "cpu"
    long = 2100  # tokens of a sequence that several threads or blocks share

    def check(self, backend, arguments, keywords):
        check(backend, arguments, keywords, self.device)

    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize(("variant", "ratio"), TERMS)
    def test_every_variant(self, backend, variant, ratio, packed):
        kl = "k3" if ratio == "output" else "unbiased"
        for seed, policy in enumerate((None, "token", "sequence")):
            arguments, keywords = random_call(seed, packed=packed, per_token=seed == 1, policy=policy)
            changes = {"variant": variant, "ratio": ratio, "kl": kl, "reduction": REDUCTIONS[seed]}
            self.check(backend, arguments, keywords | changes)

    @pytest.mark.parametrize(("place", "term"), list(enumerate(TERMS)))
    def test_tokens_that_neither_policy_can_make(self, backend, place, term):
        """Log-prob -inf under both, or under the policy itself: outside a kept set."""
        variant, ratio = term
        seed, policy = place % 3, (None, "token", "sequence")[place % 3]
        (logp, old, advantages, mask), keywords = random_call(seed, packed=seed == 2, policy=policy)
        places = mask.flatten().nonzero().squeeze(1)[::5]
        for values in (logp, old):
            values.view(-1)[places] = -torch.inf
        old = None if place % 4 == 3 else old
        kl = "k3" if ratio == "output" else "unbiased"
        changes = {"variant": variant, "ratio": ratio, "kl": kl, "reduction": REDUCTIONS[place % 4]}
        self.check(backend, (logp, old, advantages, mask), keywords | changes)

    @pytest.mark.parametrize("variant", ["grpo", "dual_clip"])
    def test_every_bound_of_the_clip(self, backend, variant):
        bounds = {"delta": 1.4} if variant == "grpo" else {"dual_bound": 1.2}
        arguments, keywords = random_call(3, drift=0.8)
        self.check(
            backend, arguments, keywords | bounds | {"variant": variant, "clip_low": 0.1, "clip_high": 0.2}
        )

    @pytest.mark.parametrize("kl", ESTIMATORS)
    @pytest.mark.parametrize("ratio", ["token", "sequence"])
    def test_every_estimator(self, backend, kl, ratio):
        arguments, keywords = random_call(4)
        self.check(backend, arguments, keywords | {"kl": kl, "ratio": ratio})

    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_every_reduction(self, backend, reduction, packed):
        totals = {
            "sequence": ("num_sequences",),
            "token": ("num_tokens",),
            "constant": ("num_sequences", "max_length"),
            "sequence-sum": ("num_sequences",),
        }[reduction]
        arguments, keywords = random_call(5, packed=packed)
        for given in ({}, dict.fromkeys(totals, 33.0), dict.fromkeys(totals, torch.tensor(33))):
            self.check(backend, arguments, keywords | {"reduction": reduction} | given)

    @pytest.mark.parametrize("changes", [{"ratio": "sequence"}, {"reduction": "token"}], ids=str)
    def test_uneven_micro_batches_with_totals_are_one_batch(self, backend, changes):
        (logp, old, advantages, mask), keywords = random_call(13)
        total = {"num_tokens": int(mask.sum())} if "reduction" in changes else {"num_sequences": 4}
        tensors = {"ref_logp": keywords["ref_logp"], "entropy": keywords["entropy"]}
        whole, parts = None, []
        for rows in (slice(0, 4), slice(0, 1), slice(1, 4)):
            piece = [value[rows].to(self.device) for value in (logp, old, advantages, mask)]
            options = {name: value[rows].to(self.device) for name, value in tensors.items()}
            result = gradients(
                lambda *v, **o: on_backend(backend, *v, **o), piece, keywords | options | changes | total
            )
            if whole is None:
                whole = result
            else:
                parts.append(result)
        torch.testing.assert_close(sum(output.loss for output, _ in parts), whole[0].loss)
        for whole_grad, *part_grads in zip(whole[1], *(grads for _, grads in parts), strict=True):
            torch.testing.assert_close(torch.cat(part_grads), whole_grad)

    def test_weights_for_loss_and_bonus(self, backend):
        arguments, keywords = random_call(6)
        weights = torch.where(arguments[3], torch.rand(arguments[3].shape), torch.nan)
        for variant in ("grpo", "gmpo"):
            changes = {"variant": variant, "weights": weights, "entropy_weights": weights.flip(1)}
            changes["entropy_weights"] = torch.where(arguments[3], changes["entropy_weights"].nan_to_num(), 0)
            self.check(backend, arguments, keywords | changes)

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
    def test_integer_masks(self, backend, dtype):
        (logp, old, advantages, mask), keywords = random_call(7)
        self.check(backend, (logp, old, advantages, mask.to(dtype) * 2), keywords)

    def test_on_policy_and_without_what_may_be_absent(self, backend):
        (logp, old, advantages, mask), keywords = random_call(8)
        self.check(backend, (logp, None, advantages, mask), keywords)
        self.check(backend, (logp, old, advantages, mask), {})
        self.check(backend, (logp, old, advantages, mask), keywords | {"kl_coef": 0.0, "entropy_coef": 0.0})

    @pytest.mark.parametrize("variant", ["grpo", "gmpo", "vespo"])
    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize(("sequences", "tokens"), [(0, 5), (3, 0), (3, 1), (1, 67), (2, None)])
    def test_sizes(self, backend, sequences, tokens, packed, variant):
        arguments, keywords = random_call(9, sequences, self.long if tokens is None else tokens, packed)
        self.check(backend, arguments, keywords | {"variant": variant})
        self.check(backend, arguments, keywords | {"ratio": "sequence"})

    @pytest.mark.parametrize("total", [None, 0], ids=["no total", "total 0"])
    def test_no_counted_token(self, backend, total):
        """A total of 0, as a step without tokens counts it, divides nothing."""
        (logp, old, advantages, mask), _ = random_call(10)
        nothing = torch.zeros_like(mask)
        given = {} if total is None else {"reduction": "token", "num_tokens": torch.tensor(total)}
        for ratio, variant in (("token", "grpo"), ("sequence", "grpo"), ("output", "cispo"), (None, "gmpo")):
            arguments = (torch.full_like(logp, torch.nan), old, advantages, nothing)
            keywords = {"ref_logp": old.to(self.device), "kl_coef": 1.0, "ratio": ratio, "variant": variant}
            output, grads = gradients(
                lambda *values, **options: on_backend(backend, *values, **options),
                [value.to(self.device) for value in arguments],
                keywords | {"entropy": old.to(self.device), "entropy_coef": 0.1} | given,
            )
            assert output.loss.item() == 0.0
            assert not any(grad.any() for grad in grads)
            assert all(value == 0 for value in output.metrics.floats().values())

    @pytest.mark.parametrize("ratio", ["token", "sequence"])
    @pytest.mark.parametrize(("variant", "signs"), BOUNDED)
    def test_ratios_that_overflow(self, backend, variant, signs, ratio):
        check_overflow(lambda *v, **o: on_backend(backend, *v, **o), variant, signs, ratio, self.device)

    @pytest.mark.parametrize("ratio", ["token", "sequence"])
    def test_an_overflow_that_nothing_bounds_is_infinite(self, backend, ratio):
        check_unbounded_overflow(lambda *v, **o: on_backend(backend, *v, **o), ratio, self.device)

    def test_the_unbiased_kl_far_from_the_reference(self, backend):
        check_far_reference(lambda *v, **o: on_backend(backend, *v, **o), self.device)

    def test_extreme_ratios(self, backend):
        """exp over- and underflows as in the reference, and the effective sample size does not overflow."""
        logp = torch.tensor([[60.0, 61.0, -90.0, 0.0]])
        arguments = (logp, torch.zeros(1, 4), torch.ones(1, 4), torch.ones(1, 4, dtype=torch.bool))
        ours = on_backend(backend, *(value.to(self.device) for value in arguments)).metrics.floats()
        expected = grpo_loss(*arguments, backend="reference").metrics.floats()
        assert ours == pytest.approx(expected, rel=1e-5)

    def test_a_nan_that_counts_is_seen(self, backend):
        (logp, old, advantages, mask), _ = random_call(14)
        logp[tuple(mask.nonzero()[0])] = torch.nan
        arguments = (value.to(self.device) for value in (logp, old, advantages, mask))
        output = on_backend(backend, *arguments)
        assert output.loss.isnan() and output.metrics["ratio/max"].isnan()

    @pytest.mark.parametrize("ratio", ["token", "sequence"])
    def test_a_loss_and_its_gradient_are_one_op_each(self, backend, ratio):
        """On a GPU the launch of another would take as long as the kernel of a small batch."""
        arguments, keywords = random_call(16)
        arguments = [value.to(self.device) for value in arguments]
        tensors = {name: keywords[name].to(self.device) for name in ("ref_logp", "entropy")}
        ops = Ops()
        with ops:
            gradients(
                lambda *v, **o: on_backend(backend, *v, **o), arguments, keywords | tensors | {"ratio": ratio}
            )
        assert [name for name in ops.names if name not in OF_THE_TEST] == [
            f"r1kernels::grpo_loss_{backend}",
            f"r1kernels::grpo_loss_{backend}_backward",
        ]

    def test_as_many_packed_tokens_as_sequences(self, backend):
        """Advantages (N,) with N = B are one per sequence, policy weights (N,) one per token."""
        logp, old, advantages = torch.randn(3, 5, generator=torch.Generator().manual_seed(15))
        cu_seqlens = torch.tensor([0, 2, 2, 4, 4, 5])
        keywords = {"policy_weights": old.abs(), "cu_seqlens": cu_seqlens}
        mask = torch.ones(5, dtype=torch.bool)
        self.check(backend, (logp, old, advantages, mask), keywords)
        of_tokens = advantages.repeat_interleave(cu_seqlens.diff())
        padded = torch.tensor([[1, 1], [0, 0], [1, 1], [0, 0], [1, 0]], dtype=torch.bool)

        def spread(values):
            return torch.zeros(5, 2).masked_scatter(padded, values).to(self.device)

        rows = on_backend(
            backend, spread(logp), spread(old), spread(of_tokens), padded.to(self.device),
            policy_weights=spread(old.abs()),
        )  # fmt: skip
        tensors = [value.to(self.device) for value in (logp, old, advantages, mask)]
        ours = on_backend(
            backend, *tensors, **{name: value.to(self.device) for name, value in keywords.items()}
        )
        torch.testing.assert_close(ours.loss, rows.loss)

    def test_without_gradients_the_numbers_are_the_same(self, backend):
        arguments, keywords = random_call(11)
        arguments = [value.to(self.device) for value in arguments]
        keywords = {
            name: value.to(self.device) if torch.is_tensor(value) else value
            for name, value in keywords.items()
        }
        with_grad, _ = gradients(lambda *v, **o: on_backend(backend, *v, **o), arguments, keywords)
        without = on_backend(backend, *arguments, **keywords)
        assert not without.loss.requires_grad
        assert same_bits(with_grad.loss.detach(), without.loss)
        assert same_bits(with_grad.metrics.tensor, without.metrics.tensor)

    def test_the_same_bits_every_time(self, backend):
        arguments, keywords = random_call(12, 3, self.long, packed=True)
        arguments = [value.to(self.device) for value in arguments]
        keywords = {
            name: value.to(self.device) if torch.is_tensor(value) else value
            for name, value in keywords.items()
        }
        first, *others = (
            gradients(
                lambda *v, **o: on_backend(backend, *v, **o), arguments, keywords | {"ratio": "sequence"}
            )
            for _ in range(3)
        )
        for output, grads in others:
            assert same_bits(output.metrics.tensor, first[0].metrics.tensor)
            assert all(same_bits(one, other) for one, other in zip(grads, first[1], strict=True))
