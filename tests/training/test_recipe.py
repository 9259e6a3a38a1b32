"""Recipes: YAML over defaults, overrides over both, and one clear line for every mistake."""

import dataclasses

import pytest
import yaml

from training.config import field_types
from training.errors import UserError
from training.recipe import STAGE_NAMES, Recipe, load, names, stage_config, to_dict


@pytest.fixture
def recipe_file(tmp_path):
    def write(text):
        path = tmp_path / "own.yaml"
        path.write_text(text)
        return path

    return write


def test_yaml_lies_over_defaults_and_overrides_over_yaml(recipe_file):
    path = recipe_file("zero: {steps: 7, lr: 5e-3}\nseed: 3\n")
    recipe = load(path, ["zero.steps=9", "model.layers=2"])
    assert (recipe.zero.steps, recipe.zero.lr, recipe.seed, recipe.model.layers) == (9, 5e-3, 3, 2)
    assert recipe.zero.group_size == Recipe().zero.group_size
    assert recipe.name == "own"


def test_extends_keeps_what_it_does_not_name(recipe_file, tmp_path):
    recipe_file("zero: {steps: 7, prompts: 5}\n")
    child = tmp_path / "child.yaml"
    child.write_text(f"extends: {tmp_path}/own.yaml\nzero: {{steps: 2}}\n")
    recipe = load(child)
    assert (recipe.name, recipe.zero.steps, recipe.zero.prompts) == ("child", 2, 5)


def test_a_recipe_that_extends_itself_is_refused(recipe_file, tmp_path):
    with pytest.raises(UserError, match="extends itself"):
        load(recipe_file(f"extends: {tmp_path}/own.yaml\n"))


@pytest.mark.parametrize("name", names())
def test_resolved_recipe_reads_back_unchanged(name, tmp_path):
    recipe = load(name, ["zero.rewards.format=0.5", "distill.students={tall: {layers: 9}}"])
    path = tmp_path / "resolved.yaml"
    path.write_text(yaml.safe_dump(to_dict(recipe)))
    assert load(path) == recipe


def test_every_stage_has_a_section():
    assert set(STAGE_NAMES) <= set(field_types(Recipe))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("zero.lrr=1", ["'zero.lrr'", "did you mean 'zero.lr'"]),
        ("zeor.lr=1", ["'zeor.lr'", "did you mean 'zero.lr'"]),
        ("seeds=1", ["'seeds'", "did you mean 'seed'"]),
        ("distill.students.lama.lr=1", ["did you mean 'distill.students.llama'"]),
        ("distill.students.llama.layer=1", ["did you mean 'distill.students.llama.layers'"]),
        ("seed.x=1", ["seed holds a single value"]),
        ("zero.steps=many", ["zero.steps", "a whole number", "'many'"]),
        ("zero.steps=1.5", ["zero.steps", "a whole number", "1.5"]),
        ("zero.steps=true", ["zero.steps", "a whole number", "True"]),
        ("zero.lr=.nan", ["zero.lr", "a finite number"]),
        ("zero.lr=true", ["zero.lr", "a finite number"]),
        ("zero.steps=-1", ["zero.steps", "at least 0", "-1"]),
        ("zero.group_size=1", ["zero.group_size", "at least 2"]),
        ("zero.ratio=tokens", ["zero.ratio", "token, sequence, output", "'tokens'"]),
        ("zero.replay=1", ["zero.replay", "true or false"]),
        ("name=3", ["name", "text"]),
        ("zero=3", ["zero", "keys with values"]),
        ("task=arithmetic", ["task", "a list"]),
        ("task=[3]", ["task[0]", "text"]),
        ("zero.rewards=3", ["zero.rewards", "names with values"]),
        ("zero.rewards.format=x", ["zero.rewards.format", "a finite number"]),
        ("stages=[base, zerro]", ["'zerro'", "did you mean 'zero'"]),
        ("zero.steps", ["expected key=value"]),
        ("=1", ["expected key=value"]),
        ("zero.steps=[", ["not YAML"]),
        ("zero={steps: 1, steps: 2}", ["'steps' stands twice"]),
    ],
)
def test_a_wrong_override_is_one_line_that_names_it(override, words):
    with pytest.raises(UserError) as caught:
        load("tiny", [override])
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("zero: {stepz: 1}", ["'zero.stepz'", "did you mean 'zero.steps'"]),
        ("zeros: {steps: 1}", ["'zeros'", "did you mean 'zero'"]),
        ("distill: {students: {a: {layer: 1}}}", ["did you mean 'distill.students.a.layers'"]),
        ("zero: {steps: 1\nseed: 2", ["own.yaml", "line", "not valid YAML: expected ',' or '}'"]),
        ("- zero", ["own.yaml", "expected keys with values"]),
        ("zero: {steps: 1}\nseed: 2\nzero: {lr: 0}", ["own.yaml, line 3", "'zero' stands twice"]),
        ("extends: tinny", ["'tinny'", "did you mean 'tiny'"]),
    ],
)
def test_a_wrong_file_is_one_line_that_names_it(recipe_file, text, words):
    with pytest.raises(UserError) as caught:
        load(recipe_file(text))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_unknown_recipe_names_the_nearest_or_all_where_none_is_near():
    with pytest.raises(UserError, match="unknown recipe 'smokee': did you mean 'smoke'"):
        load("smokee")
    with pytest.raises(
        UserError, match="unknown recipe 'nosuch': expected one of deepseek-r1, .*, tiny-controls$"
    ):
        load("nosuch")
    with pytest.raises(UserError, match="no recipe file"):
        load("nowhere.yaml")


