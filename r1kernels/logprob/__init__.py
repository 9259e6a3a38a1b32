"""Log-probabilities of chosen tokens: from logits, from hidden states and the head, one by one or by completion; choosing them."""

from . import columns_tiles as columns_tiles  # implements kernels
from . import cpu as cpu
from . import cuda as cuda
from . import kept_padded as kept_padded
from . import triton as triton
from . import triton_divergence as triton_divergence
from . import triton_kept as triton_kept
from . import triton_linear as triton_linear
from .divergence import linear_divergence
from .grouped import GroupedLogprobs, grouped_logprobs, linear_grouped_logprobs
from .linear import linear_logprobs
from .sample import sample_tokens
from .token import token_logprobs
from .topk import linear_topk_divergence, topk_divergence

__all__ = [
    "GroupedLogprobs",
    "grouped_logprobs",
    "linear_divergence",
    "linear_grouped_logprobs",
    "linear_logprobs",
    "linear_topk_divergence",
    "sample_tokens",
    "token_logprobs",
    "topk_divergence",
]
