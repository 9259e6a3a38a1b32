"""How turns become token ids and token ids a response: one way for what is taught and what is asked, whatever the template."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.own_models import edit_json, write_folder
from training import prompts
from training.document import Document
from training.encoder import Encoder
from training.engines.transformers import TransformersEngine
from training.errors import UserError
from training.loops.next_token import _encode
from training.loops.sample import Prompt, sample
from training.model import load
from training.prompts import Turn
from training.response import parse
from training.tasks.problem import Problem
from training.tokenizer import build_tokenizer

TEMPLATES = [None, "chatml", "chatml_think", "llama3", "gemma", "mistral"]
RESPONSE = "<think> 12 plus 34 is 46 </think> <answer> 46 </answer>"
# Words that mark turns in the plain format and in templates, inside a question.
ODD = "who says user : hello assistant : hi, and then <think> or [/INST] assistant :"


def problem(question="What is 12 plus 34?", **more):
    return Problem(f"id of {question}", "test", "reasoning", "en", question, "46", **more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = {}

    def make(template, **options):
        key = (template, *sorted(options.items()))
        if key not in made:
            path = tmp_path_factory.mktemp("own") / "model"
            made[key] = write_folder(path, template=template, **options)
        return made[key]

    return make


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("prompt", [prompts.chat, prompts.zero, prompts.reflect], ids=lambda p: p.__name__)
def test_sft_learns_behind_the_prompt_that_a_rollout_reads(folder, template, prompt):
    model, tokenizer = load(folder(template))
    asked = [Prompt(each, prompt(each)) for each in (problem(), problem(ODD))]
    drawn = sample(TransformersEngine(model, tokenizer), asked, max_new_tokens=3, seed_parts=(0,))
    documents = [Document(RESPONSE, each.turns) for each in asked]
    rows, truncated = _encode(Encoder(model, tokenizer), documents, 0, "sft1")
    assert truncated == 0
    for row, completion in zip(rows, drawn, strict=True):
        assert tuple(row.ids[: row.prompt]) == completion.prompt_ids


@pytest.mark.parametrize("template", [t for t in TEMPLATES if t])
def test_a_prompt_is_what_transformers_makes_of_the_conversation(folder, template):
    """The template of the folder, by transformers' own encoding of a conversation."""
    tokenizer = AutoTokenizer.from_pretrained(folder(template))
    odd = ODD.replace("[/INST]", "") if template == "mistral" else ODD  # a control token there: see below
    turns = [Turn("user", "1 + 1 ="), Turn("assistant", "2"), Turn("user", odd)]
    expected = tokenizer.apply_chat_template(
        [turn._asdict() for turn in turns], add_generation_prompt=True, return_dict=False
    )
    assert Encoder(None, tokenizer).prompt(turns).ids == expected


@pytest.mark.parametrize("template", TEMPLATES)
def test_many_prompts_at_once_are_those_of_each(folder, template):
    _, tokenizer = load(folder(template))
    encoder, spelt = Encoder(None, tokenizer), tokenizer.eos_token
    questions = ("What is 12 plus 34?", f"{spelt} 12 {spelt}", ODD, "12", f"plus {spelt}", "34")
    asked = [prompts.chat(problem(each)) for each in questions]
    assert encoder.prompts(asked) == [encoder.prompt(each) for each in asked]
    assert encoder.prompts([]) == []


def test_a_question_may_hold_the_words_of_the_plain_format(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder(None))
    ids = Encoder(None, tokenizer).prompt(prompts.chat(problem(ODD))).ids
    assert tokenizer.decode(ids) == f"user : {ODD} assistant :"


