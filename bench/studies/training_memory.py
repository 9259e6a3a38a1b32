"""Peak memory of a GRPO step, beside what the dry run says.

A model of the shape of Qwen2-0.5B with random weights takes a step of the trainer's own GRPO in two minibatches; from the second
one on the optimizer holds its moments. Each case has a process of its own. The peak is the growth of its resident memory over what it held
before there was a model: once with all freed memory given back, which is that of tensors, and once in glibc's heap as it is.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from training import estimate, prompts
from training.loops import grpo
from training.model import prepare
from training.placement import placed
from training.policy import adapted
from training.recipe import Recipe, make
from training.rewards import Reward, Sample, Scored
from training.tasks.problem import Problem
from training.tokenizer import build_tokenizer

from ..memory import Peak
from ..step import stage
from ..table import Cell, Table

EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536"}
ALLOWED = 0.15  # share by which the peak may differ from the dry run's number
SIZES: dict[str, Any] = {
    **{"hidden_size": 896, "intermediate_size": 4864, "vocab_size": 151936, "tie_word_embeddings": True},
    **{"num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2},
}
TINY = {**SIZES, "hidden_size": 56, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 512}
# rank of adapters, recomputed layers, optimizer
CASES = [
    *((rank, recomputes, "adamw") for rank in (0, 16) for recomputes in (False, True)),
    (0, False, "adamw_8bit"),
]
QUESTION = " plus ".join(str(number) for number in range(90))
MICRO_BATCH = 330  # tokens: the question once, and two responses


def recipe_of(rank: int, recomputes: bool, optimizer: str) -> Recipe:
    """The settings of a case: four responses of 32 tokens to a long question, two in a minibatch, which is a micro-batch."""
    sizes = {"steps": 1, "prompts": 1, "group_size": 4, "minibatches": 2, "max_new_tokens": 32}
    zero = {**sizes, "micro_batch_tokens": MICRO_BATCH, "optimizer": optimizer}
    model = {"lora": {"rank": rank}}
    return make(
        {"stages": ["base", "zero"], "gradient_checkpointing": recomputes, "model": model, "zero": zero}
    )


def case(sizes: Mapping[str, Any], rank: int, recomputes: bool, optimizer: str) -> dict[str, Any]:
    """A step in this process, and what the dry run says of it."""
    recipe = recipe_of(rank, recomputes, optimizer)
    tokenizer, config = build_tokenizer(), _config(sizes)
    with stage(recipe, recipe.zero) as context, placed(recipe), Peak(torch.device("cpu")) as peak:
        torch.manual_seed(0)
        policy = adapted(prepare(Qwen2ForCausalLM(config)), context, recipe.model.lora)
        grpo.train(policy, tokenizer, _problems, prompts.chat, _reward, recipe.zero, context)
        read = [row["length"] for row in context.stage.metrics()]
    found = {"rank": rank, "gradient_checkpointing": recomputes, "optimizer": optimizer}
    tokens = {"question_tokens": question_tokens(), "response_tokens": read}
    dry_run = said(sizes, rank, recomputes, optimizer)
    return {**found, "peak_bytes": peak.bytes, "dry_run_bytes": dry_run, **tokens}


def said(sizes: Mapping[str, Any], rank: int, recomputes: bool, optimizer: str) -> int:
    """What the dry run says of a case: bytes that are held, and that a step takes beside them."""
    recipe = recipe_of(rank, recomputes, optimizer)
    model = estimate.count(_config(sizes), recipe.model.lora)
    held, step, _ = estimate.grpo_memory(model, recipe.zero, recipe, question_tokens())
    return round(held + (step or 0))


def question_tokens() -> int:
    """Tokens of the prompt."""
    return len(build_tokenizer().encode(prompts.plain(prompts.chat(_problems(0)[0]))))


def _config(sizes: Mapping[str, Any]) -> Qwen2Config:
    return Qwen2Config(**sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0)


def parameters(sizes: Mapping[str, Any]) -> int:
    """Weights of a model of these sizes."""
    return estimate.count(_config(sizes)).total


def _problems(step: int) -> list[Problem]:
    return [Problem(str(step), "made", "reasoning", "en", QUESTION, "0")]


def _reward(step: int, samples: list[Sample]) -> list[Scored]:
    """Every second response is good, so that every group learns."""
    values = (float(index % 2) for index in range(len(samples)))
    return [
        Scored(each, value, {"turn": Reward(value, "")}) for each, value in zip(samples, values, strict=True)
    ]


def measure(tiny: bool = False) -> dict[str, Any]:
    """Every case, each in a process of its own; tiny: does it work at all."""
    sizes = TINY if tiny else SIZES
    found = [alone(sizes, *one) for one in CASES]
    for one, case in zip(CASES, found, strict=True):
        case["heap_bytes"] = alone(sizes, *one, exact=False)["peak_bytes"]
    return {"sizes": sizes, "cases": found}


def alone(
    sizes: Mapping[str, Any], rank: int, recomputes: bool, optimizer: str, exact: bool = True
) -> dict[str, Any]:
    """A case in a process of its own: one that has run for long holds freed memory, which a step takes before it grows.

    exact: freed tensors go back to the system at once, so that the peak is that of tensors; else glibc's heap keeps
        what it likes of them.
    """
    words = [json.dumps([sizes, rank, recomputes, optimizer])]
    environment = {**os.environ, **(EXACT if exact else {})}
    done = subprocess.run(
        [sys.executable, "-m", __name__, *words], stdout=subprocess.PIPE, check=True, env=environment
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def tables(record: Mapping[str, Any]) -> list[Table]:
    """Measured and foretold, a row per case."""
    head = ("trained", "optimizer", "backward", "peak", "dry run", "dry run / peak", "peak in glibc's heap")
    found = Table("Memory of a GRPO step", head)
    for one in record["cases"]:
        trained = f"LoRA, rank {one['rank']}" if one["rank"] else "all weights"
        kept = "layers recompute" if one["gradient_checkpointing"] else "activations kept"
        peak, said = one["peak_bytes"], one["dry_run_bytes"]
        ratio = Cell(f"{said / peak:.2f}", "failed" if abs(said / peak - 1) > ALLOWED else "")
        memory, dry_run, heap = (f"{value / 2**30:.2f} GiB" for value in (peak, said, one["heap_bytes"]))
        found.rows.append([trained, one["optimizer"], kept, memory, dry_run, ratio, heap])
    return [found]


if __name__ == "__main__":
    print(json.dumps(case(*json.loads(sys.argv[1]))))
