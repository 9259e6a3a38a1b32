"""What the GRPO functions refuse, and that the message names the argument, what was expected and what came."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

from r1kernels.grpo import grpo_loss, grpo_preset, linear_grpo_loss, reduction_weights
from r1kernels.grpo.objective import DEFAULTS

VALUES = {
    "ratio": "sequence",
    "clip_low": 0.1,
    "clip_high": 0.1,
    "delta": 2.0,
    "dual_bound": 2.0,
    "tau": (1.0, 2.0),
    "vespo": ((1.0, 2.0), (2.0, 1.0)),
}
"""One good value of every argument that only some variants use."""


def raises(error, text):
    return pytest.raises(error, match=re.escape(text))


@pytest.mark.parametrize(("variant", "name"), list(itertools.product(DEFAULTS, VALUES)))
def test_an_argument_is_used_or_refused_by_name(batch_of, variant, name):
    batch = batch_of(seed=1, drift=1.0)

    def loss(**keywords):
        return grpo_loss(
            batch.logp, batch.old_logp, batch.advantages, batch.mask, variant=variant, **keywords
        ).loss

    uses = {
        "grpo": {"ratio", "clip_low", "clip_high", "delta"},
        "dual_clip": {"ratio", "clip_low", "clip_high", "dual_bound"},
        "cispo": {"ratio", "clip_high"},
        "sapo": {"ratio", "tau"},
        "vespo": {"vespo"},
        "gmpo": {"clip_low", "clip_high"},
        "reinforce": set(),
    }
    if name in uses[variant]:
        assert loss(**{name: VALUES[name]}) != loss()
    else:
        with raises(ValueError, f"{name}: not used by variant {variant!r}"):
            loss(**{name: VALUES[name]})


@pytest.mark.parametrize(
    ("keywords", "text"),
    [
        ({"variant": "ppo"}, "variant: expected one of 'grpo', 'dual_clip'"),
        ({"ratio": "word"}, "ratio: expected one of 'token', 'sequence', 'output', got 'word'"),
        (
            {"reduction": "mean"},
            "reduction: expected one of 'sequence', 'token', 'constant', 'sequence-sum', got 'mean'",
        ),
        ({"reduction": torch.ones(2)}, "'constant', 'sequence-sum', got Tensor"),
        ({"ratio": 0}, "ratio: expected one of 'token', 'sequence', 'output', got 0"),
        ({"clip_low": -0.1}, "clip_low: expected at least 0, got -0.1"),
        ({"clip_high": float("nan")}, "clip_high: expected a finite number, got nan"),
        ({"delta": 1.1}, "delta: expected above 1 + clip_high = 1.2"),
        ({"variant": "dual_clip", "dual_bound": 1.0}, "dual_bound: expected above 1, got 1.0"),
        ({"variant": "sapo", "tau": 1.0}, "tau: expected a pair"),
        ({"variant": "sapo", "tau": (1.0, 0.0)}, "tau: expected a number above 0, got 0.0"),
        ({"variant": "vespo", "vespo": (2.0, 3.0)}, "vespo: expected a pair (k, lam), got 2.0"),
        ({"variant": "vespo", "vespo": ((2.0, 0.0), (3.0, 2.0))}, "vespo: expected a number above 0"),
        ({"kl": "k3"}, "kl: 'k3' needs ref_logp"),
        ({"kl_coef": 0.1}, "kl_coef: 0.1 needs ref_logp"),
        ({"entropy_coef": 0.1}, "entropy_coef: needs entropy"),
        ({"entropy_weights": torch.ones(5, 9)}, "entropy_weights: needs entropy"),
        ({"num_tokens": 5}, "num_tokens: not used by reduction 'sequence'"),
        ({"reduction": "token", "num_sequences": 5}, "num_sequences: not used by reduction 'token'"),
        ({"reduction": "sequence-sum", "max_length": 5}, "max_length: not used by reduction 'sequence-sum'"),
        ({"num_sequences": 0}, "num_sequences: expected a number above 0, got 0"),
        ({"num_sequences": torch.ones(3)}, "num_sequences: expected a number or a tensor of one element"),
        ({"weights": torch.ones(5, 9), "reduction": "token"}, "reduction: not used together with weights"),
        ({"weights": torch.ones(5, 9), "num_sequences": 5}, "num_sequences: not used together with weights"),
        ({"weights": torch.ones(9, 5)}, "weights: expected shape (5, 9), got (9, 5)"),
        ({"policy_weights": torch.ones(5)}, "policy_weights: expected shape (5, 1) or (5, 9), got (5,)"),
        ({"ref_logp": torch.ones(5, 8)}, "ref_logp: expected shape (5, 9), got (5, 8)"),
        (
            {"cu_seqlens": torch.tensor([0, 5])},
            "mask: expected shape (N,) together with cu_seqlens, got (5, 9)",
        ),
        ({"backend": "fpga"}, "backend: expected one of"),
    ],
)
def test_bad_keywords(batch_of, keywords, text):
    batch = batch_of()
    with raises(ValueError, text):
        grpo_loss(batch.logp, batch.old_logp, batch.advantages, batch.mask, **keywords)


@pytest.mark.parametrize("kl", ["k1", "abs", "k2", "k3_plus", "unbiased"])
def test_the_kl_of_a_whole_output_is_k3(batch_of, kl):
    batch = batch_of()
    with raises(ValueError, f"kl: {kl!r} is not used by ratio 'output'"):
        grpo_loss(
            batch.logp,
            batch.old_logp,
            batch.advantages,
            batch.mask,
            ratio="output",
            ref_logp=batch.ref_logp,
            kl=kl,
        )


def test_an_unknown_kl(batch_of):
    batch = batch_of()
    with raises(ValueError, "kl: expected one of 'k1', 'abs', 'k2', 'k3', 'k3_plus', 'unbiased', got 'k4'"):
        grpo_loss(batch.logp, batch.old_logp, batch.advantages, batch.mask, ref_logp=batch.ref_logp, kl="k4")


@pytest.mark.parametrize(
    ("position", "value", "error", "text"),
    [
        (0, [1.0], TypeError, "logp: expected a torch.Tensor, got list"),
        (0, torch.ones(5, 9, dtype=torch.int64), TypeError, "logp: expected dtype"),
        (0, torch.ones(45), ValueError, "mask: expected shape (45), got (5, 9)"),
        (1, torch.ones(5, 8), ValueError, "old_logp: expected shape (5, 9), got (5, 8)"),
        (2, torch.ones(4), ValueError, "advantages: expected shape (5,), (5, 1) or (5, 9), got (4,)"),
        (2, torch.ones(5, dtype=torch.int64), TypeError, "advantages: expected dtype"),
        (3, torch.ones(5, 9), TypeError, "mask: expected dtype bool"),
        (3, torch.ones(5, 1, dtype=torch.bool), ValueError, "mask: expected shape (5, 9), got (5, 1)"),
    ],
)
def test_bad_tensors(batch_of, position, value, error, text):
    batch = batch_of()
    arguments = [batch.logp, batch.old_logp, batch.advantages, batch.mask]
    arguments[position] = value
    with raises(error, text):
        grpo_loss(*arguments)


@pytest.mark.parametrize(
    ("boundaries", "error", "text"),
    [
        (None, ValueError, "mask: expected shape (B, T), or (N,) together with cu_seqlens, got (6,)"),
        ([0, 3, 5], ValueError, "cu_seqlens: expected the first entry 0 and the last 6, got 0 and 5"),
        ([1, 3, 6], ValueError, "cu_seqlens: expected the first entry 0 and the last 6, got 1 and 6"),
        ([0, 4, 3, 6], ValueError, "cu_seqlens: expected entries that never fall, got 3 at 2"),
        ([6], ValueError, "cu_seqlens: expected shape (B + 1,) with B >= 1, got (1,)"),
        ([0.0, 6.0], TypeError, "cu_seqlens: expected dtype int32 or int64"),
    ],
)
def test_bad_boundaries(boundaries, error, text):
    logp = torch.zeros(6)
    cu_seqlens = None if boundaries is None else torch.tensor(boundaries)
    sequences = 2 if boundaries is None else max(len(boundaries) - 1, 0)
    with raises(error, text):
        grpo_loss(logp, logp, torch.zeros(sequences), torch.ones(6, dtype=torch.bool), cu_seqlens=cu_seqlens)


@pytest.mark.parametrize(
    ("good", "bad", "error"),
    [
        ({"variant": "sapo", "tau": (1.0, 1.0)}, {"tau": (1.0, True)}, TypeError),
        ({"variant": "sapo", "tau": (1.0, 1.05)}, {"tau": (1.0, float("nan"))}, ValueError),
        ({"variant": "vespo", "vespo": ((2.0, 1.0), (3.0, 1.0))}, {"vespo": ((2.0, True), (3.0, 1.0))}, TypeError),
        ({"variant": "grpo", "clip_high": 1}, {"clip_high": True}, TypeError),
        ({"variant": "grpo", "kl_coef": 0}, {"kl_coef": False}, TypeError),
    ],
)  # fmt: skip
def test_a_call_that_was_good_does_not_make_an_equal_one_good(batch_of, good, bad, error):
    """True equals 1 and hashes like it: what was found out about one call must not stand for the other."""
    batch = batch_of()
    arguments = (batch.logp, batch.old_logp, batch.advantages, batch.mask)
    grpo_loss(*arguments, **good)
    with pytest.raises(error, match=next(iter(bad))):
        grpo_loss(*arguments, **{**good, **bad})


def test_an_unknown_keyword_is_an_error(batch_of):
    batch = batch_of()
    with pytest.raises(TypeError, match="epsilon"):
        grpo_loss(batch.logp, batch.old_logp, batch.advantages, batch.mask, epsilon=0.2)


def test_reduction_weights_refuses_what_it_does_not_use():
    mask = torch.ones(2, 3, dtype=torch.bool)
    with raises(ValueError, "max_length: not used by reduction 'token', got 7"):
        reduction_weights(mask, "token", max_length=7)
    with raises(ValueError, "reduction: expected one of"):
        reduction_weights(mask, "batch")


@pytest.mark.parametrize(
    "name", ["r1", "grpo", "bnpo", "dr_grpo", "dapo", "luspo", "gspo", "cispo", "sapo", "vespo", "gmpo"]
)
def test_every_preset_is_a_valid_call_and_a_copy(batch_of, name):
    batch = batch_of()
    preset = grpo_preset(name)
    output = grpo_loss(
        batch.logp, batch.old_logp, batch.advantages, batch.mask, ref_logp=batch.ref_logp, **preset
    )
    assert output.loss.isfinite()
    preset["reduction"] = "changed"
    assert grpo_preset(name)["reduction"] != "changed"


def test_published_settings():
    assert (grpo_preset("dapo")["clip_low"], grpo_preset("dapo")["clip_high"]) == (0.2, 0.28)
    assert (grpo_preset("gspo")["clip_low"], grpo_preset("gspo")["clip_high"]) == (3e-4, 4e-4)
    assert (grpo_preset("luspo")["clip_low"], grpo_preset("luspo")["clip_high"]) == (2e-3, 2.5e-3)
    with raises(ValueError, "name: expected one of 'r1', 'grpo'"):
        grpo_preset("ppo")


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"hidden": torch.zeros(2, 4, 6)}, ValueError, "hidden: expected shape (2, 3, any), got (2, 4, 6)"),
        ({"weight": torch.zeros(5, 7)}, ValueError, "weight: expected shape (any, 6), got (5, 7)"),
        (
            {"targets": torch.full((2, 3), 5)},
            IndexError,
            "targets: expected values in [0, 5), got 5 at position (0, 0)",
        ),
        ({"targets": torch.zeros(2, 3)}, TypeError, "targets: expected dtype int64"),
        ({"entropy": torch.zeros(2, 3)}, TypeError, "entropy: expected a bool, got Tensor"),
        (
            {"entropy_weights": torch.zeros(2, 3)},
            ValueError,
            "entropy_weights: needs entropy=True or an entropy_coef",
        ),
        ({"delta": 2.0, "variant": "sapo"}, ValueError, "delta: not used by variant 'sapo'"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a number above 0, got 0.0"),
    ],
)
def test_linear_grpo_loss_refuses(changes, error, text):
    call = {
        "hidden": torch.zeros(2, 3, 6),
        "weight": torch.zeros(5, 6),
        "targets": torch.zeros(2, 3, dtype=torch.int64),
        "old_logp": torch.zeros(2, 3),
        "advantages": torch.zeros(2),
        "mask": torch.ones(2, 3, dtype=torch.bool),
    }
    with raises(error, text):
        linear_grpo_loss(**{**call, **changes})
