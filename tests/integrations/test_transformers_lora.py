"""LoRA on the experts of transformers: PEFT's target_parameters on the kernels, against PEFT's own forward."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from r1kernels.integrations import transformers as r1
from tests.support.mixtures import SMALL, assert_same_step, build, step, tokens

peft = pytest.importorskip("peft", reason="PEFT is not installed: nothing to adapt")

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def adapted(model, **options):
    options = {"r": 2, "target_parameters": EXPERTS} | options
    return peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, **options))


def gpt_oss():
    torch.manual_seed(0)
    config = transformers.GptOssConfig(**{**SMALL, "num_local_experts": 4, "head_dim": 8})
    return transformers.GptOssForCausalLM(config).train()


def of_experts(model):
    return {name: weight for name, weight in model.named_parameters() if "experts" in name}


def kept_sizes(model, ids):
    """The sizes of all tensors that autograd keeps of one forward, parameters left out."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes = []

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in parameters:
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=ids, labels=ids)
    return sizes


@pytest.mark.parametrize("name", ["DeepseekV3", "Qwen3Moe", "Mixtral", "gpt-oss"])
@pytest.mark.parametrize("parameters", [EXPERTS, EXPERTS[:1], EXPERTS[1:]], ids=["both", "up", "down"])
def test_gradients_are_those_of_peft(name, parameters):
    ids = tokens()
    model = adapted(gpt_oss() if name == "gpt-oss" else build(name), target_parameters=parameters)
    model.set_experts_implementation("eager")
    own = step(model, ids)
    factors = [grad for one, grad in own[1].items() if "experts" in one and "lora_" in one]
    assert len(factors) >= 2 * len(parameters) and all(grad.any() for grad in factors)
    with r1.patch(model):
        assert_same_step(step(model, ids), own)
    assert torch.equal(step(model, ids)[0].logits, own[0].logits)


def test_no_matrix_of_the_experts_is_kept():
    """PEFT's own forward keeps W + B A of every layer for its backward."""
    ids = tokens(batch=1, length=3)
    model = adapted(build("Qwen3Moe", moe_intermediate_size=160))
    whole = min(weight.numel() for name, weight in of_experts(model).items() if "lora_" not in name)
    assert max(kept_sizes(model, ids)) >= whole
    with r1.patch(model):
        assert max(kept_sizes(model, ids)) < whole / 4


def test_in_bfloat16():
    ids = tokens()
    model = adapted(build("DeepseekV3").bfloat16())
    exact = step(copy.deepcopy(model).float(), ids)
    own = step(model, ids)
    with r1.patch(model):
        ours = step(model, ids)
    error, peer = ((one[0].logits.float() - exact[0].logits).abs().median() for one in (ours, own))
    assert error <= 2 * peer + 1e-3
    assert all(torch.isfinite(grad).all() for grad in ours[1].values() if grad is not None)


def test_scales_and_ranks_of_their_own():
    ids = tokens()
    model = adapted(build("Qwen3Moe"))
    for module in model.modules():
        if getattr(module, "parameter_name", "") == "down_proj":
            module.scaling["default"] = 0.25
    own = step(model, ids)
    with r1.patch(model):
        assert_same_step(step(model, ids), own)


def test_adapters_that_are_off_several_or_merged():
    ids = tokens()
    model = adapted(build("Qwen3Moe"))
    plain, own = step(build("Qwen3Moe"), ids)[0].logits, step(model, ids)[0].logits
    assert not torch.allclose(plain, own)
    with r1.patch(model):
        with model.disable_adapter():
            torch.testing.assert_close(model(input_ids=ids).logits, plain, rtol=1e-4, atol=1e-5)
        model.add_adapter("other", peft.LoraConfig(r=3, init_lora_weights=False, target_parameters=EXPERTS))
        model.base_model.set_adapter(["default", "other"])
        ours = step(model, ids)
    assert_same_step(ours, step(model, ids))
    model.base_model.set_adapter(["default"])
    merged = model.merge_and_unload()
    with r1.patch(merged):
        torch.testing.assert_close(merged(input_ids=ids).logits, own, rtol=1e-4, atol=1e-5)
