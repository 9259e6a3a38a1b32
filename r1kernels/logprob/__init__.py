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

for _name, _module in (("cuda", cuda), ("triton", triton), ("cpu", cpu)):
    backends.register("token_logprobs", _name, partial(autograd.run, _name), _module.reasons)
backends.register("token_logprobs", "reference", partial(autograd.run, "reference"))
backends.register("linear_logprobs", "reference", linear.reference)
backends.register("grouped_logprobs", "reference", grouped.reference)
backends.register("linear_grouped_logprobs", "reference", grouped.linear_reference)
