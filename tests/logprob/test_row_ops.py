"""The row ops of the kernel backends: heads, slabs, statistics, sequences."""

from __future__ import annotations

import pytest

from r1kernels import extension
from tests.support.logprob_rows import LogprobRows

pytestmark = pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))


class TestRowsCpu(LogprobRows):
    @pytest.fixture
    def backend(self):
        return "cpu"
