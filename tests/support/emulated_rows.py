"""The launchers of csrc/logprob/cuda.h under the host emulator, on CPU tensors."""

from __future__ import annotations

import torch

from r1kernels.logprob import cuda
from r1kernels.logprob.token import plain_rows

ELEMENTS = (torch.float32, torch.bfloat16, torch.float16)


def product(a, b, out, accumulate):
    assert a.dtype == b.dtype
    result = a.float() @ b.float()
    out.copy_(out + result if accumulate else result)


# that of the backend cuda, with small tiles, on a CPU
ENGINE = cuda.ENGINE._replace(
    logits=lambda hidden, weight, out: product(hidden, weight.t(), out, False),
    add_product=product,
    tokens=16,
    tile_bytes=16 * 4 * 256,
    invariant_tokens=lambda dtype: 8,
    invariant_columns=128,
)


class EmulatedKernel:
    """The row ops; ``module`` is what tests/emulator/token_logprobs.cpp defines."""

    device = "cpu"

    def __init__(self, module, seed=0):
        self.module, self.seed = module, seed

    def call(self, logits, rows):
        self.module.set_seed(self.seed)
        return self.module.Call(
            logits.data_ptr(),
            ELEMENTS.index(logits.dtype),
            *logits.shape,
            *logits.stride()[:2],
            address(rows.targets),
            address(rows.temperatures),
            rows.temperature,
            rows.ignore_index,
            address(rows.bias),
            rows.logit_scale,
            rows.softcap,
            rows.first,
            rows.vocabulary,
        )

    def rows_forward_into(self, logits, rows, with_entropy, *outputs):
        code = self.module.forward(self.call(logits, rows), with_entropy, *map(address, outputs))
        assert code == 0, self.module.error_text(code)

    def rows_backward_into(self, grad, logits, rows, *saved):
        places = (*map(address, saved), grad.data_ptr(), ELEMENTS.index(grad.dtype), *grad.stride()[:2])
        code = self.module.backward(self.call(logits, rows), *places)
        assert code == 0, self.module.error_text(code)

    def forward_into(self, logits, targets, temperatures, temperature, ignore_index, logp, entropy, stats):
        rows = plain_rows(logits, targets, temperatures, temperature, ignore_index)
        self.rows_forward_into(logits, rows, entropy is not None, logp, entropy, stats, None)

    def backward_into(
        self, grad, logits, targets, temperatures, temperature, ignore_index, logp, stats, *grads
    ):
        rows = plain_rows(logits, targets, temperatures, temperature, ignore_index)
        self.rows_backward_into(grad, logits, rows, logp, stats, *grads, None)


def address(tensor):
    return 0 if tensor is None else tensor.data_ptr()
