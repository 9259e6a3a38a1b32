"""fused_logprobs against the logits of transformers' own models: tied heads, biases, soft caps, scales, experts."""

from __future__ import annotations

import threading

import pytest
import torch
import transformers
from torch import nn

import r1kernels
from r1kernels.integrations import transformers as r1

SMALL = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}  # fmt: skip
LATENT = {"kv_lora_rank": 8, "q_lora_rank": None, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
          "moe_intermediate_size": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
          "n_shared_experts": 1, "first_k_dense_replace": 0}  # fmt: skip
MODELS = {
    "Llama": {},
    "Qwen2": {"tie_word_embeddings": True},
    "Gemma2": {"head_dim": 16, "final_logit_softcapping": 3.0},
    "Gemma3": {"head_dim": 16, "final_logit_softcapping": None},
    "Gemma4": {"head_dim": 16, "global_head_dim": 16, "final_logit_softcapping": 3.0, "vocab_size_per_layer_input": 61,
               "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0, "layer_types": ["full_attention"]},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 4.0},
    "MiniCPM3": {"dim_model_base": 8, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
                 "v_head_dim": 8},  # its factor stands before the head
    "Phi": {},  # its head has a bias
    "DeepseekV3": {**LATENT},
    "Llama4": {"head_dim": 16, "intermediate_size_mlp": 32, "num_local_experts": 2, "layer_types": ["full_attention"]},
    "FalconH1": {"lm_head_multiplier": 0.5, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8,
                 "head_dim": 16},
    "RecurrentGemma": {"lru_width": 32, "attention_window_size": 16, "head_dim": 16, "block_types": ["recurrent", "attention"], "num_hidden_layers": 2,
                       "logits_soft_cap": 3.0},
    # decoders whose outputs have other names, or which another class calls
    "GPT2": {"n_embd": 32, "n_head": 2, "n_layer": 1},
    "GPTBigCode": {"n_embd": 32, "n_head": 2, "n_layer": 1},
    "OPT": {"ffn_dim": 32, "word_embed_proj_dim": 16},
    "XGLM": {"d_model": 32, "ffn_dim": 32, "num_layers": 1, "attention_heads": 2},
    "BioGpt": {},
    "Bart": {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32},
    "Mamba": {"state_size": 8, "time_step_rank": 4},
    "Rwkv": {"attention_hidden_size": 32, "num_hidden_layers": 2},
    # between its states and the vocabulary stands a layer more
    "Bert": {"is_decoder": True},
}  # fmt: skip
CONFIGS = {"Gemma3": "Gemma3TextConfig", "Gemma4": "Gemma4TextConfig", "Llama4": "Llama4TextConfig"}
CLASSES = {"GPT2": "GPT2LMHeadModel", "Bert": "BertLMHeadModel"}


def build(name, **options):
    config_class = getattr(transformers, CONFIGS.get(name, f"{name}Config"))
    config = config_class(**{**SMALL, **MODELS.get(name, {}), **options})
    torch.manual_seed(0)
    model = getattr(transformers, CLASSES.get(name, f"{name}ForCausalLM"))(config).eval()
    with torch.no_grad():  # logits of a few nats, so that caps and scales matter
        model.get_output_embeddings().weight.mul_(20)
        if model.get_output_embeddings().bias is not None:
            model.get_output_embeddings().bias.normal_()
    return model


def batch():
    """Two sequences with padding on the left of the first one, and a prompt of 3 tokens without labels."""
    ids = torch.randint(1, 61, (2, 10), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3], ids[0, :3] = 0, 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :5] = -100
    return ids, mask, labels


def from_logits(model, ids, mask, labels, temperature):
    """transformers' own logits, and the formulas in float64."""
    z = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].double() / temperature
    logp, targets = z.log_softmax(-1), labels[:, 1:]
    kept = (targets != -100).double()
    chosen = logp.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return chosen * kept, -(logp.exp() * logp).sum(-1) * kept


