"""Which backend serves a call: the order of those who decide, the reasons, and strict mode."""

from __future__ import annotations

import threading
from unittest import TestCase

import pytest
import torch

import r1kernels
from r1kernels import backends
from tests.support import fresh

X = torch.zeros(3)


@pytest.fixture
def op():
    """An op with a reference, and a cpu backend that refuses more than five entries."""
    name = "test_backends_op"
    preferred = dict(backends._preferred)
    backends.register(name, "reference", lambda x: "reference")
    backends.register(name, "triton", lambda x: "triton", lambda x: ("not a CUDA tensor",))
    backends.register(
        name, "cpu", lambda x: "cpu", lambda x: ("more than five entries",) if x.numel() > 5 else ()
    )
    yield name
    del backends._registry[name]
    backends._preferred.clear()
    backends._preferred.update(preferred)
    r1kernels.set_strict(False)


def test_automatic_takes_the_first_that_does_not_refuse(op):
    assert backends.registered(op) == ("triton", "cpu", "reference")
    assert backends.dispatch(op, None, X) == "cpu"
    assert backends.dispatch(op, None, torch.zeros(6)) == "reference"


def test_a_backend_that_yields_is_asked_last_of_the_kernels(op):
    few, many = [1], [1, 2, 3]  # no tensors: every backend is asked
    backends.register(op, "cpu", lambda x: "cpu")
    backends.register(op, "triton", lambda x: "triton", yields=lambda x: "slow on one" if len(x) == 1 else "")
    assert backends.dispatch(op, None, many) == "triton"
    assert backends.dispatch(op, None, few) == "cpu"
    assert backends.dispatch(op, "triton", few) == "triton"
    backends.register(op, "cpu", lambda x: "cpu", lambda x: ("broken",))
    assert backends.dispatch(op, None, few) == "triton"


def test_a_backend_on_the_call_is_used_or_an_error(op):
    assert backends.dispatch(op, "reference", X) == "reference"
    with pytest.raises(
        r1kernels.BackendError, match="'triton' cannot serve this call of .*: not a CUDA tensor"
    ):
        backends.dispatch(op, "triton", X)
    with pytest.raises(
        ValueError, match="backend: expected one of triton, cpu, reference for .*, got 'cuda'"
    ):
        backends.dispatch(op, "cuda", X)


def test_the_most_specific_wins(op):
    r1kernels.set_backend("reference")
    assert backends.dispatch(op, None, X) == "reference"
    with r1kernels.use_backend("cpu", op=op):
        assert backends.dispatch(op, None, X) == "cpu"
        with r1kernels.use_backend("reference"):
            assert backends.dispatch(op, None, X) == "reference"
            assert backends.dispatch(op, "cpu", X) == "cpu"
        assert backends.dispatch(op, None, X) == "cpu"
    assert backends.dispatch(op, None, X) == "reference"


def test_use_backend_ends_with_an_exception_and_stays_in_its_thread(op):
    seen = []
    with pytest.raises(KeyError), r1kernels.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(backends.dispatch(op, None, X)))
        thread.start()
        thread.join()
        raise KeyError
    assert seen == ["cpu"] and backends.dispatch(op, None, X) == "cpu"


def test_a_preference_that_refuses_falls_back_with_one_line(op):
    with TestCase().assertLogs("r1kernels") as log, r1kernels.use_backend("triton", op=op):
        assert [backends.dispatch(op, None, X) for _ in range(3)] == ["cpu"] * 3
    assert [record.getMessage() for record in log.records] == [
        f"backend 'triton' cannot serve this call of {op}: not a CUDA tensor; another backend runs"
    ]


def test_strict_mode_refuses_to_fall_back(op):
    r1kernels.set_strict(True)
    assert backends.dispatch(op, None, X) == "cpu"
    with pytest.raises(r1kernels.BackendError, match="more than five entries.*strict mode"):
        backends.dispatch(op, None, torch.zeros(6))
    with r1kernels.use_backend("triton"), pytest.raises(r1kernels.BackendError, match="not a CUDA tensor"):
        backends.dispatch(op, None, X)


def test_explain_shows_every_backend_and_its_reasons(op):
    def public(x):
        return backends.dispatch(op, None, x)

    public.__name__ = op
    text = r1kernels.explain(public, torch.zeros(6))
    assert [line.split()[0] for line in text.splitlines()[1:]] == ["triton", "cpu", "reference"]
    assert "triton     cannot run: not a CUDA tensor" in text
    assert "cpu        cannot run: more than five entries" in text
    assert "reference  runs" in text
    assert public(X) == "cpu"


def test_explain_takes_the_arguments_of_the_public_function():
    logits, targets = torch.zeros(2, 3).double(), torch.zeros(2, dtype=torch.int64)
    text = r1kernels.explain("token_logprobs", logits, targets, temperature=0.7)
    assert "reference  runs" in text and "logits: float64 is served by the reference alone" in text
    with pytest.raises(TypeError, match="targets: expected a torch.Tensor"):
        r1kernels.explain("token_logprobs", logits, [0, 0])


@pytest.mark.parametrize("name", ["eager", "", "CPU"])
def test_an_unknown_name_is_an_error(name):
    with pytest.raises(ValueError, match=f"name: expected one of .*, got {name!r}"):
        r1kernels.set_backend(name)
    with pytest.raises(ValueError, match="name: expected one of"), r1kernels.use_backend(name):
        pass
    with pytest.raises(TypeError, match="strict: expected a bool, got str"):
        r1kernels.set_strict(name)
    with pytest.raises(ValueError, match="op: expected one of .*token_logprobs.*, got 'no_such_op'"):
        r1kernels.explain("no_such_op")


def test_the_environment_chooses():
    code = (
        "import torch, r1kernels; from r1kernels import backends;"
        "arguments = (torch.zeros(1, 2, 3), torch.zeros(2, dtype=torch.int64), None, 1.0, -100, False, False);"
        "print(backends.choose('token_logprobs', None, *arguments).name)"
    )
    result = fresh.run(code, {"R1KERNELS_BACKEND": "token_logprobs:reference,*:auto"})
    assert result.stdout.strip() == "reference", result.stderr
    result = fresh.run(code, {"R1KERNELS_BACKEND": "token_logprobs:fast"})
    assert result.returncode != 0 and "R1KERNELS_BACKEND: expected one of" in result.stderr


def test_import_is_light():
    code = (
        "import sys, torch, r1kernels;"
        "names = ('triton', 'transformers', 'trl', 'training');"
        "print([name for name in names if name in sys.modules], torch.cuda.is_initialized())"
    )
    result = fresh.run(code, {})
    assert result.stdout.strip() == "[] False", result.stdout + result.stderr


def test_a_compiled_function_follows_the_preference():
    compiled = torch.compile(
        lambda z, y: r1kernels.token_logprobs(z, y), fullgraph=True, backend="eager", dynamic=True
    )
    logits, targets = torch.randn(4, 7), torch.tensor([0, 1, 2, 6])
    default = compiled(logits, targets)
    with r1kernels.use_backend("reference"):
        chosen = compiled(logits, targets)
    torch.testing.assert_close(default, chosen)
