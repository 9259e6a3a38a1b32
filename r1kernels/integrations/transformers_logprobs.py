"""Log-probs of a causal language model of transformers, without its logits.

B sequences, L positions, H hidden, V vocabulary.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import MoEModelOutputWithPastAndCrossAttentions

from .. import checks
from ..logprob import linear_logprobs
from ..logprob.linear import Head, head_logits

IGNORED = -100
# what a configuration calls the factor on the logits, and whether it divides
_FACTORS = (("logit_scale", False), ("lm_head_multiplier", False), ("logits_scaling", True))
_MULTIPLIES_TOO = ("hyperclovax",)  # whose logits_scaling is a factor
_PROBE_LOGIT = 100.0
# relative; the rounding of bfloat16, to which a forward under autocast rounds too, stays below it
_TOLERANCE = 1e-2
_known: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def fused_logprobs(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-prob (and entropy) of each next token: the model without its head, then ``linear_logprobs`` with the head.

    Args:
        model: a causal language model of transformers (of a PEFT model its ``get_base_model()``). Mind dropout: call
            ``eval()`` where the policy that samples and the one that learns must be the same function.
        input_ids: (B, L), int64.
        attention_mask: (B, L), 0 at padding, as the model takes it; None: no padding, or padding on the right that causal
            attention never sees.
        labels: (B, L), int64, -100 where no log-prob is wanted (prompts, padding); the head computes no such position.
            Label t is predicted at position t - 1, as in transformers. None: ``input_ids`` where the mask is not 0.
        temperature: a number above 0.
        return_entropy: also return the entropy, in nats.

    Returns:
        logp (B, L - 1), or (logp, entropy): at t that of label t + 1; 0 where the label is -100. float32, with gradients.

    Raises:
        ValueError: the head is not the linear one with softcap and scale that its configuration tells (see ``output_head``).
        TypeError, IndexError: as ``linear_logprobs``.
    """
    head = output_head(model)
    checks.tensor("input_ids", input_ids, dtypes=(torch.int64,), ndim=2)
    shape = tuple(input_ids.shape)
    if attention_mask is not None:
        checks.tensor("attention_mask", attention_mask, shape=shape, like=input_ids)
    if labels is None:
        padding = (
            torch.zeros_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask == 0
        )
        labels = input_ids.masked_fill(padding, IGNORED)
    checks.tensor("labels", labels, dtypes=(torch.int64,), shape=shape, like=input_ids)
    outputs = model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    targets = labels[:, 1:]
    wanted = targets != IGNORED
    results = linear_logprobs(
        outputs.last_hidden_state[:, :-1][wanted],
        targets=targets[wanted],
        temperature=temperature,
        return_entropy=return_entropy,
        **head._asdict(),
    )
    if return_entropy:
        return _spread(results[0], wanted), _spread(results[1], wanted)
    return _spread(results, wanted)


def output_head(model: Any) -> Head:
    """The head of a causal language model: (weight, bias, softcap, logit_scale), keywords of ``linear_logprobs``.

    The configuration gives softcap and scale. At the first call for a model its own forward is tried, with large random
    states in place of the layers' result: it must give the logits of this head.

    Raises:
        ValueError: no head, one that is not a plain ``nn.Linear`` (quantised, with an adapter, with a forward of its own),
            or a model that makes other logits of it.
    """
    module = model.get_output_embeddings()
    if (
        not isinstance(module, nn.Linear)
        or type(module).forward is not nn.Linear.forward
        or "forward" in vars(module)
    ):
        raise ValueError(
            f"model: expected a head that is a plain nn.Linear, got {type(module).__name__} in {type(model).__name__}"
        )
    config = model.config.get_text_config()
    scale = 1.0
    for name, divides in _FACTORS:
        factor = getattr(config, name, None)
        if isinstance(factor, (int, float)):
            scale = 1 / factor if divides and config.model_type not in _MULTIPLIES_TOO else float(factor)
    softcap = getattr(config, "final_logit_softcapping", None)
    head = Head(module.weight, module.bias, softcap, scale)
    if model not in _known and not torch.compiler.is_compiling():
        _try(model, head)
        _known.add(model)
    return head


@torch.no_grad()
def _try(model: Any, head: Head) -> None:
    """Compare the logits of the model's own forward with those of the head."""
    weight = head.weight
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 2, weight.shape[1], generator=generator).to(weight)
    # large enough that an unknown cap shows
    hidden = hidden * (_PROBE_LOGIT / (hidden @ weight.T).abs().amax().clamp(min=1e-6))
    base = model.base_model
    ids = torch.zeros(1, 2, dtype=torch.int64, device=weight.device)
    own_forward = vars(base).get("forward")
    # the output with the most fields: a model hands on those that its own kind has
    base.forward = lambda *args, **kwargs: MoEModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden)
    try:
        with torch.autocast(weight.device.type, enabled=False):
            logits = model(input_ids=ids).logits.float()
            expected = head_logits(hidden, head).float()
    except (AttributeError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"model: {type(model).__name__} makes its logits in a way that is not known: {error}"
        ) from error
    finally:
        if own_forward is None:
            del base.forward
        else:
            base.forward = own_forward
    same = logits.shape == expected.shape
    difference = (
        float((logits - expected).norm() / expected.norm().clamp(min=1e-30)) if same else float("inf")
    )
    if not difference < _TOLERANCE:
        raise ValueError(
            f"model: {type(model).__name__} makes other logits of its head than softcap {head.softcap} and scale "
            f"{head.logit_scale:g}, which its configuration tells, give (they differ by {difference:.1e})"
        )


def _spread(values: Tensor, wanted: Tensor) -> Tensor:
    return torch.zeros(wanted.shape, dtype=values.dtype, device=values.device).masked_scatter(wanted, values)
