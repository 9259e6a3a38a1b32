"""The experts: the grouped GEMM and the whole gated MLP.

T tokens, H hidden size, I intermediate size of an expert, E experts, K experts per token, S = T * K routed rows, R rank of a
low-rank addition; N inputs and M outputs of a GEMM.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import autocast, checks, devices
from ..op import Contiguous, Float32, Int32, Kernel, Op, recorded
from . import reference
from .sort import check_ascending, too_many

ACTIVATIONS = ("silu", "gelu_tanh")
SAVES = ("hidden", "nothing")


def grouped_gemm(
    x: Tensor, weight: Tensor, offsets: Tensor, *, transposed: bool = False, backend: str | None = None
) -> Tensor:
    """Multiply each row with the weight of its expert: y[r] = weight[e] @ x[r] for offsets[e] <= r < offsets[e + 1].

    Args:
        x: (S, N), float32, bfloat16, float16 or float64, rows sorted by expert.
        weight: (E, M, N), the dtype of ``x``.
        transposed: ``weight`` is (E, N, M), and y[r] = x[r] @ weight[e]; no copy of it is made.
        offsets: (E + 1,), int32 or int64, ascending from 0 to at most S (see ``sort_by_expert``).
        backend: "cuda", "triton", "cpu" or "reference": that one or an error; None chooses (see r1kernels.backends).

    Returns:
        (S, M) in the dtype of ``x``; rows that no expert has, those from offsets[E] on, are 0 and pass no gradient. An
        expert without rows gets a zero gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device; offsets that do not ascend from 0
            to at most S (on the CPU; on CUDA with ``debug_checks(True)``, else they are cut to [0, S], one below an
            earlier one counts as that one, and rows before the first one are 0 as well).

    Precision: float32 accumulation. Under autocast both operands are cast as F.linear casts them. Deterministic on the
    CPU; traced or on CUDA the reference adds the weight gradient of an expert up with atomics, so there it is
    deterministic under ``torch.use_deterministic_algorithms(True)`` only. The last bits of a row may depend on how many
    rows its expert has, which chooses the kernel, except on cuda.
    """
    checks.tensor("x", x, dtypes=checks.FLOATS, ndim=2)
    checks.boolean("transposed", transposed)
    shape = (None, x.shape[1], None) if transposed else (None, None, x.shape[1])
    checks.tensor("weight", weight, dtypes=checks.FLOATS, shape=shape, like=x)
    _at_least_one_expert("weight", weight)
    checks.tensor("offsets", offsets, dtypes=(torch.int32, torch.int64), shape=(weight.shape[0] + 1,), like=x)
    x, weight = autocast.cast(x, weight)
    checks.tensor("weight", weight, dtypes=(x.dtype,))
    if checks.values_visible(offsets):
        check_ascending("offsets", offsets, x.shape[0])
        if int(offsets[0]) != 0:
            raise ValueError(f"offsets: expected 0 at position 0, got {int(offsets[0])}")
    return GROUPED_GEMM(backend, GemmCall(x, weight, offsets, transposed, False))


def moe_experts(
    hidden: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    activation: str = "silu",
    alpha: float = 1.0,
    limit: float | None = None,
    shift: float = 0.0,
    lora: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, float] | None = None,
    save: str = "hidden",
    batch_invariant: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""The routed experts of a mixture-of-experts layer: gated MLPs, weighted and summed over each token's experts.

    .. math:: out_t = \sum_k w_{tk} \, D_e \big( act(G_e x_t) \odot U_e x_t \big), \qquad e = indices_{tk}

    Args:
        hidden: (T, H), float32, bfloat16, float16 or float64, any strides.
        indices: (T, K) int64, in [0, E), or E: the sentinel of expert parallelism, an expert of another rank, which
            contributes 0 and passes no gradient. An expert may occur more than once in a row.
        weights: (T, K), any float dtype, the routing weights.
        gate_up: (E, 2 * I, H), the dtype of ``hidden``: rows G_e, then rows U_e.
        down: (E, H, I), the dtype of ``hidden``: D_e.
        activation: "silu" (SwiGLU), g sigmoid(alpha g), or "gelu_tanh".
        alpha: of "silu", above 0.
        limit: clamps gate g and up projection u before the activation, g to at most ``limit``, u to at most ``limit`` either
            way (DeepSeek-V4); what is beyond it gets no gradient. None: no clamp.
        shift: added to u (1 in MiniMax-M3, with alpha 1.702 and limit 7).
        lora: (A_up (E, R, H), B_up (E, 2 * I, R), A_down (E, R, I), B_down (E, H, R), scale): the matrices of expert e are
            gate_up[e] + scale B_up[e] A_up[e] and down[e] + scale B_down[e] A_down[e], which no one forms: rows of R elements join
            the products, and gradients of A and B cost products of that width. The dtype of ``hidden``; each pair has a rank of its
            own; both of a pair may be None. None: no addition.
        save: "hidden" keeps the hidden states and the pre-activations for the backward, "nothing" only the
            arguments, and computes the rest again. (The reference backend keeps under "hidden" what autograd keeps.)
        batch_invariant: a token's result is bitwise the same whatever other tokens are in the call, in any order, alone too: one
            kernel for any number of rows an expert has, and tiles of one shape.
        backend: "cuda", "triton", "cpu" or "reference": that one or an error; None chooses (see r1kernels.backends).

    Returns:
        (T, H) in the dtype of ``hidden`` (under autocast in the autocast dtype).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device; an unknown activation or save.
        IndexError: an index outside [0, E] (on the CPU; on CUDA it counts as a sentinel unless ``debug_checks(True)``).

    Precision: GEMMs accumulate in float32; pre-activation, activation and the rows of R elements of ``lora`` are rounded to the
    dtype of ``hidden``; gating
    and the weighted sum are computed in float32 (float64 for float64; on cuda the gates of 16-bit inputs by the special
    function unit, whose e^-|z| is off by 2^-22 + |z| 2^-24 of itself, far below their rounding). Under autocast hidden, gate_up and down
    are cast as F.linear casts them. An expert without tokens gets a zero gradient. Deterministic, except that the
    reference, traced or on CUDA, adds weight gradients up with atomics unless
    ``torch.use_deterministic_algorithms(True)``. On cuda a token's result does not depend on the other tokens. Elsewhere
    its last bits may, without ``batch_invariant``: the kernel follows from how many rows an expert has (cpu: at most 24 or more
    of them; triton: from the mean over the experts), and torch's matrix products, which the reference uses, from their size.

    Source: SwiGLU experts as in Mixtral, DeepSeek-V3, Qwen3-MoE; the layout of transformers' expert modules.
    """
    checks.tensor("hidden", hidden, dtypes=checks.FLOATS, ndim=2)
    tokens, size = hidden.shape
    checks.tensor("indices", indices, dtypes=(torch.int64,), shape=(tokens, None), like=hidden)
    if indices.shape[1] == 0:
        raise ValueError("indices: expected shape (T, K) with K >= 1, got K = 0")
    checks.tensor("weights", weights, dtypes=checks.FLOATS, shape=indices.shape, like=hidden)
    checks.tensor("gate_up", gate_up, dtypes=checks.FLOATS, shape=(None, None, size), like=hidden)
    experts = _at_least_one_expert("gate_up", gate_up)
    if gate_up.shape[1] % 2:
        raise ValueError(f"gate_up: expected shape (E, 2 * I, H), got {tuple(gate_up.shape)}")
    checks.tensor(
        "down", down, dtypes=checks.FLOATS, shape=(experts, size, gate_up.shape[1] // 2), like=hidden
    )
    checks.choice("activation", activation, ACTIVATIONS)
    alpha = checks.positive("alpha", alpha)
    if alpha != 1.0 and activation != "silu":
        raise ValueError(f"alpha: expected 1 for activation {activation!r}, got {alpha}")
    limit = math.inf if limit is None else checks.positive("limit", limit)
    shift = checks.number("shift", shift)
    checks.choice("save", save, SAVES)
    checks.boolean("batch_invariant", batch_invariant)
    hidden, gate_up, down = autocast.cast(hidden, gate_up, down)
    checks.tensor("gate_up", gate_up, dtypes=(hidden.dtype,))
    checks.tensor("down", down, dtypes=(hidden.dtype,))
    addition = NO_LORA if lora is None else _checked_lora(lora, hidden, gate_up, down)
    if checks.values_visible(indices):
        checks.in_range("indices", indices, 0, experts, allow=experts)
    keep = save == "hidden" and torch.is_grad_enabled()
    gating = (ACTIVATIONS.index(activation), float(alpha), float(limit), float(shift))
    call = ExpertsCall(
        hidden,
        indices,
        weights,
        gate_up,
        down,
        *gating,
        batch_invariant,
        keep,
        addition,
    )
    return MOE_EXPERTS(backend, call)


def _checked_lora(lora: Any, hidden: Tensor, gate_up: Tensor, down: Tensor) -> Lora:
    if not isinstance(lora, tuple) or len(lora) != 5:
        shown = f"a tuple of {len(lora)}" if isinstance(lora, tuple) else type(lora).__name__
        raise TypeError(f"lora: expected a tuple (A_up, B_up, A_down, B_down, scale) or None, got {shown}")
    tensors, scale = lora[:4], checks.number("lora: scale", lora[4])
    for (a_name, b_name), (a, b), weight in zip(
        (LORA_NAMES[:2], LORA_NAMES[2:]), (tensors[:2], tensors[2:]), (gate_up, down), strict=True
    ):
        if (a is None) != (b is None):
            raise ValueError(
                f"{a_name}, {b_name}: expected both or neither, got {'one' if b is None else 'the other'} alone"
            )
        if a is None:
            continue
        experts, outputs, inputs = weight.shape
        checks.tensor(a_name, a, dtypes=checks.FLOATS, shape=(experts, None, inputs), like=weight)
        if a.shape[1] == 0:
            raise ValueError(f"{a_name}: expected a rank of at least 1, got shape {tuple(a.shape)}")
        checks.tensor(b_name, b, dtypes=checks.FLOATS, shape=(experts, outputs, a.shape[1]), like=weight)
    _, *matrices = autocast.cast(hidden, *tensors)
    for name, matrix in zip(LORA_NAMES, matrices, strict=True):
        if matrix is not None:
            checks.tensor(name, matrix, dtypes=(hidden.dtype,))
    return Lora._make((*matrices, float(scale)))


def _at_least_one_expert(name: str, weight: Tensor) -> int:
    if weight.shape[0] == 0:
        raise ValueError(f"{name}: expected at least one expert, got shape {tuple(weight.shape)}")
    return weight.shape[0]


class GemmCall(NamedTuple):
    x: Contiguous
    weight: Contiguous
    offsets: Int32
    transposed: bool
    batch_invariant: bool  # the bits of a row depend on no other row


class GemmBackwardCall(NamedTuple):
    grad: Contiguous
    x: Contiguous
    weight: Contiguous
    offsets: Int32
    transposed: bool
    need_x: bool
    need_weight: bool


def _gemm_shapes(call: GemmCall) -> Tensor:
    return call.x.new_empty(call.x.shape[0], call.weight.shape[2 if call.transposed else 1])


def _gemm_backward_shapes(call: GemmBackwardCall) -> tuple[Tensor, Tensor]:
    return _gradient(call.x, call.need_x), _gradient(call.weight, call.need_weight)


GEMM_FORWARD = Kernel("grouped_gemm", GemmCall, _gemm_shapes)
GEMM_BACKWARD = Kernel("grouped_gemm", GemmBackwardCall, _gemm_backward_shapes, suffix="_backward")


def _gemm_gradients(
    backend: str, inputs: Any, tensors: Any, transposed: Any, grads: Any, needs: Any
) -> tuple[Tensor, ...]:
    row = (*grads, *inputs, *tensors, transposed, *needs)
    return GEMM_BACKWARD(backend, GemmBackwardCall._make(row))


gemm_on_kernels = recorded(
    "grouped_gemm",
    GEMM_FORWARD,
    differentiable=lambda call: (call.x, call.weight),
    save=lambda call, result: ((call.offsets,), call.transposed),
    backward=_gemm_gradients,
)


def _empty(weight: Tensor) -> tuple[str, ...]:
    return ("matrices without elements are served by the reference alone",) if 0 in weight.shape else ()


def gemm_limits(backend: str, call: GemmCall) -> tuple[str, ...]:
    return (*too_many(call.x.shape[0]), *_empty(call.weight))


GROUPED_GEMM = Op(
    "grouped_gemm",
    reference.grouped_gemm,
    gemm_on_kernels,
    decides="x",
    limits=gemm_limits,
    cuda_yields=devices.grouped_products_yield,
)


class Lora(NamedTuple):
    """scale up_b[e] up_a[e] is added to gate_up[e], scale down_b[e] down_a[e] to down[e]."""

    up_a: Contiguous | None = None  # (E, R, H)
    up_b: Contiguous | None = None  # (E, 2 * I, R)
    down_a: Contiguous | None = None  # (E, R, I)
    down_b: Contiguous | None = None  # (E, H, R)
    scale: float = 1.0

    def is_there(self) -> bool:
        """Whether any matrix is."""
        return self.up_a is not None or self.down_a is not None


LORA_NAMES = ("lora: A_up", "lora: B_up", "lora: A_down", "lora: B_down")
NO_LORA = Lora()


class LoraBackward(NamedTuple):
    need_up_a: bool = False
    need_up_b: bool = False
    need_down_a: bool = False
    need_down_b: bool = False
    lora: Lora = NO_LORA


NO_LORA_BACKWARD = LoraBackward()


class ExpertsCall(NamedTuple):
    hidden: Contiguous
    indices: Contiguous
    weights: Float32
    gate_up: Contiguous
    down: Contiguous
    activation: int  # the place in ACTIVATIONS
    alpha: float
    limit: float
    shift: float
    batch_invariant: bool
    keep: bool  # the pre-activation, for the backward
    lora: Lora = NO_LORA


class ExpertsBackwardCall(NamedTuple):
    grad: Contiguous
    hidden: Contiguous
    weights: Float32
    gate_up: Contiguous
    down: Contiguous
    pre_activation: Tensor  # (S, 2 * I) in the order of the experts; of no rows: it is computed again
    offsets: Tensor
    permutation: Tensor
    inverse: Tensor
    activation: int
    alpha: float
    limit: float
    shift: float
    batch_invariant: bool  # what is computed again has the bits of the forward
    need_hidden: bool
    need_weights: bool
    need_gate_up: bool
    need_down: bool
    low: LoraBackward = NO_LORA_BACKWARD


def _experts_shapes(call: ExpertsCall) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out (T, H), pre-activation (S, 2 * I) if ``keep``, else (0, 2 * I), offsets (E + 1,), permutation (S,), inverse (S,)."""
    rows = call.indices.numel()
    return (
        torch.empty_like(call.hidden),
        call.hidden.new_empty(rows if call.keep else 0, call.gate_up.shape[1]),
        call.indices.new_empty(call.down.shape[0] + 1, dtype=torch.int32),
        call.indices.new_empty(rows, dtype=torch.int32),
        call.indices.new_empty(rows, dtype=torch.int32),
    )


def _experts_backward_shapes(
    call: ExpertsBackwardCall,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """The gradients of hidden, weights, gate_up and down, and the four of ``lora`` if any matrix is there; one that is not needed has
    size 0 at its first dimension, and is (0,) where there is no such matrix."""
    *needs, lora = call.low
    of_lora = [
        call.hidden.new_empty(0) if matrix is None else _gradient(matrix, needed)
        for matrix, needed in zip(lora[:4], needs, strict=True)
    ]
    return (
        _gradient(call.hidden, call.need_hidden),
        _gradient(call.weights, call.need_weights),
        _gradient(call.gate_up, call.need_gate_up),
        _gradient(call.down, call.need_down),
        of_lora if lora.is_there() else [],
    )


EXPERTS_FORWARD = Kernel("moe_experts", ExpertsCall, _experts_shapes)
EXPERTS_BACKWARD = Kernel("moe_experts", ExpertsBackwardCall, _experts_backward_shapes, suffix="_backward")


def _experts_inputs(call: ExpertsCall) -> tuple[Tensor | None, ...]:
    inputs = (call.hidden, call.weights, call.gate_up, call.down)
    return inputs if call.lora is NO_LORA else (*inputs, *call.lora[:4])


def _experts_gradients(
    backend: str, inputs: Any, tensors: Any, others: Any, grads: Any, needs: Any
) -> tuple[Tensor, ...]:
    gating, scale = others
    low, matrices = NO_LORA_BACKWARD, inputs[4:]
    if matrices:
        low = LoraBackward._make((*needs[4:], Lora._make((*matrices, scale))))
    row = (*grads, *inputs[:4], *tensors, *gating, *needs[:4], low)
    *found, of_lora = EXPERTS_BACKWARD(backend, ExpertsBackwardCall._make(row))
    return (*found, *of_lora)


# Hidden states and weight matrices are saved as they are: a contiguous copy does not live until the backward.
_recorded_experts = recorded(
    "moe_experts",
    EXPERTS_FORWARD,
    differentiable=_experts_inputs,
    save=lambda call, results: (results[1:], (call[5:10], call.lora.scale)),
    backward=_experts_gradients,
    give=lambda call, results: results[0],
)


MOE_EXPERTS = Op(
    "moe_experts",
    reference.moe_experts,
    _recorded_experts,
    decides="hidden",
    limits=lambda backend, call: (*too_many(call.indices.numel()), *_empty(call.gate_up)),
    cuda_yields=devices.grouped_products_yield,
)


def _gradient(like: Tensor, needed: bool) -> Tensor:
    return like.new_empty((like.shape[0] if needed else 0, *like.shape[1:]))
