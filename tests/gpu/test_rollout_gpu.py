"""The sampler in the process on a GPU: the tokens of the CPU, and no wait for the device between two looks of the host.

Written for hardware that most machines lack: `pytest -m gpu`.
"""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device here", allow_module_level=True)
transformers = pytest.importorskip("transformers", reason="transformers is not installed")


def model_of(family):
    from tests.support.own_models import FAMILIES
    from training.model import prepare

    config = transformers.AutoConfig.for_model(family, vocab_size=64, **FAMILIES[family])
    config.initializer_range = 0.3
    torch.manual_seed(0)
    return prepare(transformers.AutoModelForCausalLM.from_config(config).eval())


def draw(model, **params):
    from training.engines import Request, SamplingParams
    from training.engines.transformers import TransformersEngine

    head = tuple(range(3, 21))
    requests = [Request((*head, *range(5, 6 + i % 4)), i, 12) for i in range(20)]
    engine = TransformersEngine(model, None)
    return engine.sample(requests, SamplingParams(stop_ids=(2, 3, 4), batch_size=7, **params))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "deepseek_v3"])
def test_greedy_tokens_are_those_of_the_cpu(family):
    model = model_of(family)
    expected = draw(model, temperature=0.0)
    found = draw(model.cuda(), temperature=0.0)
    assert [output.token_ids for output in found] == [output.token_ids for output in expected]


@pytest.mark.parametrize(
    "params", [{}, {"top_p": 0.9, "record_kept": True}, {"top_k": 5, "temperature": 0.7}]
)
def test_no_step_waits_for_the_device(monkeypatch, params):
    from training.engines import transformers as engine_module

    model = model_of("llama").cuda()
    expected = draw(model, **params)
    step = engine_module._Flight._step

    def guarded(flight):
        torch.cuda.set_sync_debug_mode("error" if flight.prefixes else "default")
        try:
            step(flight)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(engine_module._Flight, "_step", guarded)
    found = draw(model, **params)
    assert [output.token_ids for output in found] == [output.token_ids for output in expected]
    for mine, other in zip(found, expected, strict=True):
        assert (mine.kept is None) == ("record_kept" not in params)
        if mine.kept is not None:
            assert torch.equal(mine.kept.ids, other.kept.ids) and not mine.kept.ids.is_cuda
