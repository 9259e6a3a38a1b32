"""What a patched mixture of transformers counts, records and replays, and the selection bias that moves by its load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import r1kernels
from r1kernels.integrations import transformers as r1
from tests.support.mixtures import assert_same_step, build, step, tokens


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_counts_and_records_once(reentrant):
    model, ids = build("DeepseekV3"), tokens()
    with r1.patch(model):
        with r1.collect_load(model) as load, r1.record_routing(model) as record:
            expected = step(model, ids)
        assert load.counts.sum() == ids.numel() * 2 * len(load.counts)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with r1.collect_load(model) as again, r1.record_routing(model) as record_again:
            checkpointed = step(model, ids)
        assert_same_step(checkpointed, expected)
        assert torch.equal(again.counts, load.counts)
        assert torch.equal(record_again.forward(), record.forward())
        other = record.forward().flip(1)
        with r1.replay_routing(model, other) as replay, r1.collect_load(model) as load:
            step(model, ids)
        assert 0 <= replay.agreement < 1
        assert load.counts.sum() == ids.numel() * 2 * len(load.counts)


def test_replay_uses_recorded_experts_with_live_weights():
    model, ids = build("DeepseekV3", num_hidden_layers=3), tokens()
    with r1.patch(model):
        with r1.record_routing(model) as record:
            expected = step(model, ids)
        with r1.replay_routing(model, record) as replay:
            assert_same_step(step(model, ids), expected)
        assert replay.agreement == 1.0
        with torch.no_grad():  # another policy: its router would choose otherwise
            for layer in model.model.layers[1:]:
                layer.mlp.gate.weight.copy_(layer.mlp.gate.weight.flip(0))
        with r1.replay_routing(model, record) as replay, r1.record_routing(model) as replayed:
            logits, gradients = step(model, ids)
        assert replay.agreement < 0.9
        assert torch.equal(replayed.forward(), record.forward())
        assert (logits.logits - expected[0].logits).abs().max() > 1e-3  # weights are those of the new router
        assert gradients["model.layers.1.mlp.gate.weight"].abs().max() > 0
        with (
            r1.replay_routing(model, record),
            pytest.raises(ValueError, match=r"shape \(44, 2\) for layer 0"),
        ):
            model(tokens(batch=4))


def test_recorded_weights_stand_in_for_the_live_ones_without_gradient():
    model, ids = build("DeepseekV3", num_hidden_layers=3), tokens()
    with r1.patch(model):
        with r1.record_routing(model, weights=True) as record:
            expected, _ = step(model, ids)
        weights = record.forward_weights()
        assert weights.shape == record.forward().shape and weights.min() > 0
        with torch.no_grad():
            for layer in model.model.layers[1:]:
                layer.mlp.gate.weight.copy_(layer.mlp.gate.weight.flip(0))
        with r1.replay_routing(model, record, weights):
            frozen, gradients = step(model, ids)
        assert torch.equal(frozen.logits, expected.logits)
        gate = gradients.get("model.layers.1.mlp.gate.weight")
        assert gate is None or not gate.any()
        assert gradients["model.layers.1.mlp.experts.down_proj"].any()
        half = record.forward().clone()
        half[:, ::2] = -1  # those are routed and weighed live
        with r1.replay_routing(model, half, weights), r1.record_routing(model, weights=True) as again:
            model(ids)
        assert torch.equal(again.forward_weights()[:, 1::2], weights[:, 1::2])
        assert not torch.equal(again.forward_weights()[:, ::2], weights[:, ::2])
        with (
            pytest.raises(ValueError, match=r"weights: expected shape \(2, \d+, 2\)"),
            r1.replay_routing(model, record, weights[:1]),
        ):
            pass
        with r1.record_routing(model) as record:
            model(ids)
        with pytest.raises(ValueError, match="one without weights"):
            record.forward_weights()


def test_replay_of_a_generation():
    model, ids = build("DeepseekV3").eval(), tokens()
    prompt = torch.ones_like(ids)
    prompt[1, :4], ids[1, :4] = 0, 0
    with r1.patch(model):
        with r1.record_routing(model) as record:
            out = model.generate(
                ids, attention_mask=prompt, do_sample=True, min_new_tokens=6, max_new_tokens=6
            )
        assert [call.shape[0] for call in record.calls[0]] == [33, 3, 3, 3, 3, 3]
        mask = torch.cat((prompt, torch.ones(3, 6, dtype=torch.int64)), dim=1)
        mask[2, 14:] = 0  # as if this response had ended early
        sequences = record.sequences(mask)
        assert [sequence.shape[1] for sequence in sequences] == [16, 12, 14]
        # the training batch: without the padding in front
        lengths = mask.sum(1)
        batch, batch_mask = torch.zeros(3, 17, dtype=torch.int64), torch.arange(17) < lengths[:, None]
        batch[batch_mask] = out[mask.bool()]
        with r1.replay_routing(model, r1.pad_routing(sequences, batch_mask)) as replay, torch.no_grad():
            model(batch, attention_mask=batch_mask.long())
        # other padding and no cache: the same tokens at other positions, whose rounding may flip a choice
        assert replay.agreement > 0.95


def test_under_checkpointing_the_backward_belongs_into_the_replay():
    model, ids = build("DeepseekV3"), tokens()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with r1.patch(model):
        with r1.record_routing(model) as record:
            model(ids)
        with r1.replay_routing(model, record):
            loss = model(input_ids=ids, labels=ids).loss
        with pytest.raises(RuntimeError, match="the backward must run inside the block"):
            loss.backward()


def test_bias_update_once_a_step():
    model, ids = build("DeepseekV3", num_hidden_layers=3), tokens()
    gates = [layer.mlp.gate for layer in model.model.layers[1:]]
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    with r1.patch(model):
        with r1.collect_load(model, attention_mask=mask) as load:
            step(model, ids)
        first = load.counts.clone()
        assert first.sum(1).tolist() == [int(mask.sum()) * 2] * 2  # padding does not count
        with r1.collect_load(model, load):
            step(model, ids)
        assert load.counts.sum(1).tolist() == [int(mask.sum()) * 2 + ids.numel() * 2] * 2
        before = [gate.e_score_correction_bias.clone() for gate in gates]
        r1.update_bias(model, load, rate=0.01)
    for gate, bias, counts in zip(gates, before, load.counts, strict=True):
        direction = (counts.float().mean() - counts).sign()
        torch.testing.assert_close(gate.e_score_correction_bias, bias + 0.01 * (direction - direction.mean()))


RANK = """
import sys, torch, torch.distributed as dist
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from r1kernels.integrations import transformers as r1

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
torch.manual_seed(0)
model = DeepseekV3ForCausalLM(DeepseekV3Config(
    vocab_size=20, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2, kv_lora_rank=8, q_lora_rank=None, qk_rope_head_dim=4,
    qk_nope_head_dim=4, v_head_dim=4, n_routed_experts=4, num_experts_per_tok=1, n_group=1, topk_group=1,
    first_k_dense_replace=0))
