"""The Triton kernels of GRPO in Triton's interpreter. Run by test_interpreter.py."""

import pytest
import torch

from r1kernels import group_advantages, linear_grpo_loss
from r1kernels.grpo import grpo_preset, triton_advantages
from r1kernels.grpo import triton as kernels
from r1kernels.grpo.metrics import NAMES
from tests.support import interpreter_bfloat16
from tests.support.grpo_loss_kernel import (
    ESTIMATORS,
    REDUCTIONS,
    TERMS,
    GrpoLossKernel,
    gradients,
    on_backend,
    random_call,
)

interpreter_bfloat16.repair()


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Few tokens then make several slots, tiles of sequences and rounds of loops."""
    monkeypatch.setattr(kernels, "TILES", {"block": 32, "sequences": 2, "slots": 2, "many": 4})
    monkeypatch.setattr(triton_advantages, "OTHERS", 8)


@pytest.fixture
def backend():
    return "triton"


class TestGrpoLossTriton(GrpoLossKernel):
    """The interpreter is slow: half of the larger products, padded and packed by turns.

    That a call is one op is asked on the CPU, and the interpreter, one program after the other, has the same bits each time.
    """

    test_a_loss_and_its_gradient_are_one_op_each = None
    test_the_same_bits_every_time = None

    @pytest.mark.parametrize(("variant", "ratio"), TERMS)
    def test_every_variant(self, backend, variant, ratio):
        number = TERMS.index((variant, ratio))
        policy = (None, "token", "sequence")[number % 3]
        kl = "k3" if ratio == "output" else "unbiased"
        arguments, keywords = random_call(number, 3, 37, number % 2 == 1, number % 4 == 3, policy)
        self.check(backend, arguments, keywords | {"variant": variant, "ratio": ratio, "kl": kl})

    @pytest.mark.parametrize("kl", ESTIMATORS)
    def test_every_estimator(self, backend, kl):
        number = ESTIMATORS.index(kl)
        ratio = ("token", "sequence")[number % 2]
        arguments, keywords = random_call(number, 3, packed=number % 4 < 2)
        self.check(backend, arguments, keywords | {"kl": kl, "ratio": ratio})

    @pytest.mark.parametrize(("place", "term"), [(place, TERMS[place]) for place in (0, 1, 2, 3, 12, 13, 14)])
    def test_tokens_that_neither_policy_can_make(self, backend, place, term):
        super().test_tokens_that_neither_policy_can_make(backend, place, term)

    @pytest.mark.parametrize(
        ("reduction", "packed"), [*((name, name != "sequence") for name in REDUCTIONS), ("constant", False)]
    )
    def test_every_reduction(self, backend, reduction, packed):
        arguments, keywords = random_call(5, 3, packed=packed)
        total = {"num_tokens": torch.tensor(33)} if reduction == "token" and packed else {}
        self.check(backend, arguments, keywords | {"reduction": reduction} | total)

    @pytest.mark.parametrize("variant", ["grpo", "vespo"])
    @pytest.mark.parametrize(("sequences", "tokens"), [(0, 5), (3, 0), (3, 1), (1, 67)])
    def test_sizes(self, backend, sequences, tokens, variant):
        arguments, keywords = random_call(9, sequences, tokens, packed=variant == "vespo")
        self.check(backend, arguments, keywords | {"variant": variant})

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
    def test_integer_masks(self, backend, dtype):
        super().test_integer_masks(backend, dtype)


def test_the_tiles_of_a_gpu_give_the_same_numbers(monkeypatch):
    arguments, keywords = random_call(1, 3, 70, packed=True)
    keywords |= {"ratio": "sequence", "kl": "unbiased", "reduction": "token"}
    small, small_grads = gradients(lambda *v, **o: on_backend("triton", *v, **o), arguments, keywords)
    monkeypatch.undo()
    large, large_grads = gradients(lambda *v, **o: on_backend("triton", *v, **o), arguments, keywords)
    torch.testing.assert_close(large.metrics.tensor, small.metrics.tensor)
    for one, other in zip(large_grads, small_grads, strict=True):
        torch.testing.assert_close(one, other)


def test_boundaries_that_do_not_fit_reach_nothing_outside():
    """Values of a device are not read: tokens outside all boundaries count nowhere and get no gradient."""
    tokens = 90
    logp, old = -torch.rand(2, tokens)
    logp.requires_grad_()
    mask = torch.ones(tokens, dtype=torch.bool)
    ops = torch.ops.r1kernels
    numbers = torch.tensor([0.8, 1.2, torch.inf, torch.inf, 0, 0, 0, 0, 0, 0, 0, 0, 3.0])
    for bounds, inside in (
        ((40, 50, 70), (40, 70)),
        ((0, 30, 60), (0, 60)),
        ((0, 50, 500), (0, 90)),
        ((-70, 50, 90), (0, 90)),
    ):
        cu_seqlens = torch.tensor(bounds)
        arguments = (
            logp.detach(),
            old,
            torch.ones(2, 1),
            mask,
            None,
            None,
            None,
            None,
            None,
            cu_seqlens,
            numbers,
        )
        loss, metrics, grad, shares, nothing = ops.grpo_loss_triton(*arguments, None, 0, 1, 0, 0, True, False)
        grad, _ = ops.grpo_loss_triton_backward(
            loss * 0 + 1, grad, shares, nothing, mask, cu_seqlens, arguments[0]
        )
        counted = torch.zeros_like(mask)
        counted[inside[0] : inside[1]] = True
        assert metrics[NAMES.index("num_tokens")] == counted.sum()
        assert (grad[~counted] == 0).all() and loss.isfinite()


@pytest.mark.parametrize("entropy", [False, True])
def test_the_ops_keep_their_schemas(entropy):
    (logp, old, advantages, mask), keywords = random_call(3, 2, 40)
    ops = torch.ops.r1kernels
    numbers = torch.tensor([0.8, 1.2, torch.inf, torch.inf, 0, 0, 0, 0, 0, 0, 0.1, 0.1, 2.0])
    arguments = (logp, old, advantages.unsqueeze(1), mask, keywords["ref_logp"], None)
    arguments += (keywords["entropy"] if entropy else None, None, None, None, numbers, None, 0, 1, 3, 1, True)
    torch.library.opcheck(ops.grpo_loss_triton.default, (*arguments, entropy), test_utils=SCHEMA)
    _, _, *grads = ops.grpo_loss_triton(*arguments, entropy)
    backward = (torch.ones(()), *grads, mask, None, None)
    torch.library.opcheck(ops.grpo_loss_triton_backward.default, backward, test_utils=SCHEMA)
    rewards = torch.tensor([1.0, 2.0, 3.0, 5.0])
    call = (rewards, 2, None, None, 0, torch.tensor(1e-4), False)
    torch.library.opcheck(ops.group_advantages_triton.default, call, test_utils=SCHEMA)


SCHEMA = ("test_schema", "test_faketensor")


@pytest.mark.parametrize("by_id", [False, True])
@pytest.mark.parametrize(
    ("scale", "leave_one_out"), [("group", False), ("batch", False), ("none", False), ("group", True)]
)
def test_group_advantages(scale, leave_one_out, by_id):
    generator = torch.Generator().manual_seed(0)
    for size, group_size in ((6, 3), (10, 10), (2, 1), (0, 2)):
        rewards = torch.randint(0, 3, (size,), generator=generator).float()
        ids = torch.randint(-2, 3, (size,), generator=generator) * 10**12
        groups = {"group_ids": ids} if by_id else {"group_size": group_size}
        for valid in (None, torch.rand(size, generator=generator) > 0.4):
            keywords = {**groups, "valid": valid, "scale": scale, "leave_one_out": leave_one_out}
            expected = group_advantages(rewards, **keywords, backend="reference")
            torch.testing.assert_close(group_advantages(rewards, **keywords, backend="triton"), expected)


def test_a_bad_reward_makes_its_group_nan_alone(monkeypatch):
    monkeypatch.setattr("r1kernels.checks.values_visible", lambda *tensors: False)
    rewards = torch.tensor([1.0, torch.nan, 1.0, 2.0, 3.0, 4.0])
    advantages = group_advantages(rewards, group_size=3, backend="triton")
    assert advantages.isnan().tolist() == [True] * 3 + [False] * 3


@pytest.mark.parametrize("preset", ["dapo", "gspo"])
def test_linear_grpo_loss(preset):
    (_, old, advantages, mask), _ = random_call(4, 3, 9)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(3, 9, 16, generator=generator), torch.randn(50, 16, generator=generator)
    targets = torch.randint(0, 50, (3, 9), generator=generator)
    results = []
    for name, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = [leaf.to(dtype).requires_grad_() for leaf in (hidden, weight)]
        output = linear_grpo_loss(
            *leaves, targets, old.to(dtype), advantages.to(dtype), mask, **grpo_preset(preset), entropy_coef=0.1,
            backend=name,
        )  # fmt: skip
        results.append((output.loss, output.metrics.tensor, *torch.autograd.grad(output.loss, leaves)))
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("entropy_coef", [0.0, 0.05])
def test_a_small_weight_of_a_token_costs_no_digits_of_float16_gradients(entropy_coef):
    """The gradient of a tile of logits is rounded to float16 for the products with it."""
    generator = torch.Generator().manual_seed(7)
    hidden, weight = torch.randn(2, 8, 16, generator=generator), torch.randn(50, 16, generator=generator)
    targets = torch.randint(0, 50, (2, 8), generator=generator)
    advantages, mask = torch.tensor([0.01, -0.02]), torch.ones(2, 8, dtype=torch.bool)
    grads = []
    for name, dtype in (("triton", torch.float16), ("reference", torch.float64)):
        leaves = [leaf.half().to(dtype).requires_grad_() for leaf in (hidden, weight)]
        loss = linear_grpo_loss(
            *leaves, targets, None, advantages.to(dtype), mask, reduction="token", num_tokens=1e9,
            entropy_coef=entropy_coef, backend=name,
        ).loss  # fmt: skip
        grads.append(torch.autograd.grad(loss * 1e9, leaves))
    for ours, exact in zip(*grads, strict=True):
        assert ours.dtype == torch.float16
        assert (ours.double() - exact).norm() / exact.norm() < 2e-3
