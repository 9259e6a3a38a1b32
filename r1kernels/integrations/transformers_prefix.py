"""Log-probs of completions with the tokens that their sequences share computed once.

B sequences, N completion tokens, R the longest completion, H hidden, V vocabulary.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import devices
from ..logprob import linear_logprobs
from .prefix_tree import PrefixTree, build
from .transformers_logprobs import forward_to_head, head_inputs, output_head, unwrapped
from .transformers_prefix_attention import Running, packed
from .transformers_routers import unobserved

_LAYERS = ("full_attention", "sliding_attention")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
# in training or not -> why a model is refused, "" if it is not
_tried: weakref.WeakKeyDictionary[nn.Module, dict[bool, str]] = weakref.WeakKeyDictionary()


def shared_prefix_logprobs(
    model: Any, tree: PrefixTree, *, temperature: float = 1.0, return_entropy: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-prob (and entropy) of each completion token, with every shared token computed once.

    The tree's tokens go through the model in one forward, in which every token attends to its own sequence alone; then
    ``linear_logprobs`` with the head, without logits. Values and gradients are those of the repeated form, each sequence
    in a forward of its own, to rounding.

    Args:
        model: a causal language model of transformers (see ``shared_prefix_states``) with a plain linear head (see
            ``output_head``).
        tree: of ``prefix_tree``.
        temperature: a number above 0.
        return_entropy: also return the entropy, in nats.

    Returns:
        logp (B, R), or (logp, entropy): rows in the order of ``prefix_tree``'s arguments, 0 beyond a completion's end.
        float32 (float64 for a float64 model), with gradients.

    Raises:
        ValueError: what ``shared_prefix_states`` and ``output_head`` refuse.

    Precision: as ``shared_prefix_states`` and ``linear_logprobs``. Deterministic.
    """
    logps, _ = logprobs_and_outputs(model, tree, temperature, return_entropy)
    return logps


def logprobs_and_outputs(
    model: Any, tree: PrefixTree, temperature: float, return_entropy: bool, **inputs: Any
) -> tuple[Tensor | tuple[Tensor, Tensor], Any]:
    """``shared_prefix_logprobs``, with further ``inputs`` of the model, and what its forward over the packed tokens returns."""
    output_head(model)  # what it refuses is refused before the forward
    check_model(model)
    states, outputs, _ = _forward(model, tree, **inputs)
    head = output_head(model)  # once more: FSDP2 may have taken its weight away after the forward
    results = linear_logprobs(
        states[tree.predicts.to(states.device)],
        targets=tree.targets.to(states.device),
        temperature=temperature,
        return_entropy=return_entropy,
        **head._asdict(),
    )
    if return_entropy:
        return (tree.pad(results[0]), tree.pad(results[1])), outputs
    return tree.pad(results), outputs


def shared_prefix_states(model: Any, tree: PrefixTree) -> Tensor:
    """The hidden states that predict the N completion tokens, with every shared token computed once.

    They belong to ``linear_logprobs`` and ``linear_grpo_loss``, with ``output_head(model)`` and ``tree.targets``:

        linear_grpo_loss(states, targets=tree.targets, cu_seqlens=tree.cu_completions, ..., **output_head(model)._asdict())

    Args:
        model: a causal language model of transformers, also inside PEFT or DistributedDataParallel, whose layers are full or
            sliding-window attention through transformers' attention interface. Gradient checkpointing is served, dropout is
            not. At the first call for a model, in training and in evaluation, it is tried on a few tokens: a change in one
            branch must leave the states of every other branch bitwise as they were (to rounding in mixtures, whose experts
            see other rows then), and all states must be those of the repeated form.
        tree: of ``prefix_tree``.

    Returns:
        (N, H) in the model's dtype, with gradients, in the caller's order row by row: row i predicts ``tree.targets[i]``.

    Raises:
        ValueError: the model has layers of another kind (chunked, linear or recurrent ones), or dropout in training, or is
            found wrong by the trial.

    Precision: attention is merged from its parts in float32 (float64 for float64 models). Deterministic.

    Source: the merge by log-sum-exp is that of FlashAttention (arXiv 2205.14135).
    """
    check_model(model)
    states, _, _ = _forward(model, tree)
    return states[tree.predicts.to(states.device)]


