"""topk_divergence and linear_topk_divergence on every backend. N tokens, H hidden, V vocabulary, K ids per token."""

from __future__ import annotations

import pytest
import torch

import r1kernels
from r1kernels import linear_divergence, linear_topk_divergence, topk_divergence
from tests.support import topk_oracle
from tests.support.numerics import CAP, same_bits

OP = "linear_topk_divergence"
KINDS = ("forward_kl", "reverse_kl", "jsd")
N, H, V, K = 9, 6, 67, 5
HEAD = {"softcap": 5.0, "logit_scale": 0.7}


def problem(device="cpu", dtype=torch.float32, tokens=N, hidden=H, vocabulary=V, count=K):
    """(hidden, weight, bias) leaves, ids and log-probs of a teacher; some padding, token 1 of padding alone."""
    generator = torch.Generator().manual_seed(0)
    sizes = (tokens, hidden), (vocabulary, hidden), (vocabulary,)
    leaves = [torch.randn(size, generator=generator).to(device, dtype).requires_grad_() for size in sizes]
    teacher = torch.log_softmax(2 * torch.randn(tokens, vocabulary, generator=generator), -1)
    logp, ids = teacher.topk(count)
    ids[::3, -1], ids[1] = -1, -100
    logp[ids < 0] = torch.nan
    return leaves, ids.to(device), logp.to(device)


def logits_of(leaves, softcap=None, logit_scale=1.0):
    logits = logit_scale * (leaves[0] @ leaves[1].T + leaves[2])
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def exact(leaves, ids, logp, upstream, head, **options):
    """(divergence, gradients of the leaves), the row of each token by the oracle and its logits by float64 autograd."""
    leaves = [leaf.detach().double().cpu().requires_grad_() for leaf in leaves]
    logits = logits_of(leaves, **head)
    temperature = options.pop("temperature", 1.0)
    if not isinstance(temperature, torch.Tensor):
        temperature = torch.full((len(ids),), float(temperature))
    found = [
        topk_oracle.rows(z[None], i[None], p[None], temperature=float(t), **options)
        for z, i, p, t in zip(logits.detach(), ids.cpu(), logp.cpu(), temperature, strict=True)
    ]
    values, slopes = (torch.cat(each) for each in zip(*found, strict=True))
    grads = torch.autograd.grad(logits, leaves, slopes * upstream.double().unsqueeze(1))
    return values, *grads


