"""Rejection: what passes, what every filter refuses, and where the kept responses came from."""

from collections import Counter

from training import filters, prompts
from training.loops.sample import Completion
from training.responses import Source
from training.selection import EXAMPLES, in_share, select
from training.stages.rejection import _in_special_form, _in_turn
from training.tasks import get_task
from training.tasks.arithmetic import make_problem

SOURCE = Source("rl_reasoning", None, None, "hash-of-the-checkpoint", prompts.chat)
SUM = make_problem(43, 7, 50, "en")  # 57
RIGHT = "<|special_token|> 3 plus 4 makes 7 . <|special_token|> the answer is <answer> 57 </answer>"
GENERAL = {p.question: p for split in ("train", "test") for p in get_task("general").problems(split)}
NAMES = [*filters.FILTERS, filters.DUPLICATE]


def completion(text, problem=SUM, sample_id=0, finished=True):
    ids = tuple(hash(word) % 1000 for word in text.split())
    return Completion(problem, (1, 2), ids, text, sample_id, finished)


def chosen(drawn, checked_by="rule", **settings):
    settings = filters.Settings(task=get_task("arithmetic"), paragraph_words=30, **settings)
    return select(drawn, SOURCE, 7, NAMES, settings, checked_by=checked_by)


def test_a_right_and_readable_response_is_kept_with_its_provenance():
    found = chosen([completion(RIGHT, sample_id=3)])
    (row,) = found.kept
    assert not +found.rejections
    assert (row["checkpoint"], row["stage"], row["seed"], row["sample_id"]) == (
        "hash-of-the-checkpoint",
        "rl_reasoning",
        7,
        3,
    )
    assert (row["problem_id"], row["prompt_ids"], row["response_text"]) == (SUM.id, [1, 2], RIGHT)
    assert len(row["response_ids"]) == len(RIGHT.split())
    assert row["checked_by"] == "rule"


def test_every_filter_rejects_its_fault_and_shows_it():
    loop = "<|special_token|> " + "3 plus 4 makes 7 . " * 5 + "<|special_token|> <answer> 57 </answer>"
    faults = {
        "wrong_by_rule": RIGHT.replace("57", "58"),
        "mixed_language": RIGHT.replace("plus", "und").replace("makes", "gibt"),
        "code_block": RIGHT.replace("3 plus", "``` 3 ``` plus"),
        "repetition": loop,
        "overlong_paragraph": RIGHT.replace("makes", " ".join(str(i) for i in range(40))),
        "bad_format": RIGHT.replace("</answer>", ""),
    }
    drawn = [completion(text, sample_id=i) for i, text in enumerate(faults.values())]
    drawn += [completion(RIGHT, sample_id=10), completion(RIGHT, sample_id=11)]
    drawn += [completion(RIGHT, sample_id=12, finished=False)]
    found = chosen(drawn)
    assert [row["sample_id"] for row in found.kept] == [10]
    shown = {(example["filter"], example["response_text"]) for example in found.examples}
    assert shown >= {*faults.items(), ("duplicate", RIGHT), ("unfinished", RIGHT)}
    assert "wrong_by_judge" not in found.rejections


def test_the_judge_decides_where_no_rule_is_used():
    drawn = [completion(RIGHT, sample_id=i) for i in range(3)]
    found = chosen(drawn, "judge", verdicts={(SUM.id, 0): False, (SUM.id, 1): True, (SUM.id, 2): None})
    assert [row["sample_id"] for row in found.kept] == [1]
    assert found.rejections["wrong_by_judge"] == 2
    assert "wrong_by_rule" not in found.rejections


def test_general_responses_have_to_be_helpful_and_may_name_the_fact_in_another_language():
    problem = GENERAL["translate snow to german"]
    good = "<think> i translate snow to german </think> it is schnee <answer> schnee </answer>"
    drawn = [
        completion(good, problem, 0),
        completion(good.replace("schnee", "gras"), problem, 1),
        completion(
            good.replace("i translate snow to german", "ich übersetze schnee auf englisch"), problem, 2
        ),
        completion(good.replace("it is", "es ist"), problem, 3),
    ]
    found = chosen(drawn, "oracle")
    assert [row["sample_id"] for row in found.kept] == [0]
    assert +found.rejections == Counter(unhelpful=1, mixed_language=2)


def test_unchecked_general_responses_still_have_to_be_readable():
    problem = GENERAL["translate snow to german"]
    evasive = "<think> i translate snow to german </think> i cannot tell it <answer> no </answer>"
    drawn = [completion(evasive, problem, 0), completion(evasive.replace("</think>", ""), problem, 1)]
    found = chosen(drawn, "nobody")
    assert [row["sample_id"] for row in found.kept] == [0]
    assert +found.rejections == Counter(bad_format=1)
    assert found.kept[0]["checked_by"] == "nobody"


def test_a_greeting_is_answered_without_thinking():
    problem = GENERAL["good morning"]
    answer = "<answer> good morning friend </answer>"
    drawn = [
        completion(answer, problem, 0),
        completion(f"<think> it is a friend </think> {answer}", problem, 1),
    ]
    found = chosen(drawn, "oracle")
    assert [row["sample_id"] for row in found.kept] == [0]
    assert +found.rejections == Counter(needless_thinking=1)


def test_adding_selections_sums_counts_and_keeps_few_examples():
    wrong = [completion(RIGHT.replace("57", "58"), sample_id=i) for i in range(4)]
    found = chosen(wrong[:3])
    found.add(chosen([*wrong[3:], completion(RIGHT, sample_id=9)]))
    assert found.asked == 5
    assert found.rejections["wrong_by_rule"] == 4
    assert sum(example["filter"] == "wrong_by_rule" for example in found.examples) == EXAMPLES
    assert [row["sample_id"] for row in found.kept] == [9]


def test_the_share_of_judged_problems_is_a_function_of_the_problem():
    first = [in_share(f"p{i}", 0.25, 0, "judged") for i in range(2000)]
    assert first == [in_share(f"p{i}", 0.25, 0, "judged") for i in range(2000)]
    assert 0.2 < sum(first) / 2000 < 0.3
    assert not any(in_share(f"p{i}", 0.0, 0) for i in range(50))


def test_every_problem_has_its_turn_before_one_comes_twice():
    rows = [{"problem_id": f"p{i % 3}", "n": i} for i in range(12)]
    assert {row["problem_id"] for row in _in_turn(rows, 3, 0)} == {"p0", "p1", "p2"}
    assert len(_in_turn(rows, 50, 0)) == 12
    assert _in_turn(rows, 5, 0) == _in_turn(rows, 5, 0)


def test_the_special_token_form_keeps_what_was_sampled():
    row = {"response_text": "<think> i write </think> it is a <answer> a </answer>"}
    after = _in_special_form(row, SUM)
    assert (
        after["response_text"] == "<|special_token|> i write <|special_token|> it is a <answer> a </answer>"
    )
    assert after["before"] == row["response_text"]
    assert after["rules"] == ["special_token_form"]
    greeting = {"response_text": "<answer> hello friend </answer>"}
    assert _in_special_form(greeting, SUM) == greeting
