"""bench/results/machine_code.json is what the kernels become, and no kernel in it is slow in a way that machine code shows."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton", reason="triton, which brings cuobjdump, is not installed")

from tests.support import machine_code

RECORD = json.loads(machine_code.FILE.read_text())
KERNELS = [
    pytest.param(needs, id=f"{source} {name}")
    for source, kernels in RECORD["kernels"].items()
    for name, needs in kernels.items()
]


@pytest.mark.parametrize("needs", KERNELS)
def test_no_kernel_has_a_stack_or_waits_for_every_wgmma(needs):
    assert needs["stack_bytes"] == 0 and needs["serialised"] == 0
    assert needs["registers"] <= 255


@pytest.mark.slow  # compiles every kernel: minutes
@pytest.mark.parametrize("source", machine_code.sources())
def test_the_committed_counts_are_those_of_the_sources(source):
    missing = [
        name
        for name, path in (("nvcc", machine_code.nvcc()), ("CUTLASS", machine_code.cutlass()))
        if not path
    ]
    if missing:
        pytest.skip(f"not found here: {', '.join(missing)}")
    if machine_code.toolchain() != RECORD["toolchain"]:
        pytest.skip(f"other compilers here: {machine_code.toolchain()}, committed: {RECORD['toolchain']}")
    again = f"python -m tests.support.machine_code {source}"
    assert machine_code.kernels(source) == RECORD["kernels"].get(source), again