@pytest.mark.parametrize("tail", ["bucket", "ignore"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("head", "temperature", "how"),
    [
        ({}, 1.0, {}),
        (HEAD, 1.3, {"chunk_size": 4, "save_logits": False}),
        (HEAD, torch.linspace(0.5, 2, N), {"save_logits": True, "chunk_size": 2}),
    ],
    ids=["plain", "capped", "temperatures"],
)
def test_values_and_gradients(place, kind, tail, head, temperature, how):
    backend, device = place
    leaves, ids, logp = problem(device)
    options = {"kind": kind, "tail": tail, "beta": 0.3, "temperature": temperature}
    upstream = torch.linspace(-1, 1, N)
    wanted = exact(leaves, ids, logp, upstream, head, **options)
    on_device = options | {
        "temperature": temperature.to(device) if isinstance(temperature, torch.Tensor) else temperature,
        "backend": backend,
    }
    of_hidden = linear_topk_divergence(*leaves[:2], ids, logp, bias=leaves[2], **head, **how, **on_device)
    of_logits = topk_divergence(logits_of(leaves, **head), ids, logp, **on_device)
    for found in (of_hidden, of_logits):
        assert found.dtype == torch.float32 and found.shape == (N,) and found[1] == 0
        assert tail == "ignore" or (found >= 0).all()
        grads = torch.autograd.grad((found * upstream.to(device)).sum(), leaves)
        for mine, truth in zip((found.detach(), *grads), wanted, strict=True):
            scale = float(truth.abs().max())
            torch.testing.assert_close(mine.cpu().double(), truth, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lead", [0.0, 10.0, 20.0, 30.0])
@pytest.mark.parametrize("both_lead", [True, False])
def test_a_leading_logit_costs_no_digits(place, kind, lead, both_lead):
    """Student, and teacher or not, give one id all but e^-lead; ids and rest keep the digits of what is left."""
    backend, device = place
    generator = torch.Generator().manual_seed(1)
    logits, teacher = torch.randn(2, 2, 300, generator=generator)
    logits[:, 17] = logits.amax(1) + lead
    if both_lead:
        teacher[:, 17] = teacher.amax(1) + 0.9 * lead
    logp, ids = torch.log_softmax(teacher.double(), -1).topk(8)
    logp = logp.float()
    z = logits.to(device).requires_grad_()
    found = topk_divergence(z, ids.to(device), logp.to(device), kind=kind, backend=backend)
    (grad,) = torch.autograd.grad(found.sum(), z)
    value, slope = topk_oracle.rows(logits, ids, logp, kind)
    torch.testing.assert_close(found.detach().cpu().double(), value, rtol=1e-5, atol=1e-30)
    # what float32 logits and log-probs say of a probability near 1
    torch.testing.assert_close(grad.cpu().double(), slope, rtol=1e-4, atol=3e-6 * float(slope.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_0_where_the_two_agree_and_never_below(place, kind):
    backend, device = place
    generator = torch.Generator().manual_seed(2)
    logits = 4 * torch.randn(200, 300, generator=generator)
    logits[100:, 5] += 25
    logp, ids = torch.log_softmax(logits.double(), -1).topk(20)
    found = topk_divergence(
        logits.to(device), ids.to(device), logp.float().to(device), kind=kind, backend=backend
    )
    # where less than 2^-24 is left to the rest, the teacher's is that
    assert (found >= 0).all() and (found[:100] <= 1e-7).all() and (found <= 1e-6).all()
    noise = logits + 0.01 * torch.randn(logits.shape, generator=generator)
    near = topk_divergence(
        noise.to(device), ids.to(device), logp.float().to(device), kind=kind, backend=backend
    )
    assert (near >= 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_bucket_is_a_lower_bound_and_all_ids_are_the_whole_divergence(place, kind):
    backend, device = place
    generator = torch.Generator().manual_seed(3)
    sizes = (N, H), (V, H), (N, H), (V, H)
    x, w, of_teacher, teacher_w = (torch.randn(size, generator=generator).to(device) for size in sizes)
    whole = linear_divergence(x, w, of_teacher, teacher_w, kind=kind)
    before = torch.zeros(N, device=device)
    for count in (1, 5, 30, V):
        logp, ids = torch.log_softmax(of_teacher @ teacher_w.T, -1).topk(count)
        found = linear_topk_divergence(x, w, ids, logp, kind=kind, backend=backend)
        assert (found >= before - 1e-6).all() and (found <= whole + 1e-6).all()
        before = found
    torch.testing.assert_close(before, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_all_ids_leave_no_rest_however_they_are_rounded(place, kind, dtype):
    """The divergence from the stored probabilities over their sum, which in 16 bits is off by more than a rounding of float32."""
    backend, device = place
    logits, teacher = torch.randn(2, 20, V, generator=torch.Generator().manual_seed(6))
    logp, ids = torch.log_softmax(2 * teacher, -1).topk(V)
    logp = logp.to(dtype)
    found = topk_divergence(logits.to(device), ids.to(device), logp.to(device), kind=kind, backend=backend)
    p = logp.double().log_softmax(-1)
    q = logits.double().log_softmax(-1).gather(1, ids)
    mean = ((p.exp() + q.exp()) / 2).log()
    pairs = {"forward_kl": ((p, q, 1),), "reverse_kl": ((q, p, 1),), "jsd": ((p, mean, 0.5), (q, mean, 0.5))}
    exact = sum(share * (a.exp() * (a - b)).sum(-1) for a, b, share in pairs[kind])
    torch.testing.assert_close(found.cpu().double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_stored_log_probs_that_sum_to_more_than_1(place, kind):
    """Rounded to 16 bits, those of a peaked teacher sum to more than 1; the result is as of its probabilities over their sum."""
    backend, device = place
    logits = torch.randn(1, V, generator=torch.Generator().manual_seed(4))
    ids, logp = torch.tensor([[3, 9, 20]]), torch.tensor([[-1e-4, -6.0, -7.0]])
    z = logits.to(device).requires_grad_()
    found = topk_divergence(z, ids.to(device), logp.to(device), kind=kind, backend=backend)
    value, slope = topk_oracle.rows(logits, ids, logp, kind)
    torch.testing.assert_close(found.detach().cpu().double(), value, rtol=1e-5, atol=1e-7)
    (grad,) = torch.autograd.grad(found.sum(), z)
    torch.testing.assert_close(grad.cpu().double(), slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sum_over_the_ids_alone_can_be_negative(place, kind):
    backend, device = place
    logits = torch.zeros(1, 4, device=device)
    logits[0, 0] = 3.0 if kind != "reverse_kl" else -3.0
    logp = torch.tensor([[-2.0 if kind != "reverse_kl" else -0.1]], device=device)
    ids = torch.tensor([[0]], device=device)
    alone = topk_divergence(logits, ids, logp, kind=kind, tail="ignore", backend=backend)
    bucket = topk_divergence(logits, ids, logp, kind=kind, backend=backend)
    assert bucket > 0 and (kind == "jsd" or alone < 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("tail", ["bucket", "ignore"])
def test_what_one_side_alone_cannot_draw_is_infinitely_far(dtype, tail):
    logits, ids = torch.tensor([[0.0, -torch.inf, 1.0]], dtype=dtype), torch.tensor([[0, 1]])
    shared, alone = torch.tensor([[-1.0, -1.2]]).double(), torch.tensor([[-torch.inf, -1.2]]).double()
    assert topk_divergence(logits, ids, shared, kind="forward_kl", tail=tail) == torch.inf
    assert topk_divergence(logits, ids, alone, kind="reverse_kl", tail=tail) == torch.inf
    assert topk_divergence(logits, ids, alone, kind="jsd", tail=tail).isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_low_precision(place, kind, dtype):
    backend, device = place
    leaves, ids, logp = problem(device, dtype, tokens=12, hidden=16, vocabulary=300)
    found = linear_topk_divergence(*leaves[:2], ids, logp, bias=leaves[2], kind=kind, backend=backend)
    upstream = torch.ones(12)
    grads = torch.autograd.grad(found.sum(), leaves)
    values, *wanted = exact(leaves, ids, logp, upstream, {}, kind=kind)
    assert [grad.dtype for grad in grads] == [dtype] * 3
    torch.testing.assert_close(found.detach().cpu().double(), values, rtol=1e-5, atol=1e-6)
    for mine, truth in zip(grads, wanted, strict=True):
        error = (mine.cpu().double() - truth).abs().max() / truth.abs().max()
        assert error < CAP[dtype]


@pytest.mark.parametrize("layout", ["slice", "turned weight", "strided ids", "expanded hidden"])
def test_any_strides(place, layout):
    backend, device = place
    leaves, ids, logp = problem(device)
    x, w, b = (leaf.detach() for leaf in leaves)
    if layout == "slice":
        x = x.repeat(1, 2)[:, 1:12:2]
    elif layout == "turned weight":
        w = w.t().contiguous().t()
    elif layout == "strided ids":
        ids, logp = ids.repeat_interleave(2, 1)[:, ::2], logp.t().contiguous().t()
    else:
        x = x[:1].expand(N, H)
    found = []
    for make in (lambda tensor: tensor.detach(), lambda tensor: tensor.detach().contiguous().clone()):
        inputs = [make(tensor).requires_grad_() for tensor in (x, w, b)]
        value = linear_topk_divergence(*inputs[:2], make(ids), make(logp), bias=inputs[2], backend=backend)
        found.append((value.detach(), *torch.autograd.grad(value.sum(), inputs)))
    for mine, plain in zip(*found, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(0,), (2, 0), ()])
def test_few_or_no_tokens(place, shape):
    backend, device = place
    hidden = torch.randn(*shape, H, device=device, requires_grad=True)
    weight = torch.randn(V, H, device=device, requires_grad=True)
    ids = torch.zeros(*shape, 1, dtype=torch.int32, device=device)
    logp = torch.full((*shape, 1), -0.5, device=device)
    for found in (
        linear_topk_divergence(hidden, weight, ids, logp, backend=backend),
        topk_divergence(hidden @ weight.T, ids, logp, backend=backend),
    ):
        assert found.shape == shape and found.dtype == torch.float32
        grads = torch.autograd.grad(found.sum(), (hidden, weight))
        assert [grad.shape for grad in grads] == [hidden.shape, weight.shape]


def test_what_padded_tokens_hold_does_not_matter(place):
    backend, device = place
    leaves, ids, logp = problem(device)
    found = []
    for value in (torch.nan, 0.5):
        x = leaves[0].detach().clone()
        x[1] = value
        inputs = [x.requires_grad_(), *leaves[1:]]
        divergence = linear_topk_divergence(*inputs[:2], ids, logp, bias=inputs[2], backend=backend)
        found.append((divergence.detach(), *torch.autograd.grad(divergence.sum(), inputs)))
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)
    assert (found[0][1][1] == 0).all()


def test_a_masked_vocabulary(place):
    """What the student has at -inf counts nothing in the rest; a teacher's id there makes its KL infinite."""
    backend, device = place
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(5))
    logits[0, 10:] = -torch.inf
    logits[1] = -torch.inf
    logits[1, :2] = 0.0
    logits[2, 0] = -torch.inf
    ids = torch.tensor([[0, 1], [0, 1], [0, 1]])
    logp = torch.tensor([[-1.0, -2.0], [-0.6931472, -0.6931472], [-1.0, -2.0]])
    z = logits.to(device).requires_grad_()
    found = topk_divergence(z, ids.to(device), logp.to(device), backend=backend)
    # a rest that neither has is no event
    assert found[1] < 1e-6 and found[2] == torch.inf
    value, slope = topk_oracle.rows(logits[:1], ids[:1], logp[:1], "forward_kl")
    torch.testing.assert_close(found[:1].detach().cpu().double(), value, rtol=1e-6, atol=1e-6)
    (grad,) = torch.autograd.grad(found[:2].sum(), z)
    assert grad[:2].isfinite().all() and (grad[0, 10:] == 0).all() and (grad[1, 2:] == 0).all()
    torch.testing.assert_close(grad[:1].cpu().double(), slope, rtol=1e-5, atol=1e-6)


def test_two_runs_agree_bit_for_bit(place):
    backend, device = place
    leaves, ids, logp = problem(device, torch.bfloat16, tokens=300, vocabulary=4099)
    runs = []
    for _ in range(2):
        found = linear_topk_divergence(*leaves[:2], ids, logp, bias=leaves[2], backend=backend)
        runs.append((found.detach(), *torch.autograd.grad(found.sum(), leaves)))
    assert all(same_bits(first, second) for first, second in zip(*runs, strict=True))


def test_it_compiles_in_one_graph_and_lengths_do_not_recompile(place):
    backend, device = place
    leaves, ids, logp = problem(device)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def function(x, w, ids, logp):
        of_hidden = linear_topk_divergence(x, w, ids, logp, kind="jsd", backend=backend)
        return of_hidden, topk_divergence(x @ w.T, ids, logp, tail="ignore", backend=backend)

    compiled = torch.compile(function, fullgraph=True, backend=count)
    w = leaves[1].detach().requires_grad_()
    for tokens in (N, 7, 4):
        x = leaves[0].detach()[:tokens].clone().requires_grad_()
        call = (x, w, ids[:tokens].clone(), logp[:tokens].clone())
        for of_tokens in (x, *call[2:]):
            torch._dynamo.mark_dynamic(of_tokens, 0)
        found, plain = compiled(*call), function(*call)
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6)
        grads = [torch.autograd.grad(one.sum() + other.sum(), (x, w)) for one, other in (found, plain)]
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1


@pytest.mark.parametrize("tail", ["bucket", "ignore"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_of_the_reference(kind, tail):
    leaves, ids, logp = problem(dtype=torch.float64, tokens=3, hidden=2, vocabulary=7, count=4)
    options = HEAD | {"temperature": 1.3, "kind": kind, "tail": tail, "beta": 0.2, "chunk_size": 2}
    assert torch.autograd.gradcheck(
        lambda x, w, b: linear_topk_divergence(x, w, ids, logp.double(), bias=b, **options), leaves
    )


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"teacher_ids": torch.zeros(N, K)}, TypeError, "teacher_ids: expected dtype int64 or int32"),
        (
            {"teacher_ids": torch.zeros(N - 1, K).long()},
            ValueError,
            r"teacher_ids: expected shape \(9, any\)",
        ),
        ({"teacher_ids": torch.zeros(N, 0).long()}, ValueError, "teacher_ids: expected shape .* K >= 1"),
        ({"teacher_ids": torch.tensor([[1, 2, 3, 4, V]] * N)}, IndexError, r"got 67 at position \(0, 4\)"),
        (
            {"teacher_ids": torch.tensor([[1, 2, 3, 4, 2]] * N), "teacher_logp": torch.full((N, K), -2.0)},
            ValueError,
            r"teacher_ids: expected every id once for a token, got 2 at position \(0, 4\)",
        ),
        ({"teacher_logp": torch.zeros(N, K - 1)}, ValueError, r"teacher_logp: expected shape \(9, 5\)"),
        (
            {"teacher_logp": torch.full((N, K), 0.25)},
            ValueError,
            "teacher_logp: expected log-probs, at most 0",
        ),
        (
            {"teacher_logp": torch.full((N, K), -1.0, requires_grad=True)},
            ValueError,
            "teacher_logp: expected a tensor without gradient",
        ),
        ({"kind": "kl"}, ValueError, "kind: expected one of 'forward_kl', 'reverse_kl', 'jsd', got 'kl'"),
        ({"tail": "drop"}, ValueError, "tail: expected one of 'bucket', 'ignore', got 'drop'"),
        ({"kind": "reverse_kl", "beta": -0.5}, ValueError, "beta: expected a number in"),
        ({"kind": "jsd", "beta": 1.0}, ValueError, "beta: expected a number inside"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a number above 0"),
        ({"temprature": 1.0}, TypeError, "temprature"),
    ],
)
def test_bad_arguments_are_named(change, error, text):
    leaves, ids, logp = problem()
    arguments = {"teacher_ids": ids, "teacher_logp": logp} | change
    with pytest.raises(error, match=text):
        linear_topk_divergence(*leaves[:2], **arguments)
    with pytest.raises(error, match=text):
        topk_divergence(logits_of(leaves), **arguments)


def test_what_a_gpu_would_meet_unseen_makes_its_row_nan():
    """Values are not looked at in a graph: an id that is there twice, and one out of range."""
    leaves, ids, logp = problem()
    ids, logp = ids.clamp(min=0), logp.nan_to_num(-3.0)
    ids[1] = torch.arange(K)
    ids[2, 3] = ids[2, 1]
    compiled = torch.compile(topk_divergence, fullgraph=True, backend="aot_eager")
    found = compiled(logits_of(leaves).detach(), ids, logp)
    assert found[2].isnan() and found[[0, 1, 3]].isfinite().all()
    ids[3, 0] = V
    with pytest.raises(RuntimeError, match=r"ids: expected values in \[0, 67\)"):
        torch.compile(topk_divergence, fullgraph=True, backend="aot_eager")(
            logits_of(leaves).detach(), ids, logp, backend="cpu"
        )


def test_a_second_derivative_is_refused(place):
    backend, device = place
    leaves, ids, logp = problem(device)
    found = linear_topk_divergence(*leaves[:2], ids, logp, backend=backend)
    (grad,) = torch.autograd.grad(found.sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="a second derivative is not implemented"):
        grad.square().sum().backward()


def test_explain_names_the_backends():
    leaves, ids, logp = problem()
    text = r1kernels.explain(linear_topk_divergence, *leaves[:2], ids, logp)
    assert all(f"  {backend}" in text for backend in ("cuda", "triton", "cpu", "reference"))
