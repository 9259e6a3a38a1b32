"""TRL's log-prob functions with r1kernels behind them: TRL's own values and gradients, and both against float64."""

from __future__ import annotations

import importlib
import sys
import types

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: nothing to adapt")

import transformers
from trl.trainer import utils

from r1kernels.integrations import trl as r1
from r1kernels.integrations.trl_logprobs import OUTPUTS

OWN = {
    name: getattr(utils, name)
    for name in (
        "_ChunkedLogProbFunction",
        "selective_log_softmax",
        "entropy_from_logits",
        "selective_log_softmax_and_entropy",
    )
}


@pytest.fixture
def patched():
    with r1.patch_logprobs():
        yield


def head(seed=0, tokens=13, hidden=16, vocabulary=37, bias=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        return values.to(dtype).requires_grad_()

    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    return (
        normal(tokens, hidden, scale=0.25),
        normal(vocabulary, hidden),
        normal(vocabulary) if bias else None,
        targets,
    )


def oracle(hidden, weight, bias, targets, temperature, softcap, scale):
    """The five outputs in float64 from the textbook formulas; the logits are moderate, so nothing cancels."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    z = logits / temperature
    logp = z.log_softmax(-1)
    p = logp.exp()
    return (
        logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1),
        -(p * logp).sum(-1),
        p.square().sum(-1).log(),
        z.mean(-1),
        z.argmax(-1) == targets,
    )


def backward(logp, entropy, inputs):
    loss = (logp * torch.linspace(-1, 1, logp.numel(), dtype=logp.dtype)).sum()
    if entropy is not None:
        loss = loss + (entropy * torch.linspace(0.5, 2, logp.numel(), dtype=logp.dtype)).sum()
    return torch.autograd.grad(loss, [one for one in inputs if one is not None])


@pytest.mark.parametrize(
    ("temperature", "softcap", "scale", "bias", "outputs"),
    [
        (1.0, None, 1.0, False, OUTPUTS),
        (0.7, None, 0.5, True, OUTPUTS),
        (1.3, 5.0, 1.0, True, OUTPUTS),
        (1.0, 30.0, 2.0, False, ("log_probs", "entropy")),
        (1.0, None, 1.0, True, ("log_probs",)),
        (1.0, None, 1.0, True, ("is_top1",)),
    ],
)
def test_the_fused_head_gives_trl_values_and_gradients(patched, temperature, softcap, scale, bias, outputs):
    hidden, weight, offset, targets = head(bias=bias)
    with torch.no_grad():  # the first target is the best one, so that is_top1 is not False everywhere
        targets[0] = (hidden @ weight.T + (0 if offset is None else offset))[0].argmax()
    assert utils._ChunkedLogProbFunction is not OWN["_ChunkedLogProbFunction"]
    arguments = (hidden, weight, offset, targets, temperature, 16, softcap, scale, outputs)
    ours = utils._ChunkedLogProbFunction.apply(*arguments)
    theirs = OWN["_ChunkedLogProbFunction"].apply(*arguments)
    doubles = [
        None if one is None else one.detach().double().requires_grad_() for one in (hidden, weight, offset)
    ]
    exact = oracle(*doubles, targets, temperature, softcap, scale)
    for i, (mine, other, truth) in enumerate(zip(ours, theirs, exact, strict=True)):
        if i and OUTPUTS[i - 1] not in outputs:
            assert mine is None and other is None
            continue
        assert mine.dtype == other.dtype and mine.shape == other.shape == (13,)
        assert mine.requires_grad == other.requires_grad == (i < 2)
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(mine, truth.to(mine.dtype), rtol=1e-5, atol=2e-6)
    for mine, other, truth in zip(
        backward(*ours[:2], (hidden, weight, offset)),
        backward(*theirs[:2], (hidden, weight, offset)),
        backward(exact[0], None if ours[1] is None else exact[1], doubles),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=5e-6)
        torch.testing.assert_close(mine, truth.float(), rtol=1e-5, atol=5e-6)


def test_the_fused_head_in_bfloat16_under_autocast_and_with_a_float32_head(patched):
    hidden, weight, _, targets = head(bias=False, dtype=torch.bfloat16)
    (ours,) = utils._ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 16, outputs=())[:1]
    exact = oracle(hidden.double(), weight.double(), None, targets, 1.0, None, 1.0)[0]
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, exact.float(), rtol=1e-5, atol=1e-5)  # the logits are float32
    # a bfloat16 head under float32 hidden states: the head is cast, and its gradient comes in bfloat16
    wide = hidden.detach().float().requires_grad_()
    logp = utils._ChunkedLogProbFunction.apply(wide, weight, None, targets, 1.0, 16, outputs=())[0]
    gradients = torch.autograd.grad(logp.sum(), (wide, weight))
    assert [one.dtype for one in gradients] == [torch.float32, torch.bfloat16]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = utils._ChunkedLogProbFunction.apply(
            wide, weight.float(), None, targets, 1.0, 16, outputs=()
        )[0]
    torch.testing.assert_close(narrow, ours)


def test_no_tokens_and_no_partitioned_head(patched):
    hidden, weight, bias, targets = head(tokens=0)
    logp, entropy, *_ = utils._ChunkedLogProbFunction.apply(hidden, weight, bias, targets, 1.0, 16)
    assert logp.shape == entropy.shape == (0,)
    logp.sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    weight.ds_id = 3  # what DeepSpeed ZeRO-3 marks its parameters with
    with pytest.raises(ValueError, match="expected a whole head, got one that DeepSpeed ZeRO-3 partitions"):
        utils._ChunkedLogProbFunction.apply(hidden, weight, bias, targets, 1.0, 16)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_model_with_trl_fused_head(softcap):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip
    config = transformers.Gemma2Config(**sizes, final_logit_softcapping=softcap, pad_token_id=0)
    model = transformers.Gemma2ForCausalLM(config)
    utils.add_fused_lm_head(model, temperature=0.8, outputs=("log_probs", *OUTPUTS))
    ids = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :4] = -100
    own = model(input_ids=ids, labels=labels, fused_lm_head=True)
    own.loss.backward()
    gradient = model.lm_head.weight.grad.clone()
    model.zero_grad()
    with r1.patch_logprobs():
        ours = model(input_ids=ids, labels=labels, fused_lm_head=True)
        ours.loss.backward()
    for name in ("log_probs", *OUTPUTS):
        torch.testing.assert_close(getattr(ours, name), getattr(own, name), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.lm_head.weight.grad, gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shape", [(3, 5), (7,)])
def test_log_softmax_and_entropy_of_logits(patched, shape):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(*shape, 11, generator=generator).requires_grad_()
    index = torch.randint(11, shape, generator=generator)
    row_mask = torch.rand(shape, generator=generator) > 0.3
    for temperature, mask in ((1.0, None), (0.5, row_mask), (2.0, row_mask.long())):
        ours = utils.selective_log_softmax(logits, index, temperature, mask)
        theirs = OWN["selective_log_softmax"](logits, index, temperature, mask)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        both = utils.selective_log_softmax_and_entropy(logits, index, True, temperature, mask)
        expected = OWN["selective_log_softmax_and_entropy"](logits, index, True, temperature, mask)
        for mine, other in zip(both, expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
        mine = torch.autograd.grad(ours.sum() + both[1].sum(), logits)
        other = torch.autograd.grad(theirs.sum() + expected[1].sum(), logits)
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    constant = utils.selective_log_softmax_and_entropy(logits, index, entropy_requires_grad=False)[1]
    assert not constant.requires_grad
    torch.testing.assert_close(
        utils.entropy_from_logits(logits, chunk_size=2),
        OWN["entropy_from_logits"](logits),
        rtol=1e-5,
        atol=1e-6,
    )
    with pytest.raises(ValueError, match="temperature"):
        utils.selective_log_softmax(logits, index, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (7,)])
def test_several_tokens_per_row(patched, shape, dtype):
    """Log-probs and gradients are TRL's of float64 logits; a token may be there twice, and some are masked."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(*shape, 11, generator=generator).to(dtype).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    index = torch.randint(11, (*shape, 3), generator=generator)
    index[0, ..., 1] = index[0, ..., 0]
    mask = (torch.rand(index.shape, generator=generator) > 0.3).long()
    upstream = torch.linspace(-1, 2, index.numel()).view_as(index)
    rounding = 1e-6 if dtype == torch.float32 else 1e-2
    for options in ({}, {"temperature": 0.5, "row_mask": mask}):
        ours = utils.selective_log_softmax(logits, index, **options)
        theirs = OWN["selective_log_softmax"](exact, index, **options)
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=1e-6)
        (mine,) = torch.autograd.grad(ours, logits, upstream)
        (other,) = torch.autograd.grad(theirs, exact, upstream.double())
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), other, rtol=rounding, atol=rounding)


