"""pytest bench: the quick cases of every family through pytest-benchmark; with --benchmark-disable a smoke test."""

from __future__ import annotations

from typing import Any

import pytest

from . import environment, replay

_SESSION = pytest.StashKey[replay.Session]()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        replay.parametrize(metafunc, metafunc.module.FAMILY)


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> replay.Session:
    """What the session has measured so far; a case is measured when the first of its tests asks for it."""
    stash = request.config.stash
    if _SESSION not in stash:
        stash[_SESSION] = replay.Session(smoke=bool(request.config.getoption("benchmark_disable")))
    return stash[_SESSION]


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Our own facts: pytest-benchmark's would name the host."""
    machine_info.clear()
    machine_info.update(environment.environment(replay.DEVICE))


def pytest_benchmark_generate_commit_info(config: pytest.Config) -> dict[str, Any]:
    return {"id": environment.commit()}


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]
) -> None:
    """The whole record, as ``python -m bench run`` writes it, failures and ceilings included."""
    if _SESSION in config.stash:
        output_json["r1kernels"] = config.stash[_SESSION].record
