"""The table of settings: the committed one is that of the dataclasses, and names every key with what it is."""

import dataclasses
from pathlib import Path

from training.cli import main
from training.config import field_types, is_section, paths
from training.recipe import Recipe
from training.settings import page

COMMITTED = Path(__file__).parents[2] / "docs/settings.md"


def test_the_committed_table_is_current(capsys):
    assert main(["settings"]) == 0
    assert COMMITTED.read_text() == capsys.readouterr().out, "python -m training settings > docs/settings.md"


def test_every_key_stands_in_it_once():
    rows = [line.split("`")[1] for line in page().splitlines() if line.startswith("| `")]
    sections = [name for name, kind in field_types(Recipe).items() if is_section(kind)] + ["model.lora"]
    assert len(rows) == len(set(rows))
    assert set(paths(Recipe)) - set(sections) <= set(rows)
    assert {"distill.students.NAME.lr", "zero.examples[].question"} <= set(rows)


def test_ranges_defaults_and_what_may_change_by_hand():
    found = {line.split("`")[1]: line for line in page().splitlines() if line.startswith("| `")}
    assert found["zero.temperature"].split(" | ")[1:4] == ["`1`", "", "number, more than 0"]
    assert found["sft1.lr"].split(" | ")[1:4] == ["`0.001`", "`1e-05`", "number, at least 0"]
    assert found["zero.ratio"].split(" | ")[3] == "`token`, `sequence`, `output`"
    assert found["threads"].endswith("any time, last bits |")
    assert found["zero.save_every"].endswith("any time |")
    assert found["zero.rewards"].split(" | ")[1] == "`{accuracy: 1.0, format: 1.0}`"


def test_a_section_without_a_word_about_a_field_is_a_fault():
    for name, kind in field_types(Recipe).items():
        for field in dataclasses.fields(kind) if is_section(kind) else ():
            assert field.metadata.get("help"), f"{name}.{field.name}"