def test_stage_config_changes_with_what_decides_the_result_only():
    base = stage_config(load("tiny"), "zero")
    assert stage_config(load("tiny", ["zero.save_every=3", "sft1.lr=1", "name=x"]), "zero") == base
    for word in ("zero.lr=1", "seed=1", "model.layers=5", "task=[countdown]"):
        assert stage_config(load("tiny", [word]), "zero") != base


def test_folders_count_by_what_they_hold_and_names_do_not(tmp_path):
    def files(stage, *words):
        return stage_config(load("tiny", words), stage).get("files", {})

    folder = tmp_path / "own"
    folder.mkdir()
    for stage, word in (
        ("base", "model.pretrained={}"),
        ("sft1", "sft1.start={}"),
        ("distill", "distill.teacher={}"),
        ("distill", "distill.students={{a: {{pretrained: {}}}}}"),
    ):
        (folder / "config.json").write_text("{}")
        before = files(stage, word.format(folder))
        (folder / "config.json").write_text("{ }")
        after = files(stage, word.format(folder))
        assert before.keys() == after.keys() == {str(folder)} and before != after
    assert (
        files("distill", "distill.students={a: {pretrained: Qwen/Qwen2.5-0.5B}, b: {pretrained: smollm2}}")
        == {}
    )
    assert files("base", "model.pretrained=Qwen/Qwen2.5-0.5B") == {}


def test_the_paper_recipe_has_the_numbers_of_the_paper():
    """arXiv 2501.12948v2: 10,400 steps of 512 outputs are 650 rollouts of 8,192 in 16 minibatches."""
    recipe = load("deepseek-r1")
    for section in (recipe.zero, recipe.rl_reasoning, recipe.rl_all):
        assert section.prompts * section.group_size == 8192
        assert section.prompts * section.group_size // section.minibatches == 512
        assert (section.group_size, section.lr, section.kl_coef) == (16, 3e-6, 1e-3)
        assert section.reference_every * section.minibatches == 400
    assert recipe.zero.steps * recipe.zero.minibatches == 10_400
    assert recipe.zero.max_new_tokens == 32_768
    ((step, length),) = recipe.zero.max_new_tokens_from.items()
    assert length == 65_536
    assert 0 <= step * recipe.zero.minibatches - 8_200 < recipe.zero.minibatches
    assert recipe.rl_reasoning.clip == 10
    assert recipe.rl_all.temperature == 0.7
    assert 0 <= recipe.rl_all.steps * recipe.rl_all.minibatches - 1_700 < recipe.rl_all.minibatches
    assert recipe.rl_all.preference_share == pytest.approx(400 / 1700)
    for section in (recipe.sft1, recipe.sft2):
        assert (section.lr, section.lr_end, section.batch_size, section.max_length) == (
            5e-5,
            5e-6,
            128,
            32_768,
        )
        assert section.epochs in (2, 3)
    assert recipe.sft2.start == "base"
    models = recipe.reward_models
    assert (models.lr, models.batch_size, models.epochs, models.max_new_tokens) == (6e-6, 256, 1, 8192)
    assert {name: student.lr for name, student in recipe.distill.students.items()} == {
        "qwen2-1.5b": 1e-4,
        "qwen2-7b": 8e-5,
        "qwen2-14b": 7e-5,
        "qwen2-32b": 6e-5,
        "llama-8b": 5e-5,
        "llama-70b": 2e-5,
    }
    for student in recipe.distill.students.values():
        assert student.batch_size == 64
        assert student.lr_end == pytest.approx(student.lr / 10)


def test_a_recipe_copy_is_its_own():
    first, second = load("tiny"), load("tiny")
    first.zero.rewards["accuracy"] = 9.0
    assert second.zero.rewards["accuracy"] != 9.0
    assert dataclasses.replace(second) == second
