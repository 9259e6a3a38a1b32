"""shared_prefix_logprobs and shared_prefix_states against the repeated form: transformers' own forward of each sequence."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import transformers
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import r1kernels
from r1kernels.integrations import transformers as r1
from tests.support import causal_models
from tests.support import prefix_models as models


def assert_parity(model, prompts, completions, values, gradients):
    tree = r1.prefix_tree(prompts, completions)
    logp, entropy = r1.shared_prefix_logprobs(
        model, tree, temperature=models.TEMPERATURE, return_entropy=True
    )
    found = models.gradients(model, logp, entropy)
    expected = models.repeated(model, prompts, completions)
    assert logp.shape == expected[0].shape
    assert models.difference(logp, expected[0]) < values
    assert models.difference(entropy, expected[1]) < values
    of_repeated = models.gradients(model, *expected)
    assert found.keys() == of_repeated.keys()
    worst = max(of_repeated, key=lambda name: models.difference(found[name], of_repeated[name]))
    assert models.difference(found[worst], of_repeated[worst]) < gradients, worst


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Qwen3"])
def test_float32_is_the_repeated_form_to_rounding(name):
    assert_parity(models.build(name), *models.sequences(), values=1e-6, gradients=1e-5)


@pytest.mark.parametrize("name", models.MODELS)
def test_float64_is_the_repeated_form(name):
    model = models.build(name, torch.float64)
    exact = name == "GPTNeoX"  # norms, rotations and eager softmaxes of the others run in float32
    assert_parity(model, *models.sequences(), *((1e-12, 1e-12) if exact else (1e-7, 1e-6)))


@pytest.mark.parametrize(
    ("prompts", "completions"),
    [
        ([[5]], [[7]]),
        ([[5], [5], [6]], [[7], [7], [8]]),  # the same sequence twice
        ([[5, 9, 11]] * 3, [[7], [], [8, 9]]),  # nothing to predict in one
        (
            [[*range(3, 40)], [*range(3, 23)], [*range(3, 30)]],
            [[50], [*range(23, 30)], [30, 31]],
        ),  # prompts within sequences
        ([[3, 4], [5, 6], [7]], [[8, 9, 10], [11], [12, 13]]),  # nothing in common
        (
            [[*range(3, 43)]] * 4,
            [[*range(20), 1], [*range(20), 2, 3], [*range(19), 50], [4]],
        ),  # completions begin alike
    ],
    ids=["single", "twice", "empty", "nested", "apart", "deep"],
)
def test_trees_of_any_shape(prompts, completions):
    model = models.build("Qwen3", torch.float64)
    tree = r1.prefix_tree(prompts, completions)
    logp = r1.shared_prefix_logprobs(model, tree, temperature=models.TEMPERATURE)
    expected = models.repeated(model, prompts, completions)[0]
    torch.testing.assert_close(logp, expected, rtol=1e-7, atol=1e-7)


def test_states_predict_the_completion_tokens_in_the_callers_order():
    model = models.build("Llama")
    prompts, completions = models.sequences()
    tree = r1.prefix_tree(prompts, completions)
    states = r1.shared_prefix_states(model, tree)
    assert tree.targets.tolist() == [token for row in completions for token in row]
    expected = [
        r1.head_inputs(model, torch.tensor([prompt + completion]))[0, len(prompt) - 1 : -1]
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    torch.testing.assert_close(states, torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_states_and_tree_are_what_linear_grpo_loss_takes():
    model = models.build("Gemma2", final_logit_softcapping=2.0)
    prompts, completions = models.sequences()
    tree = r1.prefix_tree(prompts, completions)
    old = torch.randn(len(tree.targets), generator=torch.Generator().manual_seed(0)) - 4
    advantages, mask = torch.linspace(-1, 1, len(prompts)), torch.ones(len(tree.targets), dtype=torch.int64)
    loss = r1kernels.linear_grpo_loss(
        r1.shared_prefix_states(model, tree),
        targets=tree.targets,
        old_logp=old,
        advantages=advantages,
        mask=mask,
        cu_seqlens=tree.cu_completions,
        temperature=models.TEMPERATURE,
        **r1.output_head(model)._asdict(),
    ).loss
    found = models.gradients(model, loss)
    logp = models.repeated(model, prompts, completions)[0]
    real = torch.arange(logp.shape[1]) < torch.tensor(tree.lengths).unsqueeze(1)
    padded = tree.pad(old)
    expected = r1kernels.grpo_loss(logp.float(), padded, advantages, real.long()).loss
    of_expected = models.gradients(model, expected)
    torch.testing.assert_close(loss, expected)
    assert max(models.difference(found[name], of_expected[name]) for name in of_expected) < 1e-5


def test_it_is_the_same_bit_for_bit_every_time():
    model = models.build("Mistral")
    tree = r1.prefix_tree(*models.sequences())
    first, second = (r1.shared_prefix_logprobs(model, tree) for _ in range(2))
    assert torch.equal(first, second)
    one, other = models.gradients(model, first), models.gradients(model, second)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    model = models.build("Gemma3").train()
    tree = r1.prefix_tree(*models.sequences())
    expected = r1.shared_prefix_logprobs(model, tree)
    of_expected = models.gradients(model, expected)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    logp = r1.shared_prefix_logprobs(model, tree)
    found = models.gradients(model, logp)
    assert torch.equal(logp, expected)
    assert all(torch.equal(found[name], of_expected[name]) for name in of_expected)


def test_checkpointing_of_torch_changes_nothing():
    model = models.build("Llama").train()
    tree = r1.prefix_tree(*models.sequences())
    of_expected = models.gradients(model, r1.shared_prefix_logprobs(model, tree))
    for reentrant in (CheckpointImpl.REENTRANT, CheckpointImpl.NO_REENTRANT):
        wrapped = models.build("Llama").train()
        apply_activation_checkpointing(
            wrapped,
            checkpoint_wrapper_fn=partial(checkpoint_wrapper, checkpoint_impl=reentrant),
            check_fn=lambda module: isinstance(module, LlamaDecoderLayer),
        )
        found = models.gradients(wrapped, r1.shared_prefix_logprobs(wrapped, tree))
        found = {name.replace("_checkpoint_wrapped_module.", ""): grad for name, grad in found.items()}
        assert all(torch.equal(found[name], of_expected[name]) for name in of_expected)


@pytest.mark.slow
def test_compiled_layers_give_the_same():
    model = models.build("Llama")
    prompts, completions = models.sequences()
    model.model.compile(backend="eager")
    logp = r1.shared_prefix_logprobs(
        model, r1.prefix_tree(prompts, completions), temperature=models.TEMPERATURE
    )
    found = models.gradients(model, logp)
    expected = models.repeated(model, prompts, completions)[0]
    of_expected = models.gradients(model, expected)
    assert models.difference(logp, expected) < 1e-6
    assert max(models.difference(found[name], of_expected[name]) for name in of_expected) < 1e-5


def test_the_model_is_left_as_it_was():
    model = models.build("Llama").train()
    model.gradient_checkpointing_enable()
    ids = torch.tensor([models.sequences()[0][0]])
    before = model(input_ids=ids).logits
    attention, checkpoint = (
        model.config._attn_implementation,
        model.model.layers[0]._gradient_checkpointing_func,
    )
    r1.shared_prefix_logprobs(model, r1.prefix_tree(*models.sequences()))
    assert model.config._attn_implementation == attention
    assert model.model.layers[0]._gradient_checkpointing_func is checkpoint
    assert torch.equal(model(input_ids=ids).logits, before)


def test_autocast_rounds_as_the_repeated_form_does():
    model = models.build("Llama")
    prompts, completions = models.sequences()
    exact = models.repeated(model, prompts, completions)[0]
    tree = r1.prefix_tree(prompts, completions)
    with torch.autocast("cpu", torch.bfloat16):
        logp = r1.shared_prefix_logprobs(model, tree, temperature=models.TEMPERATURE)
        rounded = models.repeated(model, prompts, completions)[0]
    assert models.difference(logp, exact) < 2 * models.difference(rounded, exact)
    assert all(grad.isfinite().all() for grad in models.gradients(model, logp).values())


@torch.no_grad()
@pytest.mark.parametrize("name", ["Llama", "Gemma2", "GptOss", "DeepseekV3"])
def test_bfloat16_rounds_as_the_repeated_form_does(name):
    rounded = models.build(name, torch.bfloat16)
    model = models.build(name)
    model.load_state_dict({key: value.float() for key, value in rounded.state_dict().items()})
    prompts, completions = models.sequences()
    exact = models.repeated(model, prompts, completions)[0]
    logp = r1.shared_prefix_logprobs(
        rounded, r1.prefix_tree(prompts, completions), temperature=models.TEMPERATURE
    )
    repeated = models.repeated(rounded, prompts, completions)[0]
    assert models.difference(logp, exact) < 2 * models.difference(repeated, exact)


def test_adapters_of_peft():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(models.build("Llama"), config).eval()
    assert_parity(model, *models.sequences(), values=1e-6, gradients=1e-5)


@pytest.mark.parametrize(
    ("kind", "name", "reason"),
    [
        ("llama4_text", "Llama4", "it has layers of chunked_attention"),
        ("qwen3_next", "Qwen3Next", "it has layers of linear_attention"),
        ("rwkv", "Rwkv", "its attention does not go through transformers' attention interface"),
        ("mamba", "Mamba", "it has layers of linear_attention"),
        ("gptj", "GPTJ", "its attention does not go through transformers' attention interface"),
        ("bloom", "Bloom", "its attention does not go through transformers' attention interface"),
        ("bart", "Bart", "its states differ by"),  # positions of its own, whatever the caller's are
    ],
)
def test_models_that_would_be_wrong_are_refused_by_name(kind, name, reason):
    model = causal_models.build(kind, getattr(transformers, f"{name}ForCausalLM"))
    tree = r1.prefix_tree([[5, 6, 7]] * 2, [[8], [9]])
    for _ in range(2):
        with pytest.raises(ValueError, match=f"model: {name}ForCausalLM cannot share prefixes: {reason}"):
            r1.shared_prefix_states(model, tree)
    assert r1.explain_shared_prefix(model, tree).startswith(f"refused: model: {name}")


def test_what_a_layer_does_besides_is_noticed():
    tree = r1.prefix_tree([[5, 6, 7]] * 2, [[8], [9]])
    model = models.build("Llama")

    def leaks(module, args, output):
        return output + output.cumsum(dim=1)

    for layer in model.model.layers:
        layer.mlp.register_forward_hook(leaks)
    with pytest.raises(ValueError, match="a change in one branch changes the states of others"):
        r1.shared_prefix_states(model, tree)
    model = models.build("Llama")
    for layer in model.model.layers:  # a mask that the attention function does not get to see
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, inputs: (args, {**inputs, "attention_mask": torch.zeros(1)}),
            with_kwargs=True,
        )
    with pytest.raises(ValueError, match="LlamaAttention: expected attention without a mask"):
        r1.shared_prefix_states(model, tree)
    model = models.build("Mistral")
    for layer in model.model.layers:
        layer.self_attn.config = models.build("Mistral", sliding_window=None).config
    with pytest.raises(ValueError, match="without the window of 8 tokens"):
        r1.shared_prefix_states(model, tree)


def test_no_memory_is_not_taken_for_a_model_that_cannot_share():
    model, tree = models.build("Llama"), r1.prefix_tree([[5, 6, 7]] * 2, [[8], [9]])

    def fails(module, args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    handle = model.model.layers[0].register_forward_pre_hook(fails)
    with pytest.raises(torch.OutOfMemoryError):
        r1.shared_prefix_states(model, tree)
    handle.remove()
    assert len(r1.shared_prefix_states(model, tree)) == 2


@pytest.mark.parametrize("wrong", [torch.nn.DataParallel, lambda model: "a name"])
def test_what_is_no_model_of_transformers_is_refused(wrong):
    model, tree = wrong(models.build("Llama")), r1.prefix_tree([[5]], [[7]])
    for call in (r1.shared_prefix_logprobs, r1.shared_prefix_states):
        with pytest.raises(ValueError, match="model: expected a causal language model of transformers"):
            call(model, tree)
    assert r1.explain_shared_prefix(model, tree).startswith("refused: model: expected a causal")


def test_dropout_is_refused():
    tree = r1.prefix_tree([[5, 6, 7]] * 2, [[8], [9]])
    model = models.build("Llama", attention_dropout=0.1)
    with pytest.raises(ValueError, match=r"dropout=0\.1; call model\.eval\(\)"):
        r1.shared_prefix_states(model.train(), tree)
    r1.shared_prefix_states(model.eval(), tree)
    model = models.build("GPTNeoX", hidden_dropout=0.1)
    with pytest.raises(
        ValueError, match=r"expected no dropout, got .*emb_dropout in GPTNeoX.*; call model\.eval\(\)"
    ):
        r1.shared_prefix_states(model.train(), tree)


def test_explain_says_which_way():
    tree = r1.prefix_tree(*models.sequences())
    text = r1.explain_shared_prefix(models.build("Gemma3"), tree)
    assert f"{tree.tokens} tokens in {len(tree.nodes)} nodes for {tree.repeated_tokens} repeated" in text
    assert "flash attention for CPUs" in text
    assert "sliding windows of 8 tokens" in text
    assert "plain PyTorch" in r1.explain_shared_prefix(models.build("Gemma2"), tree)  # its soft cap
