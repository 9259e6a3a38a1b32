"""Sampling: keyed draws, inverse-CDF choice, ends of responses, and the recorded routing."""

import pytest
import torch

from training import prompts
from training.engines.choice import choose_tokens, uniforms
from training.engines.transformers import TransformersEngine
from training.loops.batch import collate, logprobs
from training.loops.sample import Prompt, sample
from training.model import build_model
from training.sections import Model, Student
from training.student import build
from training.tasks.arithmetic import make_problem
from training.tokenizer import build_tokenizer

TOKENIZER = build_tokenizer()
SIZES = Model(hidden_size=32, layers=2, heads=2, intermediate_size=32, moe_intermediate_size=16, experts=4)
PROBLEMS = [make_problem(12, 4, 34, "en"), make_problem(5, 6, 9, "de"), make_problem(57, 8, 68, "en")]
ASKED = [Prompt(problem, prompts.chat(problem)) for problem in PROBLEMS]


@pytest.fixture(scope="module")
def model():
    built = build_model(SIZES, TOKENIZER, seed=0).eval()
    with torch.no_grad():  # an untrained model is nearly uniform: sharpen it, and let responses end early
        built.lm_head.weight.mul_(30)
    return built


def draw(model, asked=ASKED, **options):
    return sample(
        TransformersEngine(model, TOKENIZER),
        asked,
        **{"samples": 3, "max_new_tokens": 12, "seed_parts": (0, "test"), **options},
    )


def test_uniform_numbers_are_keyed_and_uniform():
    numbers = uniforms([1, 2, 2**63 - 1], 5000)
    assert numbers.shape == (3, 5000) and numbers.dtype == torch.float64
    assert numbers.min() >= 0 and numbers.max() < 1
    assert torch.equal(uniforms([2], 10), numbers[1:2, :10])
    # mean 1/2 with standard error sqrt(1/12/5000) = 0.004; neighbours and keys uncorrelated within 5 / sqrt(5000)
    assert (numbers.mean(dim=1) - 0.5).abs().max() < 0.02
    assert torch.corrcoef(numbers)[0, 1].abs() < 0.07
    assert torch.corrcoef(torch.stack([numbers[0, :-1], numbers[0, 1:]]))[0, 1].abs() < 0.07


def test_splitmix64_known_values():
    # The reference implementation of SplitMix64 seeded with 0 gives 0xE220A8397B1DCDAF, then 0x6E789E6AA1B965F4.
    expected = [(0xE220A8397B1DCDAF >> 11) * 2.0**-53, (0x6E789E6AA1B965F4 >> 11) * 2.0**-53]
    assert uniforms([0], 2)[0].tolist() == expected


def test_the_choice_is_the_inverse_of_the_cumulated_probabilities():
    logits = torch.log(torch.tensor([[0.2, 0.5, 0.0, 0.3]])).expand(6, 4)
    uniform = torch.tensor([0.0, 0.19, 0.21, 0.69, 0.71, 0.9999999], dtype=torch.float64)
    assert choose_tokens(logits, uniform, 1.0, 1.0)[0].tolist() == [0, 0, 1, 1, 3, 3]


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    # 0.5 + 0.3 reach 0.75; the token of 0.2 is out, and what is left is 5/8 and 3/8.
    logits = torch.log(torch.tensor([[0.2, 0.5, 0.3]])).expand(4, 3)
    uniform = torch.tensor([0.0, 0.62, 0.63, 0.99], dtype=torch.float64)
    assert choose_tokens(logits, uniform, 1.0, 0.75)[0].tolist() == [1, 1, 2, 2]


def test_top_p_keeps_the_likeliest_token_however_small_it_is():
    logits = torch.log(torch.tensor([[0.2, 0.5, 0.3]])).expand(3, 3)
    uniform = torch.tensor([0.0, 0.5, 0.99], dtype=torch.float64)
    assert choose_tokens(logits, uniform, 1.0, 0.0)[0].tolist() == [1, 1, 1]
    # logits over this temperature are no floats
    chosen = choose_tokens(9 + logits, uniform, 2e-38, 0.9, 2)
    assert chosen.tokens.tolist() == [1, 1, 1] and chosen.logp.tolist() == [0.0, 0.0, 0.0]


def test_temperature_sharpens_and_zero_is_greedy():
    # At T = 0.5 the probabilities are squared: 0.4^2 : 0.6^2 = 4 : 9, so the first token ends at 4/13 = 0.3077.
    logits = torch.log(torch.tensor([[0.4, 0.6]])).expand(2, 2)
    uniform = torch.tensor([0.307, 0.308], dtype=torch.float64)
    assert choose_tokens(logits, uniform, 0.5, 1.0)[0].tolist() == [0, 1]
    assert choose_tokens(logits, torch.zeros(2, dtype=torch.float64), 0.0, 1.0)[0].tolist() == [1, 1]


