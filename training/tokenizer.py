"""The closed word-level tokenizer of the small recipes.

Whole words of the tasks' languages, single digits, punctuation, atomic tags, and single letters for any other word, so
that a person may type anything in `chat`. Characters alone would double the length of every sequence.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from training import prompts
from training.tasks import arithmetic, general

PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
TAGS = ("<think>", "</think>", "<answer>", "</answer>", "<|special_token|>")
DIGITS = tuple("0123456789")
PUNCTUATION = ("```", "\n", *".,:;?!+-*/=()[]{}\"'<>|_#%")
LETTERS = tuple("abcdefghijklmnopqrstuvwxyzäöüß")
MAX_ENTRIES = 300


def vocabulary_words() -> list[str]:
    """Every word that the prompts and the tasks register, without repetition, in a stable order."""
    sources = (prompts.WORDS, arithmetic.WORDS, general.WORDS)
    return sorted({word for source in sources for words in source.values() for word in words})


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer: at most 300 entries, pad differs from eos, text is lower-cased.

    `decode` joins tokens by single spaces, except that the digits of one number stand together ("57"), and
    `encode(decode(ids))` gives the same ids back. `decode(ids, skip_special_tokens=True)` drops pad, bos and eos and keeps
    the tags.
    """
    words = vocabulary_words()
    entries = list(dict.fromkeys([PAD, BOS, EOS, UNKNOWN, *TAGS, *PUNCTUATION, *DIGITS, *LETTERS, *words]))
    if len(entries) > MAX_ENTRIES:
        raise ValueError(f"the vocabulary must hold at most {MAX_ENTRIES} entries, got {len(entries)}")
    tokenizer = Tokenizer(models.WordLevel({entry: i for i, entry in enumerate(entries)}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    # A known word counts only as a whole word; every other character that is not a blank is a token of its own.
    whole_word = rf"(?<![^\W\d_]){_any_of(word for word in words if len(word) > 1)}(?![^\W\d_])"
    pattern = Regex(whole_word + r"|```|\n|\S")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="removed", invert=True)
    # WordPiece joins by spaces (no token starts with its prefix), then the digits of a number close up.
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="\0", cleanup=False),
            decoders.Fuse(),
            decoders.Replace(Regex(r"(?<=\d) (?=\d)"), ""),
        ]
    )
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=1_000_000,
    )


def _any_of(words: Iterable[str]) -> str:
    """The pattern of these words, longer ones first, that reads each letter once: "an(?:d|swer)"."""
    tails: dict[str, list[str]] = {}
    for word in words:
        tails.setdefault(word[:1], []).append(word[1:])
    ends = tails.pop("", None)
    choices = "|".join(re.escape(head) + _any_of(rest) for head, rest in tails.items())
    return f"(?:{choices})" + "?" * bool(ends) if choices else ""
