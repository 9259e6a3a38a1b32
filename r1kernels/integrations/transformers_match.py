"""Which router of transformers computes what ``r1kernels.route`` computes, found by what it does and not by its name.

A trial runs the router's own class on random tokens and with random weights, on the CPU, so that neither the weights of
the model nor where they lie matter (meta tensors, shards and GPUs are as good as any). What it gives (logits, weights,
indices, and the gradients of all of its parameters) is compared with ``route``, for the numbers and tensors that the
router and its config hold. T tokens, H hidden size, E experts, K experts per token.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import autocast, backends
from ..moe import Routing, route, router_logits
from ..moe.routing import CHOICES, GROUP_SCORES

ARGUMENT = "(argument)"  # where the selection bias lies if the block hands it to the router
_TOKENS = 64
# the logits of some tokens are lower by as much, so that a sum of scores that is not alone shows
_LOWEST = -12.0
_TOLERANCE = 1e-4
_SCALARS = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Match:
    """What a router computes; tensors and most numbers by where they lie in the router, so that they are read live."""

    experts: int
    matrix: str  # (E, H), of the linear layer
    norm: str = ""  # a module that the hidden states go through before it
    input_scale: str = ""  # (H,), and
    input_factor: str = ""  # a number, both of which multiply them then
    logit_bias: str = ""  # (E,), added to the logits
    factor: str = ""  # a number that multiplies the logits
    softcap: str = ""  # a number c: c * tanh(logits / c)
    top_k: int | str = 0
    score: str = "sigmoid"
    choose_by: str = "scores"
    selection_bias: str = ""  # (E,), or ARGUMENT
    table: str = ""  # (vocabulary, K): the experts of a token follow from its id, an argument
    n_group: int | str = 1
    topk_group: int | str = 1
    group_score: str | None = None
    normalize: bool = True
    eps: float = 1e-20
    scale: float | str = 1.0
    expert_scale: str = ""  # (E,), multiplies the weights of its experts
    gives: str = "logits"  # or "probabilities", their softmax: what comes before weights and indices
    float32_linear: bool = True
    float32_logits: bool = True
    weights_like: str = ""  # "logits" or "hidden", whose dtype the weights are given in; "": float32

    def logits(self, router: Any, hidden: Tensor) -> Tensor:
        """(T, E), from hidden states of any shape (..., H)."""
        weight = _read(router, self.matrix)
        bias = _read(router, self.logit_bias) if self.logit_bias else None
        hidden = hidden.reshape(-1, weight.shape[1])
        if self.norm:
            hidden = _read(router, self.norm)(hidden)
        for name in (self.input_scale, self.input_factor):
            if name:
                hidden = hidden * _read(router, name)
        # float32 also where the model's own linear layer is in fewer bits: rounded once, the same for a token in any batch
        logits = router_logits(hidden if self.float32_linear else hidden.to(weight.dtype), weight, bias)
        if not self.float32_linear:
            (like,) = autocast.cast(weight)
            logits = logits.to(like.dtype)
        if self.float32_logits:
            logits = logits.float()
        if self.factor:
            logits = logits * _read(router, self.factor)
        if self.softcap:
            cap = _read(router, self.softcap)
            logits = torch.tanh(logits / cap) * cap
        return logits

    def first(self, logits: Tensor) -> Tensor:
        """What the router returns before weights and indices."""
        return logits.softmax(dim=-1, dtype=torch.float32) if self.gives == "probabilities" else logits

    def options(self, router: Any, *arguments: Any) -> dict[str, Any]:
        """The arguments of ``route`` but the logits, given what the router is called with after the hidden states."""
        bias = arguments[0] if self.selection_bias == ARGUMENT else self.bias(router)
        indices = _read(router, self.table)[arguments[0].reshape(-1)].long() if self.table else None
        return {
            "top_k": self.experts_per_token(router),
            "score": self.score,
            "choose_by": self.choose_by,
            "bias": bias,
            "indices": indices,
            "n_group": _value(router, self.n_group),
            "topk_group": _value(router, self.topk_group),
            "group_score": self.group_score,
            "normalize": self.normalize,
            "eps": self.eps,
            "scale": _value(router, self.scale),
        }

    def bias(self, router: Any) -> Tensor | None:
        """The selection bias (E,) that the router holds."""
        held = self.selection_bias not in ("", ARGUMENT)
        return _read(router, self.selection_bias).reshape(-1) if held else None

    def experts_per_token(self, router: Any) -> int:
        return int(_value(router, self.top_k))

    def weights(self, router: Any, routing: Routing, logits: Tensor, hidden: Tensor) -> Tensor:
        """The weights of ``route``, in the dtype in which the router gives them."""
        weights = routing.weights
        if self.expert_scale:
            weights = weights * _read(router, self.expert_scale)[routing.indices]
        like = {"logits": logits, "hidden": hidden, "": routing.weights}[self.weights_like]
        return weights.to(like.dtype)

    def __str__(self) -> str:
        said = [f"{self.score} {'of the chosen' if self.normalize else 'of all'}"]
        said += [
            f"{name.replace('_', ' ')} {where}"
            for name in ("norm", "logit_bias", "factor", "softcap", "selection_bias", "expert_scale")
            if (where := getattr(self, name))
        ]
        if self.choose_by == "logits":
            said.append("chosen by logits")
        if self.table:
            said.append(f"experts by {self.table}")
        if self.n_group != 1:
            by = f" by {self.group_score}" if self.group_score else ""
            said.append(f"groups {self.topk_group} of {self.n_group}{by}")
        if self.eps != 1e-20:
            said.append(f"eps {self.eps:g}")
        if self.scale != 1.0:
            said.append(f"scale {self.scale if isinstance(self.scale, str) else format(self.scale, 'g')}")
        return ", ".join(said)


@dataclass(frozen=True)
class _Found:
    """What a router is made of: names of its matrices (E, H) and vectors (E,), names and values of its numbers."""

    matrices: list[str]
    vectors: list[str]
    numbers: dict[str, int | float]


_known: dict[Any, Match | str] = {}


def match(router: nn.Module, experts: int) -> Match | str:
    """What the router computes, or one sentence that says why ``route`` does not. A class and config is tried once."""
    key = (experts, type(router).forward, *_identity(router))
    if key not in _known:
        with (
            torch.device("cpu"),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            backends.use_backend("reference"),
        ):
            _known[key] = _Trial(router, experts).match()
    return _known[key]


def _identity(router: nn.Module) -> Iterator[Any]:
    """What decides how a router computes: its class, its numbers and the shapes of its tensors."""
    for name, module in router.named_modules():
        yield name, type(module)
        for key, value in vars(module).items():
            if isinstance(value, _SCALARS) and key not in ("layer_idx", "training"):
                yield key, value
            elif key == "config":
                yield key, repr(value)
        for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            yield key, tuple(tensor.shape)


class _Trial:
    """One router on random tokens."""

    def __init__(self, router: nn.Module, experts: int) -> None:
        self.router, self.experts = router, experts
        self.generator = torch.Generator("cpu").manual_seed(0)
        # in float32, whatever torch's default dtype is
        self.normal = partial(torch.randn, generator=self.generator, dtype=torch.float32)

    def match(self) -> Match | str:
        parts = self._parts()
        if len(parts.matrices) != 1:
            return f"it has {len(parts.matrices)} matrices with a row for each of the {self.experts} experts"
        try:
            arguments = self._arguments()
            copied = _copy(self.router, self._random)
            hidden = self.normal(_TOKENS, _read(copied, parts.matrices[0]).shape[1])
            hidden[:, 0] = (
                _LOWEST
                * torch.rand(_TOKENS, generator=self.generator, dtype=torch.float32).sub(0.5).clamp(min=0)
                * 2
            )
            outputs, shape = _call(copied, hidden.requires_grad_(), arguments)
        except _Unknown as error:
            return str(error)
        if not (isinstance(outputs, tuple) and len(outputs) == 3):
            got = len(outputs) if isinstance(outputs, tuple) else type(outputs).__name__
            return f"it returns {got} values where logits, weights and indices are expected"
        logits, weights, indices = outputs
        rows = (_TOKENS, self.experts)
        if logits.numel() != rows[0] * rows[1] or weights.shape != indices.shape or weights.numel() % _TOKENS:
            shapes = ", ".join(str(tuple(output.shape)) for output in outputs)
            return f"it returns shapes {shapes} where (T, E), (T, K) and (T, K) are expected"
        own = (logits.reshape(rows), weights.reshape(_TOKENS, -1), indices.reshape(_TOKENS, -1))
        linear = self._linear(copied, parts, hidden, own[0].detach())
        if linear is None:
            return "its logits are not those of a linear layer"
        linear = replace(linear, top_k=self._top_k(parts, own[2].shape[1]))
        found = self._choice(copied, parts, linear, linear.logits(copied, hidden).detach(), own, arguments)
        if isinstance(found, str):
            return found
        if not self._same_gradients(copied, found, hidden, own, arguments):
            return "its gradients are others"
        return self._dtypes(found, hidden.detach().bfloat16().reshape(shape), arguments)

    def _parts(self) -> _Found:
        vectors = [
            name
            for name, tensor in _tensors(self.router)
            if tensor.numel() == self.experts and tensor.is_floating_point()
        ]
        return _Found(rows_of_experts(self.router, self.experts), vectors, dict(_numbers(self.router)))

    def _random(self, tensor: Tensor) -> Tensor:
        """Random values in the place of a parameter or buffer, so that logits spread over a few units."""
        if not tensor.is_floating_point():
            return torch.randint(self.experts, tensor.shape, generator=self.generator)
        values = self.normal(tensor.shape) * 0.5
        if tensor.ndim == 2 and tensor.shape[0] == self.experts and tensor.shape[1] > 1:
            values *= 4 / tensor.shape[1] ** 0.5
            values[:, 0] = 1.0  # the first hidden unit moves all logits of a token alike
        return values

    def _arguments(self) -> tuple[Tensor, ...]:
        """What the router's forward is called with after the hidden states."""
        names = [name for name in inspect.signature(type(self.router).forward).parameters if name != "self"]
        if len(names) == 1:
            return ()
        if len(names) == 2 and "bias" in names[1]:
            return (self.normal(self.experts) * 0.5,)
        if len(names) == 2 and "ids" in names[1] and (table := self._table()):
            return (torch.randint(len(_read(self.router, table)), (_TOKENS,), generator=self.generator),)
        raise _Unknown(f"its forward takes {', '.join(names)}")

    def _table(self) -> str:
        """The name of what gives a token's experts by its id."""
        integers = [
            name for name, one in _tensors(self.router) if one.ndim == 2 and not one.is_floating_point()
        ]
        return integers[0] if len(integers) == 1 else ""

    def _top_k(self, parts: _Found, top_k: int) -> int | str:
        names = [name for name, value in parts.numbers.items() if "top" in name and value == top_k]
        return min(names, key=len) if names else top_k

    def _linear(self, copied: nn.Module, parts: _Found, hidden: Tensor, logits: Tensor) -> Match | None:
        """The linear layer whose logits these are."""
        floats = {name: value for name, value in parts.numbers.items() if isinstance(value, float)}
        for bias in ("", *parts.vectors):
            plain = Match(self.experts, parts.matrices[0], logit_bias=bias)
            for found in (
                plain,
                *(replace(plain, factor=name) for name in floats),
                *(replace(plain, softcap=name) for name, value in floats.items() if value > 0),
            ):
                if _close(found.logits(copied, hidden), logits):
                    return found
        return self._normed(copied, parts, floats, hidden, logits)

    def _normed(
        self, copied: nn.Module, parts: _Found, floats: Iterable[str], hidden: Tensor, first: Tensor
    ) -> Match | None:
        """A linear layer of normed and scaled hidden states, whose logits these are, or probabilities."""
        size = hidden.shape[1]
        norms = [name for name, one in copied.named_children() if not any(True for _ in one.parameters())]
        scales = [
            name for name, one in _tensors(copied) if one.shape == (size,) and name not in parts.vectors
        ]
        for norm, scale, factor in itertools.product(norms, ("", *scales), ("", *floats)):
            found = Match(self.experts, parts.matrices[0], norm=norm, input_scale=scale, input_factor=factor)
            logits = found.logits(copied, hidden)
            for gives in ("logits", "probabilities"):
                found = replace(found, gives=gives)
                if _close(found.first(logits), first):
                    return found
        return None

    def _choice(
        self,
        copied: nn.Module,
        parts: _Found,
        linear: Match,
        logits: Tensor,
        own: Any,
        arguments: tuple[Tensor, ...],
    ) -> Match | str:
        """What chooses these experts and gives them these weights."""
        weights, indices = own[1].detach(), own[2]
        dense = _spread(weights, indices, self.experts)
        chosen = _spread(torch.ones_like(weights), indices, self.experts)
        counts = [name for name in parts.numbers if name.endswith("group")]
        kept = [name for name in counts if "top" in name]
        groups: list[tuple[int | str, int | str]] = [(1, 1)]
        groups += [(of, few) for of in counts if of not in kept and parts.numbers[of] > 1 for few in kept]
        biases = ["", *(name for name in parts.vectors if name != linear.logit_bias)]
        table = ""
        if arguments:
            biases, table = ([ARGUMENT], "") if arguments[0].is_floating_point() else ([""], self._table())
        scales = (1.0, 1.0 / indices.shape[1], *(name for name in parts.numbers if "scal" in name))
        expert_scales = [name for name in parts.vectors if "scal" in name]
        refused, same_choice = "", False
        # where one expert of weight 1 is chosen, every score serves: the plainer one
        for bias, (n_group, topk_group), score, choose_by, group_score in itertools.product(
            biases, groups, ("softmax", "sigmoid", "sqrt_softplus"), CHOICES, (None, *GROUP_SCORES)
        ):
            plain = choose_by == "scores" or bias  # else both are the same
            if not plain or (group_score and n_group == 1):
                continue
            for normalize, eps in ((True, 1e-20), (False, 1e-20), (True, 1e-6)):
                candidate = replace(
                    linear, selection_bias=bias, table=table, n_group=n_group, topk_group=topk_group, score=score,
                    choose_by=choose_by, group_score=group_score, normalize=normalize, eps=eps,
                )  # fmt: skip
                try:
                    ours = route(logits.float(), **candidate.options(copied, *arguments))
                except ValueError as error:
                    refused = f"it asks for what route does not compute: {error}"
                    break
                if not torch.equal(
                    _spread(torch.ones_like(ours.weights), ours.indices, self.experts), chosen
                ):
                    break
                same_choice = True
                ours_dense = _spread(ours.weights, ours.indices, self.experts)
                for scale in scales:
                    if _close(ours_dense * float(_value(copied, scale)), dense):
                        return replace(candidate, scale=scale)
                for name in expert_scales:
                    if _close(ours_dense * _read(copied, name).detach(), dense):
                        return replace(candidate, expert_scale=name)
        return refused or f"it gives other weights{'' if same_choice else ' to other experts'}"

    def _same_gradients(
        self, copied: nn.Module, found: Match, hidden: Tensor, own: Any, arguments: tuple[Tensor, ...]
    ) -> bool:
        """Whether a random sum of logits and weights has the same gradients."""
        parameters = [hidden, *copied.parameters()]
        upstream = [self.normal(own[0].shape) for _ in range(2)]
        ours = found.logits(copied, hidden)
        routing = route(ours.float(), **found.options(copied, *arguments))
        our_weights = found.weights(copied, routing, ours, hidden)
        gradients = []
        for logits, weights, indices in (own, (found.first(ours), our_weights, routing.indices)):
            dense = _spread(weights, indices, self.experts)
            total = (upstream[0] * logits).sum() + (upstream[1] * dense).sum()
            gradients.append(
                torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True)
            )
        return all(
            float((one - other).norm()) <= _TOLERANCE * float(one.norm())
            for one, other in zip(*gradients, strict=True)
        )

    @torch.no_grad()
    def _dtypes(self, found: Match, hidden: Tensor, arguments: tuple[Tensor, ...]) -> Match | str:
        """In which dtypes the router computes in a model of bfloat16."""
        for dtype in (torch.bfloat16, torch.float32):  # some keep their weights in float32
            copied = _copy(self.router, partial(self._narrow, dtype))
            try:
                logits, weights, _ = type(copied).forward(copied, hidden, *arguments)
                break
            except RuntimeError:
                continue
        else:
            return "it does not run in bfloat16"
        logits = logits.reshape(_TOKENS, self.experts)
        like = (
            "" if weights.dtype == torch.float32 else "logits" if logits.dtype == weights.dtype else "hidden"
        )
        candidates = [
            replace(
                found, float32_linear=linear, float32_logits=logits.dtype == torch.float32, weights_like=like
            )
            for linear in (True, False)
        ]
        return min(
            candidates, key=lambda one: float((one.first(one.logits(copied, hidden)) - logits).abs().sum())
        )

    def _narrow(self, dtype: torch.dtype, tensor: Tensor) -> Tensor:
        values = self._random(tensor)
        return values.to(dtype) if values.is_floating_point() else values