def test_samples_follow_the_distribution_of_the_model(model):
    """First tokens of many samples against the model's own probabilities (total variation distance)."""
    drawn = draw(model, ASKED[:1], samples=4000, max_new_tokens=1)
    counts = torch.bincount(torch.tensor([c.token_ids[0] for c in drawn]), minlength=len(TOKENIZER)) / 4000
    ids = torch.tensor([drawn[0].prompt_ids])
    expected = model(input_ids=ids).logits[0, -1].softmax(-1)
    assert (counts - expected).abs().sum() / 2 < 0.08


def test_the_order_of_a_batch_and_its_size_change_nothing(model):
    whole = draw(model)
    assert [c.sample_id for c in whole] == [0, 1, 2] * 3
    assert [c.problem.id for c in whole] == [p.id for p in PROBLEMS for _ in range(3)]
    reversed_ = draw(model, ASKED[::-1], batch_size=2)
    by_key = {(c.problem.id, c.sample_id): c.token_ids for c in reversed_}
    assert all(by_key[c.problem.id, c.sample_id] == c.token_ids for c in whole)


def test_samples_differ_by_number_and_by_seed(model):
    first = draw(model, samples=8)
    assert len({c.token_ids for c in first[:8]}) > 1
    assert [c.token_ids for c in draw(model, samples=8, seed_parts=(1, "test"))] != [
        c.token_ids for c in first
    ]


def test_a_response_ends_with_eos_or_is_cut(model):
    drawn = draw(model, samples=200, max_new_tokens=40)
    assert {c.finished for c in drawn} == {True, False}
    for c in drawn:
        assert (TOKENIZER.eos_token_id in c.token_ids) == c.finished
        assert c.token_ids.count(TOKENIZER.eos_token_id) == int(c.finished)
        assert len(c.token_ids) == 40 or c.finished
        assert TOKENIZER.encode(c.text, add_special_tokens=False) == list(
            c.token_ids[: len(c.token_ids) - c.finished]
        )


def test_greedy_is_what_transformers_generates(model):
    for completion in draw(model, samples=1, temperature=0.0, max_new_tokens=20):
        ids = torch.tensor([completion.prompt_ids])
        expected = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False
        )
        assert tuple(expected[0, ids.shape[1] :].tolist()) == completion.token_ids


def test_recorded_routing_is_that_of_one_forward_pass(model):
    from r1kernels.integrations import transformers as integration

    for completion in draw(model, samples=4, record_routing=True):
        tokens = completion.prompt_ids + completion.token_ids
        with integration.record_routing(model) as record, torch.no_grad():
            model(input_ids=torch.tensor([tokens[:-1]]))
        assert torch.equal(completion.routing.sort(-1).values, record.forward().sort(-1).values)


def test_replay_reproduces_live_logprobs_and_follows_a_foreign_record(model):
    drawn = draw(model, samples=4, record_routing=True)
    live = logprobs(model, collate(drawn, 0, torch.device("cpu"), replay=False), 1.0)
    replayed = logprobs(model, collate(drawn, 0, torch.device("cpu"), replay=True), 1.0)
    assert replayed.agreement == 1.0
    torch.testing.assert_close(replayed.logp, live.logp, rtol=1e-5, atol=1e-5)
    swapped = [type(c)(**{**vars(c), "routing": 3 - c.routing}) for c in drawn]
    other = logprobs(model, collate(swapped, 0, torch.device("cpu"), replay=True), 1.0)
    assert other.agreement < 1.0
    assert not torch.allclose(other.logp, live.logp, rtol=1e-3, atol=1e-3)


def test_logprobs_are_those_of_log_softmax_one_response_at_a_time(model):
    drawn = draw(model, samples=2)
    batch = collate(drawn, 0, torch.device("cpu"), replay=False)
    found = logprobs(model, batch, temperature=0.7, entropy=True)
    lengths = [len(c.token_ids) for c in drawn]
    assert batch.lengths == lengths and found.logp.shape == found.entropy.shape == (sum(lengths),)
    for c, logp, entropies in zip(
        drawn, found.logp.split(lengths), found.entropy.split(lengths), strict=True
    ):
        logits = model(input_ids=torch.tensor([c.prompt_ids + c.token_ids])).logits[0].double() / 0.7
        start = len(c.prompt_ids) - 1
        expected = logits[start:-1].log_softmax(-1)[torch.arange(len(c.token_ids)), torch.tensor(c.token_ids)]
        entropy = torch.distributions.Categorical(logits=logits[start:-1]).entropy()
        torch.testing.assert_close(logp.double(), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(entropies.double(), entropy, rtol=1e-4, atol=1e-4)


def test_a_dense_model_samples_without_routing():
    sizes = Student(hidden_size=16, layers=1, heads=2, intermediate_size=16)
    student, _ = build(sizes, TOKENIZER, 0, max_length=128)
    drawn = draw(student, record_routing=True)
    assert len(drawn) == 9 and all(c.routing is None for c in drawn)


def test_no_prompts_give_no_samples(model):
    assert draw(model, []) == []


def test_the_likeliest_of_one_token_is_greedy(model):
    greedy = [c.token_ids for c in draw(model, temperature=0.0)]
    assert [c.token_ids for c in draw(model, top_k=1)] == greedy
    assert [c.token_ids for c in draw(model)] != greedy
