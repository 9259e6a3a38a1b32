"""A real GRPOTrainer on a tiny model: 20 steps with and without r1kernels give the same rewards, losses and metrics."""

from __future__ import annotations

import pytest
import torch

trl = pytest.importorskip("trl", reason="TRL is not installed: nothing to adapt")
datasets = pytest.importorskip("datasets", reason="TRL's trainer needs datasets")

from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

import r1kernels  # noqa: E402
from r1kernels.integrations import trl as r1  # noqa: E402
from r1kernels.integrations import trl_linear, trl_prefix  # noqa: E402

WORDS = ["<pad>", "<eos>", *(f"w{i}" for i in range(30))]


def train(directory, steps, adapters=None, words_of_prompt=2, **options):
    """The log of a run: the same prompts and the same random numbers each time; ``adapters`` is a configuration of PEFT.

    Plain gradient descent: Adam would make steps of full length out of gradients that are nothing but rounding.
    """
    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            pad_token_id=0, eos_token_id=1, bos_token_id=None,
        )
    )  # fmt: skip
    model.save_pretrained(directory / "model")  # where TRL finds the reference for the KL term
    config = trl.GRPOConfig(
        output_dir=str(directory), use_cpu=True, max_steps=steps, per_device_train_batch_size=8, num_generations=4,
        max_completion_length=6, optim="sgd", learning_rate=1.0, logging_steps=1, report_to="none", save_strategy="no", seed=1,
        disable_tqdm=True, bf16=False, gradient_accumulation_steps=2, **options,
    )  # fmt: skip

    def early_words(completions, **_):
        """The share of words out of the first half of the vocabulary."""
        found = [
            [int(word[1:]) < 15 for word in text.split() if word.startswith("w")] for text in completions
        ]
        return [sum(words) / len(words) if words else 0.0 for words in found]

    prompts = [" ".join(f"w{(i + n) % 30}" for n in range(words_of_prompt)) for i in range(20)]
    trainer = trl.GRPOTrainer(
        model=str(directory / "model"),
        reward_funcs=early_words,
        args=config,
        processing_class=tokenizer,
        peft_config=adapters,
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
    )
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"num_iterations": 2, "loss_type": "dapo", "beta": 0.05, "temperature": 0.9},
        {
            "num_iterations": 2,
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "entropy_coef": 0.01,
            "top_entropy_quantile": 0.5,
        },
    ],
    ids=["dapo with KL", "gspo with entropy"],
)
def test_twenty_steps_with_and_without_the_patch(tmp_path, options):
    own = train(tmp_path, 20, **options)
    with r1.patch():
        ours = train(tmp_path, 20, **options)
    assert_same_runs(ours, own)
    assert_learnt(own)
    assert max(row["clip_ratio/region_mean"] for row in own) > 0


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["dapo", "sapo"])
def test_twenty_steps_from_hidden_states(tmp_path, loss_type, monkeypatch):
    options = {"loss_type": loss_type, "beta": 0.05, "temperature": 0.9}
    own = train(tmp_path, 20, **options)
    served = []
    monkeypatch.setattr(
        trl_linear,
        "linear_grpo_loss",
        lambda *a, **k: served.append(1) or r1kernels.linear_grpo_loss(*a, **k),
    )
    with r1.patch(linear=True):
        ours = train(tmp_path, 20, **options)
    assert len(served) == 20 * 2  # every micro-batch
    assert_same_runs(ours, own)
    assert_learnt(own)


@pytest.mark.slow
def test_twenty_steps_of_adapters_from_hidden_states(tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is not installed: nothing to train")
    adapters = peft.LoraConfig(r=8, lora_alpha=64, target_modules="all-linear", init_lora_weights="gaussian")
    own = train(tmp_path, 20, adapters, beta=0.05)
    r1kernels.set_strict(True)  # whatever is not computed from hidden states is an error
    try:
        with r1.patch(linear=True):
            ours = train(tmp_path, 20, adapters, beta=0.05)
    finally:
        r1kernels.set_strict(False)
    assert_same_runs(ours, own, relative=1e-3)  # the steps of adapters are long, and rounding grows with them
    assert all(row["grad_norm"] > 1e-2 for row in own)


@pytest.mark.slow
@pytest.mark.parametrize("adapted", [False, True], ids=["whole model", "adapters"])
@pytest.mark.parametrize("linear", [False, True], ids=["log-probs", "hidden states"])
def test_twenty_steps_with_shared_prefixes(tmp_path, monkeypatch, linear, adapted):
    """Old (where the loss needs them), reference and new log-probs, with TRL's gradient checkpointing and shuffled rows."""
    adapters = None
    if adapted:
        peft = pytest.importorskip("peft", reason="PEFT is not installed: nothing to train")
        adapters = peft.LoraConfig(
            r=8, lora_alpha=64, target_modules="all-linear", init_lora_weights="gaussian"
        )
    trees = []
    build = trl_prefix.prefix_tree
    monkeypatch.setattr(trl_prefix, "prefix_tree", lambda *rows: trees.append(build(*rows)) or trees[-1])
    options = {"beta": 0.05, "temperature": 0.9, "words_of_prompt": 20}
    options |= {} if linear else {"num_iterations": 2}
    own = train(tmp_path, 20, adapters, **options)
    r1kernels.set_strict(True)  # whatever is not computed from hidden states is an error
    try:
        with r1.patch(prefix=True, linear=linear):
            ours = train(tmp_path, 20, adapters, **options)
    finally:
        r1kernels.set_strict(False)
    assert_same_runs(ours, own, relative=1e-3 if adapted else 1e-4)
    assert sum(tree.tokens for tree in trees) < 0.6 * sum(tree.repeated_tokens for tree in trees)
    assert all(row["grad_norm"] > 1e-2 for row in own)


def assert_same_runs(ours, own, relative=1e-4):
    assert len(ours) == len(own) == 20
    for mine, other in zip(ours, own, strict=True):
        assert set(mine) == set(other)
        for name, value in other.items():
            if not name.endswith(("time", "_per_second", "runtime")):
                assert mine[name] == pytest.approx(value, rel=relative, abs=relative / 10), (
                    other["step"],
                    name,
                )


def assert_learnt(own):
    """They did not agree by standing still."""
    rewards = [row["reward"] for row in own if "reward" in row]
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.3