class _Unknown(Exception):
    """Why a router cannot be tried."""


def _call(router: nn.Module, hidden: Tensor, arguments: tuple[Tensor, ...]) -> tuple[Any, tuple[int, ...]]:
    """What the router gives for hidden states (T, H), or (1, T, H) where it insists on a batch; and the shape it took."""
    error: Exception | None = None
    for shape in (hidden.shape, (1, *hidden.shape)):
        try:
            # a router may change its input
            return type(router).forward(router, hidden.reshape(shape) * 1.0, *arguments), tuple(shape)
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as raised:
            error = error or raised
    raise _Unknown(f"it does not run alone ({error})")


def _copy(module: nn.Module, values: Callable[[Tensor], Tensor]) -> Any:
    """The module without its hooks, with other values in the place of its tensors."""
    copied = copy.copy(module)
    copied.__dict__ = {
        key: type(value)() if key.endswith("_hooks") or key.endswith("_hooks_with_kwargs") else value
        for key, value in vars(module).items()
        if key not in ("forward", "_r1kernels")
    }
    copied._parameters = {
        name: None if parameter is None else nn.Parameter(values(parameter), parameter.is_floating_point())
        for name, parameter in module._parameters.items()
    }
    copied._buffers = {
        name: None if buffer is None else values(buffer) for name, buffer in module._buffers.items()
    }
    copied._modules = {
        name: None if child is None else _copy(child, values) for name, child in module._modules.items()
    }
    return copied


