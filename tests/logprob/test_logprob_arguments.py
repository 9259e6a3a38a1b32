"""What the log-prob ops say to arguments they cannot take: N tokens, H hidden, V vocabulary."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from r1kernels import (
    BackendError,
    extension,
    grouped_logprobs,
    linear_grouped_logprobs,
    linear_grpo_loss,
    linear_logprobs,
    route,
    token_logprobs,
)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (lambda z, y: ((z.tolist(), y), {}), TypeError, "logits: expected a torch.Tensor, got list"),
        (lambda z, y: ((z.long(), y), {}), TypeError, "logits: expected dtype float32 or bfloat16"),
        (lambda z, y: ((z[..., :0], y), {}), ValueError, r"logits: expected shape \(\.\.\., V\) with V >= 1"),
        (lambda z, y: ((z, y.int()), {}), TypeError, "targets: expected dtype int64, got torch.int32"),
        (lambda z, y: ((z, y[:1]), {}), ValueError, r"targets: expected shape \(2\), got \(1,\)"),
        (
            lambda z, y: ((z, y + 5), {}),
            IndexError,
            r"targets: expected values in \[0, 5\) or -100, got 5 at position 0",
        ),
        (lambda z, y: ((z, y - 1), {}), IndexError, r"got -1 at position 0"),
        (
            lambda z, y: ((z, y), {"temperature": 0.0}),
            ValueError,
            "temperature: expected a number above 0, got 0.0",
        ),
        (
            lambda z, y: ((z, y), {"temperature": float("nan")}),
            ValueError,
            "temperature: expected a finite number",
        ),
        (lambda z, y: ((z, y), {"temperature": "1"}), TypeError, "temperature: expected a number, got str"),
        (
            lambda z, y: ((z, y), {"temperature": torch.ones(3)}),
            ValueError,
            r"temperature: expected shape \(2\)",
        ),
        (
            lambda z, y: ((z, y), {"temperature": torch.tensor([1.0, -2.0])}),
            ValueError,
            "temperature: expected values above 0, got -2.0 at position 1",
        ),
        (
            lambda z, y: ((z, y), {"temperature": torch.ones(2, requires_grad=True)}),
            ValueError,
            "temperature: expected a tensor without gradient, got one that requires it",
        ),
        (lambda z, y: ((z, y), {"return_entropy": 1}), TypeError, "return_entropy: expected a bool, got int"),
        (lambda z, y: ((z, y), {"ignore_index": 1.0}), TypeError, "ignore_index: expected an int, got float"),
        (lambda z, y: ((z, y), {"ignore_index": 2**70}), ValueError, "ignore_index: .* that 64 bits hold"),
        (lambda z, y: ((z, y), {"backend": "tpu"}), ValueError, "backend: expected one of .*, got 'tpu'"),
        (lambda z, y: ((z, y), {"temprature": 1.0}), TypeError, "temprature"),
    ],
)
def test_bad_arguments_of_token_logprobs_are_named(arguments, error, text):
    positional, named = arguments(torch.randn(2, 5), torch.tensor([0, 1]))
    with pytest.raises(error, match=text):
        token_logprobs(*positional, **named)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"hidden": torch.zeros(2, 0)}, ValueError, r"hidden: expected shape \(\.\.\., H\) with H >= 1"),
        ({"hidden": torch.tensor(1.0)}, ValueError, r"hidden: expected shape \(\.\.\., H\) with H >= 1"),
        ({"weight": torch.zeros(5, 4)}, ValueError, r"weight: expected shape \(any, 3\), got \(5, 4\)"),
        ({"weight": torch.zeros(5, 3).bfloat16()}, TypeError, "weight: expected the dtype of hidden"),
        ({"weight": torch.zeros(0, 3)}, ValueError, r"weight: expected shape \(V, H\) with V >= 1"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias: expected shape \(5\), got \(4,\)"),
        (
            {"targets": torch.tensor([0, 5])},
            IndexError,
            r"targets: expected values in \[0, 5\) or -100, got 5",
        ),
        ({"softcap": -1.0}, ValueError, "softcap: expected a number above 0"),
        ({"stats": ("entropy",)}, ValueError, "stats: expected one of 'log_sum_sq_probs'"),
        ({"stats": "is_top1"}, TypeError, "stats: expected a tuple of names, got str"),
        ({"group": 3}, TypeError, "group: expected a torch.distributed.ProcessGroup, got int"),
        ({"targets": torch.tensor([0, 1], dtype=torch.int32)}, TypeError, "targets: expected dtype int64"),
        (
            {"temperature": torch.ones(2, requires_grad=True)},
            ValueError,
            "temperature: expected a tensor without gradient",
        ),
        ({"chunk_size": 0}, ValueError, "chunk_size: expected at least 1, got 0"),
        ({"save_logits": 1}, TypeError, "save_logits: expected a bool"),
        (
            {"logit_scale": 10**400},
            ValueError,
            "logit_scale: expected a finite number, got an int of 1329 bits",
        ),
    ],
)
def test_bad_arguments_of_linear_logprobs_are_named(change, error, text):
    arguments = {
        "hidden": torch.zeros(2, 3),
        "weight": torch.zeros(5, 3),
        "targets": torch.tensor([0, 1]),
    } | change
    with pytest.raises(error, match=text):
        linear_logprobs(**arguments)


@pytest.mark.parametrize("value", [1e-50, 1e50])
def test_a_temperature_or_a_cap_that_float32_does_not_hold_is_named(value):
    z, y = torch.randn(2, 5), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="temperature: expected a number that float32 holds"):
        token_logprobs(z, y, temperature=value)
    with pytest.raises(
        ValueError, match="temperature: expected values that float32 holds, got 1e.50 at position 0"
    ):
        token_logprobs(z, y, temperature=torch.full((2,), value, dtype=torch.float64))
    with pytest.raises(ValueError, match="softcap: expected a number that float32 holds"):
        linear_logprobs(z, torch.randn(3, 5), y, softcap=value)


def test_a_tensor_on_another_device_is_named():
    z, weight, y = torch.randn(2, 5), torch.randn(3, 5), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="targets: expected a tensor on cpu, got one on meta"):
        token_logprobs(z, y.to("meta"))
    with pytest.raises(ValueError, match="temperature: expected a tensor on cpu, got one on meta"):
        token_logprobs(z, y, temperature=torch.ones(2, device="meta"))
    with pytest.raises(ValueError, match="weight: expected a tensor on cpu, got one on meta"):
        linear_logprobs(z, weight.to("meta"), y)
    with pytest.raises(ValueError, match="bias: expected a tensor on cpu, got one on meta"):
        linear_logprobs(z, weight, y, bias=torch.zeros(3, device="meta"))


@pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))
def test_float64_on_a_kernel_says_why():
    z, weight, y = torch.randn(2, 5).double(), torch.randn(3, 5).double(), torch.tensor([0, 1])
    with pytest.raises(BackendError, match="logits: float64 is served by the reference alone"):
        token_logprobs(z, y, backend="cpu")
    with pytest.raises(BackendError, match="hidden: float64 is served by the reference alone"):
        linear_logprobs(z, weight, y, backend="cpu")


def test_a_temperature_may_be_a_number_of_numpy_or_a_tensor_without_dimensions():
    z, weight, y = torch.randn(2, 5), torch.randn(7, 5), torch.tensor([0, 1])
    mask = torch.ones(1, 2, dtype=torch.bool)
    calls = (
        lambda t: token_logprobs(z, y, temperature=t),
        lambda t: linear_logprobs(z, weight, y, temperature=t),
        lambda t: grouped_logprobs(z[None], y[None], group_size=1, temperature=t).logp,
        lambda t: (
            linear_grpo_loss(
                z[None],
                weight,
                y[None],
                None,
                torch.ones(1),
                mask,
                temperature=t,
                kl_coef=1.0,
                ref_logp=-mask.float(),
            ).loss
        ),
    )
    for call in calls:
        expected = call(0.5)
        for same in (
            np.float32(0.5),
            np.float64(0.5),
            torch.tensor(0.5),
            torch.tensor(0.5, dtype=torch.float64),
        ):
            torch.testing.assert_close(call(same), expected)
        for below in (np.float32(-0.5), torch.tensor(-0.5), torch.tensor(1e-40)):
            with pytest.raises(ValueError, match="temperature: expected"):
                call(below)


def test_numbers_of_numpy_are_numbers():
    x, weight, y = torch.randn(1, 4, 5), torch.randn(7, 5), torch.tensor([[0, 1, 6, 2]])
    plain = linear_grouped_logprobs(x, weight, y, group_size=1, softcap=2.0, logit_scale=0.5, chunk_size=2)
    ours = linear_grouped_logprobs(
        x, weight, y, group_size=np.int64(1), softcap=np.float32(2.0), logit_scale=np.float32(0.5),
        chunk_size=np.int32(2),
    )  # fmt: skip
    torch.testing.assert_close(ours.logp, plain.logp)
    loss = linear_grpo_loss(
        x, weight, y, None, torch.ones(1), y >= 0, entropy_coef=np.float32(0.5), clip_low=np.float64(0.1)
    ).loss
    torch.testing.assert_close(
        loss,
        linear_grpo_loss(x, weight, y, None, torch.ones(1), y >= 0, entropy_coef=0.5, clip_low=0.1).loss,
    )
    routing = route(x[0], np.int64(2), n_group=np.int32(1), scale=np.float32(1.5))
    torch.testing.assert_close(routing.weights, route(x[0], 2, scale=1.5).weights)
