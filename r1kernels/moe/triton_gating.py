"""The gated activation of the experts in Triton, a = act(gate) * up, and its derivative.

Imports Triton: import this module only where a kernel is launched. ACTIVATION is a position in experts.ACTIVATIONS. All
values are float32.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton reads annotations of a kernel as its own types)

import triton
import triton.language as tl

CUBIC = tl.constexpr(0.044715)
TWICE_ROOT = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)


@triton.jit
def activated(gate, ACTIVATION: tl.constexpr):
    """act(gate): gate * sigmoid(gate), or gelu_tanh = gate * sigmoid(2 sqrt(2 / pi) (gate + 0.044715 gate^3))."""
    return gate * tl.sigmoid(_slope(gate, ACTIVATION))


@triton.jit
def activated_with_derivative(gate, ACTIVATION: tl.constexpr):
    """(act(gate), act'(gate)): with s = sigmoid(h(gate)), act' = s + gate * s * (1 - s) * h'(gate)."""
    share = tl.sigmoid(_slope(gate, ACTIVATION))
    if ACTIVATION == 0:
        derivative = share * (1.0 + gate * (1.0 - share))
    else:
        # beyond 20 the sigmoid is 0 or 1, and 0 * inf must not become NaN
        near = tl.minimum(tl.maximum(gate, -20.0), 20.0)
        rise = (near * near * 3.0 * CUBIC + 1.0) * TWICE_ROOT
        derivative = share + near * share * (1.0 - share) * rise
    return gate * share, derivative


@triton.jit
def _slope(gate, ACTIVATION: tl.constexpr):
    return gate if ACTIVATION == 0 else (gate + gate * gate * gate * CUBIC) * TWICE_ROOT
