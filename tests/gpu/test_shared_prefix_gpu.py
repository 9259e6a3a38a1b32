"""The attentions of a prefix tree on a GPU against softmax in float64, and a model's log-probs against the repeated form.

Written for hardware that most machines lack: `pytest -m gpu`.
"""

from __future__ import annotations

import pytest
import torch

from r1kernels.integrations.prefix_kernels import EAGER, EFFICIENT_CUDA, FLASH_CUDA
from tests.support import prefix_kernels as cases

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device here", allow_module_level=True)
r1 = pytest.importorskip("r1kernels.integrations.transformers", reason="transformers is not installed")


@pytest.mark.parametrize(
    ("kernel", "dtype", "window"),
    [
        (FLASH_CUDA, torch.bfloat16, 0),
        (FLASH_CUDA, torch.float16, 0),
        *(
            (EFFICIENT_CUDA, dtype, window)
            for dtype in (torch.bfloat16, torch.float32)
            for window in (0, 24, 64)
        ),
        (EAGER, torch.float32, 24),
    ],
)
def test_parts_merge_to_the_softmax_over_a_path(kernel, dtype, window):
    tree, tensors = cases.inputs(dtype, "cuda", size=64, value_size=64)
    found = cases.run(kernel, tree, tensors, window)
    bound = {torch.float32: 1e-3, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert max(cases.errors(found, cases.expected(tree, tensors, window))) < bound


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma2", "GptOss", "DeepseekV3"])
def test_a_model_gives_the_log_probs_of_the_repeated_form(name):
    from tests.support import prefix_models as models

    model = models.build(name).cuda()
    prompts, completions = models.sequences()
    logp = r1.shared_prefix_logprobs(
        model, r1.prefix_tree(prompts, completions), temperature=models.TEMPERATURE
    )
    found = models.gradients(model, logp)
    expected = models.repeated(model, prompts, completions)[0]
    assert models.difference(logp, expected) < 1e-3
    of_repeated = models.gradients(model, expected)
    assert max(models.difference(found[one], of_repeated[one]) for one in of_repeated) < 1e-2
