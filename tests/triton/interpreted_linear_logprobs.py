"""linear_logprobs on Triton in Triton's interpreter: the forward that writes no tile, the tile loop, completions.

Run by test_interpreter.py. N tokens, V vocabulary, H hidden, G completions a prompt.
"""

import math

import pytest
import torch

import r1kernels
from r1kernels import linear_grouped_logprobs, linear_logprobs
from r1kernels.logprob import parts, tiles, token, tuning
from r1kernels.logprob import triton_linear as backend
from r1kernels.logprob.linear import STATS
from tests.support import interpreter_bfloat16
from tests.support import logprob_oracle as oracle
from tests.support.numerics import assert_as_exact_as, same_bits
from tests.support.redzones import Redzones
from tests.support.row_ops_kernel import rows_of

interpreter_bfloat16.repair()

IGNORED = -100
DTYPES = (torch.bfloat16, torch.float16)
POINTERS = tuning.Tile(16, 32, 16, group=2, warps=4, stages=2, descriptors=False)
DESCRIPTORS = POINTERS._replace(descriptors=True)
WIDE = DESCRIPTORS._replace(columns=256)
LINEAR = torch.ops.r1kernels.linear_logprobs_triton
LINEAR_BACKWARD = torch.ops.r1kernels.linear_logprobs_triton_backward
KERNEL = {"backend": "triton", "batch_invariant": True}  # never by tiles, whatever H is
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"logit_scale": -0.5},
    "softcap": {"softcap": 3.0},
    "all": {"bias": True, "logit_scale": 0.7, "softcap": 4.0},
}


TILES = {"pointers": POINTERS, "descriptors": DESCRIPTORS, "wide": WIDE}


@pytest.fixture(params=TILES)
def tile(request, monkeypatch):
    """Small tiles, so that a small call has many; and one so wide that its terms are folded."""
    found = TILES[request.param]
    monkeypatch.setattr(tuning, "linear_forward", lambda device, kind, tokens: found)
    return found


def random_case(tokens, vocabulary, width, dtype=torch.bfloat16, scale=1.0):
    """(hidden, weight, targets)"""
    generator = torch.Generator().manual_seed(tokens + 1000 * vocabulary + width)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype)
    weight = (scale * torch.randn(vocabulary, width, generator=generator)).to(dtype)
    return hidden, weight, torch.randint(0, vocabulary, (tokens,), generator=generator)


def head_of(name, vocabulary, dtype):
    head = dict(HEADS[name])
    if head.pop("bias", False):
        head["bias"] = torch.randn(vocabulary, generator=torch.Generator().manual_seed(5)).to(dtype)
    return head


def exact_logits(hidden, weight, bias=None, logit_scale=1.0, softcap=None):
    z = hidden.double() @ weight.double().T
    z = logit_scale * (z if bias is None else z + bias.double())
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def kernel_and_reference(hidden, weight, targets, **options):
    return (
        linear_logprobs(hidden, weight, targets, **how, **options)
        for how in (KERNEL, {"backend": "reference"})
    )


@pytest.mark.parametrize("how", [{"batch_invariant": True}, {"save_logits": True}], ids=str)
def test_several_targets_a_token(how):
    """By tiles in every case: log-probs, entropy, a divergence from two ids, gradients; an ignored target, one that is there twice, a token without any."""
    hidden, weight, _ = random_case(6, 150, 16, torch.float32)
    targets = torch.tensor([[3, 9, 149], [7, 7, -100], [-100, -100, -100], [0, 1, 2], [80, 81, 5], [9, 3, 1]])
    found = []
    for options in (how | {"backend": "triton"}, {"backend": "reference"}):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        logp, entropy = linear_logprobs(*leaves, targets, return_entropy=True, **options)
        of_logits = r1kernels.token_logprobs(
            leaves[0] @ leaves[1].T, targets, temperature=0.8, backend=options["backend"]
        )
        teacher = torch.tensor([[3, 9]] * 6), torch.tensor([[-0.5, -2.0]] * 6)
        divergence = r1kernels.linear_topk_divergence(
            *leaves, *teacher, kind="jsd", backend=options["backend"]
        )
        loss = logp[:, 0].sum() - logp[:, 1].sum() + entropy.sum() + of_logits[:, 2].sum() + divergence.sum()
        found.append((logp, entropy, of_logits, divergence, *torch.autograd.grad(loss, leaves)))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


