"""The generative judge: what it is taught to write, how verdicts are read, and how its data are balanced."""

import json
from dataclasses import replace

import pytest

from tests.support.own_models import write_folder
from training import prompts
from training.encoder import Encoder
from training.judge import balance, document, is_hard, longest_verdict, parse_verdict, write_verdict
from training.model import load
from training.response import parse
from training.rewards import Sample
from training.tasks.arithmetic import make_problem
from training.tokenizer import build_tokenizer

PROBLEM = make_problem(43, 7, 50, "en")  # 57


def sample(text, sample_id=0, problem=PROBLEM):
    return Sample(problem, text, parse(text), (), sample_id)


@pytest.mark.parametrize(
    ("answer", "right", "analysis"),
    [
        ("57", True, "5 5 right , 7 7 right"),
        ("58", False, "5 5 right , 7 8 wrong"),
        ("7", False, "5 7 wrong , 7 - wrong"),
        ("157", False, "5 1 wrong , 7 5 wrong , - 7 wrong"),
        (None, False, "no answer"),
    ],
)
def test_a_written_verdict_is_json_that_lays_the_digits_side_by_side(answer, right, analysis):
    text = write_verdict("57", answer, right)
    fields = {key.strip(): value.strip() for key, value in json.loads(text).items()}
    assert fields == {"analysis": analysis, "correctness": "right" if right else "wrong"}
    verdict = parse_verdict(text)
    assert (verdict.correct, verdict.parsed, verdict.analysis) == (right, True, analysis)


def test_a_verdict_survives_the_tokenizer():
    tokenizer = build_tokenizer()
    ids = tokenizer.encode(write_verdict("157", "167", False), add_special_tokens=False)
    assert tokenizer.unk_token_id not in ids
    verdict = parse_verdict(tokenizer.decode(ids))
    assert verdict.parsed and not verdict.correct


@pytest.mark.parametrize(
    "text",
    [
        "",
        "right",
        '{ " analysis " : " 5 5 right " , " correctness " : " right "',
        '{ " analysis " : " 5 5 right " , " correctness " : " yes " }',
        '{ " correctness " : " right " }',
        '{ " analysis " : " " , " correctness " : " right " } right',
        '{ " analysis " : " " , " correctness " : true }',
        '[ " right " ]',
        "NaN",
    ],
)
def test_what_cannot_be_parsed_counts_as_wrong(text):
    verdict = parse_verdict(text)
    assert not verdict.parsed and not verdict.correct


def test_the_loss_is_on_the_verdict_and_the_prompt_shows_question_reference_and_response():
    text = "<think> 3 plus 4 makes 7 . </think> <answer> 58 </answer>"
    made = document(sample(text), right=False)
    assert made.text == write_verdict("57", "58", False)
    (turn,) = made.prompt
    for part in (PROBLEM.question, "reference : 57", text):
        assert part in turn.content


def test_hard_negatives_are_near_misses():
    assert is_hard(sample("<think> a </think> <answer> 58 </answer>"), right=False)
    assert is_hard(sample("<think> so 57 . </think> <answer> 9 </answer>"), right=False)
    assert not is_hard(sample("<think> a </think> <answer> 9 </answer>"), right=False)
    assert not is_hard(sample("57 ."), right=False)
    assert not is_hard(sample("<think> a </think> <answer> 57 </answer>"), right=True)


def test_balance_is_within_each_checkpoint_prefers_hard_negatives_and_drops_duplicates():
    def response(answer, note):
        return f"<think> {note} </think> <answer> {answer} </answer>"

    candidates = [(sample(response(57, f"w{i}"), i), True, "weak") for i in range(2)]
    candidates += [(sample(response(9, f"e{i}"), 10 + i), False, "weak") for i in range(5)]
    candidates += [(sample(response(58, f"h{i}"), 20 + i), False, "weak") for i in range(2)]
    candidates += [(sample(response(57, "same"), 30 + i), True, "strong") for i in range(4)]
    candidates += [(sample(response(58, f"s{i}"), 40 + i), False, "strong") for i in range(3)]
    chosen = balance(candidates, (0, "test"))
    counts = {
        (source, right): sum(1 for _, r, s in chosen if (s, r) == (source, right))
        for source in ("weak", "strong")
        for right in (True, False)
    }
    assert counts == {("weak", True): 2, ("weak", False): 2, ("strong", True): 1, ("strong", False): 1}
    assert all(is_hard(each, right) for each, right, _ in chosen if not right)
    assert chosen == balance(candidates, (0, "test"))


def test_the_longest_verdict_is_as_long_as_the_tokenizer_of_a_person_writes_it(tmp_path):
    """Bytes of a reference of six pieces make far more tokens than the words of the small recipes."""
    folder = write_folder(tmp_path / "own", "qwen2", template="chatml_think", vocab_size=270, bos=None)
    model, tokenizer = load(folder)
    encoder = Encoder(model, tokenizer)
    opening = encoder.prompt(prompts.chat(PROBLEM)).opening
    hard = replace(PROBLEM, reference="alpha beta gamma delta epsilon zeta")
    asked = [
        sample("<think> a </think> <answer> alpha beta gamma delta epsilon eta </answer>", problem=hard),
        sample("none"),
    ]
    longest = longest_verdict(encoder, opening, asked)
    text = write_verdict(hard.reference, asked[0].response.answer, False)
    assert longest == len(tokenizer(f"</think>\n\n{text}<|im_end|>")["input_ids"]) > 100
    words = Encoder(None, build_tokenizer())
    assert longest_verdict(words, "", [sample("<answer> 58 </answer>")]) < 40
