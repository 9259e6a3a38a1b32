"""Memory: the peak of a block, and what autograd keeps."""

import pytest
import torch

from bench import memory
from r1kernels import extension, linear_logprobs

MEBIBYTES = 1 << 20


def test_the_peak_counts_what_was_freed_again():
    x = torch.ones(16 * MEBIBYTES)
    with memory.Peak(torch.device("cpu")) as peak:
        y = x * 2
        z = y + 1
        del y
    if peak.bytes is None:
        pytest.skip("this system does not let a process reset its high-water mark")
    # two tensors of 64 MiB at once, one of them gone at the end
    assert 120 * MEBIBYTES < peak.bytes < 160 * MEBIBYTES
    with memory.Peak(torch.device("cpu")) as nothing:
        pass
    assert nothing.bytes < 8 * MEBIBYTES and z.numel()


def test_saved_bytes_count_each_storage_once_and_no_parameters():
    weight = torch.ones(100, requires_grad=True)
    x = torch.ones(100, requires_grad=True)
    with memory.counting_saved([weight]) as saved:
        y = (x * weight).exp()
        (y * y).sum()
    # x (for the gradient of weight) and y, which exp and the product keep
    assert saved.bytes == 2 * 400


@pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))
@pytest.mark.parametrize("frozen", [False, True], ids=["head too", "frozen head"])
def test_fused_log_probs_take_little_beside_their_gradients(frozen):
    """linear_logprobs without saved logits: a tile and what the GEMM packs, not the 128 MiB of logits."""
    tokens, vocabulary, hidden = 2048, 16384, 64
    x = torch.randn(tokens, hidden, requires_grad=True)
    weight = torch.randn(vocabulary, hidden, requires_grad=not frozen)
    targets = torch.randint(vocabulary, (tokens,))

    def gradients(rows):
        logp = linear_logprobs(x[rows], weight, targets[rows], save_logits=False, backend="cpu")
        return torch.autograd.grad(logp.sum(), x if frozen else (x, weight))

    gradients(slice(8))  # the libraries load
    with memory.Peak(torch.device("cpu")) as peak:
        found = gradients(slice(None))
    if peak.bytes is None:
        pytest.skip("this system does not let a process reset its high-water mark")
    assert peak.bytes - sum(grad.nbytes for grad in found) < 64 * MEBIBYTES
