"""Sampling in pieces: the same draws however often a stage is stopped, nothing drawn twice, and a bar where it takes long."""

import io
from types import SimpleNamespace

import pytest

from training import pieces
from training.context import StageContext
from training.engines.transformers import TransformersEngine
from training.loops.sample import Prompt
from training.model import build_model
from training.pieces import sample_in_pieces
from training.progress import Progress
from training.prompts import chat
from training.run_dir import StageDir
from training.sections import Model
from training.tasks.arithmetic import make_problem
from training.tokenizer import build_tokenizer

TOKENIZER = build_tokenizer()
MODEL = build_model(
    Model(hidden_size=16, layers=1, dense_layers=1, heads=2, intermediate_size=16), TOKENIZER, 0
)
PROMPTS = [Prompt(problem, chat(problem)) for problem in (make_problem(a, 7, 9, "en") for a in range(1, 10))]


class Killed(BaseException):
    """Stands for kill -9."""


def context(path):
    stage = StageDir(path / "judge")
    stage.begin({}, {})
    out = io.StringIO()
    return StageContext("judge", SimpleNamespace(seed=0), None, stage, {}, Progress(out)), out


def draw(context, prompts=PROMPTS, identity="a", **settings):
    settings = {"samples": 2, "batch_size": 1, "max_new_tokens": 5, "seed_parts": (0, "x"), **settings}
    return sample_in_pieces(context, identity, TransformersEngine(MODEL, TOKENIZER), prompts, **settings)


@pytest.fixture
def calls(monkeypatch):
    """The prompts of every call of the sampler; `calls.die_at` kills that one."""
    real, calls = pieces.sample, SimpleNamespace(sizes=[], die_at=None)

    def counted(engine, prompts, **settings):
        if len(calls.sizes) == calls.die_at:
            raise Killed
        calls.sizes.append(len(prompts))
        return real(engine, prompts, **settings)

    monkeypatch.setattr(pieces, "sample", counted)
    return calls


def test_pieces_are_of_four_batches_and_give_what_one_call_gives(tmp_path, calls):
    found = draw(context(tmp_path)[0])
    assert calls.sizes == [2, 2, 2, 2, 1]  # 2 prompts x 2 samples are 4 batches of 1
    whole = draw(None, batch_size=100)
    assert [(c.problem.id, c.sample_id, c.token_ids, c.text) for c in found] == [
        (c.problem.id, c.sample_id, c.token_ids, c.text) for c in whole
    ]


def test_what_was_drawn_before_a_kill_is_not_drawn_again(tmp_path, calls):
    expected = draw(None)
    calls.sizes.clear()
    calls.die_at = 3
    with pytest.raises(Killed):
        draw(context(tmp_path)[0])
    calls.die_at = None
    assert draw(context(tmp_path)[0]) == expected
    assert calls.sizes == [2, 2, 2, 2, 1]


@pytest.mark.parametrize(
    "other",
    [
        {"identity": "b"},
        {"seed_parts": (1, "x")},
        {"max_new_tokens": 4},
        {"prompts": PROMPTS[1:]},
        {"temperature": 0.5},
    ],
)
def test_another_question_never_gets_the_pieces_of_this_one(tmp_path, calls, other):
    draw(context(tmp_path)[0])
    calls.sizes.clear()
    draw(context(tmp_path)[0], **other)
    assert sum(calls.sizes) == len(other.get("prompts", PROMPTS))


def test_a_bar_shows_where_a_long_draw_is(tmp_path):
    long, out = context(tmp_path / "long")
    draw(long)
    assert "judge samples 18/18" in out.getvalue()
    short, out = context(tmp_path / "short")
    draw(short, batch_size=100)
    assert out.getvalue() == ""
