"""Put r1kernels under TRL's GRPOTrainer by one line: the same rewards, losses and metrics.

Run it: ``python docs/examples/trl_dropin.py``. It trains a tiny model with random weights for three steps, once with TRL
alone and once patched, and prints both logs.
"""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from r1kernels.integrations import trl as r1

WORDS = ["<pad>", "<eos>", *(f"w{i}" for i in range(30))]


def early_words(completions: list[str], **_: object) -> list[float]:
    """A task: the share of words out of the first half of the vocabulary."""
    found = [[int(word[1:]) < 15 for word in text.split() if word.startswith("w")] for text in completions]
    return [sum(words) / len(words) if words else 0.0 for words in found]


def make_trainer(directory: Path) -> GRPOTrainer:
    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    sizes = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    config = GRPOConfig(
        output_dir=str(directory), use_cpu=True, bf16=False, max_steps=3, per_device_train_batch_size=8,
        num_generations=4, max_completion_length=6, learning_rate=1.0, optim="sgd", logging_steps=1, report_to="none",
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    prompts = Dataset.from_dict({"prompt": [f"w{i} w{i + 1}" for i in range(20)]})
    model = LlamaForCausalLM(sizes)
    return GRPOTrainer(model, early_words, args=config, processing_class=tokenizer, train_dataset=prompts)


def train(patched: bool) -> list[dict[str, float]]:
    with tempfile.TemporaryDirectory() as directory, r1.patch() if patched else nullcontext():  # the drop-in
        trainer = make_trainer(Path(directory))
        trainer.train()
        return [row for row in trainer.state.log_history if "loss" in row]


def main() -> float:
    before, after = train(patched=False), train(patched=True)
    names = ("reward", "loss", "grad_norm", "entropy")
    print("step  " + "  ".join(f"{name:>22}" for name in names) + "   (TRL / r1kernels)")
    for one, other in zip(before, after, strict=True):
        print(
            f"{one['step']:>4}  " + "  ".join(f"{one[name]:>10.6f} /{other[name]:>10.6f}" for name in names)
        )
    pairs = zip(before, after, strict=True)
    difference = max(abs(one[name] - other[name]) for one, other in pairs for name in names)
    print(f"largest difference {difference:.2e}")
    return difference


if __name__ == "__main__":
    main()
