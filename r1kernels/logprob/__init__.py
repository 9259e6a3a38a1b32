"""Log-probabilities of chosen tokens: from logits, from hidden states and the head, one by one or by completion."""

from functools import partial

from .. import backends
from . import autograd, cpu, cuda, grouped, linear, linear_autograd, triton, triton_linear
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
    backends.register("grouped_logprobs", _name, partial(grouped.run, _name), _module.reasons)
_LINEAR = (("cuda", cuda.linear_reasons), ("triton", triton_linear.reasons), ("cpu", cpu.linear_reasons))
for _name, _reasons in _LINEAR:
    backends.register("linear_logprobs", _name, partial(linear_autograd.run, _name, None), _reasons)
    backends.register("linear_grouped_logprobs", _name, partial(grouped.linear_run, _name), _reasons)
backends.register("token_logprobs", "reference", partial(autograd.run, "reference"))
backends.register("linear_logprobs", "reference", linear.reference)
backends.register("grouped_logprobs", "reference", partial(grouped.run, "reference"))
backends.register("linear_grouped_logprobs", "reference", partial(grouped.linear_run, "reference"))