class TestForwardWithoutATile:
    @pytest.mark.parametrize(
        ("tile", "head", "dtype"),
        [
            ("pointers", "plain", torch.bfloat16),
            ("descriptors", "plain", torch.float16),
            ("wide", "plain", torch.bfloat16),
            ("descriptors", "bias", torch.bfloat16),
            ("pointers", "scale", torch.bfloat16),
            ("wide", "softcap", torch.bfloat16),
            ("pointers", "all", torch.float16),
            ("descriptors", "all", torch.bfloat16),
            ("wide", "all", torch.bfloat16),
        ],
        ids=str,
        indirect=["tile"],
    )
    def test_as_exact_as_eager(self, tile, head, dtype):
        """Against float64, with eager's logits in the dtype of the inputs as the peer."""
        hidden, weight, targets = random_case(19, 107, 40, dtype, scale=0.4)
        head = head_of(head, 107, dtype)
        logp, entropy = linear_logprobs(
            hidden, weight, targets, temperature=0.8, return_entropy=True, **KERNEL, **head
        )
        wide = {name: value.double() if name == "bias" else value for name, value in head.items()}
        truth = torch.log_softmax(exact_logits(hidden, weight, **wide) / 0.8, dim=-1)
        given = {name: value.float() if name == "bias" else value for name, value in head.items()}
        peer = torch.log_softmax(exact_logits(hidden, weight, **given).to(dtype).float() / 0.8, dim=-1)
        for ours, compute in ((logp, chosen(targets)), (entropy, entropy_of)):
            assert_as_exact_as(ours, compute(peer), compute(truth), torch.float32)

    @pytest.mark.parametrize(
        "shape", [(1, 1, 8), (1, 3, 1), (17, 33, 15), (33, 64, 48), (2, 131, 17)], ids=str
    )
    def test_odd_shapes(self, tile, shape):
        hidden, weight, targets = random_case(*shape)
        ours, expected = kernel_and_reference(hidden, weight, targets, return_entropy=True)
        for one, other in zip(ours, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6)

    @pytest.mark.parametrize("lead", [20.0, 30.0])
    def test_nothing_cancels_where_one_logit_leads(self, tile, lead):
        """Hidden states of one number, so that the logits are those numbers exactly."""
        column = torch.arange(100).remainder(13).float() / 8
        column[77] = column.max() + lead
        weight = column.bfloat16().unsqueeze(-1)
        assert torch.equal(weight.float().squeeze(-1), column)
        targets = torch.tensor([77, 3])
        hidden = torch.ones(2, 1, dtype=torch.bfloat16)
        logp, entropy = linear_logprobs(hidden, weight, targets, return_entropy=True, **KERNEL)
        exact_logp, exact_entropy = oracle.rows(column.expand(2, -1), targets)
        torch.testing.assert_close(logp.double(), exact_logp, rtol=2e-5, atol=0)
        torch.testing.assert_close(entropy.double(), exact_entropy, rtol=2e-5, atol=0)
        assert (logp <= 0).all() and (entropy >= 0).all()

    def test_minus_infinity_nan_and_infinity(self, tile):
        """A bias of -inf masks: exact results, also where it fills the first tiles; NaN and inf stay in their rows."""
        hidden, weight, targets = random_case(6, 150, 16)
        bias = torch.zeros(150, dtype=torch.bfloat16)
        bias[:70] = -math.inf
        targets[:] = torch.tensor([80, 149, 5, 100, 110, 120])
        hidden[4, 3], hidden[5, 3] = math.nan, math.inf
        logp, entropy = linear_logprobs(hidden, weight, targets, bias=bias, return_entropy=True, **KERNEL)
        truth = torch.log_softmax((hidden[:4].double() @ weight.double().T)[:, 70:], dim=-1)
        rows = torch.tensor([0, 1, 3])
        torch.testing.assert_close(
            logp[rows].double(), chosen(targets[rows] - 70)(truth[rows]), rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(entropy[:4].double(), entropy_of(truth), rtol=1e-5, atol=1e-5)
        assert logp[2] == -math.inf
        assert logp[4:].isnan().all() and entropy[4:].isnan().all()
        everything = torch.full_like(bias, -math.inf)
        logp, entropy = linear_logprobs(
            hidden, weight, targets, bias=everything, return_entropy=True, **KERNEL
        )
        assert logp.isnan().all() and entropy.isnan().all()

    def test_ignored_targets_and_temperatures_of_tokens(self, tile):
        hidden, weight, targets = random_case(20, 100, 24)
        targets[3] = targets[19] = IGNORED
        hidden[3] = math.nan
        options = {"temperature": torch.linspace(0.3, 2.0, 20), "return_entropy": True, "stats": STATS}
        ours, expected = kernel_and_reference(hidden, weight, targets, **options)
        for one, other in zip(ours[:2], expected[:2], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6)
            assert (one[[3, 19]] == 0).all()
        for name in STATS:
            torch.testing.assert_close(ours[2][name], expected[2][name], rtol=1e-5, atol=2e-6)
            assert (ours[2][name][[3, 19]] == 0).all()

    def test_of_equal_logits_the_first_is_top(self, tile):
        """In one quarter of a tile, in different quarters and in different tiles of 32 columns."""
        for places in ((3, 5), (3, 20), (3, 70), (31, 32)):
            weight = torch.zeros(100, 8, dtype=torch.bfloat16)
            weight[list(places)] = 1.0
            hidden = torch.ones(3, 8, dtype=torch.bfloat16)
            targets = torch.tensor([*places, 0])
            _, stats = linear_logprobs(hidden, weight, targets, stats=("is_top1",), **KERNEL)
            assert stats["is_top1"].tolist() == [True, False, False]

    def test_a_target_out_of_range_or_a_bad_temperature_is_nan(self, tile):
        """What the op does on a GPU, where no one looks at the values."""
        hidden, weight, targets = random_case(5, 90, 16)
        clean = forward(hidden, weight, rows_of(weight.T, targets), tile)
        targets[1], targets[2] = 90, -5
        bad = forward(hidden, weight, rows_of(weight.T, targets), tile)
        for one, other in zip(bad[:2], clean[:2], strict=True):
            assert one.isnan().tolist() == [False, True, True, False, False]
            assert same_bits(one[[0, 3, 4]], other[[0, 3, 4]])
        temperatures = torch.tensor([1.0, 0.0, 1.0, math.nan, 1.0])
        targets[1], targets[2] = 0, 0
        bad = forward(hidden, weight, rows_of(weight.T, targets, temperatures=temperatures), tile)
        for result in bad[:2]:
            assert result.isnan().tolist() == [False, True, False, True, False]

    def test_a_slab_gives_its_part(self, tile):
        hidden, weight, targets = random_case(9, 120, 16)
        targets[4] = IGNORED
        z = exact_logits(hidden, weight)
        rows = rows_of(weight.T, targets, temperature=0.5)
        part = forward(hidden, weight[40:100], rows._replace(first=40), tile)
        inside = (targets >= 40) & (targets < 100)
        expected = torch.where(
            inside, z.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1), torch.nan
        )
        expected[4] = 0.0
        torch.testing.assert_close(part[0].double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)
        assert part[1].shape == (0,)
        largest = z[:, 40:100].amax(-1)
        others = ((z[:, 40:100] - largest.unsqueeze(-1)) / 0.5).exp().sum(-1) - 1
        kept = targets != IGNORED
        torch.testing.assert_close(part[2][0, kept].double(), largest[kept], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(part[2][1, kept].double(), others[kept], rtol=1e-4, atol=1e-5)

    def test_nothing_outside_the_tensors_is_read_or_written(self, tile):
        """Inputs stand between NaN: rows of a wider matrix, and columns past the end of a tile."""
        hidden, weight, targets = random_case(18, 45, 24)
        zones = Redzones()
        wide = {"layout": lambda buffer: buffer[:, :24], "shape": (18, 40)}
        fenced = (zones.input(hidden, **wide), zones.input(weight), zones.input(targets))
        outputs = (zones.output(18), zones.output(18), zones.output(3, 18), zones.output(3, 18))
        rows = rows_of(weight.T, fenced[2])
        backend.forward_into(*fenced[:2], rows, True, tile, *outputs)
        zones.check()
        assert all(output.isfinite().all() for output in outputs)
        plain = forward(hidden, weight, rows_of(weight.T, targets), tile, extra=True)
        for fenced_result, result in zip(outputs, plain, strict=True):
            assert same_bits(fenced_result, result)

    def test_no_tokens(self, tile):
        hidden, weight, targets = random_case(0, 20, 8)
        logp, entropy = linear_logprobs(hidden, weight, targets, return_entropy=True, **KERNEL)
        assert logp.shape == entropy.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_batch_invariance_by_bytes(dtype):
    """The same bits for any N, order, chunk size and layout, with and without a gradient, twice.

    Small integers, whose products are exact in any order: the library that multiplies for the interpreter promises none.
    """
    hidden, weight, targets = random_case(70, 300, 24, dtype)
    hidden, weight = hidden.round(), weight.round()
    options = {"return_entropy": True, "batch_invariant": True, "backend": "triton"}
    together = linear_logprobs(hidden, weight, targets, **options)
    again = linear_logprobs(hidden, weight, targets, chunk_size=7, **options)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(0))
    shuffled = linear_logprobs(hidden[order], weight, targets[order], **options)
    wide = torch.zeros(70, 31, dtype=dtype)
    wide[:, 3:27] = hidden
    strided = linear_logprobs(wide[:, 3:27], weight, targets, **options)
    leaf = hidden.clone().requires_grad_()
    differentiable = linear_logprobs(leaf, weight, targets, **options)
    few = linear_logprobs(hidden[30:33], weight, targets[30:33], **options)
    for index in (0, 1):
        assert same_bits(together[index], again[index])
        assert same_bits(together[index][order], shuffled[index])
        assert same_bits(together[index], strided[index])
        assert same_bits(together[index], differentiable[index].detach())
        assert same_bits(together[index][30:33], few[index])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("save_logits", [True, False])
