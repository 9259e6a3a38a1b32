"""What every GPU backend of route and sort_by_expert must do, for the emulator, Triton's interpreter and a GPU.

The oracle of a choice is the C++ backend for CPUs, which tests/moe holds against plain Python: indices, counts and orders
must have its bits; of weights and gradients it is plain PyTorch in float64. T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import pytest
import torch

from r1kernels import extension
from r1kernels.moe.reference import sorted_rows
from r1kernels.moe.routing import ROUTE, SCORES, Choice, RouteCall, Routing
from r1kernels.moe.sort import SORT_BY_EXPERT, SortCall
from tests.support.forced import run_on
from tests.support.numerics import assert_as_exact_as, same_bits
from tests.support.routing_cases import check_special_logits, families, normal

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEFAULTS = {
    "score": "sigmoid",
    "choose_by": "scores",
    "bias": None,
    "n_group": 1,
    "topk_group": 1,
    "group_score": None,
    "normalize": True,
    "eps": 1e-20,
    "scale": 1.0,
    "indices": None,
}


def integers(low, high, *shape, seed=0):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def route(backend, logits, top_k, **options):
    """The call behind the public function: without its look at the values of indices."""
    given = DEFAULTS | options
    score, group_score = given["score"], given["group_score"]
    two_best = group_score == "two_best" or (group_score is None and score != "softmax")
    groups = (given["n_group"], given["topk_group"], two_best)
    choice = Choice(given["choose_by"] == "logits", given["bias"], *groups, given["indices"])
    weighing = (SCORES.index(score), given["normalize"], given["eps"], given["scale"])
    call = RouteCall(logits, top_k, *weighing, choice)
    return Routing(*run_on(backend, ROUTE, call))


class RoutingKernel:
    device = "cpu"
    tokens = 9

    def moved(self, options):
        return {key: v.to(self.device) if torch.is_tensor(v) else v for key, v in options.items()}

    def run(self, backend, logits, **options):
        """The routing and the gradient of the logits, on the CPU."""
        grad = normal(logits.shape[0], options["top_k"], seed=2).to(self.device)
        leaf = logits.detach().to(self.device).requires_grad_()
        routing = route(backend, leaf, **self.moved(options))
        (gradient,) = torch.autograd.grad(routing.weights, leaf, grad)
        return tuple(result.detach().cpu() for result in (*routing, gradient))

    def check(self, backend, logits, **options):
        """Choice and counts have the bits of the CPU's; weights and gradients are exact but for a rounding or two."""
        if extension.missing() is not None:
            pytest.skip(str(extension.missing()))
        ours = self.run(backend, logits, **options)
        expected = route("cpu", logits, **options)
        assert torch.equal(ours[1], expected.indices)
        assert torch.equal(ours[2], expected.tokens_per_expert)
        leaf = logits.double().requires_grad_()
        exact = route("reference", leaf, **options | {"indices": expected.indices}).weights
        (gradient,) = torch.autograd.grad(exact, leaf, normal(*exact.shape, seed=2).double())
        rounding = torch.finfo(torch.float32).eps
        torch.testing.assert_close(
            ours[0].double(), exact.detach(), rtol=2 * rounding, atol=1e-37, equal_nan=True
        )
        rounding = torch.finfo(logits.dtype).eps
        largest = float(gradient.nan_to_num(0).abs().max()) if gradient.numel() else 0.0
        torch.testing.assert_close(
            ours[3].double(), gradient, rtol=2 * rounding, atol=rounding * largest + 1e-14, equal_nan=True
        )
        return ours

    @families
    @pytest.mark.parametrize("experts", [8, 20, 128])
    def test_choice_weights_and_gradients(self, backend, options, experts):
        self.check(backend, normal(self.tokens, experts), **options)
        self.check(backend, normal(self.tokens, experts), bias=normal(experts, seed=1) - 2, **options)

    @families
    def test_ties_go_to_the_lowest_index(self, backend, options):
        for experts in (8, 40):
            two_levels = (normal(self.tokens, experts) > 0).float()
            self.check(backend, two_levels, **options)
            self.check(backend, two_levels, bias=torch.tensor([0.0, 0.25]).repeat(experts // 2), **options)
        self.check(backend, torch.zeros(2, 8), **options)
        self.check(backend, torch.full((2, 8), 50.0), **options)  # saturated: sigmoid is 1 in float32

    @pytest.mark.parametrize("score", ["sigmoid", "softmax"])
    def test_near_logits_behind_equal_ones_at_the_edge_of_the_choice(self, backend, score):
        # scores that are equal in float32 go by their number, and experts 1 and 2 of a lower logit stand before those of a larger one
        for logits in (
            [0.0, -1e-10, 0.0, 0.0, 0.0],
            [0.0, -1e-10, -1e-10, 0.0, 0.0],
            [1.0, 1.0, -1e-10, 0.0, 0.0],
        ):
            for top_k in (2, 3):
                self.check(backend, torch.tensor([logits]), top_k=top_k, score=score)

    @pytest.mark.parametrize("options", [{"score": "softmax"}, {"choose_by": "logits"}])
    def test_zeros_of_both_signs_are_equal(self, backend, options):
        logits = torch.tensor([[-0.0, 0.0, 0.0, -1.0], [-1.0, -0.0, 0.0, 0.0]])
        assert self.check(backend, logits, top_k=1, **options)[1].tolist() == [[0], [1]]

    def test_the_shapes_of_models(self, backend):
        v3 = {"top_k": 8, "n_group": 8, "topk_group": 4, "scale": 2.5}
        self.check(backend, normal(4, 256), bias=normal(256, seed=1) / 10, **v3)
        self.check(backend, normal(2, 512), top_k=10, score="softmax")
        self.check(backend, normal(4, 64), top_k=8, score="softmax", normalize=False)
        self.check(backend, normal(4, 8), top_k=2, score="softmax")

    @pytest.mark.parametrize("score", ["sigmoid", "softmax"])
    @pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (7, 7), (33, 1), (50, 40), (1000, 2)])
    def test_sizes(self, backend, score, experts, top_k):
        for normalize in (False, True):
            options = {"top_k": top_k, "score": score, "normalize": normalize}
            self.check(backend, normal(2, experts), **options)

    def test_groups_of_one_expert_and_odd_groups(self, backend):
        self.check(backend, normal(5, 8), top_k=2, n_group=8, topk_group=3)
        self.check(backend, normal(5, 8), top_k=2, score="softmax", n_group=8, topk_group=2)
        self.check(backend, (2 * normal(5, 35)).round(), top_k=4, n_group=5, topk_group=2)
        self.check(backend, normal(2, 40), top_k=3, n_group=40, topk_group=35)
        self.check(backend, normal(5, 9), top_k=3, n_group=3, topk_group=3)

    def test_extreme_selection_scores(self, backend):
        bias = torch.tensor([0.0, -torch.inf, torch.inf, 1e30, -1e30, -0.0, 2.0, -2.0])
        self.check(backend, normal(4, 8), top_k=8, bias=bias)
        self.check(backend, normal(4, 8), top_k=3, bias=bias, n_group=4, topk_group=2)
        wide = torch.tensor([[0.0, -torch.inf, 90.0, -200.0, 3e38]])
        self.check(backend, wide, top_k=5, score="softmax")
        self.check(backend, wide, top_k=5, score="softmax", normalize=False)
        # the scores of all groups but the first are 0 in float32, and so equal
        far = torch.tensor([[0.0, -1.0, -200.0, -300.0, -150.0, -400.0, -250.0, -500.0]])
        self.check(backend, far, top_k=3, score="softmax", n_group=4, topk_group=2)

    @families
    def test_nan_and_infinite_logits(self, backend, options):
        def run(logits, **options):
            weights, indices, _, grad = self.run(backend, logits, **options)
            return weights, indices, grad

        check_special_logits(run, options)

    @pytest.mark.parametrize("score", ["sigmoid", "softmax"])
    def test_the_choice_and_the_gradient_of_a_nan_row(self, backend, score):
        logits = normal(4, 8)
        logits[1, 3] = torch.nan
        self.check(backend, logits, top_k=2, score=score)

    @families
    def test_replay(self, backend, options):
        logits, top_k = normal(self.tokens, 20), options["top_k"]
        live = self.run(backend, logits, **options)
        replayed = self.run(backend, logits, indices=live[1], **options)
        assert all(same_bits(first, second) for first, second in zip(live, replayed, strict=True))
        self.check(backend, logits, indices=integers(0, 4, self.tokens, top_k), **options)  # duplicates
        self.check(backend, normal(2, 8), **options | {"top_k": 40}, indices=integers(0, 8, 2, 40))

    @families
    def test_an_index_that_is_no_expert_gets_no_weight_and_no_count(self, backend, options):
        logits, top_k = normal(5, 8), options["top_k"]
        indices = integers(-2, 11, 5, top_k)
        indices[0], indices[1, 0] = 8, 2**40
        weights, kept, counts, grad = self.run(backend, logits, indices=indices, **options)
        leaf = logits.clone().requires_grad_()
        expected = route("reference", leaf, indices=indices, **options)
        (gradient,) = torch.autograd.grad(expected.weights, leaf, normal(5, top_k, seed=2))
        assert torch.equal(kept, indices) and torch.equal(counts, expected.tokens_per_expert)
        torch.testing.assert_close(weights, expected.weights.detach())
        torch.testing.assert_close(grad[1:], gradient[1:], rtol=1e-5, atol=1e-6)
        assert (weights[(indices < 0) | (indices >= 8)] == 0).all() and (grad[0] == 0).all()

    @pytest.mark.parametrize("score", ["sigmoid", "softmax"])
    def test_replay_of_hopeless_experts_stays_finite(self, backend, score):
        logits = torch.tensor([[200.0, -200.0, -200.0]])
        weights, _, _, grad = self.run(backend, logits, top_k=2, score=score, indices=torch.tensor([[1, 2]]))
        expected = [[0.0, 0.0]] if score == "sigmoid" else [[0.5, 0.5]]  # both scores underflow to 0
        assert weights.tolist() == expected and torch.isfinite(grad).all()

    @families
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_as_exact_as_eager(self, backend, options, dtype):
        logits = (3 * normal(self.tokens, 40)).to(dtype)
        ours = self.check(backend, logits, **options)
        grad = normal(self.tokens, options["top_k"], seed=2)
        results = []
        for wide in (logits, logits.double()):
            leaf = wide.clone().requires_grad_()
            weights = route("reference", leaf, indices=ours[1], **options).weights
            results.append((weights.detach(), *torch.autograd.grad(weights, leaf, grad.to(weights.dtype))))
        (plain, plain_grad), (exact, exact_grad) = results
        assert_as_exact_as(ours[0], plain, exact, torch.float32)
        assert_as_exact_as(ours[3], plain_grad, exact_grad, dtype)

    @families
    def test_a_row_has_the_same_bits_in_any_company(self, backend, options):
        logits = normal(self.tokens, 24)
        weights, indices, _, grad = self.run(backend, logits, **options)
        again = self.run(backend, logits, **options)
        assert same_bits(again[0], weights) and same_bits(again[3], grad)
        turned = self.run(backend, logits.flip(0), **options)
        assert same_bits(turned[0].flip(0), weights) and same_bits(turned[1].flip(0), indices)

    def test_no_token(self, backend):
        for score in ("sigmoid", "softmax"):
            options = {"top_k": 2, "score": score}
            weights, indices, counts, grad = self.run(backend, torch.zeros(0, 6), **options)
            assert weights.shape == indices.shape == (0, 2) and grad.shape == (0, 6)
            assert counts.tolist() == [0] * 6

    # --- sort_by_expert ---

    def check_order(self, backend, indices, experts):
        ours = run_on(backend, SORT_BY_EXPERT, SortCall(indices.to(self.device).flatten(), experts))
        for part, expected in zip(ours, sorted_rows(indices.flatten(), experts), strict=True):
            assert part.dtype == expected.dtype and torch.equal(part.cpu(), expected)

    @pytest.mark.parametrize("rows", [0, 1, 31, 33, 256, 257, 1000])
    @pytest.mark.parametrize("experts", [1, 5, 64])
    def test_order(self, backend, rows, experts):
        self.check_order(backend, integers(0, experts + 1, rows), experts)

    def test_order_of_one_expert_of_nobody_and_of_what_is_no_expert(self, backend):
        self.check_order(backend, torch.full((300,), 3), 7)
        self.check_order(backend, torch.full((300,), 7), 7)
        self.check_order(backend, integers(-5, 15, 300), 7)
        self.check_order(backend, torch.tensor([[2, 2**40], [0, -(2**40)], [1, 3]]), 3)
