"""The C++ kernels for CPUs once more for each weaker instruction set than this machine's: every one has its own copy."""

import os
import re
from pathlib import Path

import pytest

from r1kernels import extension
from tests.support import fresh
from tests.support.forks import CHOSEN

pytestmark = pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))

HERE = Path(__file__).parent
LOGPROB = [
    "test_cpu_kernel.py",
    "test_gemm_cpu.py",
    "test_row_ops.py",
    "test_sample_tokens.py",
    "test_linear_logprobs.py::test_low_precision_inputs_are_as_exact_as_eager",
    "test_linear_divergence.py::test_it_keeps_its_digits_where_logits_lead",
]
MOE = [
    "test_moe_cpu_ops.py",
    "test_experts_backends.py",
    "test_route.py",
    "test_route_choice.py",
    "test_route_cpu.py",
]
ATTENTION = ["test_decode_attention.py", "test_decode_cpu.py"]
# of the log-probs and of attention all, of the experts what follows; not what the reference gives, which has no instruction sets,
# nor more tokens than a block has (1030)
LEFT_OUT = "opcheck or compiled or reference or cuda or triton or 1030"
OF_EXPERTS = (
    "as_exact_as_eager or gates or long_sums or choice_among_many or hopeless or infinite "
    "or outside or company or choice_in_groups or any_bits"
)


@pytest.mark.skipif(
    CHOSEN not in os.environ, reason="test_every_instruction_set runs it, in processes of their own"
)
def test_the_chosen_one_runs():
    assert extension.chosen_isa() == os.environ[CHOSEN]


def test_every_instruction_set():
    isas = list(extension.supported_isas()[:-1])
    if not isas:
        pytest.skip("this processor has the weakest one alone")
    of_experts = " or ".join(name.removesuffix(".py") for name in MOE)
    arguments = ["-q", "-x", "-p", "no:cacheprovider", "-p", "tests.support.forks"]
    arguments += ["-k", f"not ({LEFT_OUT}) and (not ({of_experts}) or {OF_EXPERTS})"]
    arguments += [f"{__file__}::test_the_chosen_one_runs"]
    arguments += [*(f"{HERE}/logprob/{name}" for name in LOGPROB), *(f"{HERE}/moe/{name}" for name in MOE)]
    arguments += [f"{HERE}/attention/{name}" for name in ATTENTION]
    # plugins that happen to be installed are not needed
    environment = {**os.environ, CHOSEN: " ".join(isas), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    program = f"import os, pytest, sys; os.chdir({str(HERE.parent)!r}); sys.exit(pytest.main({arguments}))"
    run = fresh.run(program, environment)
    assert run.returncode == 0, run.stdout[-3000:]
    assert re.findall(r"(\w+) runs", run.stdout) == re.findall(r"(\w+) ended with 0", run.stdout) == isas
    assert len(re.findall(r"\d+ passed", run.stdout)) == len(isas)


def test_an_unknown_one_is_an_error_that_names_the_known_ones():
    program = "import torch, r1kernels; r1kernels.token_logprobs(torch.zeros(1, 2), torch.tensor([0]))"
    result = fresh.run(program, {**os.environ, CHOSEN: "mmx"})
    assert result.returncode != 0
    assert f"{CHOSEN}: expected one of baseline" in result.stderr and "got 'mmx'" in result.stderr
