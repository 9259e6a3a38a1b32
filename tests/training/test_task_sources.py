"""Problems from elsewhere: reasoning-gym and JSONL files, their checks and clear errors."""

import json

import pytest

from training.errors import UserError
from training.response import parse
from training.rewards import Sample, accuracy, errors, score
from training.tasks import get_task
from training.tasks.problem import DataError

# -------------------------------------------------------------------------------------------------------- reasoning-gym

EASY = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def test_reasoning_gym_is_the_same_for_the_same_seed():
    pytest.importorskip("reasoning_gym")
    first, again, other = (
        get_task("reasoning_gym:chain_sum", size=60, seed=seed, **EASY) for seed in (3, 3, 4)
    )
    assert first.problems("train") == again.problems("train")
    assert first.problems("train") != other.problems("train")
    train, test = ({problem.question for problem in first.problems(split)} for split in ("train", "test"))
    assert train and test and not train & test
    assert first.problems("harder") == []


def test_reasoning_gym_harder_level():
    pytest.importorskip("reasoning_gym")
    task = get_task("reasoning_gym:chain_sum", size=30, harder={"min_digits": 3, "max_digits": 3}, **EASY)
    easy = {problem.question for split in ("train", "test") for problem in task.problems(split)}
    harder = task.problems("harder")
    assert len(harder) > 20 and not easy & {problem.question for problem in harder}
    assert all(task.check(problem, problem.reference) for problem in harder)


@pytest.mark.parametrize("name", ["chain_sum", "countdown", "spell_backward", "fraction_simplification"])
def test_only_the_full_score_is_right(name):
    reasoning_gym = pytest.importorskip("reasoning_gym")
    task = get_task(f"reasoning_gym:{name}", size=20)
    scorer = reasoning_gym.create_dataset(name, seed=0, size=20)
    part_of_the_credit = 0
    for problem in task.problems("train"):
        assert task.check(problem, problem.reference)
        for wrong in (f"it is {problem.reference} or 17", "17", ""):
            part_of_the_credit += 0 < scorer.score_answer(wrong, problem.meta["entry"]) < 1
            assert not task.check(problem, wrong)
    assert part_of_the_credit > 0, "this test is about answers that the package itself half rewards"


def test_a_scorer_that_raises_is_a_counted_error():
    pytest.importorskip("reasoning_gym")
    task = get_task("reasoning_gym:prime_factorization", size=5)
    problem = task.problems("train")[0]
    text = "<think> we </think> <answer> zzz </answer>"
    scored = score([Sample(problem, text, parse(text), (1, 2))], {"accuracy": 1.0}, task)
    assert scored[0].total is None
    assert sum(errors(scored).values()) == 1


def test_a_data_set_without_reference_answers_is_refused():
    pytest.importorskip("reasoning_gym")
    with pytest.raises(DataError, match="rush_hour: entry 0 has no reference answer"):
        get_task("reasoning_gym:rush_hour", size=2).problems("train")


def test_reasoning_gym_refuses_bad_settings():
    pytest.importorskip("reasoning_gym")
    with pytest.raises(UserError, match="chain_sum"):
        get_task("reasoning_gym:chain_sum", min_terms=5, max_terms=2)
    with pytest.raises(UserError, match="size must be a positive integer"):
        get_task("reasoning_gym:chain_sum", size=0)


# ---------------------------------------------------------------------------------------------------------------- JSONL


def write(tmp_path, *lines):
    path = tmp_path / "problems.jsonl"
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8"
    )
    return path


def row(number, **more):
    return {"question": f"what is {number} plus 1", "answer": number + 1, **more}


def test_jsonl_reads_its_fields(tmp_path):
    path = write(
        tmp_path,
        row(1),
        "",
        {
            "question": "Hauptstadt ?",
            "reference": "Berlin",
            "language": "de",
            "level": "harder",
            "source": "atlas",
        },
        {"question": "say hello", "answer": "hello", "kind": "helpful", "id": "h1", "thinking": False},
    )
    task = get_task(f"jsonl:{path}", test_share=0.0)
    first, greeting = task.problems("train")
    (capital,) = task.problems("harder")
    assert (first.reference, first.kind, first.language, first.thinking) == ("2", "reasoning", "en", True)
    assert (greeting.id, greeting.kind, greeting.thinking) == ("h1", "helpful", False)
    assert (capital.reference, capital.language, capital.meta["source"]) == ("Berlin", "de", "atlas")
    assert task.problems("test") == []
    assert {problem.task for problem in (first, greeting, capital)} == {f"jsonl:{path}"}
    assert task.worked_examples("en") == []


