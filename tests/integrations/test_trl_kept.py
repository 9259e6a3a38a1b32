"""TRL under truncated sampling: log-probs among what its generation drew from, in all passes of a real GRPOTrainer."""

from __future__ import annotations

import pytest
import torch

trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="TRL is not installed: nothing to adapt")
pytest.importorskip("datasets", reason="TRL's trainer needs datasets")

from r1kernels.integrations import trl as r1  # noqa: E402
from r1kernels.integrations import trl_grpo, trl_kept  # noqa: E402
from tests.integrations.test_trl_run import train  # noqa: E402

TRUNCATED = {"top_p": 0.7, "top_k": 12, "temperature": 0.8, "beta": 0.05}


@pytest.fixture
def passes(monkeypatch):
    """For every loss: its inputs, and the log-probs by the definition, from logits of the model at that moment."""
    found = []
    own = trl_grpo.compute_loss

    def noted(self, model, inputs):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        tokens = inputs["completion_ids"].shape[1]
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=attention).logits[:, -tokens - 1 : -1]
            logits = logits / self.temperature
            left = torch.zeros_like(logits, dtype=torch.bool)
            for row, (kept, sizes) in enumerate(inputs[trl_kept.KEY]):
                for token, one in enumerate(kept.split(sizes.tolist())):
                    left[row, token, one] = True
            expected = logits.masked_fill(~left, -torch.inf).log_softmax(-1)
            expected = expected.gather(-1, inputs["completion_ids"][..., None]).squeeze(-1)
        logp, _, _ = self._get_per_token_logps_and_entropies(model, ids, attention, tokens)
        found.append((inputs, logp.detach(), expected, left))
        return own(self, model, inputs)

    monkeypatch.setattr(trl_grpo, "compute_loss", noted)
    return found


@pytest.mark.parametrize("prefix", [False, True])
def test_every_pass_scores_a_token_among_what_it_was_drawn_from(tmp_path, passes, prefix):
    with r1.patch(kept=True, prefix=prefix):
        rows = train(tmp_path, 2, num_iterations=2, **TRUNCATED)
    assert len(passes) == 4 and all(row["grad_norm"] > 0 for row in rows)
    for inputs, logp, expected, left in passes:
        real = inputs["completion_mask"].bool()
        torch.testing.assert_close(logp[real], expected[real], rtol=1e-5, atol=1e-5)
        assert left[real].any(-1).all() and int(left.sum(-1).max()) <= 12
    for inputs, logp, *_ in passes[
        :2
    ]:  # before the first update the old policy and the reference are the policy
        real = inputs["completion_mask"].bool()
        torch.testing.assert_close(inputs["old_per_token_logps"][real], logp[real], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(inputs["ref_per_token_logps"][real], logp[real], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_from_hidden_states_it_takes_the_same_steps(tmp_path):
    with r1.patch(kept=True):
        plain = train(tmp_path, 6, **TRUNCATED)
    with r1.patch(kept=True, linear=True):
        linear = train(tmp_path, 6, **TRUNCATED)
    for mine, other in zip(linear, plain, strict=True):
        for name in ("loss", "grad_norm", "entropy", "kl", "reward"):
            assert mine[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5)


def test_without_truncation_nothing_changes(tmp_path):
    own = train(tmp_path, 1, temperature=0.9)
    with r1.patch(kept=True):
        ours = train(tmp_path, 1, temperature=0.9)
    for name in ("loss", "grad_norm", "entropy", "reward"):
        assert ours[0][name] == pytest.approx(own[0][name], rel=1e-4, abs=1e-5)


def test_what_tells_no_sets_is_refused(tmp_path):
    with r1.patch(kept=True), pytest.raises(ValueError, match="tools: expected none with kept sets"):
        trainer.GRPOTrainer._generate_single_turn(
            type(
                "Stand", (), {"use_vllm": False, "use_transformers_continuous_batching": False, "tools": [1]}
            )(),
            [],
        )
    assert trainer.GRPOTrainer._generate_single_turn is trl_kept._OWN["_generate_single_turn"]