def test_gradients_of_the_tile_loop(monkeypatch, save_logits, dtype):
    """Several slabs and blocks; against the reference, which accumulates in float32 too."""
    monkeypatch.setattr(tiles, "tiling_of", lambda *unused: tiles.Tiling(4, 64, 0))
    hidden, weight, targets = random_case(6, 100, 16, dtype)
    targets[2] = IGNORED
    bias = torch.randn(100, generator=torch.Generator().manual_seed(2)).to(dtype)
    results = []
    for name in ("triton", "reference"):
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
        logp, entropy = linear_logprobs(
            leaves[0],
            leaves[1],
            targets,
            bias=leaves[2],
            softcap=6.0,
            logit_scale=0.8,
            temperature=0.9,
            return_entropy=True,
            save_logits=save_logits,
            backend=name,
        )
        gradients = torch.autograd.grad((logp + 0.3 * entropy).sum(), leaves)
        results.append((logp.detach(), entropy.detach(), *gradients))
    for ours, expected in zip(*results, strict=True):
        assert ours.dtype == expected.dtype
        allowed = 2.0**-7 if ours.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(ours, expected, rtol=allowed, atol=allowed * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("columns", [64, 100], ids=["slabs", "whole"])
def test_a_frozen_head(monkeypatch, columns, dtype):
    """The slope from the forward, against the gradient that the reference computes."""
    monkeypatch.setattr(tiles, "tiling_of", lambda *unused: tiles.Tiling(4, columns, 0))
    hidden, weight, targets = random_case(6, 100, 16, dtype)
    targets[2] = IGNORED
    results = []
    for name in ("triton", "reference"):
        x = hidden.clone().requires_grad_()
        options = {"softcap": 6.0, "logit_scale": 0.8, "temperature": 0.9, "backend": name}
        logp = linear_logprobs(x, weight, targets, **options)
        results.append((logp.detach(), torch.autograd.grad((logp * torch.arange(6)).sum(), x)[0]))
    for ours, expected in zip(*results, strict=True):
        allowed = 2.0**-7 if ours.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(ours, expected, rtol=allowed, atol=allowed * float(expected.abs().max()))


def test_the_ranks_of_a_sharded_vocabulary_add_up_to_the_whole():
    """The ops as each rank calls them: sums of its columns, merged, then its gradients from the merged sums."""
    hidden, weight, targets = random_case(11, 150, 16)
    targets[2] = IGNORED
    rows = rows_of(weight.T, targets, temperature=0.9, softcap=6.0)
    shards = [slice(0, 40), slice(40, 150)]
    options = (True, False, 0, False, False)
    found = [LINEAR(hidden, weight[shard], *rows._replace(first=shard.start), *options) for shard in shards]
    pieces = [parts.Part(logp, stats, extra) for logp, _, stats, extra, _ in found]
    logp, entropy, stats, _ = parts.finish(parts.merge(pieces, [0, 40], 150, rows), rows, True)
    upstream = (torch.ones(11), torch.full((11,), 0.3), None)
    needs = (True, True, False)
    gradients = [
        LINEAR_BACKWARD(
            hidden, weight[shard], *rows._replace(first=shard.start), 0, logp, stats, *upstream, *needs
        )
        for shard in shards
    ]
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    how = {"temperature": 0.9, "softcap": 6.0, "return_entropy": True, "backend": "reference"}
    expected = linear_logprobs(leaves[0], leaves[1], targets, **how)
    torch.testing.assert_close(logp, expected[0].detach(), rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(entropy, expected[1].detach(), rtol=1e-5, atol=2e-6)
    truth = torch.autograd.grad((expected[0] + 0.3 * expected[1]).sum(), leaves)
    grad_hidden = gradients[0][0] + gradients[1][0]
    assert grad_hidden.dtype == torch.float32, "a term of a sum is not rounded"
    grad_weight = torch.cat([grads[1] for grads in gradients])
    for ours, other in zip((grad_hidden.bfloat16(), grad_weight), truth, strict=True):
        torch.testing.assert_close(ours, other, rtol=2.0**-7, atol=2.0**-7 * float(other.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_of_a_float32_tile_in_16_bits(dtype):
    """The row kernel rounds once what it would have written in float32."""
    generator = torch.Generator().manual_seed(4)
    raw = torch.randn(5, 83, generator=generator)
    targets = torch.randint(0, 83, (5,), generator=generator)
    targets[3] = IGNORED
    rows = rows_of(raw, targets, softcap=4.0)
    call = token.RowsCall(raw.unsqueeze(0), rows, True, False)
    logp, _, stats, _ = token.FORWARD("triton", call)
    upstream = token.Upstream(logp, stats, torch.ones(5), torch.full((5,), 0.5), None)
    narrow = backend.gradient(backend.ENGINE, raw, rows, dtype, upstream)
    wide = backend.gradient(backend.ENGINE, raw.clone(), rows, torch.float32, upstream)
    assert narrow.dtype == dtype and same_bits(narrow.contiguous(), wide.to(dtype))


@pytest.mark.parametrize(("packed", "reduce"), [(False, "mean"), (True, "sum"), (True, "none")])
def test_completions(packed, reduce):
    """grouped and linear_grouped: values and gradients as the reference gives them."""
    hidden, weight, targets = random_case(12, 40, 8, torch.float32)
    lengths = torch.tensor([0, 3, 5, 5, 12])
    mask = torch.rand(4, 3, generator=torch.Generator().manual_seed(1)) < 0.7
    layout = {"cu_seqlens": lengths} if packed else {"mask": mask}
    shape = (12,) if packed else (4, 3)
    results = []
    for name in ("triton", "reference"):
        x, w = hidden.view(*shape, 8).clone().requires_grad_(), weight.clone().requires_grad_()
        options = {"group_size": 2, "reduce": reduce, "return_entropy": True, "backend": name, **layout}
        linear = linear_grouped_logprobs(x, w, targets.view(shape), temperature=0.7, **options)
        grouped = r1kernels.grouped_logprobs(x @ w.T, targets.view(shape), temperature=0.7, **options)
        loss = 0.0
        for result in (linear, grouped):
            factors = torch.arange(result.logp.numel()).view(result.logp.shape) + 1.0
            loss = loss + (factors * result.logp).sum() + (0.1 * factors * result.entropy).sum()
        gradients = torch.autograd.grad(loss, (x, w))
        results.append((linear.logp, linear.entropy, grouped.logp, grouped.entropy, *gradients))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_a_compiled_call_holds_the_ops():
    hidden, weight, targets = random_case(6, 40, 8, torch.float32)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]

    def loss(x, w, y):
        logp, entropy = linear_logprobs(x, w, y, return_entropy=True, backend="triton")
        return (logp + 0.1 * entropy).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(*leaves, targets), leaves)
    for ours, other in zip(torch.autograd.grad(compiled(*leaves, targets), leaves), expected, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-6, atol=1e-6)


def test_what_is_not_served_says_why():
    hidden, weight, targets = random_case(2, 5, 4, torch.float32)
    with pytest.raises(r1kernels.BackendError, match="hidden: float64 is served by the reference alone"):
        linear_logprobs(hidden.double(), weight.double(), targets, backend="triton")


def forward(hidden, weight, rows, tile, extra=False):
    results = token.row_results(hidden, hidden.shape[0], weight.shape[0], rows, True, extra)
    backend.forward_into(hidden, weight, rows, True, tile, *results)
    return results


def chosen(targets):
    return lambda log_probs: log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def entropy_of(log_probs):
    return -torch.where(log_probs > -math.inf, log_probs.exp() * log_probs, 0.0).sum(-1)


def test_a_frozen_head_keeps_the_digits_of_small_probabilities_in_float16():
    """The target leads by 14 nats: what the slope is made of are the probabilities of the others."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(40, 64, generator=generator).half()
    hidden, targets = (weight[:5] * 0.35).contiguous(), torch.arange(5)
    grads = []
    for dtype, name in ((torch.float16, "triton"), (torch.float64, "reference")):
        leaf = hidden.to(dtype).requires_grad_()
        logp = linear_logprobs(leaf, weight.to(dtype), targets, backend=name)
        grads.append(torch.autograd.grad((1e4 * logp).sum(), leaf)[0].double())
    assert logp.max() > -1e-4
    for ours, exact in zip(*grads, strict=True):
        assert (ours - exact).norm() < 1e-2 * exact.norm()
