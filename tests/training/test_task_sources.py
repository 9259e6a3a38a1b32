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


def test_reasoning_gym_asks_in_the_languages_that_it_has_words_for():
    pytest.importorskip("reasoning_gym")
    wordings = {"de": "Nenne das Ergebnis:", "zh": "答案是多少:"}
    task = get_task("reasoning_gym:chain_sum", size=40, wordings=wordings, **EASY)
    numbers = {}
    for split in ("train", "test"):
        problems = task.problems(split)
        asked = {
            tag: {p.question.partition(":")[2] for p in problems if p.language == tag}
            for tag in ("en", "de", "zh")
        }
        assert asked["en"] == asked["de"] == asked["zh"]
        assert all(p.question.startswith(wordings.get(p.language, "State the")) for p in problems)
        assert all(task.check(p, p.reference) for p in problems)
        numbers[split] = asked["en"]
    assert numbers["train"] and numbers["test"] and not numbers["train"] & numbers["test"]


def test_reasoning_gym_shows_the_worked_examples_that_a_recipe_gives_it():
    pytest.importorskip("reasoning_gym")
    shown = {"de": [["Was ist 1 + 1 =", "2"]]}
    task = get_task("reasoning_gym:chain_sum", size=5, examples=shown)
    assert task.worked_examples("de") == [("Was ist 1 + 1 =", "2")] and task.worked_examples("en") == []
    for wrong in ("1 + 1", ["1 + 1"], ["1 + 1", 2]):
        with pytest.raises(UserError, match=r"examples.zh: expected \[question, response\] each, got"):
            get_task("reasoning_gym:chain_sum", size=5, examples={"zh": [wrong]})


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


def test_what_decorates_an_answer_does_not_make_it_wrong():
    pytest.importorskip("reasoning_gym")
    task = get_task("reasoning_gym:chain_sum", size=5, **EASY)
    problem = task.problems("train")[0]
    for form in (r"\boxed{%s}", "**%s**", r"\(%s\)", "%s."):
        assert task.check(problem, form % problem.reference)
        assert not task.check(problem, form % "17000")


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


def read(tmp_path, *lines, **options):
    """The problems of a file, none of them held out."""
    return get_task(f"jsonl:{write(tmp_path, *lines)}", test_share=0.0, **options).problems("train")


def test_jsonl_keeps_other_keys_and_questions_that_differ_in_them(tmp_path):
    first, second = read(tmp_path, row(1, level=3, source="a"), row(1, level=3, source="b"))
    assert (first.level, first.meta["source"], second.meta["source"]) == ("3", "a", "b")
    assert first.id != second.id


def test_jsonl_names_problems_by_their_content_and_not_by_the_place_of_the_file(tmp_path):
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    here, there = (read(tmp_path / folder, row(1), row(2)) for folder in ("here", "there"))
    assert [problem.id for problem in here] == [problem.id for problem in there]
    edited = read(tmp_path / "here", row(1), {**row(2), "answer": 4})
    assert here[0].id == edited[0].id and here[1].id != edited[1].id


def test_jsonl_reads_any_language_tag(tmp_path):
    tags = ("fr", "zh-CN", "de-DE", "vi", "hi", "th", "haw", "pt_BR")
    problems = read(tmp_path, *(row(i, language=tag) for i, tag in enumerate(tags)))
    assert [problem.language for problem in problems] == [*tags[:-1], "pt-BR"]


def test_jsonl_reads_a_conversation(tmp_path):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "What is 1 plus 1?"},
    ]
    (problem,) = read(tmp_path, {"messages": turns, "answer": 2})
    assert problem.question == "What is 1 plus 1?"
    assert problem.before == (("system", "Be brief."), ("user", "Hello"), ("assistant", "Hello."))


