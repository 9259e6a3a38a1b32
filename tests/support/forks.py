"""A plugin of pytest: what was collected runs in a fork for each instruction set that R1KERNELS_CPU_ISA lists.

All is imported and collected once. The C++ kernels choose at their first call, which is in the fork.
"""

import os

import pytest
import torch.distributed.tensor  # noqa: F401 - torch.testing imports it at its first comparison, in each fork otherwise

from r1kernels import extension

CHOSEN = "R1KERNELS_CPU_ISA"


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    for isa in os.environ[CHOSEN].split():
        child = os.fork()
        if child == 0:
            os.environ[CHOSEN] = isa
            print(f"{extension.chosen_isa()} runs", flush=True)
            return None  # on to pytest's own loop, in the fork
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(f"{isa} ended with {code}", flush=True)
        session.testsfailed += code != 0
    return True
