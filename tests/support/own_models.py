"""Small folders as a person brings them: a model of a public family with random weights, a byte-level BPE tokenizer
trained on a few sentences, a chat template, and the special tokens and the dtype that a test asks for.

    folder = write_folder(tmp_path / "own", "qwen2", template="chatml", bos=None, pad=None, dtype="bfloat16",
                          eos="<|endoftext|>", generation_eos=("<|im_end|>", "<|endoftext|>"))
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

SENTENCES = (
    "What is 12 plus 34? Think step by step, then answer.",
    "<think> 12 plus 34 is 46 </think> <answer> 46 </answer>",
    "think in <think> </think> then answer in <answer> </answer> .",
    "user : what is the capital of france assistant : the answer is paris",
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May.",
    "the user asks, the assistant answers: right or wrong, a reference and a response",
)

_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Name -> (template, its special tokens, the token that ends a turn, the token that begins a text).
TEMPLATES: dict[str, tuple[str, tuple[str, ...], str, str | None]] = {
    "chatml": (_CHATML, ("<|im_start|>", "<|im_end|>", "<|endoftext|>"), "<|im_end|>", None),
    # opens the thinking in the assistant's turn and leaves it out of past turns, as those of DeepSeek-R1's students do
    "chatml_think": (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{% if message['role'] == 'assistant' %}{{ message['content'].split('</think>')[-1] }}"
        "{% else %}{{ message['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
        ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
        "<|im_end|>",
        None,
    ),
    "llama3": (
        "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
        "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"),
        "<|eot_id|>",
        "<|begin_of_text|>",
    ),
    # knows no system turn
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for message in messages %}<start_of_turn>"
        "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
        "{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        ("<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>"),
        "<end_of_turn>",
        "<bos>",
    ),
    "mistral": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %} {{ message['content'] }}</s>"
        "{% else %}[INST] {{ message['content'] }} [/INST]{% endif %}{% endfor %}",
        ("<s>", "</s>", "[INST]", "[/INST]"),
        "</s>",
        "<s>",
    ),
}

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}

# Name of the family (transformers' model_type) -> sizes of a small model.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": _SIZES,
    "qwen3": {**_SIZES, "head_dim": 8},
    "llama": _SIZES,
    "mistral": _SIZES,
    "phi3": _SIZES,
    "gemma": {**_SIZES, "head_dim": 8},
    "gemma2": {**_SIZES, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 32},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "qwen3_moe": {
        **_SIZES,
        **_EXPERTS,
        "head_dim": 8,
        "moe_intermediate_size": 16,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "olmoe": {**_SIZES, **_EXPERTS},
    "mixtral": {**_SIZES, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {**_SIZES, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {**_SIZES, "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        **_SIZES,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": None,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "mamba": {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2},
    "qwen3_next": {
        **_SIZES,
        **_EXPERTS,
        "head_dim": 8,
        "num_hidden_layers": 4,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
}


def write_folder(
    path: Path,
    family: str = "qwen2",
    *,
    template: str | None = "chatml",
    eos: str | None = "",
    bos: str | None = "",
    pad: str | None = None,
    generation_eos: Sequence[str] = (),
    dtype: str = "float32",
    positions: int = 512,
    sentences: Sequence[str] = SENTENCES,
    vocab_size: int = 400,
    shard_size: str = "5GB",
    seed: int = 0,
    **sizes: Any,
) -> Path:
    """Write a model with its tokenizer as transformers does, and return `path`.

    Args:
        path: the folder, made here.
        family: of FAMILIES.
        template: of TEMPLATES, another chat template as it is written in jinja, or None: the tokenizer has none.
        eos, bos, pad: the tokenizer's tokens; None: it has none. "" takes those of the template for eos (its end of turn)
            and bos.
        generation_eos: tokens whose ids are the list of eos ids in generation_config.json; empty: the tokenizer's eos.
        dtype: "float32", "bfloat16" or "float16".
        positions: the longest text of the model, in tokens.
        sentences: what the tokenizer is trained on, beside all bytes.
        vocab_size: entries of the tokenizer, at most.
        shard_size: the largest file of weights, as transformers spells it.
        seed: of the random weights.
        sizes: fields of the model's config in place of those in FAMILIES.
    """
    text, tokens, end_of_turn, begin = TEMPLATES.get(template or "", (template, (), "<|endoftext|>", None))
    eos = end_of_turn if eos == "" else eos
    bos = begin if bos == "" else bos
    special = dict.fromkeys([*tokens, *(each for each in (eos, bos, pad) if each), *generation_eos])
    tokenizer = _tokenizer(list(special), sentences, vocab_size, eos, bos, pad, text)
    torch.manual_seed(seed)
    positions_name = {"gpt2": "n_positions", "mamba": ""}.get(family, "max_position_embeddings")
    config = AutoConfig.for_model(
        family,
        **{
            **FAMILIES[family],
            **({positions_name: positions} if positions_name else {}),
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **sizes,
        },
    )
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    if generation_eos:
        model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(list(generation_eos))
    model.save_pretrained(path, max_shard_size=shard_size)
    tokenizer.save_pretrained(path)
    return Path(path)


def edit_json(path: Path, **fields: Any) -> None:
    """Change fields of a JSON file in a folder; a field of None is taken out."""
    found = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({name: value for name, value in found.items() if value is not None}))


def _tokenizer(
    special: list[str],
    sentences: Sequence[str],
    vocab_size: int,
    eos: str | None,
    bos: str | None,
    pad: str | None,
    template: str | None,
) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    # one token each, but no special ones, as in Qwen3
    tokenizer.add_tokens(
        [AddedToken(tag, normalized=False, special=False) for tag in ("<think>", "</think>")]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos,
        bos_token=bos,
        pad_token=pad,
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = template
    return made


def write_sums(folder: Path) -> None:
    """40 problems of one's own, data.jsonl, and a right response to each, traces.jsonl."""
    rows = [{"question": f"What is {n} plus 1?", "answer": n + 1} for n in range(40)]
    traces = [
        {"question": row["question"], "response": f"<answer> {row['answer']} </answer>"} for row in rows
    ]
    for name, lines in (("data", rows), ("traces", traces)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
