"""A real vLLM server on the CPU (`make vllm`): log-probs and greedy tokens after updates, updates that are not whole, whole runs."""

from statistics import fmean, variance

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.vllm_stand_in import PYTHON, TOKENIZER, StandIn, moved, policy, requests, talk
from training import corpus, pipeline
from training.checkpoint import save_model
from training.context import StageContext
from training.engines import EngineError, SamplingParams, connect, weights, workspace
from training.loops import next_token
from training.progress import Progress
from training.recipe import load
from training.run_dir import RunDir, StageDir
from training.sections import Rollout
from training.tokenizer import build_tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.is_file(), reason="no .venv-vllm: `make vllm` makes it"),
]
ROLLOUT = Rollout(engine="vllm", start=True, python=str(PYTHON), timeout=900.0)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """One workspace for all tests, whose server is started once for a size of model."""
    with workspace.workspace_in(tmp_path_factory.mktemp("home")):
        yield


def test_after_each_of_three_updates_log_probs_and_greedy_tokens_are_those_of_transformers(home):
    model = policy()
    engine = connect(ROLLOUT, model, TOKENIZER)
    for version in range(1, 4):
        engine.update(moved(model, version), version)
        for request, output in zip(requests(), engine.sample(requests(), SamplingParams()), strict=True):
            ids = torch.tensor([[*request.prompt_ids, *output.token_ids]])
            with torch.no_grad():
                logp = model(ids).logits[0, len(request.prompt_ids) - 1 : -1].log_softmax(-1)
            own = logp[torch.arange(len(output.token_ids)), list(output.token_ids)]
            torch.testing.assert_close(torch.tensor(output.logp), own, rtol=0, atol=1e-4)
            assert output.version == version
        for request, output in zip(requests(), engine.sample(requests(), SamplingParams(0.0)), strict=True):
            ids = torch.tensor([request.prompt_ids])
            greedy = model.generate(
                ids, do_sample=False, max_new_tokens=request.max_new_tokens, eos_token_id=None
            )
            assert greedy[0, ids.shape[1] :].tolist() == list(output.token_ids)
    engine.close()


def test_draws_depend_on_prompt_and_key_alone(home):
    engine = connect(ROLLOUT, policy(), TOKENIZER)
    together = engine.sample(requests(), SamplingParams())
    alone = [engine.sample([request], SamplingParams())[0] for request in requests()]
    assert [each.token_ids for each in together] == [each.token_ids for each in alone]
    assert together[0].token_ids != together[1].token_ids  # one prompt, two keys
    engine.close()


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.0.self_attn.v_proj.bias", "lm_head.weight"]
)
def test_an_update_that_leaves_out_one_tensor(home, monkeypatch, name):
    model = policy()
    whole = weights.write

    def incomplete(model, folder, dtype):
        whole(model, folder, dtype)
        tensors = load_file(folder / "model.safetensors")
        del tensors[name]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    connect(ROLLOUT, model, TOKENIZER).close()
    monkeypatch.setattr(weights, "write", incomplete)
    with pytest.raises(EngineError, match="left a tensor out"):
        connect(ROLLOUT, model, TOKENIZER)


def test_the_recording_of_the_stand_in_is_what_the_server_answers(home):
    """The stand-in of the everyday tests, beside the real one: the same conversation, the same tokens."""
    with StandIn() as stand_in:
        recorded = talk(connect(stand_in.rollout, model := policy(), TOKENIZER), model)
    real = talk(connect(ROLLOUT, model := policy(), TOKENIZER), model)
    for ours, theirs in zip(recorded, real, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert (a.token_ids, a.finished, a.version) == (b.token_ids, b.finished, b.version)
            assert a.logp == pytest.approx(b.logp, abs=1e-5)


STEPS, LAST = 20, 8
WORDS = [
    *("stages=[base,zero]", f"zero.steps={STEPS}", "zero.prompts=16", "zero.group_size=8", "zero.lr=2e-3"),
    *("zero.max_new_tokens=40", "zero.batch_size=128"),
]


# Every problem is worked out step by step: of two ways to the same reward, a long and a short one, runs would take either.
MIX = {"tidy": 0.3, "mixed": 0.2, "formless": 0.4, "general": 0.1}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a small Qwen2 model that has read a corpus for as long as `smoke` says."""
    recipe, tokenizer, folder = load("smoke"), build_tokenizer(), tmp_path_factory.mktemp("base")
    model = policy(tokenizer)  # of the words of the corpus, which the recording does not have
    stage = StageDir(folder / "training")
    stage.begin({}, {})
    documents = corpus.documents(0, recipe.base.steps * recipe.base.batch_size, mix=MIX, steps=1, largest=29)
    context = StageContext("base", recipe, recipe.base, stage, {}, Progress(quiet=True))
    next_token.train(model, tokenizer, documents, recipe.base, context)
    save_model(model, tokenizer, folder / "model")
    return folder / "model"


def run_of(base, folder, *words):
    """The last steps of a run of GRPO."""
    recipe = load("smoke", [*WORDS, f"model.pretrained={base}", *words])
    pipeline.run(recipe, RunDir(folder), progress=Progress(quiet=True))
    rows = RunDir(folder).stage("zero").metrics()
    assert len(rows) == STEPS
    return rows


def test_a_run_of_grpo_ends_with_the_same_marks_whatever_engine_draws(base, tmp_path):
    ours = run_of(base, tmp_path / "ours")
    theirs = run_of(
        base,
        tmp_path / "theirs",
        *("rollout.engine=vllm", "rollout.start=true", f"rollout.python={PYTHON}", "rollout.timeout=900"),
    )
    for row in theirs:
        assert row["sampler_gap_max"] < 1e-4
        assert row["stale"] == 0
    for mark in ("reward", "accuracy", "format", "length"):
        a, b = ([row[mark] for row in rows[-LAST:]] for rows in (ours, theirs))
        noise = ((variance(a) + variance(b)) / LAST) ** 0.5
        assert abs(fmean(a) - fmean(b)) < 4 * noise + 1e-3, (mark, a, b)
    assert fmean(row["reward"] for row in theirs[-LAST:]) > theirs[0]["reward"] + 0.2
    assert not (tmp_path / "theirs" / workspace.WEIGHTS).exists()
