"""Shared prefixes in the trainer: the steps of the repeated form to rounding, with a prompt computed once for its group."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from transformers import Llama4ForCausalLM, Llama4TextConfig

from tests.training.test_loops import (
    CONFIG,
    DOCUMENTS,
    PROBLEMS,
    TOKENIZER,
    context,
    model,
    share_of_even_ids,
    without_times,
)
from training import notices, prompts, student
from training.document import Document
from training.loops import grpo, next_token
from training.loops.batch import Row, lay_out, micro_trees, shared_tokens
from training.loops.optim import Optimizer
from training.placement import placed
from training.sections import NextToken, Student

# Adam divides by the root of the squared gradient: where that is all rounding, so is the direction of its first step.
STEP = replace(CONFIG, steps=1, kl_coef=0.05, lr=5e-5)


def dense():
    sizes = Student(hidden_size=32, layers=2, heads=2, intermediate_size=32)
    return student.build(sizes, TOKENIZER, 0, max_length=128)[0]


@contextmanager
def counted(policy):
    """The tokens that the policy reads in each forward pass, in a list."""
    read = []

    def count(module, args):
        read.append(args[0].numel())

    hook = policy.get_input_embeddings().register_forward_pre_hook(count)
    try:
        yield read
    finally:
        hook.remove()


@pytest.fixture
def gradients(monkeypatch):
    """The gradients of every optimizer step, by name."""
    found = []
    step = Optimizer.step

    def noted(self, *args):
        found.append({n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None})
        return step(self, *args)

    monkeypatch.setattr(Optimizer, "step", noted)
    return found


def train(folder, shared, make, config=STEP, documents=None):
    """(metrics, parameters after it, tokens of every pass, warnings) of a step of GRPO, or of next-token training on `config`."""
    at = context(folder, config)
    at.recipe = replace(at.recipe, shared_prefix=shared)
    policy = make()
    heard = []
    with counted(policy) as read, notices.listening(lambda kind, text: heard.append((kind, text))):
        if isinstance(config, NextToken):
            next_token.train(policy, TOKENIZER, documents or ANSWERS, config, at)
        else:
            grpo.train(policy, TOKENIZER, lambda step: PROBLEMS, prompts.chat, share_of_even_ids, config, at)
    return without_times(at.stage.metrics()), policy.state_dict(), read, heard


def assert_same(one, other, gradients, rtol=1e-4):
    """Metrics, gradients and parameters of two trainings; `gradients`: of both, one after the other."""
    (rows, weights, *_), (expected_rows, expected, *_) = one, other
    for row, known in zip(rows, expected_rows, strict=True):
        assert known["grad_norm"] > 1e-4
        # replayed choices are counted once where they are computed once
        names = [name for name in known if not name.startswith("replay_agreement")]
        assert {name: row[name] for name in names} == pytest.approx(
            {name: known[name] for name in names}, rel=rtol, abs=1e-6
        )
    half = len(gradients) // 2
    assert half > 0
    for found, known in zip(gradients[:half], gradients[half:], strict=True):
        for name in known:
            difference = float((found[name] - known[name]).norm() / known[name].norm().clamp(min=1e-8))
            assert difference < rtol, name
    for name in expected:
        torch.testing.assert_close(weights[name], expected[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("make", [model, dense], ids=["deepseek_v3", "dense"])
def test_a_step_of_grpo_is_that_of_the_repeated_form(tmp_path, gradients, make, fused):
    """The mixture replays the routing of the rollout in all passes and moves its bias by the load of the experts."""
    config = replace(STEP, fused_loss=fused)
    shared = train(tmp_path / "a", True, make, config)
    repeated = train(tmp_path / "b", False, make, config)
    assert_same(shared, repeated, gradients)
    assert sum(shared[2]) < sum(repeated[2])
    if make is model:
        assert shared[0][0]["replay_agreement_old"] > 0.99


@pytest.mark.parametrize("most", [20, 100])
def test_micro_batches_of_trees_are_one_batch(tmp_path, gradients, most):
    whole = train(tmp_path / "a", True, model, replace(STEP, minibatches=1))
    small = train(tmp_path / "b", True, model, replace(STEP, minibatches=1, micro_batch_tokens=most))
    assert_same(small, whole, gradients)
    assert len(small[2]) > len(whole[2])


def test_layers_that_recompute_their_activations_take_the_same_step(tmp_path, gradients):
    at = context(tmp_path / "recipe", STEP).recipe
    with placed(replace(at, gradient_checkpointing=True)):
        recomputed = train(tmp_path / "a", True, model)
    assert_same(recomputed, train(tmp_path / "b", False, model), gradients)


def test_under_autocast_the_step_is_that_of_the_repeated_form_to_the_rounding_of_bfloat16(tmp_path):
    at = context(tmp_path / "recipe", STEP).recipe
    with placed(replace(at, dtype="bfloat16")):
        shared, repeated = (train(tmp_path / str(on), on, dense) for on in (True, False))
    assert all(kind != "shared_prefix" for kind, _ in shared[3])
    assert sum(shared[2]) < sum(repeated[2])
    assert shared[0][0]["entropy"] == pytest.approx(repeated[0][0]["entropy"], rel=1e-3)
    assert shared[0][0]["grad_norm"] == pytest.approx(repeated[0][0]["grad_norm"], rel=0.05)


ANSWERS = [
    Document(f"{a} plus {b} makes {n} .", prompts.ask(f"What is {a} plus {b} ?"))
    for a in range(1, 4)
    for b in range(1, 3)
    for n in (a + b, a + b + 1, 7)
]
LEARNT = NextToken(steps=2, batch_size=len(ANSWERS), lr=5e-5, lr_end=5e-5, bias_rate=1e-3)


@pytest.mark.parametrize("make", [model, dense], ids=["deepseek_v3", "dense"])
def test_sft_on_several_responses_to_a_prompt_is_that_of_the_repeated_form(tmp_path, gradients, make):
    shared = train(tmp_path / "a", True, make, LEARNT)
    repeated = train(tmp_path / "b", False, make, LEARNT)
    assert_same(shared, repeated, gradients)
    assert sum(shared[2]) < 0.75 * sum(repeated[2])


def test_documents_of_one_length_with_nothing_in_common_are_read_side_by_side(tmp_path):
    at = context(tmp_path / "a", LEARNT)
    policy = dense()
    with counted(policy) as read:
        next_token.train(policy, TOKENIZER, DOCUMENTS[:8], replace(LEARNT, steps=1, batch_size=8), at)
    (length,) = {len(TOKENIZER.encode(each.text, add_special_tokens=False)) + 2 for each in DOCUMENTS[:8]}
    # the other is the trial of the head
    assert 8 * length in read and len(read) == 2


OF_TWO_LENGTHS = [
    Document(("7 " * 30 if i % 4 == 0 else "") + each.text) for i, each in enumerate(DOCUMENTS[:8])
]
THAT_BEGIN_ALIKE = [Document("7 " * 30 + each.text) for each in DOCUMENTS[:8]]


@pytest.mark.parametrize("documents", [OF_TWO_LENGTHS, THAT_BEGIN_ALIKE], ids=["lengths", "beginnings"])
def test_pretraining_computes_no_padding_and_common_beginnings_once(tmp_path, gradients, documents):
    shared = train(tmp_path / "a", True, model, LEARNT, documents)
    repeated = train(tmp_path / "b", False, model, LEARNT, documents)
    assert_same(shared, repeated, gradients)
    assert sum(shared[2]) < 0.9 * sum(repeated[2])


def llama4():
    config = Llama4TextConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=32,
        intermediate_size=16,
        intermediate_size_mlp=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        attention_chunk_size=16,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return Llama4ForCausalLM(config).eval()


def test_a_model_that_cannot_share_is_named_in_one_warning_and_trains_all_the_same(tmp_path):
    shared = train(tmp_path / "a", True, llama4, replace(STEP, steps=2, replay=False))
    repeated = train(tmp_path / "b", False, llama4, replace(STEP, steps=2, replay=False))
    assert shared[0] == repeated[0] and shared[2] == repeated[2]
    (warning,) = [text for kind, text in shared[3] if kind == "shared_prefix"]
    assert "Llama4ForCausalLM cannot share prefixes: it has layers of chunked_attention" in warning
    assert all(kind != "shared_prefix" for kind, _ in repeated[3])


def rows(*groups):
    """Rows of prompts of some length and responses of others, every token its own, but for the first 18."""
    found, fresh = [], iter(range(1000, 9999))
    for prompt, responses in groups:
        ids = (*range(18), *(next(fresh) for _ in range(prompt - 18)))
        for length in responses:
            response = tuple(next(fresh) for _ in range(length))
            found.append(Row((*ids, *response[:-1]), prompt, response))
    return found


@pytest.mark.parametrize("most", [50, 90, 150, 1000])
def test_pieces_keep_a_group_together_and_fit_the_tokens_of_their_tree(most):
    known = rows((40, [8, 3, 5]), (36, [9] * 6), (60, [2, 2]), (50, [40, 4]))
    order = [5, 0, 12, 7, 1, 9, 3, 11, 2, 10, 8, 4, 6]
    shuffled = [known[i] for i in order]
    found = list(micro_trees(shuffled, most))
    assert sorted(i for piece in found for i in piece) == list(range(len(shuffled)))
    for piece in found:
        batch = lay_out([shuffled[i] for i in piece], 0, torch.device("cpu"), shared=True)
        assert batch.inputs.tokens <= most or len(piece) == 1
        assert batch.targets.tolist() == [token for i in piece for token in shuffled[i].targets]
    parts = {}  # prompt -> the pieces that its rows are in
    for number, piece in enumerate(found):
        for i in piece:
            parts.setdefault(shuffled[i].prompt_ids, set()).add(number)
    for prompt, numbers in parts.items():
        own = len(prompt) + sum(len(r.targets) - 1 for r in shuffled if r.prompt_ids == prompt)
        assert len(numbers) == 1 or own > most
    if most == 1000:
        assert len(found) == 1


def test_what_prompts_have_in_common():
    long = tuple(range(20))
    assert [shared_tokens(long, other) for other in ((*long[:17], 99, 18), long[:16], (7, *long), ())] == [
        17,
        16,
        0,
        0,
    ]
    assert shared_tokens(long, long[:3]) == 0  # a tree computes so few again
