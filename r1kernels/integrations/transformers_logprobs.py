"""Log-probs of a causal language model of transformers, without its logits.

B sequences, L positions, H hidden, V vocabulary.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from .. import checks
from ..logprob import linear_logprobs
from ..logprob.arguments import Head
from ..logprob.kept import check_kept
from ..logprob.linear_reference import head_logits
from .transformers_routers import unobserved

IGNORED = -100
# what a configuration calls the factor on the logits, and whether it divides
_FACTORS = (
    ("logit_scale", False),
    ("output_multiplier", False),
    ("lm_head_multiplier", False),
    ("logits_scaling", True),
)
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_MULTIPLIES_TOO = ("hyperclovax",)  # whose logits_scaling is a factor
_BEFORE_THE_HEAD = ("minicpm3",)  # which divides the states that enter the head
_TRIAL_LOGIT = 100.0
# relative; the rounding of bfloat16, to which a forward under autocast rounds too, stays below it
_TOLERANCE = 1e-2
_tried: weakref.WeakKeyDictionary[nn.Module, tuple[Any, ...]] = weakref.WeakKeyDictionary()


def fused_logprobs(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
    kept: tuple[Tensor, Tensor] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-prob (and entropy) of each next token: the model up to its head, then ``linear_logprobs`` with the head.

    Args:
        model: a causal language model of transformers, also inside PEFT or DistributedDataParallel (then see
            ``head_inputs``). Mind dropout: call ``eval()`` where the policy that samples and the one that learns must be
            the same function.
        input_ids: (B, L), int64.
        attention_mask: (B, L), 0 at padding, as the model takes it; None: no padding, or padding on the right that causal
            attention never sees.
        labels: (B, L), int64, -100 where no log-prob is wanted (prompts, padding); the head computes no such position.
            Label t is predicted at position t - 1, as in transformers. None: ``input_ids`` where the mask is not 0 at t and
            at t - 1: nothing is predicted from padding.
        temperature: a number above 0.
        return_entropy: also return the entropy, in nats.
        kept: (ids, offsets), what a truncated sampler kept for each of the B (L - 1) labels, as in ``linear_logprobs``; those of
            labels at -100 are not looked at.

    Returns:
        logp (B, L - 1), or (logp, entropy): at t that of label t + 1; 0 where the label is -100. float32, with gradients.

    Raises:
        ValueError: the head is not the linear one with softcap and scale that its configuration tells (see ``output_head``).
        TypeError, IndexError: as ``linear_logprobs``.
    """
    output_head(model)  # what it refuses is refused before the forward
    checks.tensor("input_ids", input_ids, dtypes=(torch.int64,), ndim=2)
    shape = tuple(input_ids.shape)
    if attention_mask is not None:
        checks.tensor("attention_mask", attention_mask, shape=shape, like=input_ids)
    if labels is not None:
        checks.tensor("labels", labels, dtypes=(torch.int64,), shape=shape, like=input_ids)
        targets = labels[:, 1:]
    elif attention_mask is None:
        targets = input_ids[:, 1:]
    else:
        real = attention_mask != 0
        targets = input_ids[:, 1:].masked_fill(~(real[:, 1:] & real[:, :-1]), IGNORED)
    hidden = head_inputs(model, input_ids=input_ids, attention_mask=attention_mask)
    head = output_head(model)  # once more: FSDP2 may have taken its weight away after the forward
    wanted = targets != IGNORED
    sets = check_kept(kept, targets, head.weight.shape[0], IGNORED)
    results = linear_logprobs(
        hidden[:, :-1][wanted],
        targets=targets[wanted],
        temperature=temperature,
        return_entropy=return_entropy,
        kept=None if sets is None else sets.some(wanted.flatten()),
        **head._asdict(),
    )
    if return_entropy:
        return _spread(results[0], wanted), _spread(results[1], wanted)
    return _spread(results, wanted)