def test_patch_reaches_every_module_and_is_undone():
    dpo = importlib.import_module("trl.experimental.cpo.cpo_trainer")  # it imports the function by name
    patch = r1.patch_logprobs()
    assert dpo.selective_log_softmax is utils.selective_log_softmax is not OWN["selective_log_softmax"]
    with pytest.raises(ValueError, match="expected a library that is not patched yet"):
        r1.patch_logprobs()
    # a module of TRL imported while it is patched has the replacement, and gets the original back too
    late = types.ModuleType("trl.late")
    late.entropy_from_logits = utils.entropy_from_logits
    sys.modules["trl.late"] = late
    try:
        patch.undo()
        patch.undo()
    finally:
        del sys.modules["trl.late"]
    assert dpo.selective_log_softmax is OWN["selective_log_softmax"]
    assert late.entropy_from_logits is OWN["entropy_from_logits"]
    assert all(getattr(utils, name) is function for name, function in OWN.items())


def other_outputs(ctx, hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping=None,
                  logit_scale=1.0, outputs=("entropy",)):  # fmt: skip
    pass


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        (
            "selective_log_softmax",
            lambda logits, index, dim: None,
            r"expected the parameters \(logits, index, temp",
        ),
        ("entropy_from_logits", lambda logits, mask: None, r"the installed version has \(logits, mask\)"),
        (
            "selective_log_softmax_and_entropy",
            lambda logits, index: None,
            r"the installed version has \(logits, index\)",
        ),
        (
            "_ChunkedLogProbFunction",
            types.SimpleNamespace(forward=lambda ctx, hidden, weight: None),
            r"has \(ctx, hidden, weight\)",
        ),
        ("_ChunkedLogProbFunction", types.SimpleNamespace(forward=other_outputs), r"expected the outputs"),
    ],
)
def test_another_signature_is_refused_and_nothing_changes(monkeypatch, name, changed, message):
    monkeypatch.setattr(utils, name, changed)
    before = {other: getattr(utils, other) for other in OWN}
    with pytest.raises(RuntimeError, match=message):
        r1.patch_logprobs()
    assert all(getattr(utils, other) is function for other, function in before.items())


def test_older_versions_have_less(monkeypatch):
    def selective_log_softmax(logits, index):
        return OWN["selective_log_softmax"](logits, index)

    monkeypatch.setattr(utils, "selective_log_softmax", selective_log_softmax)
    monkeypatch.delattr(utils, "_ChunkedLogProbFunction")
    monkeypatch.delattr(utils, "selective_log_softmax_and_entropy")
    with r1.patch_logprobs():
        assert utils.selective_log_softmax is not selective_log_softmax
        assert not hasattr(utils, "_ChunkedLogProbFunction")
    assert utils.selective_log_softmax is selective_log_softmax
