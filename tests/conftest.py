"""What holds for every test: one thread (two on a busy machine run many times slower) and repeatable examples."""

import contextlib
import functools
import gc
import os
import sys

# The keys of these caches do not hold the shapes that an op gives: a graph compiled before an op changed would be found again.
os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "0")
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "0")

import pytest
import torch

from r1kernels import backends

# the tests of a GPU run without it
with contextlib.suppress(ModuleNotFoundError):
    import hypothesis

    hypothesis.settings.register_profile("r1kernels", deadline=None, derandomize=True, max_examples=50)
    hypothesis.settings.load_profile("r1kernels")
torch.set_num_threads(1)
# what is imported and collected is much, and looked through each time otherwise
gc.set_threshold(100_000, 20, 50)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config, log):
    """The tests of a file whose fixtures are made once for all of them run in one process; the others as they come."""
    from xdist.scheduler import LoadScopeScheduling

    @functools.cache
    def shares(path):
        return 'scope="module"' in (config.rootpath / path).read_text(encoding="utf-8")

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            path = nodeid.partition("::")[0]
            return path if shares(path) else nodeid

    return ByFile(config, log)


@pytest.fixture(scope="module", autouse=True)
def imported_for_good():
    """The garbage collector looks no more through what is imported by now: a full collection is ten times as fast."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    """At the end everything is collected again: libraries tell what they find alive then as leaks."""
    gc.unfreeze()


# torch.manual_seed notes the stack for each kind of device that may start later, a third of a millisecond a test
seed = torch.manual_seed if torch.backends.cuda.is_built() else torch.default_generator.manual_seed


@pytest.fixture(autouse=True)
def fixed_seed():
    """Fresh random inputs that are the same in every run."""
    seed(0)


@pytest.fixture(autouse=True)
def compiled_alone():
    """What a test compiles is forgotten: met again with other sizes it would be compiled with symbolic ones, at many times the price."""
    yield
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and dynamo.convert_frame.FRAME_COUNTER:
        dynamo.reset()


@pytest.fixture(autouse=True)
def same_backends():
    """A test leaves the choice of backends as it found it: what it left would decide later tests of the process."""
    before = backends.strict(), dict(backends._preferred)
    yield
    assert (backends.strict(), backends._preferred) == before
