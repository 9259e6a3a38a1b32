"""Log-probabilities of chosen tokens: from logits, from hidden states and the head, one by one or by completion."""

from . import cpu as cpu  # implements kernels
from . import cuda as cuda
from . import kept_padded as kept_padded
from . import triton as triton
from . import triton_kept as triton_kept
from . import triton_linear as triton_linear
from .grouped import GroupedLogprobs, grouped_logprobs, linear_grouped_logprobs
from .linear import linear_logprobs
from .token import token_logprobs

__all__ = [
    "GroupedLogprobs",
    "grouped_logprobs",
    "linear_grouped_logprobs",
    "linear_logprobs",
    "token_logprobs",
]
