"""Log-probabilities of chosen tokens: from logits, from hidden states and the head, one by one or by completion."""

from functools import partial

from .. import backends
from . import autograd, cpu, cuda, grouped, linear, triton
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

backends.register("token_logprobs", "cuda", cuda.run, cuda.reasons)
backends.register("token_logprobs", "triton", triton.run, triton.reasons)
backends.register("token_logprobs", "cpu", cpu.run, cpu.reasons)
backends.register("token_logprobs", "reference", partial(autograd.run, "reference"))
backends.register("linear_logprobs", "reference", linear.reference)
backends.register("grouped_logprobs", "reference", grouped.reference)
backends.register("linear_grouped_logprobs", "reference", grouped.linear_reference)
