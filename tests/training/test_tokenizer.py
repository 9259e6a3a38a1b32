"""The closed vocabulary: size, tags, numbers, unknown words, and the round trip."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.checkpoint import load_model, save_model
from training.model import build_model
from training.sections import Model
from training.tokenizer import MAX_ENTRIES, TAGS, build_tokenizer

TOKENIZER = build_tokenizer()


def encode(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def test_the_vocabulary_is_closed_and_small():
    assert len(TOKENIZER) <= MAX_ENTRIES
    assert TOKENIZER.pad_token_id != TOKENIZER.eos_token_id
    assert sorted(TOKENIZER.get_vocab().values()) == list(range(len(TOKENIZER)))


@pytest.mark.parametrize("tag", TAGS)
def test_a_tag_is_one_token_that_decoding_keeps(tag):
    assert len(encode(tag)) == 1
    assert TOKENIZER.decode(encode(f"{tag} 5"), skip_special_tokens=True) == f"{tag} 5"


def test_tags_need_no_blanks_around_them():
    assert encode("<think>5 plus 6</think>") == encode("<think> 5 plus 6 </think>")


def test_words_are_whole_and_digits_are_single():
    assert len(encode("makes")) == 1
    assert len(encode("makes 125")) == 4
    assert TOKENIZER.decode(encode("makes 125 check 1 .")) == "makes 125 check 1 ."


def test_an_unknown_word_is_spelled_even_if_a_known_one_is_inside_it():
    assert len(encode("plusplus")) == 8
    assert TOKENIZER.unk_token_id not in encode("Zebra, grüßt?")


def test_text_is_lower_cased():
    assert encode("MAKES") == encode("makes")


def test_special_tokens_vanish_on_request():
    ids = [TOKENIZER.bos_token_id, *encode("makes 5"), TOKENIZER.eos_token_id, TOKENIZER.pad_token_id]
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == "makes 5"


@given(st.lists(st.integers(0, len(TOKENIZER) - 1), min_size=1, max_size=40))
def test_any_ids_survive_decoding_and_encoding(ids):
    assert encode(TOKENIZER.decode(ids)) == ids


def test_it_is_saved_and_loaded_with_a_checkpoint(tmp_path):
    model = build_model(Model(hidden_size=16, layers=1, dense_layers=1), TOKENIZER, seed=0)
    save_model(model, TOKENIZER, tmp_path / "checkpoint")
    _, loaded = load_model(tmp_path / "checkpoint")
    text = "<think> 5 und 7 gibt 12 . </think> <answer> 12 </answer> zebra"
    assert loaded(text, add_special_tokens=False)["input_ids"] == encode(text)
    assert loaded.decode(encode(text)) == TOKENIZER.decode(encode(text))
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id) == (0, 1, 2)
