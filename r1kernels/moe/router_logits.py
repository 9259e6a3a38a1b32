"""router_logits: the gate of a mixture, in float32, each token by itself.

T tokens, H hidden size, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import autocast, checks
from ..op import Op
from . import experts, reference


def router_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    r"""The logits of a router, ``hidden @ weight.T + bias`` in float32, for ``route``.

    A token that is routed once in a prompt's batch and once alone, or by a sampler and by a trainer, must have the same logits, or
    its experts may differ. torch's matrix products of few rows differ in the last bits from those of many.

    Args:
        hidden: (..., H), float32, bfloat16, float16 or float64; any strides.
        weight: (E, H), any float dtype. bias: (E,) or None.
        backend: "cuda", "triton", "cpu" or "reference": that one or an error; None chooses (see r1kernels.backends).

    Returns:
        (..., E) float32 (float64 if an input is), whatever autocast says. Gradients come in the dtype of each input.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.

    Precision: float32 products and sums. The bits of a token depend on its hidden state and the weights alone: not on the other
    tokens, their number or order, nor, on the cpu backend, on the number of threads. Deterministic.
    """
    checks.tensor("hidden", hidden, dtypes=checks.FLOATS)
    if hidden.ndim == 0:
        raise ValueError("hidden: expected shape (..., H), got ()")
    size = hidden.shape[-1]
    checks.tensor("weight", weight, dtypes=checks.FLOATS, shape=(None, size), like=hidden)
    if bias is not None:
        checks.tensor("bias", bias, dtypes=checks.FLOATS, shape=weight.shape[:1], like=hidden)
    given = [x.dtype for x in (hidden, weight, bias) if x is not None]
    dtype = torch.float64 if torch.float64 in given else torch.float32
    with autocast.off(hidden):
        rows = hidden.reshape(hidden.shape[:-1].numel(), size).to(dtype)
        # all rows are those of one expert, whose matrix has the outputs E
        offsets = torch.arange(2, dtype=torch.int32, device=hidden.device) * rows.shape[0]
        call = experts.GemmCall(rows, weight.to(dtype).unsqueeze(0), offsets, False, True)
        logits = ROUTER_LOGITS(backend, call)
        logits = logits if bias is None else logits + bias.to(dtype)
    return logits.view(*hidden.shape[:-1], weight.shape[0])


ROUTER_LOGITS = Op(
    "router_logits",
    reference.grouped_gemm,
    experts.gemm_on_kernels,
    decides="x",
    limits=experts.gemm_limits,
)