def test_jsonl_reads_gsm8k_math_and_multiple_choice_as_they_are_published(tmp_path):
    path = write(
        tmp_path,
        {
            "question": "How many clips?",
            "answer": "In May 48/2 = <<48/2=24>>24.\nIn all 48+24 = 72.\n#### 72",
        },
    )
    task = get_task(f"jsonl:{path}", test_share=0.0)
    (clips,) = task.problems("train")
    assert clips.reference == "72" and task.check(clips, "72") and not task.check(clips, "24")

    columns = {"question": "problem", "answer": "solution"}
    solution = r"We have $x = \\frac{1}{2}$. The answer is $\\boxed{\\frac{1}{2}}$.".replace("\\\\", "\\")
    path = write(tmp_path, {"problem": "Solve.", "solution": solution, "level": "Level 5", "type": "Algebra"})
    task = get_task(f"jsonl:{path}", test_share=0.0, columns=columns)
    (solved,) = task.problems("train")
    assert solved.level == "Level 5" and task.check(solved, "0.5") and not task.check(solved, "2")

    mmlu = {"question": "Capital of France?", "choices": ["Rome", "Paris", "Bern", "Oslo"], "answer": 1}
    arc = {
        "question": "Capital of Italy?",
        "choices": {"text": ["Rome", "Paris"], "label": ["1", "2"]},
        "answerKey": "1",
    }
    path = write(tmp_path, mmlu)
    task = get_task(f"jsonl:{path}", test_share=0.0)
    (capital,) = task.problems("train")
    assert capital.question == "Capital of France?\nA. Rome\nB. Paris\nC. Bern\nD. Oslo"
    assert all(task.check(capital, answer) for answer in ("B", "(B)", r"\boxed{B}", "Paris", "B. Paris"))
    assert not any(task.check(capital, answer) for answer in ("A", "A or B", "B. Rome", "Rome", "1"))
    listed = {**mmlu, "question": "Capital of France? A) Rome B) Paris C) Bern D) Oslo"}
    (own,) = read(tmp_path, listed)
    assert own.question == listed["question"]
    (numbers,) = read(tmp_path, {"question": "What is 12 - 11?", "choices": ["1", "2"], "answer": "A"})
    assert numbers.question == "What is 12 - 11?\nA. 1\nB. 2", "digits of the question are no list of choices"
    task = get_task(f"jsonl:{write(tmp_path, arc)}", test_share=0.0, columns={"answer": "answerKey"})
    (capital,) = task.problems("train")
    assert task.check(capital, "1") and task.check(capital, "Rome") and not task.check(capital, "2")


def test_jsonl_refuses_columns_that_it_does_not_know(tmp_path):
    with pytest.raises(UserError, match="did you mean 'question'"):
        read(tmp_path, row(1), columns={"questoin": "problem"})


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"question": "promt"},
            "line 1: field 'question': expected text, it is missing; the row has question",
        ),
        ({"language": "lagn"}, "no row has 'lagn', which columns names for 'language'"),
    ],
)
def test_a_column_that_no_row_has_is_named_though_the_field_is_there(tmp_path, columns, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, row(1, lang="de"), columns=columns)


def test_two_lines_with_one_id_are_refused(tmp_path):
    with pytest.raises(UserError, match="line 2: has the id of line 1"):
        read(tmp_path, row(1, id="one"), row(2, id="one"))


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
        ("question,answer", "expected a JSON object, one per line: Expecting value"),
        ('{"answer": "5"}', "field 'question': expected text, it is missing"),
        ('{"question": 7, "answer": "5"}', "field 'question': expected text, got 7"),
        ('{"question": "a"}', "one of the fields 'answer' and 'reference'"),
        ('{"question": "a", "answer": "5", "reference": "5"}', "one of the fields 'answer' and 'reference'"),
        ('{"question": "a", "answer": ""}', "field 'answer': expected text, got ''"),
        ('{"question": "a", "answer": null}', "field 'answer': expected text, got None"),
        ('{"question": "a", "answer": true}', "field 'answer': expected text, got True"),
        ('{"question": "a", "answer": "5", "kind": "helpfull"}', "field 'kind'.*reasoning, helpful, unsafe"),
        (
            '{"question": "a", "answer": "5", "language": "x y"}',
            "expected a tag such as de or zh-CN, got 'x y'",
        ),
        ('{"question": "a", "answer": "5", "thinking": "no"}', "field 'thinking'"),
        ('{"question": "a", "answer": "5", "check": "maths"}', "field 'check'"),
        ('{"question": "a", "answer": "zzz ???", "check": "mathematics"}', "cannot be parsed"),
        ('{"question": "what is 1 plus 1", "answer": "7"}', "the question of line 1, but differs from it"),
        ('{"messages": [], "answer": "5"}', "field 'messages': expected a list of turns"),
        ('{"messages": [{"role": "bot", "content": "a"}], "answer": "5"}', "expected turns with a role"),
        (
            '{"messages": [{"role": "assistant", "content": "a"}], "answer": "5"}',
            "a question of the user last",
        ),
        ('{"question": "a", "messages": [], "answer": "5"}', "one of the fields 'question' and 'messages'"),
        ('{"question": "a", "choices": ["x", "y"], "answer": "C"}', "is none of the choices A, B"),
        ('{"question": "a", "choices": "xy", "answer": "A"}', "field 'choices'"),
        ('{"question": "a", "answer": "First this.\\nThen that."}', "no response can equal this answer"),
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