def rows_of_experts(module: nn.Module, experts: int) -> list[str]:
    """The names of the matrices of a module that have a row for each expert."""
    return [
        name
        for name, tensor in _tensors(module)
        if tensor.ndim == 2
        and tensor.shape[0] == experts
        and tensor.shape[1] != 1
        and tensor.is_floating_point()
    ]


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _numbers(router: nn.Module) -> Iterator[tuple[str, int | float]]:
    """Names and values of the numbers that a router and its config hold; the router's own first."""
    for prefix, owner in (("", router), ("config.", getattr(router, "config", None))):
        for name, value in vars(owner).items() if owner is not None else ():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                yield prefix + name, value


def _read(router: Any, name: str) -> Any:
    for part in name.split("."):
        router = getattr(router, part)
    return router


def _value(router: Any, number: float | str) -> Any:
    return _read(router, number) if isinstance(number, str) else number


def _spread(values: Tensor, indices: Tensor, experts: int) -> Tensor:
    """(T, E), with the values (T, K) at their experts: the order of a token's experts is left open."""
    return values.new_zeros(values.shape[0], experts).scatter(1, indices, values)


def _close(ours: Tensor, theirs: Tensor) -> bool:
    return torch.allclose(ours.detach(), theirs, rtol=_TOLERANCE, atol=1e-6)