r1.patch(model)
load = r1.ExpertLoad(1, 4)
load.add(0, torch.tensor([[0], [0], [1]] if rank == 0 else [[1], [1], [2]]))  # together 2, 3, 1, 0: the mean is 1.5
r1.update_bias(model, load, rate=0.1)
assert load.counts.sum() == 3  # the load itself stays that of this rank
print(model.model.layers[0].mlp.gate.e_score_correction_bias.tolist())
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_bias_update_sums_over_ranks(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    command = [sys.executable, str(script)]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(r1kernels.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")], env=environment, stdout=subprocess.PIPE
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0]
    for output in outputs:
        torch.testing.assert_close(torch.tensor(json.loads(output)), torch.tensor([-0.1, -0.1, 0.1, 0.1]))


def test_a_softmax_model_has_no_bias_to_update():
    model = build("Qwen3Moe")
    with r1.patch(model):
        with r1.collect_load(model) as load:
            model(tokens())
        assert load.counts.sum() == 33 * 2 * 2
        with pytest.raises(ValueError, match="with a selection bias, got Qwen3MoeTopKRouter"):
            r1.update_bias(model, load, rate=0.01)
        with pytest.raises(TypeError, match="summed: expected a bool, got str"):
            r1.update_bias(model, load, rate=0.01, summed="no")
        with (
            pytest.raises(TypeError, match="weights: expected a bool, got Tensor"),
            r1.record_routing(model, weights=torch.ones(2)),
        ):
            pass