def head_inputs(model: Any, input_ids: Tensor, **inputs: Any) -> Tensor:
    """The hidden states (B, L, H) that enter the head in the model's own forward, with gradients; it computes no logits.

    Whatever the layers of the model return, and whatever stands between them and the head, is in them: norms, factors,
    projections, adapters. They belong to ``linear_logprobs`` and ``linear_grpo_loss``, with ``output_head``.

    Args:
        model: as for ``output_head``. Of a model given to torch.compile as a whole the layers run uncompiled here: compile
            the layers (``model.model.compile()``), or what takes the states.
        input_ids: (B, L), int64.
        inputs: what else the model takes: ``attention_mask``, ... No cache is made.

    Raises:
        ValueError: the forward does not call its head once, or with states of another shape than (B, L, H).
    """
    return forward_to_head(model, input_ids, **inputs)[0]


def forward_to_head(model: Any, input_ids: Tensor, **inputs: Any) -> tuple[Tensor, Any]:
    """``head_inputs``, and what else the model's forward returns; its logits are empty."""
    inputs = {"input_ids": input_ids, "use_cache": False, **inputs}
    states, outputs = _run(model, lambda states: states[:, :0], inputs)
    if states.ndim != 3 or states.shape[:2] != input_ids.shape:
        raise ValueError(
            f"model: expected states (B, L, H) for input_ids {tuple(input_ids.shape)} at the head of {type(model).__name__}, "
            f"got {tuple(states.shape)}"
        )
    return states, outputs


def output_head(model: Any) -> Head:
    """The head of a causal language model: (weight, bias, softcap, logit_scale), keywords of ``linear_logprobs``.

    It makes the model's logits of the states that ``head_inputs`` gives. The configuration gives softcap and scale. At the first
    call for a model, and when its head, its hooks or its numbers have changed, its own forward is tried on two tokens, with
    large random states at the head: it must give the logits of this head. Such a trial draws no random numbers from the global
    generators, and routing records do not see it.

    Args:
        model: a causal language model of transformers, also inside PEFT, DistributedDataParallel or torch.compile.

    Raises:
        ValueError: no head, one that is not a plain ``nn.Linear`` (quantised, with an adapter, with a forward of its own),
            one that is sharded or partitioned (FSDP, DeepSpeed ZeRO-3), or a model that makes other logits of it.
    """
    module = _linear_head(model)
    config = unwrapped(model).config.get_text_config()
    scale = 1.0
    for name, divides in _FACTORS:
        factor = getattr(config, name, None)
        if isinstance(factor, (int, float)) and config.model_type not in _BEFORE_THE_HEAD:
            scale = 1 / factor if divides and config.model_type not in _MULTIPLIES_TOO else float(factor)
    softcap = next((cap for name in _SOFTCAPS if (cap := getattr(config, name, None)) is not None), None)
    head = Head(module.weight, module.bias, softcap, scale)
    if not torch.compiler.is_compiling():
        depends_on = _what_logits_depend_on(model, head)
        if _tried.get(model) != depends_on:
            _try(model, head)
            _tried[model] = depends_on
    return head


def unwrapped(model: Any) -> Any:
    """The model inside the wrappers of torch, which have no method or attribute of it; ValueError: none of transformers."""
    while isinstance(model, (DistributedDataParallel, torch._dynamo.OptimizedModule)):
        model = model.module if isinstance(model, DistributedDataParallel) else model._orig_mod
    if not hasattr(model, "get_output_embeddings"):
        raise ValueError(
            "model: expected a causal language model of transformers, alone or inside PEFT, DistributedDataParallel or "
            f"torch.compile, got {type(model).__name__}"
        )
    return model


def _linear_head(model: Any) -> nn.Linear:
    inner = unwrapped(model)
    module = inner.get_output_embeddings()
    if (
        not isinstance(module, nn.Linear)
        or type(module).forward is not nn.Linear.forward
        or "forward" in vars(module)
    ):
        found = f"{type(module).__module__}.{type(module).__name__}".removeprefix("builtins.")
        if isinstance(module, nn.Linear) and "forward" in vars(module):
            found += " with a forward of its own"
        elif found.startswith("peft."):
            found += " (an adapter: merge it into the head, or leave the head out of its targets)"
        raise ValueError(
            f"model: expected a head that is a plain nn.Linear, got {found} in {type(inner).__name__}"
        )
    weight = module.weight
    if isinstance(weight, DTensor):
        raise ValueError(
            f"model: expected a head whose weight is whole, got a DTensor {tuple(weight.placements)} in {type(inner).__name__}: "
            "under FSDP2 call model.unshard() before each forward, and let what holds the head keep it until the backward "
            "(reshard_after_forward=False, the default of the outermost module); or take token_logprobs of the logits"
        )
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(
            f"model: expected a head whose weight is whole, (V, H), got shape {tuple(weight.shape)} in {type(inner).__name__}: "
            "gather what FSDP or DeepSpeed ZeRO-3 partitions"
        )
    return module