def gradients(model, logp, entropy):
    model.zero_grad()
    (logp.sum() + 0.5 * entropy.sum()).backward()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients_are_those_of_the_logits(name):
    model, (ids, mask, labels) = build(name), batch()
    logp, entropy = r1.fused_logprobs(model, ids, mask, labels, temperature=0.8, return_entropy=True)
    expected, expected_entropy = from_logits(model, ids, mask, labels, 0.8)
    assert logp.shape == entropy.shape == (2, 9) and logp.dtype == torch.float32
    assert not logp[:, :4].any()  # no labels there
    torch.testing.assert_close(logp, expected.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entropy, expected_entropy.float(), rtol=1e-4, atol=1e-5)
    mine, other = gradients(model, logp, entropy), gradients(model, expected, expected_entropy)
    assert set(mine) == set(other)
    for parameter, gradient in other.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(mine[parameter], gradient, rtol=1e-4, atol=1e-4 * scale + 1e-7)


def test_labels_are_the_inputs_where_nothing_is_predicted_from_padding():
    model, (ids, mask, _) = build("Llama"), batch()
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 3] = -100  # the first real token stands behind padding
    own = r1.fused_logprobs(model, ids, mask)
    assert torch.equal(own, r1.fused_logprobs(model, ids, mask, labels))
    assert not own[0, :3].any() and (own[0, 3:] < 0).all()
    # the same tokens with padding on the right
    turned, turned_mask = ids.roll(-3, 1), mask.roll(-3, 1)
    right = r1.fused_logprobs(model, turned[:1], turned_mask[:1])
    torch.testing.assert_close(right[0, :6], own[0, 3:], rtol=1e-4, atol=1e-4)
    assert not right[0, 6:].any()
    whole = r1.fused_logprobs(model, ids)
    torch.testing.assert_close(whole[1], own[1])
    assert (whole < 0).all()
    nothing = r1.fused_logprobs(model, ids, mask, torch.full_like(ids, -100))
    assert not nothing.any()
    nothing.sum().backward()  # a batch without labels still trains, with gradients of 0


def test_the_head_of_a_model_is_keywords_of_the_ops():
    model = build("Gemma2")
    head = r1.output_head(model)
    assert head.weight is model.lm_head.weight and head.bias is None
    assert (head.softcap, head.logit_scale) == (3.0, 1.0)
    assert r1.output_head(build("Granite")).logit_scale == 0.25
    hidden = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    logp = r1kernels.linear_logprobs(hidden, targets=torch.arange(4), **head._asdict())
    z = 3.0 * torch.tanh(hidden @ model.lm_head.weight.T / 3.0)
    torch.testing.assert_close(logp, z.log_softmax(-1)[torch.arange(4), torch.arange(4)])


def test_bfloat16():
    model, (ids, mask, labels) = build("Cohere").bfloat16(), batch()
    logp = r1.fused_logprobs(model, ids, mask, labels)
    assert logp.dtype == torch.float32
    wide = from_logits(model, ids, mask, labels, 1.0)[0]  # from logits rounded to bfloat16
    torch.testing.assert_close(logp, wide.float(), rtol=0.02, atol=0.05)


class OtherCap(transformers.LlamaForCausalLM):
    """A cap that no configuration tells."""

    def forward(self, **kwargs):
        outputs = super().forward(**kwargs)
        outputs.logits = 50.0 * torch.tanh(outputs.logits / 50.0)
        return outputs


