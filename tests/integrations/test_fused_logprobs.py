"""fused_logprobs against the logits of transformers' own models: tied heads, biases, soft caps, scales, experts."""

from __future__ import annotations

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
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 4.0},
    "Phi": {},  # its head has a bias
    "DeepseekV3": {**LATENT},
    "FalconH1": {"lm_head_multiplier": 0.5, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8,
                 "head_dim": 16},
}  # fmt: skip


def build(name, **options):
    config_class = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")
    config = config_class(**{**SMALL, **MODELS.get(name, {}), **options})
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
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
    z = model(input_ids=ids, attention_mask=mask).logits[:, :-1].double() / temperature
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


def test_labels_are_the_inputs_where_the_mask_is_not_0():
    model, (ids, mask, _) = build("Llama"), batch()
    labels = ids.masked_fill(mask == 0, -100)
    own = r1.fused_logprobs(model, ids, mask)
    assert torch.equal(own, r1.fused_logprobs(model, ids, mask, labels))
    assert not own[0, :2].any() and (own[0, 2:] < 0).all()
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
        ValueError, match="expected a head that is a plain nn.Linear, got Biased in LlamaForCausalLM"
    ):
        r1.fused_logprobs(model, ids)
    model = build("Llama")
    model.lm_head.forward = lambda x: x
    with pytest.raises(ValueError, match="expected a head that is a plain nn.Linear, got Linear"):
        r1.fused_logprobs(model, ids)
    with pytest.raises(ValueError, match="got NoneType in LlamaModel"):
        r1.fused_logprobs(transformers.LlamaModel(config), ids)
    # BERT's head has a layer of its own between the states and the vocabulary
    bert = transformers.BertLMHeadModel(
        transformers.BertConfig(
            vocab_size=61,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            is_decoder=True,
        )
    )
    with pytest.raises(ValueError, match="BertLMHeadModel makes"):
        r1.fused_logprobs(bert, ids)
    assert "forward" not in vars(bert.base_model)  # the trial leaves nothing behind


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