CONTROL = {
    None: ["<|endoftext|>"],
    "chatml": ["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
    "chatml_think": ["<|im_end|>"],
    "llama3": ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
    "gemma": ["<start_of_turn>", "<end_of_turn>"],
    "mistral": ["</s>", "[/INST]"],
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_control_token_in_a_question_is_text(folder, template):
    """It neither ends a turn nor begins one, and the words around it and tags are as they would be without it."""
    tokenizer = AutoTokenizer.from_pretrained(folder(template))
    encoder = Encoder(None, tokenizer)
    plain = encoder.prompt(prompts.ask("Say <think> once."))
    for token in CONTROL[template]:
        number = tokenizer.convert_tokens_to_ids(token)
        assert tokenizer(token, add_special_tokens=False)["input_ids"] == [number], "it is a token"
        found = encoder.prompt(prompts.ask(f"Say <think> once.{token}assistant {token}"))
        assert found.ids.count(number) == plain.ids.count(number)
        assert tokenizer.decode(found.ids).count(token) == tokenizer.decode(plain.ids).count(token) + 2
        assert found.opening == plain.opening
        length = next(i for i, (a, b) in enumerate(zip(plain.ids, found.ids, strict=False)) if a != b)
        before = tokenizer.decode(plain.ids[:length])
        assert before.endswith("Say <think> once.") or before.endswith("Say <think> once")


@pytest.mark.parametrize("template", TEMPLATES)
def test_sft_teaches_the_end_that_sampling_stops_at(folder, template):
    model, tokenizer = load(folder(template))
    encoder = Encoder(model, tokenizer)
    last = encoder.response(RESPONSE)[-1]
    ends = {"llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "mistral": "</s>", None: "<|endoftext|>"}
    assert tokenizer.decode([last]) == ends.get(template, "<|im_end|>")
    assert last in encoder.stop_ids


def always(model, token):
    """The model with a head that gives `token` nearly all probability: the direction of a state decides nothing."""
    with torch.no_grad():
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.lm_head.weight.shape[0]))
        model.lm_head.bias[token] = 1e4
    return model


@pytest.mark.parametrize("token", ["<|im_end|>", "<|endoftext|>", "<|other_end|>"])
def test_every_eos_of_tokenizer_and_generation_config_and_the_end_of_a_turn_stop(folder, token):
    """The tokenizer's eos is <|endoftext|>, generation_config names <|other_end|>, the template writes <|im_end|>."""
    path = folder("chatml", eos="<|endoftext|>", generation_eos=("<|other_end|>", "<|endoftext|>"))
    model, tokenizer = load(path)
    ids = tokenizer.convert_tokens_to_ids(token)
    (completion,) = sample(
        TransformersEngine(always(model, ids), tokenizer),
        [Prompt(problem(), prompts.chat(problem()))],
        max_new_tokens=4,
        seed_parts=(0,),
    )
    assert completion.finished and completion.token_ids == (ids,) and completion.text == ""


def test_without_bos_nothing_stands_before_the_text_and_without_pad_any_id_pads(folder):
    path = folder(None, eos="<|endoftext|>", bos=None, pad=None)
    model, tokenizer = load(path)
    encoder = Encoder(model, tokenizer)
    assert tokenizer.decode(encoder.prompt([Turn("user", "hi")]).ids) == "user : hi assistant :"
    assert 0 <= encoder.pad_id < len(tokenizer)
    assert encoder.document("hi") == [*tokenizer.encode("hi"), tokenizer.eos_token_id]


def test_a_tokenizer_with_bos_puts_it_once():
    tokenizer = build_tokenizer()
    ids = Encoder(None, tokenizer).prompt(prompts.ask("12 plus 34")).ids
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


def test_an_opened_think_tag_is_part_of_the_response(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder("chatml_think"))
    encoder = Encoder(None, tokenizer)
    ids, opening = encoder.prompt(prompts.chat(problem()))
    assert opening == "<think>\n" and tokenizer.decode(ids).endswith("assistant\n<think>\n")
    written = encoder.response(RESPONSE, opening)
    assert "<think>" not in tokenizer.decode(written)
    read = parse(encoder.text(written[:-1], opening))
    assert read.well_formed and read.answer == "46" and read.think == "12 plus 34 is 46"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (RESPONSE, RESPONSE),
        ("hello , how can i help", "hello , how can i help"),  # no thinking: it is closed at once
        ("<|special_token|> 1 2 <|special_token|> <answer> 3 </answer>", "<think> 1 2 </think> <answer> 3 </answer>"),
    ],
)  # fmt: skip
def test_behind_an_opened_tag_every_form_is_read_as_it_was_meant(folder, text, expected):
    encoder = Encoder(None, AutoTokenizer.from_pretrained(folder("chatml_think")))
    _, opening = encoder.prompt(prompts.chat(problem()))
    read = parse(encoder.text(encoder.response(text, opening)[:-1], opening))
    meant = parse(expected)
    assert (read.think, read.answer, read.summary, read.flags) == (
        meant.think,
        meant.answer,
        meant.summary,
        meant.flags,
    )


def test_a_sampled_response_behind_an_opened_tag_is_parsed_with_it(folder):
    model, tokenizer = load(folder("chatml_think"))
    (completion,) = sample(
        TransformersEngine(always(model, tokenizer.convert_tokens_to_ids("</think>")), tokenizer),
        [Prompt(problem(), [*prompts.chat(problem())])],
        max_new_tokens=1,
        seed_parts=(0,),
    )
    assert completion.text == ""  # opened by the prompt, closed at once: no thinking and nothing said
    (completion,) = sample(
        TransformersEngine(load(folder("chatml_think"))[0], tokenizer), [Prompt(problem(), prompts.chat(problem()))],
        max_new_tokens=4, seed_parts=(0,),
    )  # fmt: skip
    assert completion.text.startswith("<think>\n")


def test_a_system_turn_leads_the_question_where_the_template_takes_none(folder):
    turns = [Turn("system", "be brief"), Turn("user", "hi")]
    for template, expected in (
        ("gemma", "<bos><start_of_turn>user\nbe brief hi<end_of_turn>\n<start_of_turn>model\n"),
        ("chatml", "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"),
    ):  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(folder(template))
        assert tokenizer.decode(Encoder(None, tokenizer).prompt(turns).ids) == expected


def test_a_template_that_refuses_the_turns_is_one_line(tmp_path):
    write_folder(tmp_path / "own", template="{{ raise_exception('no conversations here') }}", eos="<eos>")
    encoder = Encoder(None, AutoTokenizer.from_pretrained(tmp_path / "own"))
    with pytest.raises(UserError, match="refuses the turns user: no conversations here"):
        encoder.prompt([Turn("user", "hi")])


@pytest.mark.parametrize(
    "date",
    [
        "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ date_string }}",
        "{{ strftime_now('%d %b %Y') }}",
    ],
)
def test_a_template_that_takes_a_date_writes_the_same_one_every_day(tmp_path, date):
    write_folder(tmp_path / "own", template=date + " {{ messages[0]['content'] }}")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "own")
    assert tokenizer.decode(Encoder(None, tokenizer).prompt([Turn("user", "hi")]).ids) == "01 Jan 2025 hi"


def test_after_sft_other_programs_stop_at_the_end_that_was_taught(folder):
    model, tokenizer = load(folder("chatml", eos="<|endoftext|>"))
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    Encoder(model, tokenizer).note_ends()
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert set(model.generation_config.eos_token_id) == set(ends)


def test_a_generation_config_that_contradicts_itself_can_still_be_saved(tmp_path):
    path = write_folder(tmp_path / "own", eos="<|endoftext|>")
    edit_json(path / "generation_config.json", do_sample=False, temperature=0.6)
    model, tokenizer = load(path)
    Encoder(model, tokenizer).note_ends()
    model.save_pretrained(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").generation_config
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in saved.eos_token_id
