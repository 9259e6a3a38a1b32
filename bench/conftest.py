"""What pytest-benchmark writes about the machine: our own facts, for its own would name the host."""

from typing import Any

import pytest

from . import environment, test_ops


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.clear()
    machine_info.update(environment.environment(test_ops.DEVICE.type))


def pytest_benchmark_generate_commit_info(config: pytest.Config) -> dict[str, Any]:
    return {"id": environment.commit()}