def _path_to_head(model: Any, head: nn.Module) -> list[nn.Module]:
    """The modules from the model to its head, each a child of the one before it."""
    paths = [[model]]
    for path in paths:  # breadth first: a head lies near the top
        if path[-1] is head:
            return path
        paths += [[*path, child] for child in path[-1].children()]
    raise ValueError(f"model: expected a model that holds its head, got {type(model).__name__}")


def _what_logits_depend_on(model: Any, head: Head) -> tuple[Any, ...]:
    """What tells that the same hidden states may give other logits than before, as far as anyone can see from outside."""
    inner = unwrapped(model)
    # Falcon-H1 keeps the factor beneath
    modules = [*_path_to_head(model, inner.get_output_embeddings()), inner.base_model]
    parts = [
        (
            id(module),
            id(type(module).forward),
            id(vars(module).get("forward")),
            *module._forward_pre_hooks,
            *module._forward_hooks,
            *(item for item in vars(module).items() if type(item[1]) in (int, float)),
        )
        for module in modules
    ]
    return *parts, head.bias is None, head.softcap, head.logit_scale


@torch.compiler.disable
def _run(model: Any, replace: Callable[[Tensor], Tensor], inputs: dict[str, Any]) -> tuple[Tensor, Any]:
    """The model's own forward with ``replace(states)`` at its head in place of the states: (states, its outputs)."""
    while isinstance(model, torch._dynamo.OptimizedModule):
        model = model._orig_mod
    path = _path_to_head(model, unwrapped(model).get_output_embeddings())
    # compiled code does not look for hooks, or keeps those that it was compiled with
    if any(isinstance(one, torch._dynamo.OptimizedModule) or one._compiled_call_impl for one in path[1:]):
        raise ValueError(
            f"model: expected a model compiled as a whole or layer by layer, got {type(model).__name__} around a compiled one"
        )
    thread, found = threading.get_ident(), []

    def take(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if threading.get_ident() != thread:
            return None
        found.append(args[0])
        return replace(args[0]), *args[1:]

    hook = path[-1].register_forward_pre_hook(take)
    try:
        outputs = model._call_impl(**inputs)
    finally:
        hook.remove()
    if len(found) != 1:
        raise ValueError(
            f"model: expected a forward that calls its head once, {type(model).__name__} does so {len(found)} times"
        )
    return found[0], outputs


@torch.no_grad()
@torch.compiler.disable
def _try(model: Any, head: Head) -> None:
    """Compare the logits of the model's own forward with those of the head, for large random states."""
    weight = head.weight
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 2, weight.shape[1], generator=generator).to(weight)
    # large enough that an unknown cap shows
    hidden = hidden * (_TRIAL_LOGIT / (hidden @ weight.T).abs().amax().clamp(min=1e-6))
    expected = head_logits(hidden, head).float()
    ids = torch.zeros(1, 2, dtype=torch.int64, device=weight.device)
    name = type(unwrapped(model)).__name__
    devices = [] if weight.device.type == "cpu" else [weight.device]
    inputs = {"input_ids": ids, "use_cache": False, "return_dict": True}
    try:
        with unobserved(), torch.random.fork_rng(devices, device_type=weight.device.type):
            _, outputs = _run(model, lambda states: hidden.to(states.dtype), inputs)
        logits = outputs.logits.float()
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"model: {name} makes its logits in a way that is not known: {error}") from error
    same = logits.shape == expected.shape
    difference = (
        float((logits - expected).norm() / expected.norm().clamp(min=1e-30)) if same else float("inf")
    )
    if not difference < _TOLERANCE:
        raise ValueError(
            f"model: {name} makes other logits of its head than softcap {head.softcap} and scale "
            f"{head.logit_scale:g}, which its configuration tells, give (they differ by {difference:.1e})"
        )


def _spread(values: Tensor, wanted: Tensor) -> Tensor:
    return torch.zeros(wanted.shape, dtype=values.dtype, device=values.device).masked_scatter(wanted, values)
