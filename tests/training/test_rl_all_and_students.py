"""rl_all: which questions a step asks, and what a student of the distillation is."""

from collections import Counter

import pytest
import torch

from training import checkpoint, student
from training.errors import UserError
from training.sections import Student
from training.stages.rl_all import problems_of_step
from training.tasks import get_task
from training.tokenizer import build_tokenizer

GENERAL = get_task("general").problems("train")
POOLS = {
    "reasoning": get_task("arithmetic").problems("train"),
    "helpful": [p for p in GENERAL if p.kind == "helpful"],
    "unsafe": [p for p in GENERAL if p.kind == "unsafe"],
}
MIX = {"reasoning": 0.5, "helpful": 0.3, "unsafe": 0.2}


@pytest.mark.parametrize(
    ("count", "expected"),
    [(20, (10, 6, 4)), (24, (12, 7, 5)), (10, (5, 3, 2)), (1, (1, 0, 0))],
)
def test_a_step_asks_every_kind_by_its_share(count, expected):
    asked = problems_of_step(POOLS, MIX, count, 0, 3)
    kinds = Counter(problem.kind for problem in asked)
    assert tuple(kinds[kind] for kind in MIX) == expected
    assert len({problem.id for problem in asked}) == count


def test_the_questions_are_a_function_of_seed_and_step():
    def ids(seed, step):
        return [problem.id for problem in problems_of_step(POOLS, MIX, 24, seed, step)]

    assert ids(0, 3) == ids(0, 3)
    assert ids(0, 3) != ids(0, 4)
    assert ids(0, 3) != ids(1, 3)


@pytest.mark.parametrize(
    ("architecture", "name"), [("qwen2", "Qwen2ForCausalLM"), ("llama", "LlamaForCausalLM")]
)
def test_a_student_is_a_small_dense_model_with_keyed_weights(architecture, name):
    tokenizer = build_tokenizer()
    sizes = Student(architecture=architecture, hidden_size=32, layers=1, heads=2, intermediate_size=64)
    state = torch.random.get_rng_state()
    model, _ = student.build(sizes, tokenizer, 0, 64)
    assert torch.equal(state, torch.random.get_rng_state())
    assert type(model).__name__ == name
    again, other = (student.build(sizes, tokenizer, seed, 64)[0] for seed in (0, 1))
    weight = model.model.layers[0].mlp.up_proj.weight
    assert torch.equal(weight, again.model.layers[0].mlp.up_proj.weight)
    assert not torch.equal(weight, other.model.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_a_saved_student_reads_and_writes_text_as_its_teacher_does(architecture, tmp_path):
    tokenizer = build_tokenizer()
    sizes = Student(architecture=architecture, hidden_size=32, layers=1, heads=2, intermediate_size=64)
    model, own = student.build(sizes, tokenizer, 0, 64)
    checkpoint.save_model(model, own, tmp_path / "checkpoint")
    _, loaded = checkpoint.load_model(tmp_path / "checkpoint")
    text = "user : from 57 by 7 what is first over 47 ? assistant : <think> 7 plus 7 makes 14 . </think>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert loaded(text, add_special_tokens=False)["input_ids"] == ids
    assert loaded.decode(ids) == text


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(UserError, match="hidden_size 30 is not divisible by heads 4"):
        student.build(Student(hidden_size=30, heads=4), build_tokenizer(), 0, 64)
