"""A real DistillationTrainer on tiny models: steps with and without r1kernels give the same losses, entropies and gradients."""

from __future__ import annotations

import pytest
import torch

trl = pytest.importorskip("trl", reason="TRL is not installed: nothing to adapt")
datasets = pytest.importorskip("datasets", reason="TRL's trainer needs datasets")
pytest.importorskip("trl.kernels.chunked_divergence", reason="this TRL has no chunked divergence")

from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

import r1kernels  # noqa: E402
from r1kernels.integrations import trl as r1  # noqa: E402
from r1kernels.integrations import trl_divergence  # noqa: E402

WORDS = ["<pad>", "<eos>", *(f"w{i}" for i in range(45))]
STEPS = 3


def model(width, seed):
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS), hidden_size=width, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            pad_token_id=0, eos_token_id=1, bos_token_id=None, tie_word_embeddings=False,
        )
    )  # fmt: skip


def train(directory, beta):
    """(the log of a run, the student): the same prompts and the same random numbers each time."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    student, teacher = model(32, 0), model(48, 1)
    with torch.no_grad():
        teacher.lm_head.weight *= 20  # surer than random weights are
    config = trl.DistillationConfig(
        output_dir=str(directory), use_cpu=True, max_steps=STEPS, per_device_train_batch_size=4, max_completion_length=6, beta=beta,
        temperature=0.9, optim="sgd", learning_rate=0.5, logging_steps=1, report_to="none", save_strategy="no", seed=1,
        disable_tqdm=True, bf16=False, gradient_accumulation_steps=2, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = trl.DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=config,
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_dict({"prompt": [f"w{i} w{i + 1}" for i in range(20)]}),
    )
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row], student


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_steps_with_and_without_the_patch(tmp_path, beta, monkeypatch):
    own, one = train(tmp_path, beta)
    served = []
    monkeypatch.setattr(
        trl_divergence,
        "linear_divergence",
        lambda *a, **k: served.append(k["kind"]) or r1kernels.linear_divergence(*a, **k),
    )
    with r1.patch_divergence():
        ours, other = train(tmp_path, beta)
    kind = {0.0: "forward_kl", 0.5: "jsd", 1.0: "reverse_kl"}[beta]
    assert served == [kind] * (2 * STEPS)  # every micro-batch
    assert len(ours) == len(own) == STEPS
    for mine, their in zip(ours, own, strict=True):
        assert set(mine) == set(their)
        for name, value in their.items():
            if not name.endswith(("time", "_per_second", "runtime")):
                assert mine[name] == pytest.approx(value, rel=1e-4, abs=1e-5), (their["step"], name)
    # they did not agree by standing still
    assert all(row["grad_norm"] > 1e-2 for row in own)
    start = model(32, 0)
    for first, second, before in zip(one.parameters(), other.parameters(), start.parameters(), strict=True):
        moved = (first - before).abs().max()
        assert moved > 1e-5 and (first - second).abs().max() <= 1e-3 * moved
