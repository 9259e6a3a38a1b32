"""The engine in the process: what it draws is the model's own, whatever shares its batch, and nothing is computed twice."""

import random
from contextlib import contextmanager

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tests.support.host_reads import NoHostReads
from tests.support.own_models import FAMILIES
from training import notices
from training.engines import Request, SamplingParams, connect
from training.engines import transformers as engine_module
from training.engines.choice import choose_tokens
from training.engines.transformers import TransformersEngine
from training.model import prepare
from training.sections import Rollout

V = 64
SMALL = {**FAMILIES["llama"], "num_hidden_layers": 4}
WINDOW = {"sliding_window": 8}  # shorter than the prompts below
MODELS = {
    "llama": SMALL,
    "mistral": {**SMALL, **WINDOW},
    "gemma2": {**FAMILIES["gemma2"], **WINDOW},
    "gemma3_text": {**SMALL, **WINDOW, "head_dim": 8, "query_pre_attn_scalar": 8},
    "gpt_oss": {**FAMILIES["gpt_oss"], **WINDOW},
    "qwen2_moe": {
        **SMALL,
        **WINDOW,
        "use_sliding_window": True,
        "max_window_layers": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "deepseek_v3": FAMILIES["deepseek_v3"],
    "gpt2": FAMILIES["gpt2"],
    "opt": {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"word_embed_proj_dim": 32},
}
# Models whose attention the engine cannot be asked for, and how they are told.
OTHERS = {
    "bloom": ({"hidden_size": 32, "n_layer": 2, "n_head": 4}, "does not ask"),
    # keeps no keys and values
    "openai-gpt": ({"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, "does not ask"),
    # keeps states of which no row can be taken out
    "mamba": ({"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2}, "does not ask"),
    # looks into the mask
    "doge": ({**SMALL, **WINDOW}, "cannot be asked"),
    "diffllama": (SMALL, "has an attention of its own"),
    "llama4_text": (
        {
            **SMALL,
            "head_dim": 8,
            "attention_chunk_size": 8,
            "num_local_experts": 2,
            "intermediate_size_mlp": 48,
        },
        "attends in chunks",
    ),
}


def build(family, sizes=None):
    """A model with weights large enough that its choices differ."""
    config = AutoConfig.for_model(
        family, vocab_size=V, pad_token_id=0, bos_token_id=1, eos_token_id=2, **(sizes or MODELS[family])
    )
    config.initializer_range = 0.3
    torch.manual_seed(0)
    return prepare(AutoModelForCausalLM.from_config(config).eval())


@pytest.fixture(scope="module")
def mixture():
    return build("deepseek_v3")


def texts(*lengths, head=17):
    """Prompts of `head` tokens in common and some more each."""
    rng = random.Random(0)
    first = [rng.randrange(3, V) for _ in range(head)]
    return [(*first, *(rng.randrange(3, V) for _ in range(length))) for length in lengths]


def draw(model, requests, **params):
    engine = TransformersEngine(model, None)
    return engine.sample(requests, SamplingParams(**{"stop_ids": (2, 3, 4), **params}))


def requests_of(prompts, samples=3, most=12):
    return [Request(prompt, 100 * i + j, most) for i, prompt in enumerate(prompts) for j in range(samples)]


@contextmanager
def passes(model):
    """The number of tokens in every forward pass of the block."""
    sizes = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    engine_module._served(model)  # the model is tried once, before anything is counted
    sizes.clear()
    yield sizes
    handle.remove()


@pytest.mark.parametrize("family", [*MODELS, *OTHERS])
def test_greedy_is_what_transformers_generates(family):
    """Prompts of different lengths, beyond the window, beside each other."""
    model = build(family, OTHERS[family][0] if family in OTHERS else None)
    prompts = texts(1, 9, 4, 9)
    said = []
    with notices.listening(lambda kind, text: said.append(text)):
        drawn = draw(model, requests_of(prompts, samples=1), temperature=0.0, stop_ids=())
    assert [text for text in said if OTHERS[family][1] in text] if family in OTHERS else said == []
    for prompt, output in zip(prompts, drawn, strict=True):
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        expected = model.generate(
            ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None
        )
        assert output.token_ids == tuple(expected[0, len(prompt) :].tolist())
        assert output.logp == (0.0,) * 12 and not output.finished


@pytest.mark.parametrize("family", ["deepseek_v3", "gemma2", "bloom", "mamba"])
def test_a_response_is_the_same_in_every_batch(family):
    model = build(family, OTHERS[family][0] if family in OTHERS else None)
    asked = requests_of(texts(1, 9, 4, 2, 30), samples=3, most=6 if family in OTHERS else 12)
    expected = draw(model, asked)
    assert len({output.token_ids for output in expected}) > 10
    shuffled = random.Random(1).sample(asked, len(asked))
    batches = [(asked, 1), (shuffled, 3)]
    if family in MODELS:  # in which prompts of different lengths stand beside each other
        batches += [(asked, 3), (shuffled, 64), (asked[5:8], 64)]
    for requests, size in batches:
        found = dict(zip(requests, draw(model, requests, batch_size=size), strict=True))
        for request, output in zip(asked, expected, strict=True):
            if request in found:
                assert found[request].token_ids == output.token_ids
                assert found[request].logp == pytest.approx(output.logp, abs=1e-5)


def test_every_prompt_is_read_once_without_padding_and_only_live_rows_are_read(mixture):
    prompts = texts(1, 9, 4)
    with passes(mixture) as sizes:
        drawn = draw(mixture, requests_of(prompts, samples=5), batch_size=64)
    assert sizes[:2] == [17, 1 + 9 + 4]  # the common head, and what each prompt has beside it
    live = [sum(len(output.token_ids) > n for output in drawn) for n in range(1, 12)]
    assert sizes[2:] == [rows for rows in live if rows]


def test_a_response_that_has_ended_makes_room_for_the_next(mixture):
    asked = requests_of(texts(1, 9, 4, 2), samples=5, most=20)
    with passes(mixture) as sizes:
        drawn = draw(mixture, asked, batch_size=4)
    lengths = [len(output.token_ids) for output in drawn]
    assert len(set(lengths)) > 3
    assert sum(size for size in sizes if size <= 4) >= sum(lengths) - len(lengths)
    # batches that wait for their longest response would take this many passes
    waiting = sum(max(lengths[first : first + 4]) - 1 for first in range(0, 20, 4))
    assert sum(size <= 4 for size in sizes) < waiting


@pytest.mark.parametrize("steps", [1, 5])
def test_how_often_the_host_looks_changes_nothing(mixture, monkeypatch, steps):
    asked = requests_of(texts(1, 9, 4, 2), samples=5)
    expected = draw(mixture, asked, batch_size=7, record_routing=True)
    monkeypatch.setitem(engine_module.STEPS_UNSEEN, "cpu", steps)
    found = draw(mixture, asked, batch_size=7, record_routing=True)
    assert [output.token_ids for output in found] == [output.token_ids for output in expected]
    assert [output.logp for output in found] == [pytest.approx(output.logp, abs=1e-5) for output in expected]
    assert all(torch.equal(a.routing, b.routing) for a, b in zip(found, expected, strict=True))


def test_a_token_is_drawn_without_a_look_of_the_host(monkeypatch):
    """Between two looks nothing waits for the device, where it is a GPU."""
    model, step, steps = build("llama"), engine_module._Flight._step, []

    def guarded(flight):
        with NoHostReads():
            step(flight)
        steps.append(flight)

    monkeypatch.setattr(engine_module._Flight, "_step", guarded)
    drawn = draw(model, requests_of(texts(1, 9, 4)), temperature=0.7, top_k=9, record_kept=True)
    assert all(len(output.kept.offsets) == 1 + len(output.token_ids) for output in drawn)
    assert len(steps) >= max(len(output.token_ids) for output in drawn) - 1


def test_each_of_several_tokens_ends_a_response(mixture):
    drawn = draw(mixture, requests_of(texts(1, 9), samples=60))
    ends = {output.token_ids[-1] for output in drawn if output.finished}
    assert ends == {2, 3, 4}
    for output in drawn:
        assert output.finished == (output.token_ids[-1] in (2, 3, 4))
        assert output.finished or len(output.token_ids) == 12
        assert not {2, 3, 4} & set(output.token_ids[:-1])


def test_each_request_has_its_own_limit(mixture):
    asked = [Request(prompt, i, 1 + i) for i, prompt in enumerate(texts(1, 9, 4, 2))]
    assert [len(output.token_ids) for output in draw(mixture, asked, stop_ids=())] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [(1.0, 1.0, 0), (0.7, 1.0, 0), (1.3, 0.8, 0), (1.0, 1.0, 5), (1.0, 0.6, 9)],
)
def test_log_probs_are_those_of_what_was_drawn_from(mixture, temperature, top_p, top_k):
    """Against transformers' own warpers over the logits of one forward pass."""
    params = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    asked = requests_of(texts(1, 9), samples=4)
    for request, output in zip(asked, draw(mixture, asked, **params), strict=True):
        first = len(request.prompt_ids)
        text = torch.tensor([request.prompt_ids + output.token_ids])
        with torch.no_grad():
            scores = mixture(input_ids=text).logits[0, first - 1 : -1].double() / temperature
        if top_k:
            scores = TopKLogitsWarper(top_k)(None, scores)
        if top_p < 1:
            scores = TopPLogitsWarper(top_p)(None, scores)
        expected = scores.log_softmax(-1).gather(1, text[0, first:, None]).squeeze(1)
        assert output.logp == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (0.9, 0), (0.9, 300), (1.0, 7)])
def test_choices_from_a_large_vocabulary_follow_the_distribution(top_p, top_k):
    """Quantiles of the exact distribution (float64, by transformers' warpers) give its tokens, and none of probability 0."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((1, 1000), generator=generator) * 3
    scores = logits.double()
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    cumulated = scores.softmax(-1).cumsum(-1)[0]
    uniform = torch.linspace(0, 1, 501, dtype=torch.float64)[:-1]
    chosen, logp, _ = choose_tokens(logits.expand(500, -1), uniform, 1.0, top_p, top_k)
    before = torch.cat((torch.zeros(1, dtype=torch.float64), cumulated))[chosen]
    assert (before <= uniform + 1e-6).all() and (cumulated[chosen] >= uniform - 1e-6).all()
    torch.testing.assert_close(logp, scores.log_softmax(-1)[0, chosen], rtol=0, atol=1e-6)
    chosen, *_ = choose_tokens(logits, torch.tensor([1 - 2**-53], dtype=torch.float64), 1.0, top_p, top_k)
    assert torch.isfinite(scores[0, chosen]).all()


def test_equal_probabilities_at_the_edge_of_top_p_keep_the_lowest_tokens():
    uniform = torch.tensor([0.0, 0.4, 0.6, 0.99], dtype=torch.float64)
    chosen, logp, _ = choose_tokens(torch.zeros(4, 8), uniform, 1.0, top_p=0.25)
    assert chosen.tolist() == [0, 0, 1, 1]
    assert logp.exp().tolist() == pytest.approx([0.5] * 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Request((), 0, 4), "prompt_ids: expected one or more token ids of at least 0, got \\(\\)"),
        (lambda: Request((3, -1), 0, 4), "prompt_ids: expected one or more token ids"),
        (lambda: Request((3,), 0, 0), "max_new_tokens: expected at least 1, got 0"),
        (
            lambda: SamplingParams(temperature=-0.1),
            "temperature: expected a finite number of at least 0, got -0.1",
        ),
        (lambda: SamplingParams(temperature=float("nan")), "temperature: expected a finite number"),
        (lambda: SamplingParams(top_p=0.0), "top_p: expected above 0 and at most 1, got 0.0"),
        (lambda: SamplingParams(top_k=-1), "top_k: expected at least 0, got -1"),
        (lambda: SamplingParams(batch_size=0), "batch_size: expected at least 1, got 0"),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")]
)
def test_no_memory_is_not_taken_for_a_model_that_cannot_be_served(error):
    model = build("deepseek_v3")

    def fails(module, args, kwargs):
        raise error

    handle = model.register_forward_pre_hook(fails, with_kwargs=True)
    with pytest.raises(type(error), match="memory"):
        draw(model, requests_of(texts(2)))
    handle.remove()
    assert all(output.token_ids for output in draw(model, requests_of(texts(2))))


def test_the_model_is_left_as_it_was(mixture):
    before = mixture.config._attn_implementation
    mixture.train()
    try:
        draw(mixture, requests_of(texts(1)))
        with pytest.raises(IndexError):
            draw(mixture, [Request((V + 9,), 0, 1)])
        assert mixture.training and mixture.config._attn_implementation == before
    finally:
        mixture.eval()


def test_each_part_and_each_module_of_a_model_is_left_as_it_was():
    """A policy that sees images too, with an attention for its texts alone and a layer that is kept in eval mode."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**MODELS["gemma3_text"], "vocab_size": V, "pad_token_id": 0}
    model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision)).train()
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    model.get_decoder().layers[0].eval()

    def state():
        return [
            (m.training, m.config._attn_implementation if hasattr(m, "config") else None)
            for m in model.modules()
        ]

    before = state()
    draw(model, requests_of(texts(1)))
    assert state() == before


def test_outputs_carry_the_version_of_the_weights(mixture):
    engine = connect(Rollout(), mixture, None, 3)
    asked = requests_of(texts(1))
    params = SamplingParams()
    assert {output.version for output in engine.sample(asked, params)} == {3}
    engine.update(mixture, 4)
    assert {output.version for output in engine.sample(asked, params)} == {4}
    engine.close()


@pytest.mark.parametrize("architecture", ["deepseek_v3", "llama"])
def test_under_autocast_log_probs_are_those_of_the_model_in_bfloat16(architecture):
    model = build(architecture)
    asked = requests_of(texts(1, 9))
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        drawn = draw(model, asked)
        assert not torch.is_autocast_cache_enabled()
        for request, output in zip(asked, drawn, strict=True):
            first = len(request.prompt_ids)
            text = torch.tensor([request.prompt_ids + output.token_ids])
            with torch.no_grad():
                logits = model(input_ids=text).logits[0, first - 1 : -1].float()
            expected = logits.log_softmax(-1).gather(1, text[0, first:, None]).squeeze(1)
            error = (expected - torch.tensor(output.logp)).abs().mean()
            assert error < 0.1  # of a model with large weights; a few roundings of bfloat16
