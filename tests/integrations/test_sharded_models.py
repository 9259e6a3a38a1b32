"""Models inside DistributedDataParallel and under FSDP2 (``fully_shard``), in a group of one process."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from r1kernels.integrations import transformers as r1

SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 2, "pad_token_id": 0}  # fmt: skip
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "head_dim": 16,
    "initializer_range": 0.3,
}
IDS = torch.randint(1, 61, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def build():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


def shard(model, mesh, **options):
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh, **options)


def step(model, logp):
    """Gradients of a sum of log-probs, whole and by name; the model keeps none."""
    logp.sum().backward()
    gradients = {name.removeprefix("module."): one.grad for name, one in model.named_parameters()}
    found = {
        name: one.full_tensor() if isinstance(one, DTensor) else one.clone()
        for name, one in gradients.items()
    }
    model.zero_grad()
    return found


def assert_same_gradients(mine, other):
    assert set(mine) == set(other)
    for name, gradient in other.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-4, atol=1e-5)


def count_forwards(model):
    calls = []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_data_parallel(mesh):
    plain, parallel = build(), DistributedDataParallel(build(), find_unused_parameters=True)
    expected = r1.fused_logprobs(plain, IDS)
    gradients = step(plain, expected)
    for _ in range(2):
        logp = r1.fused_logprobs(parallel, IDS)
        torch.testing.assert_close(logp, expected)
        assert_same_gradients(step(parallel, logp), gradients)
    parallel = DistributedDataParallel(torch.compile(build(), backend="eager"))
    with pytest.raises(ValueError, match="got DistributedDataParallel around a compiled one"):
        r1.fused_logprobs(parallel, IDS)


def test_a_sharded_head_is_refused_before_any_forward(mesh):
    model = shard(build(), mesh)
    calls = count_forwards(model)
    message = r"head whose weight is whole, got a DTensor .* in FSDPLlamaForCausalLM: under FSDP2 call model.unshard\(\)"
    for _ in range(2):  # the second time after a training step
        calls.clear()
        for refused in (lambda: r1.fused_logprobs(model, IDS), lambda: r1.output_head(model)):
            with pytest.raises(ValueError, match=message):
                refused()
        assert not calls
        model(IDS, labels=IDS).loss.backward()
    partitioned = build()
    partitioned.lm_head.weight = nn.Parameter(torch.empty(0))  # as DeepSpeed ZeRO-3 leaves it
    with pytest.raises(
        ValueError, match=r"got shape \(0,\) in LlamaForCausalLM: gather what FSDP or DeepSpeed"
    ):
        r1.output_head(partitioned)


def test_what_the_refusal_says_works(mesh):
    plain, model = build(), shard(build(), mesh)
    expected = r1.fused_logprobs(plain, IDS)
    gradients = step(plain, expected)
    for _ in range(2):
        model.unshard()
        logp = r1.fused_logprobs(model, IDS)
        torch.testing.assert_close(logp, expected)
        assert_same_gradients(step(model, logp), gradients)
    # a root that gives its weights back after the forward
    model = shard(build(), mesh, reshard_after_forward=True)
    model.unshard()
    with pytest.raises(ValueError, match="reshard_after_forward=False, the default of the outermost module"):
        r1.fused_logprobs(model, IDS)


def test_shared_prefixes(mesh):
    tree = r1.prefix_tree([[*range(1, 20)]] * 3 + [[5]], [[7, 8], [9], [10, 11, 12], [13]])
    plain, parallel, model = build(), DistributedDataParallel(build()), shard(build(), mesh)
    expected = r1.shared_prefix_logprobs(plain, tree)
    gradients = step(plain, expected)
    for _ in range(2):
        model.unshard()
        for one in (parallel, model):
            logp = r1.shared_prefix_logprobs(one, tree)
            torch.testing.assert_close(logp, expected)
            assert_same_gradients(step(one, logp), gradients)


def test_trl_falls_back(mesh):
    pytest.importorskip("trl", reason="TRL is not installed: nothing to adapt")
    from r1kernels.integrations import trl_linear

    trainer = SimpleNamespace(
        loss_type="grpo", off_policy_mask_threshold=None, top_entropy_quantile=1.0, _entropy_bonus_enabled=False,
        aux_loss_enabled=False, args=SimpleNamespace(delta=None), epsilon_high=0.2,
        accelerator=SimpleNamespace(unwrap_model=lambda model: model),
    )  # fmt: skip
    assert trl_linear.why_not(trainer, build(), {}) == ""
    model = shard(build(), mesh)
    calls = count_forwards(model)
    for _ in range(2):
        assert "got a DTensor" in trl_linear.why_not(trainer, model, {})
        assert not calls
        model(IDS, labels=IDS).loss.backward()
        calls.clear()


@pytest.mark.parametrize("order", ["patch first", "shard first"])
def test_mixtures_can_be_patched_before_and_after(mesh, order):
    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES, **EXPERTS))
    plain = copy.deepcopy(model)
    expected = plain(IDS, labels=IDS)
    gradients = step(plain, expected.loss)
    if order == "patch first":
        patch, _ = r1.patch(model), shard(model, mesh)
    else:
        shard(model, mesh)
        patch = r1.patch(model)
    for _ in range(2):
        with r1.record_routing(model) as record:
            ours = model(IDS, labels=IDS)
        torch.testing.assert_close(ours.logits, expected.logits, rtol=1e-4, atol=1e-5)
        assert_same_gradients(step(model, ours.loss), gradients)
        assert record.forward().shape == (2, IDS.numel(), 2)
    patch.undo()
    torch.testing.assert_close(model(IDS).logits, expected.logits)