def test_jsonl_checks_by_value_or_by_text(tmp_path):
    path = write(
        tmp_path,
        row(1),
        {"question": "capital", "answer": "New  York"},
        {"question": "code", "answer": "B12", "check": "text"},
        {"question": "expand", "answer": "x^2+x"},
    )
    task = get_task(f"jsonl:{path}", test_share=0.0)
    two, city, code, expression = task.problems("train")
    assert task.check(two, "2.0") and not task.check(two, "2 or 3") and not task.check(two, "")
    assert task.check(city, "new york") and not task.check(city, "york")
    assert task.check(code, "b12") and not task.check(code, "12")
    assert task.check(expression, "x(x+1)") and not task.check(expression, "x")
    text = "<think> so </think> <answer> 2.0 </answer>"
    assert accuracy(Sample(two, text, parse(text), ()), task).value == 1.0


def test_jsonl_splits_by_question(tmp_path):
    path = write(tmp_path, *[row(number, id=str(number)) for number in range(200)])
    task = get_task(f"jsonl:{path}", test_share=0.3)
    train, test = ({problem.question for problem in task.problems(split)} for split in ("train", "test"))
    assert len(train) + len(test) == 200 and 30 < len(test) < 90
    renamed = tmp_path / "renamed.jsonl"
    renamed.write_text("\n".join(json.dumps(row(number)) for number in range(200)))
    assert {
        problem.question for problem in get_task(f"jsonl:{renamed}", test_share=0.3).problems("test")
    } == test


def test_the_same_line_twice_counts_once(tmp_path):
    assert len(get_task(f"jsonl:{write(tmp_path, row(1), row(1))}", test_share=0.0).problems("train")) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "a", "answer": ', "Expecting value"),
        ('{"question": "a", "answer": NaN}', "NaN is not JSON"),
        ('["question"]', "expected a JSON object, got list"),
        ('{"answer": "5"}', "field 'question': expected text, it is missing"),
        ('{"question": 7, "answer": "5"}', "field 'question': expected text, got 7"),
        ('{"question": "a"}', "one of the fields 'answer' and 'reference'"),
        ('{"question": "a", "answer": "5", "reference": "5"}', "one of the fields 'answer' and 'reference'"),
        ('{"question": "a", "answer": ""}', "field 'answer': expected text, got ''"),
        ('{"question": "a", "answer": null}', "field 'answer': expected text, got None"),
        ('{"question": "a", "answer": true}', "field 'answer': expected text, got True"),
        ('{"question": "a", "answer": "5", "kind": "helpfull"}', "field 'kind'.*reasoning, helpful, unsafe"),
        ('{"question": "a", "answer": "5", "language": "xx"}', "'xx' has no word list"),
        ('{"question": "a", "answer": "5", "thinking": "no"}', "field 'thinking'"),
        ('{"question": "a", "answer": "5", "check": "maths"}', "field 'check'"),
        ('{"question": "a", "answer": "zzz ???", "check": "mathematics"}', "cannot be parsed"),
        ('{"question": "what is 1 plus 1", "answer": "7"}', "line 1, but differs from it"),
        ("[" * 100000, "recursion"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, message):
    path = write(tmp_path, row(1), "", line, row(2))
    with pytest.raises(UserError, match=rf"(?s)problems\.jsonl, line 3: .*{message}"):
        get_task(f"jsonl:{path}")


def test_bytes_that_are_no_text_are_named(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"question": "a", "answer": "5"}\r\n{"question": "\xff", "answer": "5"}\n')
    with pytest.raises(UserError, match=r"line 2: .*utf-8"):
        get_task(f"jsonl:{path}")


def test_an_empty_file_and_a_bad_share(tmp_path):
    path = write(tmp_path, "", "  ")
    with pytest.raises(UserError, match="no problems"):
        get_task(f"jsonl:{path}")
    with pytest.raises(UserError, match="test_share"):
        get_task(f"jsonl:{path}", test_share=1.5)
