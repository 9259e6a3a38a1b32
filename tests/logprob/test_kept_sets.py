"""Kept sets on every backend: log-probs renormalised over what a truncated sampler kept. N tokens, H hidden, V vocabulary."""

from __future__ import annotations

import pytest
import torch

import r1kernels
from r1kernels import (
    extension,
    grouped_logprobs,
    linear_grouped_logprobs,
    linear_logprobs,
    token_logprobs,
)
from tests.support import logprob_oracle
from tests.support.kept_case import IGNORED, in_csr, masked, of_sets, sets_around
from tests.support.numerics import assert_as_exact_as, same_bits

OP = "linear_logprobs"
N, H, V = 12, 21, 67
# rows of one, two and four vectors' widths, the whole vocabulary as an empty set and as a full one
LENGTHS = [0, 1, 3, 16, 17, 40, V, 0, 5, 20, 2, 33]
STATS = ("log_sum_sq_probs", "mean_logits", "is_top1")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEADS = {
    "plain": {},
    "capped": {"softcap": 5.0, "logit_scale": 0.7, "temperature": 1.3},
    "temperatures": {"temperature": torch.linspace(0.5, 2.0, N)},
}


def problem(dtype=torch.float32, lengths=LENGTHS, seed=0):
    """((hidden, weight, bias), targets, sets): targets 2 and 7 are ignored, with a set and without."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (len(lengths), H), (V, H), (V,)
    leaves = [torch.randn(size, generator=generator).to(dtype).requires_grad_() for size in sizes]
    targets = torch.randint(0, V, (len(lengths),), generator=generator)
    sets = sets_around(targets, lengths, V)
    targets[2::5] = IGNORED
    return leaves, targets, sets


def head_logits(hidden, weight, bias, options):
    logits = (hidden @ weight.T + bias) * options.get("logit_scale", 1.0)
    cap = options.get("softcap")
    return cap * torch.tanh(logits / cap) if cap else logits


def results_and_gradients(logp, entropy, leaves):
    """Targets outside their sets take part in the loss as training code masks them."""
    upstream = torch.linspace(-1, 1, logp.numel(), dtype=logp.dtype, device=logp.device).view(logp.shape)
    loss = (torch.where(logp.isfinite(), logp, 0.0) * upstream).sum() + (entropy * (1 - upstream)).sum()
    return logp.detach().cpu(), entropy.detach().cpu(), *(g.cpu() for g in torch.autograd.grad(loss, leaves))


def on(device, *tensors):
    return [tensor.detach().to(device).requires_grad_(tensor.requires_grad) for tensor in tensors]


def exact(leaves, targets, sets, options):
    double = [leaf.detach().double().requires_grad_() for leaf in leaves]
    temperature = options.get("temperature", 1.0)
    temperature = temperature.double() if isinstance(temperature, torch.Tensor) else temperature
    logp, entropy, stats = of_sets(head_logits(*double, options), sets, targets, temperature)
    return results_and_gradients(logp, entropy, double), stats


def eager(leaves, targets, sets, options):
    """masked_fill and log_softmax, as people write it."""
    inputs = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    temperature = options.get("temperature", 1.0)
    temperature = temperature.unsqueeze(-1) if isinstance(temperature, torch.Tensor) else temperature
    x = masked(head_logits(*inputs, options).float(), sets) / temperature
    log_probs = x.log_softmax(-1)
    counted = targets != IGNORED
    logp = log_probs.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    entropy = -torch.where(log_probs.isfinite(), log_probs.exp() * log_probs, 0.0).sum(-1)
    return results_and_gradients(torch.where(counted, logp, 0.0), torch.where(counted, entropy, 0.0), inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", HEADS)
def test_a_head_is_as_exact_as_eager(place, name, dtype):
    backend, device = place
    leaves, targets, sets = problem(dtype)
    options = HEADS[name]
    inputs = on(device, *leaves)
    here = {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in options.items()}
    logp, entropy, stats = linear_logprobs(
        *inputs[:2],
        targets.to(device),
        bias=inputs[2],
        kept=[x.to(device) for x in in_csr(sets)],
        return_entropy=True,
        stats=STATS,
        backend=backend,
        **here,
    )
    ours = results_and_gradients(logp, entropy, inputs)
    truth, exact_stats = exact(leaves, targets, sets, options)
    for mine, peer, value in zip(ours, eager(leaves, targets, sets, options), truth, strict=True):
        assert_as_exact_as(mine, peer, value, mine.dtype)
    for key in STATS[:2]:
        torch.testing.assert_close(stats[key].double().cpu(), exact_stats[key], rtol=1e-5, atol=1e-5)
    assert torch.equal(stats["is_top1"].cpu(), exact_stats["is_top1"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("integers", [torch.int32, torch.int64], ids=str)
def test_logits_in_any_strides(place, dtype, integers):
    backend, device = place
    leaves, targets, sets = problem(dtype)
    logits = head_logits(*leaves, {}).detach()
    padded = torch.full((3, 5, V + 3), torch.nan, dtype=dtype)[:, :4, :V].to(device)
    z = padded.copy_(logits.view(3, 4, V).to(device)).requires_grad_()
    ids, offsets = in_csr(sets, integers)
    logp, entropy = token_logprobs(
        z,
        targets.view(3, 4).to(device),
        temperature=0.8,
        return_entropy=True,
        kept=(ids.to(device), offsets),
        backend=backend,
    )
    ours = results_and_gradients(logp.flatten(), entropy.flatten(), [z])
    double = logits.double().requires_grad_()
    truth = results_and_gradients(*of_sets(double, sets, targets, 0.8)[:2], [double])
    plain = logits.clone().requires_grad_()
    x = masked(plain.float(), sets) / 0.8
    log_probs = x.log_softmax(-1)
    counted = targets != IGNORED
    peer = results_and_gradients(
        torch.where(counted, log_probs.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1), 0.0),
        torch.where(
            counted, -torch.where(log_probs.isfinite(), log_probs.exp() * log_probs, 0.0).sum(-1), 0.0
        ),
        [plain],
    )
    for mine, other, value in zip(ours, peer, truth, strict=True):
        assert_as_exact_as(mine.view(value.shape), other, value, mine.dtype)


def test_sets_that_are_all_empty_are_the_dense_call(place):
    backend, device = place
    (x, w, _), targets, _ = problem()
    none = (torch.zeros(0, dtype=torch.int64, device=device), torch.zeros(N + 1, dtype=torch.int64))
    x, w, targets = x.to(device), w.to(device), targets.to(device)
    expected = linear_logprobs(x, w, targets, backend=backend)
    assert same_bits(linear_logprobs(x, w, targets, kept=none, backend=backend), expected)
    logits = torch.randn(N, V, device=device)
    expected = token_logprobs(logits, targets, backend=backend)
    assert same_bits(token_logprobs(logits, targets, kept=none, backend=backend), expected)


@pytest.mark.parametrize("op", ["token", "linear"])
def test_a_target_outside_its_set(place, op):
    """Log-prob -inf without a gradient; the entropy of the set stays, and its gradient."""
    backend, device = place
    (x, w, b), targets, sets = problem()
    outside = [4, 9]
    for row in outside:
        sets[row].remove(int(targets[row]))
    ids, offsets = (tensor.to(device) for tensor in in_csr(sets))
    x, w, b, y = *on(device, x, w, b), targets.to(device)
    logits = (x @ w.T + b).detach().requires_grad_()
    leaf, call = {
        "token": (logits, lambda: token_logprobs(logits, y, **options)),
        "linear": (x, lambda: linear_logprobs(x, w, y, bias=b, **options)),
    }[op]
    options = {"kept": (ids, offsets), "return_entropy": True, "backend": backend}
    logp, entropy = call()
    assert (logp[outside] == -torch.inf).all() and logp[targets == IGNORED].eq(0).all()
    _, expected, _ = of_sets(logits.detach().double().cpu(), sets, targets)
    torch.testing.assert_close(entropy.double().cpu(), expected, rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad(logp, leaf, torch.full_like(logp, torch.inf), retain_graph=True)
    assert grad[outside].eq(0).all()
    (grad,) = torch.autograd.grad(entropy.sum(), leaf)
    assert grad[outside].abs().amax(-1).gt(0).all()


@pytest.mark.parametrize("op", ["token", "linear"])
def test_an_id_that_is_there_twice_counts_once(place, op):
    backend, device = place
    (x, w, b), targets, sets = problem()
    twice = [ids + ids[::-2] for ids in sets]
    found = []
    for given in (sets, twice):
        y, kept = targets.to(device), [tensor.to(device) for tensor in in_csr(given)]
        leaves = on(device, x, w, b)
        if op == "token":
            leaves = [(leaves[0] @ leaves[1].T + leaves[2]).detach().requires_grad_()]
            result = token_logprobs(leaves[0], y, kept=kept, return_entropy=True, backend=backend)
        else:
            result = linear_logprobs(
                *leaves[:2], y, bias=leaves[2], kept=kept, return_entropy=True, backend=backend
            )
        found.append(results_and_gradients(*result, leaves))
    for once, again in zip(*found, strict=True):
        torch.testing.assert_close(once, again, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("op", ["token", "linear"])
def test_a_row_without_a_distribution_is_nan_alone(place, op):
    """With ids that are there twice, too: what takes no part in one row belongs to no other."""
    backend, device = place
    (x, w, b), targets, sets = problem()
    broken, y = 5, targets.to(device)
    kept = [tensor.to(device) for tensor in in_csr([ids + ids[::-2] for ids in sets])]
    leaves = on(device, x, w, b) if op == "linear" else on(device, (x @ w.T + b).detach().requires_grad_())
    leaves[0].detach()[broken] = torch.nan
    if op == "token":
        found = token_logprobs(*leaves, y, kept=kept, return_entropy=True, backend=backend)
    else:
        found = linear_logprobs(
            *leaves[:2], y, bias=leaves[2], kept=kept, return_entropy=True, backend=backend
        )
    logp, entropy, grad, *of_head = results_and_gradients(*found, leaves)
    others = torch.arange(N) != broken
    for value in (logp, entropy, grad):
        assert value[others].isfinite().all()
    assert logp[broken].isnan() and entropy[broken].isnan()
    if backend != "reference":  # which multiplies the rows of the head by all hidden states
        apart = torch.ones(V, dtype=torch.bool).index_fill(0, torch.tensor(sets[broken]), False)
        assert all(value[apart].isfinite().all() for value in of_head)


@pytest.mark.parametrize("op", ["token", "linear"])
def test_the_ignored_index_may_be_a_member(place, op):
    """A target outside its set has the entropy of its set, also where that holds ``ignore_index``."""
    backend, device = place
    (x, w, b), targets, sets = problem()
    ignored, row = 3, 9
    targets = torch.where(targets == IGNORED, ignored, torch.where(targets == ignored, 4, targets))
    sets = sets_around(targets, LENGTHS, V)
    outside = next(v for v in range(V) if v not in (*sets[row], ignored))
    targets[row], sets[row] = outside, [ignored, *(v for v in sets[row] if v != ignored)]
    y, kept = targets.to(device), [tensor.to(device) for tensor in in_csr(sets)]
    options = {"kept": kept, "ignore_index": ignored, "return_entropy": True, "backend": backend}
    x, w, b = (value.detach().to(device) for value in (x, w, b))
    logits = x @ w.T + b
    if op == "token":
        logp, entropy = token_logprobs(logits, y, **options)
    else:
        logp, entropy = linear_logprobs(x, w, y, bias=b, **options)
    _, expected, _ = of_sets(logits.double().cpu(), sets, targets.masked_fill(targets == ignored, IGNORED))
    assert logp[row] == -torch.inf
    torch.testing.assert_close(entropy.double().cpu(), expected, rtol=1e-5, atol=1e-5)


def test_debug_checks_name_what_is_outside_or_twice():
    (x, w, _), targets, sets = problem()
    r1kernels.debug_checks(True)
    try:
        linear_logprobs(x, w, targets, kept=in_csr(sets))
        with pytest.raises(
            ValueError, match=rf"kept ids.*got {sets[3][1]} again at position \d+, for token 3"
        ):
            linear_logprobs(x, w, targets, kept=in_csr([*sets[:3], sets[3] + [sets[3][1]], *sets[4:]]))
        sets[4].remove(int(targets[4]))
        with pytest.raises(ValueError, match=f"targets.*got {int(targets[4])} at position 4"):
            token_logprobs(torch.randn(N, V), targets, kept=in_csr(sets))
    finally:
        r1kernels.debug_checks(False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids, offsets: (ids, offsets[:-1]), r"offsets: expected shape \(13\), got \(12,\)"),
        (lambda ids, offsets: (ids, offsets.flip(0)), r"offsets: expected the first entry 0 and the last"),
        (lambda ids, offsets: (ids[:-1], offsets), r"the first entry 0 and the last \d+, got 0 and \d+"),
        (
            lambda ids, offsets: (ids, offsets.index_fill(0, torch.tensor([5]), 0)),
            r"entries that never fall, got 0 at 5 after 20",
        ),
        (
            lambda ids, offsets: (ids.index_fill(0, torch.tensor([7]), V), offsets),
            rf"ids: expected values in \[0, {V}\), got {V} at position 7",
        ),
        (lambda ids, offsets: (ids.index_fill(0, torch.tensor([7]), -1), offsets), r"got -1 at position 7"),
    ],
)
def test_broken_sets_are_clear_errors(change, message):
    (x, w, _), targets, sets = problem()
    kept = change(*in_csr(sets))
    calls = (
        lambda: token_logprobs(torch.randn(N, V), targets, kept=kept),
        lambda: linear_logprobs(x, w, targets, kept=kept),
        lambda: grouped_logprobs(
            torch.randn(2, 6, V), targets.view(2, 6).clamp(min=0), group_size=1, kept=kept
        ),
    )
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()


def test_other_types_are_clear_errors():
    (x, w, _), targets, sets = problem()
    ids, offsets = in_csr(sets)
    for kept, message in (
        (ids, "kept: expected a pair"),
        ((ids.float(), offsets), "kept ids: expected dtype int32 or int64"),
        ((ids, offsets.short()), "kept offsets: expected dtype int32 or int64"),
    ):
        with pytest.raises(TypeError, match=message):
            linear_logprobs(x, w, targets, kept=kept)
    with pytest.raises(ValueError, match="inplace_backward: expected False together with kept"):
        token_logprobs(torch.randn(N, V), targets, kept=(ids, offsets), inplace_backward=True)


def test_what_is_ignored_may_hold_anything(place):
    backend, device = place
    (x, w, b), targets, sets = problem()
    x.detach()[targets == IGNORED] = torch.nan
    inputs, y = on(device, x, w, b), targets.to(device)
    kept = [tensor.to(device) for tensor in in_csr(sets)]
    found = linear_logprobs(*inputs[:2], y, bias=inputs[2], kept=kept, return_entropy=True, backend=backend)
    for value in results_and_gradients(*found, inputs):
        assert value.isfinite().all()


def test_a_masked_vocabulary_within_a_set(place):
    backend, device = place
    _, targets, sets = problem()
    logits = torch.randn(N, V)
    inside = [row for row in (4, 5, 6) if len(sets[row]) > 3]
    for row in inside:
        logits[row, [v for v in sets[row] if v != targets[row]][:2]] = -torch.inf
    logits[8, sets[8]] = -torch.inf  # nothing is left
    logits[9, targets[9]] = -torch.inf
    z = logits.to(device).requires_grad_()
    kept = [tensor.to(device) for tensor in in_csr(sets)]
    logp, entropy = token_logprobs(z, targets.to(device), kept=kept, return_entropy=True, backend=backend)
    assert logp[8].isnan() and logp[9] == -torch.inf
    expected, of_entropy, _ = of_sets(logits.double(), sets, targets)
    others = torch.tensor([row for row in range(N) if row not in (8, 9)])
    torch.testing.assert_close(logp.cpu().double()[others], expected[others], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.cpu().double()[inside], of_entropy[inside], rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad(logp[others].sum(), z)
    assert grad[others].isfinite().all()


@pytest.mark.parametrize("lead", [20.0, 30.0])
def test_a_leading_logit_keeps_its_digits(place, lead):
    """Against the textbook formulas in 60 digits, over the set alone: outside of it an even larger logit leads."""
    backend, device = place
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 40, generator=generator)
    logits[0, 3], logits[0, 30] = lead, 2 * lead
    ids, targets = [17, 3, 5, 22], torch.tensor([3])
    z = logits.to(device).requires_grad_()
    kept = [tensor.to(device) for tensor in in_csr([ids])]
    logp, entropy = token_logprobs(z, targets.to(device), kept=kept, return_entropy=True, backend=backend)
    mine = logits[0, ids].tolist()
    exact_logp, exact_entropy = logprob_oracle.row(mine, 1)
    assert logp.item() == pytest.approx(exact_logp, rel=3e-6)
    assert entropy.item() == pytest.approx(exact_entropy, rel=3e-6)
    (grad,) = torch.autograd.grad(logp.sum() + entropy.sum(), z)
    wanted = logprob_oracle.gradient(mine, 1, 1.0, 1.0)
    assert grad[0, ids].tolist() == pytest.approx(wanted, rel=1e-5)
    # through a head whose hidden state is one number
    x, w = torch.ones(1, 1, device=device, requires_grad=True), logits.t().contiguous().to(device)
    logp, entropy = linear_logprobs(
        x, w.requires_grad_(), targets.to(device), kept=kept, return_entropy=True, backend=backend
    )
    assert logp.item() == pytest.approx(exact_logp, rel=3e-6)
    assert entropy.item() == pytest.approx(exact_entropy, rel=3e-6)
    (grad,) = torch.autograd.grad(logp.sum() + entropy.sum(), w)
    assert grad[ids, 0].tolist() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("reduce", ["sum", "mean", "none"])
@pytest.mark.parametrize("packed", [False, True])
def test_completions(place, reduce, packed):
    """Against token log-probs of the same call, summed up by torch; masked tokens have sets too."""
    backend, device = place
    (x, w, b), targets, sets = problem()
    counted = targets != IGNORED
    x, w, b = on(device, x, w, b)
    y, kept = targets.to(device), [tensor.to(device) for tensor in in_csr(sets)]
    token = linear_logprobs(x, w, y, bias=b, kept=kept, return_entropy=True, backend=backend)
    shape, how = (4, 3), {"mask": counted.view(4, 3).to(device)}
    if packed:
        bounds = torch.tensor([0, 2, 2, 7, N], device=device)
        shape, how = (N,), {"cu_seqlens": bounds}
        counted = torch.ones(N, dtype=torch.bool)
        y = torch.where(y == IGNORED, torch.tensor([s[0] if s else 1 for s in sets], device=device), y)
        token = linear_logprobs(x, w, y, bias=b, kept=kept, return_entropy=True, backend=backend)
    options = {"group_size": 2, "reduce": reduce, "return_entropy": True, "kept": kept, "backend": backend}
    logits = (x @ w.T + b).view(*shape, V)
    for found in (
        linear_grouped_logprobs(x.view(*shape, H), w, y.view(shape), bias=b, **how, **options),
        grouped_logprobs(logits, y.view(shape), **how, **options),
    ):
        expected = []
        for values in token:
            if reduce == "none":
                expected.append(values.view(shape))
                continue
            pieces = values.split(bounds.diff().tolist()) if packed else values.view(shape).unbind(0)
            sums = torch.stack([piece.sum() for piece in pieces])
            counts = found.counts.flatten().clamp(min=1)
            expected.append((sums / counts if reduce == "mean" else sums).view(2, 2))
        for mine, other in zip((found.logp, found.entropy), expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
            upstream = torch.linspace(-1, 1, mine.numel(), device=device).view(mine.shape)
            grads = [
                torch.autograd.grad((values * upstream).sum(), (x, w, b), retain_graph=True)
                for values in (mine, other)
            ]
            for grad, wanted in zip(*grads, strict=True):
                torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trained", [(True, False, False), (False, True, False), (False, False, True)])
def test_what_is_frozen_costs_no_gradient(place, trained):
    backend, device = place
    leaves, targets, sets = problem()
    y, kept = targets.to(device), [tensor.to(device) for tensor in in_csr(sets)]
    grads = []
    for needs in (trained, (True, True, True)):
        inputs = [x.detach().to(device).requires_grad_(need) for x, need in zip(leaves, needs, strict=True)]
        logp = linear_logprobs(*inputs[:2], y, bias=inputs[2], kept=kept, backend=backend)
        logp.sum().backward()
        grads.append([x.grad for x in inputs])
    for need, alone, together in zip(trained, *grads, strict=True):
        assert (alone is not None) == need
        if need:
            torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-6)


def test_float64_is_served_by_the_reference():
    leaves, targets, sets = problem(torch.float64)
    logp, entropy = linear_logprobs(
        *leaves[:2], targets, bias=leaves[2], kept=in_csr(sets), return_entropy=True
    )
    ours = results_and_gradients(logp, entropy, leaves)
    for mine, value in zip(ours, exact(leaves, targets, sets, {})[0], strict=True):
        torch.testing.assert_close(mine, value, rtol=1e-11, atol=1e-11)


def test_it_compiles_in_one_graph(place):
    backend, device = place
    leaves, targets, sets = problem()
    x, w, b = on(device, *leaves)
    kept = [tensor.to(device) for tensor in in_csr(sets)]
    logits = torch.randn(N, V, device=device, requires_grad=True)

    def head(x, w, b, y, ids, offsets):
        return linear_logprobs(x, w, y, bias=b, kept=(ids, offsets), return_entropy=True, backend=backend)

    def tokens(z, y, ids, offsets):
        return token_logprobs(z, y, kept=(ids, offsets), return_entropy=True, backend=backend)

    both = ((head, (x, w, b)), (tokens, (logits,)))
    for function, inputs in both if backend != "reference" else both[1:]:
        others = (targets.to(device), *kept)
        plain = results_and_gradients(*function(*inputs, *others), inputs)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        found = results_and_gradients(*compiled(*inputs, *others), inputs)
        for mine, other in zip(found, plain, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_lengths_do_not_recompile(place):
    backend, device = place
    (x, w, _), targets, sets = problem()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def function(x, w, y, ids, offsets):
        return linear_logprobs(x, w, y, kept=(ids, offsets), backend=backend)

    compiled = torch.compile(function, fullgraph=True, backend=count)
    for tokens in (N, 7, 4):
        kept = [tensor.to(device) for tensor in in_csr(sets[:tokens])]
        call = (*on(device, x[:tokens], w), targets[:tokens].clone().to(device), *kept)
        for of_tokens in (call[0], *call[2:]):
            torch._dynamo.mark_dynamic(of_tokens, 0)
        torch.testing.assert_close(compiled(*call), function(*call))
    assert len(graphs) == 1


@pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))
class TestOnTheCpu:
    def test_no_token_multiplies_the_whole_head(self):
        """Ignored tokens with an empty set, as those of a prompt, do not either."""
        leaves, targets, sets = problem()
        for row, ids in enumerate(sets):
            if not ids:
                targets[row] = IGNORED
        with torch.profiler.profile() as profile:
            logp = linear_logprobs(*leaves[:2], targets, bias=leaves[2], kept=in_csr(sets), backend="cpu")
            logp.sum().backward()
        names = {event.name for event in profile.events()}
        assert "r1kernels::kept_products_cpu" in names and "r1kernels::kept_products_cpu_backward" in names
        assert not names & {
            "aten::mm",
            "aten::addmm",
            "r1kernels::linear_logprobs_cpu",
            "r1kernels::gemm_bf16_cpu",
        }

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_bits_depend_on_no_other_token_and_no_thread(self, dtype):
        lengths = [1 + 7 * n % 40 for n in range(61)]
        leaves, targets, sets = problem(dtype, lengths)

        def run(tokens, threads=1):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                x, w, b = (leaf.detach().clone().requires_grad_() for leaf in leaves)
                logp, entropy = linear_logprobs(
                    x[tokens],
                    w,
                    targets[tokens],
                    bias=b,
                    kept=in_csr([sets[n] for n in tokens.tolist()]),
                    return_entropy=True,
                    backend="cpu",
                )
                return results_and_gradients(logp, entropy, (x, w, b))
            finally:
                torch.set_num_threads(before)

        everything = run(torch.arange(61))
        for other in (run(torch.arange(61), threads=2), run(torch.arange(61), threads=3)):
            assert all(same_bits(mine, value) for mine, value in zip(other, everything, strict=True))
        order = torch.randperm(61, generator=torch.Generator().manual_seed(0))
        turned = run(order)
        assert same_bits(turned[0], everything[0][order]) and same_bits(turned[1], everything[1][order])
        alone = run(torch.tensor([17]))
        assert same_bits(alone[0], everything[0][17:18]) and same_bits(alone[1], everything[1][17:18])

    def test_a_compiled_graph_looks_at_the_sets(self):
        (x, w, _), targets, sets = problem()
        ids, offsets = in_csr(sets)
        compiled = torch.compile(
            lambda *kept: linear_logprobs(x, w, targets, kept=kept, backend="cpu"),
            fullgraph=True,
            backend="aot_eager",
        )
        with pytest.raises(RuntimeError, match=r"kept ids: expected values in \[0, 67\)"):
            compiled(ids.index_fill(0, torch.tensor([3]), V), offsets)