class Biased(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def test_heads_that_are_not_known_are_refused():
    config = transformers.LlamaConfig(**SMALL)
    ids = batch()[0]
    with pytest.raises(
        ValueError, match="OtherCap makes other logits of its head than softcap None and scale 1"
    ):
        r1.fused_logprobs(OtherCap(config), ids)
    model = build("Llama")
    model.lm_head = Biased(32, 61)
    with pytest.raises(
        ValueError, match=r"expected a head that is a plain nn.Linear, got .*Biased in LlamaForCausalLM"
    ):
        r1.fused_logprobs(model, ids)
    model = build("Llama")
    model.lm_head.forward = lambda x: x
    with pytest.raises(
        ValueError, match="a plain nn.Linear, got torch.nn.modules.linear.Linear with a forward of its own"
    ):
        r1.fused_logprobs(model, ids)
    with pytest.raises(ValueError, match="got NoneType in LlamaModel"):
        r1.fused_logprobs(transformers.LlamaModel(config), ids)
    model = build("Llama")
    model.get_output_embeddings = lambda: model.model.layers[0].mlp.up_proj
    with pytest.raises(ValueError, match="makes other logits of its head"):
        r1.fused_logprobs(model, ids)
    model.get_output_embeddings = lambda: nn.Linear(32, 61)
    with pytest.raises(ValueError, match="expected a model that holds its head"):
        r1.fused_logprobs(model, ids)
    assert not any(module._forward_pre_hooks for module in model.modules())  # the trial leaves nothing behind


def test_what_changes_the_logits_after_the_first_call_is_noticed():
    ids = batch()[0]
    model = build("Llama")
    expected = r1.fused_logprobs(model, ids)
    hook = model.lm_head.register_forward_hook(lambda module, args, logits: logits * 2)
    with pytest.raises(ValueError, match="LlamaForCausalLM makes other logits of its head"):
        r1.fused_logprobs(model, ids)
    hook.remove()
    torch.testing.assert_close(r1.fused_logprobs(model, ids), expected)
    # one before the head changes its states, which are taken behind it
    hook = model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    own = from_logits(model, ids, None, ids, 1.0)[0].float()
    torch.testing.assert_close(r1.fused_logprobs(model, ids), own, rtol=1e-4, atol=1e-4)
    hook.remove()
    model.register_forward_hook(
        lambda module, args, outputs: outputs.__setitem__("logits", outputs.logits * 2)
    )
    with pytest.raises(ValueError, match="makes other logits"):
        r1.output_head(model)
    model = build("Cohere")
    r1.output_head(model)
    model.logit_scale = 0.5
    with pytest.raises(ValueError, match="scale 0.25, which its configuration tells"):
        r1.output_head(model)
    model.config.logit_scale = 0.5
    assert r1.output_head(model).logit_scale == 0.5
    model = build("FalconH1")
    r1.output_head(model)
    model.model.lm_head_multiplier = 0.75
    with pytest.raises(ValueError, match="scale 0.5, which its configuration tells"):
        r1.output_head(model)


def test_the_head_inputs_are_the_states_that_make_the_logits():
    model, (ids, mask, _) = build("MiniCPM3"), batch()
    hidden = r1.head_inputs(model, input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(model.lm_head(hidden), model(ids, attention_mask=mask).logits)
    with torch.no_grad():
        assert not r1.head_inputs(model, input_ids=ids).requires_grad

    class Twice(transformers.LlamaForCausalLM):
        def forward(self, **kwargs):
            super().forward(**kwargs)
            return super().forward(**kwargs)

    with pytest.raises(ValueError, match="a forward that calls its head once, Twice does so 2 times"):
        r1.head_inputs(Twice(transformers.LlamaConfig(**SMALL)), input_ids=ids)


def test_a_forward_of_another_thread_in_the_middle_is_its_own():
    model, (ids, *_) = build("Llama"), batch()
    expected = model(ids).logits
    found, main = [], threading.get_ident()

    def meanwhile(module, args, outputs):
        if threading.get_ident() == main:
            other = threading.Thread(target=lambda: found.append(model(ids).logits))
            other.start()
            other.join()

    model.model.register_forward_hook(meanwhile)
    r1.fused_logprobs(model, ids)
    assert len(found) == 2  # in the trial and in the forward
    for logits in found:
        assert torch.equal(logits, expected)


def test_the_trial_draws_no_random_numbers_and_keeps_the_mode():
    model = build("GPT2", embd_pdrop=0.5).train()
    torch.manual_seed(3)
    r1.output_head(model)
    first = torch.rand(2)
    torch.manual_seed(3)
    assert torch.equal(first, torch.rand(2))
    assert model.training


def test_gradient_checkpointing_and_autocast():
    model, (ids, mask, labels) = build("Llama").train(), batch()
    expected = r1.fused_logprobs(model, ids, mask, labels)
    gradient = gradients(model, expected, expected)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    logp = r1.fused_logprobs(model, ids, mask, labels)
    torch.testing.assert_close(logp, expected)
    for name, one in gradients(model, logp, logp).items():
        torch.testing.assert_close(one, gradient[name])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = r1.fused_logprobs(build("Llama"), ids, mask, labels)
    torch.testing.assert_close(narrow, expected, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("whole", ["torch.compile", "compile()", "layers"])
def test_compiled_models(whole):
    model, (ids, mask, labels) = build("Llama"), batch()
    expected, logits = r1.fused_logprobs(model, ids, mask, labels), model(ids).logits
    model = build("Llama")
    compiled = model
    if whole == "torch.compile":
        compiled = torch.compile(model, backend="eager")
    elif whole == "compile()":
        model.compile(backend="eager")
    else:
        model.model.compile(backend="eager")
    for _ in range(2):
        torch.testing.assert_close(r1.fused_logprobs(compiled, ids, mask, labels), expected)
        torch.testing.assert_close(compiled(ids).logits, logits)


def test_a_compiled_call_of_a_model():
    model, fresh, (ids, mask, labels) = build("Llama"), build("Llama"), batch()
    around = torch.compile(lambda: r1.fused_logprobs(fresh, ids, mask, labels), backend="eager")
    torch.testing.assert_close(around(), r1.fused_logprobs(model, ids, mask, labels))


def test_models_inside_peft():
    peft = pytest.importorskip("peft", reason="PEFT is not installed: nothing to serve")
    ids, mask, labels = batch()

    def adapted(**options):
        torch.manual_seed(1)
        config = peft.LoraConfig(r=2, init_lora_weights=False, **options)
        return peft.get_peft_model(build("Llama"), config).eval()

    model = adapted(target_modules=["q_proj", "v_proj"])
    logp, entropy = r1.fused_logprobs(model, ids, mask, labels, return_entropy=True)
    expected = from_logits(model, ids, mask, labels, 1.0)
    torch.testing.assert_close(logp, expected[0].float(), rtol=1e-4, atol=1e-5)
    mine, other = gradients(model, logp, entropy), gradients(model, *expected)
    assert set(mine) == set(other) and all("lora_" in name for name in mine)
    for name, gradient in other.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))
    torch.testing.assert_close(r1.fused_logprobs(model.get_base_model(), ids, mask, labels), logp)
    for options, name in (
        ({"target_modules": ["q_proj", "lm_head"]}, r"peft.tuners.lora.layer.Linear \(an adapter: merge it"),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
            r"ModulesToSaveWrapper \(an adapter",
        ),
    ):
        with pytest.raises(ValueError, match=f"a plain nn.Linear, got .*{name}"):
            r1.fused_logprobs(adapted(**options), ids)
    prompt = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    with pytest.raises(
        ValueError, match=r"for input_ids \(2, 10\) at the head of PeftModelForCausalLM, got \(2, 13, 32\)"
    ):
        r1.fused_logprobs(peft.get_peft_model(build("Llama"), prompt), ids)


def test_bad_arguments():
    model, (ids, mask, labels) = build("Llama"), batch()
    with pytest.raises(ValueError, match="labels"):
        r1.fused_logprobs(model, ids, mask, labels[:, 1:])
    with pytest.raises(ValueError, match="attention_mask"):
        r1.fused_logprobs(model, ids, mask[:, 1:], labels)
    with pytest.raises(ValueError, match="input_ids"):
        r1.fused_logprobs(model, ids[0])
    with pytest.raises(ValueError, match="temperature"):
        r1.fused_logprobs(model, ids, temperature=0.0)
    labels[1, 9] = 61
    with pytest.raises(IndexError, match="targets"):
        r1.fused_logprobs(model, ids, mask, labels)


def test_routing_records_do_not_see_the_trial():
    model, (ids, mask, _) = build("DeepseekV3"), batch()
    with (
        r1.patch(model),
        r1.record_routing(model) as record,
        r1.collect_load(model, attention_mask=mask) as load,
    ):
        r1.fused_logprobs(model, ids, mask)
    assert record.forward().shape == (1, 20, 2)
    assert load.counts.sum() == int(mask.sum()) * 2