def explain_shared_prefix(model: Any, tree: PrefixTree) -> str:
    """Which way ``shared_prefix_states`` takes for a model and a tree, or why it refuses; runs one forward of the tree."""
    saved = f"{tree.tokens} tokens in {len(tree.nodes)} nodes for {tree.repeated_tokens} repeated"
    try:
        check_model(model)
        with torch.no_grad(), unobserved():
            _, _, running = _forward(model, tree)
    except ValueError as error:
        return f"refused: {error}"
    windows = sorted({window for window in running.windows if window is not None})
    lines = [
        f"one forward over the packed tree: {saved}",
        f"attention of {len(running.windows)} layers merged from parts by {', '.join(running.kernels)}",
    ]
    if windows:
        lines.append(f"sliding windows of {', '.join(map(str, windows))} tokens")
    return "\n".join(lines)


def check_model(model: Any) -> None:
    """Refuse a model of which the packed tree would give other states than the repeated form.

    The trial runs once per model, in training and in evaluation.

    Raises:
        ValueError: see ``shared_prefix_states``.
    """
    inner = unwrapped(model)
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner  # of PEFT
    name = type(inner).__name__
    if model.training:
        dropout = next(
            (n for n, m in inner.named_modules() if isinstance(m, nn.Dropout) and m.p and m.training), None
        )
        if dropout is not None:
            raise ValueError(
                f"model: expected no dropout, got {dropout} in {name}; call model.eval() or set it to 0"
            )
    tried = _tried.setdefault(inner, {})
    if model.training not in tried:
        try:
            tried[model.training] = _refusal(model, inner)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            if devices.out_of_memory(error):
                raise
            reason = f"its forward over a packed tree fails: {error}"
            raise ValueError(f"model: {name} cannot share prefixes: {reason}") from error
    if tried[model.training]:
        raise ValueError(f"model: {name} cannot share prefixes: {tried[model.training]}")


def _forward(model: Any, tree: PrefixTree, **inputs: Any) -> tuple[Tensor, Any, Running]:
    """All states of the packed tree, (tokens, H), and what else the model's forward returns."""
    with packed(model, tree) as running:
        ids, positions = (
            t.to(running.multiplicity.device).unsqueeze(0) for t in (tree.input_ids, tree.position_ids)
        )
        states, outputs = forward_to_head(model, ids, position_ids=positions, **inputs)
    return states[0], outputs, running


def _refusal(model: Any, inner: Any) -> str:
    """Why a model cannot share prefixes; empty if it can."""
    config = inner.config.get_text_config()
    types = getattr(config, "layer_types", None)
    unknown = sorted({*types} - {*_LAYERS}) if types else []
    if unknown:
        return f"it has layers of {', '.join(unknown)}, expected {' and '.join(_LAYERS)}"
    generator = torch.Generator().manual_seed(0)
    head, first, second, *ends = torch.randint(config.vocab_size, (7, 5), generator=generator).tolist()
    rows = [head + first + ends[0], head + first + ends[1], head + second + ends[2], head + second + ends[3]]
    tree = build(rows, [10] * len(rows), least_saved=1)
    branch = next(node for node in tree.nodes if node.last == node.end)  # the first: what leaks goes forward
    ids = tree.input_ids.clone()
    ids[branch.start : branch.end] = (ids[branch.start : branch.end] + 1) % config.vocab_size
    device = next(inner.parameters()).device
    devices = [] if device.type == "cpu" else [device]
    with torch.no_grad(), unobserved(), torch.random.fork_rng(devices, device_type=device.type):
        states, _, running = _forward(model, tree)
        changed, _, _ = _forward(model, replace(tree, input_ids=ids))
        repeated = head_inputs(model, torch.tensor(rows, device=states.device)).flatten(0, 1)
    if not running.windows:
        return "its attention does not go through transformers' attention interface"
    window = getattr(config, "sliding_window", None)
    if types:
        expected = [window if kind == "sliding_attention" else None for kind in types]
        if running.windows != expected:
            return f"its layers attend with the windows {running.windows}, its configuration tells {expected}"
    elif window is not None and window not in running.windows:
        return f"its layers attend without the window of {window} tokens that its configuration tells"
    rounded = states.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(states.device.type)
    tolerance = 0.1 if rounded else 1e-3
    outside = torch.ones(tree.tokens, dtype=torch.bool, device=states.device)
    outside[branch.start : branch.end] = False
    changed, others = changed[outside], states[outside]
    mixture = any(getattr(config, name, None) for name in _EXPERTS)
    if not (torch.equal(changed, others) or (mixture and _difference(changed, others) < tolerance)):
        return "a change in one branch changes the states of others"
    difference = _difference(states[tree.sequences.to(states.device)], repeated)
    if not difference < tolerance:
        return f"its states differ by {difference:.1e} from those of the repeated form"
    return ""


def _difference(states: Tensor, expected: Tensor) -> float:
    """The relative difference of nine tokens in ten: rounding may send the others to other experts."""
    states, expected = states.float(), expected.float()
    apart = (states - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-30)
    return float(apart.quantile(0.9))
