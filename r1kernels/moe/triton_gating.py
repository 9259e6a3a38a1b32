"""The gated activation of the experts in Triton, a = act(gate) * (up + shift) with both clamped, and its derivatives.

Imports Triton: import this module only where a kernel is launched. ACTIVATION is a position in experts.ACTIVATIONS; ALPHA, LIMIT
and SHIFT are those of moe_experts, the limit infinite where there is none. All values are float32.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton reads annotations of a kernel as its own types)

import triton
import triton.language as tl

CUBIC = tl.constexpr(0.044715)
TWICE_ROOT = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)


@triton.jit
def gated(gate, up, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr):
    """a, for act(g) = g * sigmoid(alpha g), or gelu_tanh = g * sigmoid(2 sqrt(2 / pi) (g + 0.044715 g^3))."""
    g, u = clamped(gate, up, LIMIT, SHIFT)
    return g * tl.sigmoid(_slope(g, ACTIVATION, ALPHA)) * u


@triton.jit
def gated_with_derivatives(
    gate, up, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr
):
    """(a, da/dgate, da/dup): with s = sigmoid(h(g)), act' = s + g * s * (1 - s) * h'(g); 0 for what is clamped."""
    g, u = clamped(gate, up, LIMIT, SHIFT)
    share = tl.sigmoid(_slope(g, ACTIVATION, ALPHA))
    if ACTIVATION == 0:
        derivative = share * (1.0 + ALPHA * g * (1.0 - share))
    else:
        # beyond 20 the sigmoid is 0 or 1, and 0 * inf must not become NaN
        near = tl.minimum(tl.maximum(g, -20.0), 20.0)
        rise = (near * near * 3.0 * CUBIC + 1.0) * TWICE_ROOT
        derivative = share + near * share * (1.0 - share) * rise
    by_gate, by_up = u * derivative, g * share
    if float("inf") != LIMIT:
        by_gate = tl.where(gate > LIMIT, 0.0, by_gate)
        by_up = tl.where((up > LIMIT) | (up < -LIMIT), 0.0, by_up)
    return g * share * u, by_gate, by_up


@triton.jit
def clamped(gate, up, LIMIT: tl.constexpr, SHIFT: tl.constexpr):
    """The gate, and up + shift; NaN stays."""
    if float("inf") != LIMIT:
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    if SHIFT != 0.0:
        up += SHIFT
    return gate, up


@triton.jit
def _slope(gate, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr):
    if ACTIVATION == 0:
        return gate if ALPHA == 1.0 else ALPHA * gate
    else:
        return (gate + gate * gate * gate * CUBIC) * TWICE_ROOT
