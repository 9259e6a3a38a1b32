"""What linear_grpo_loss takes from this family for its own schema."""

from __future__ import annotations

import torch

from ..op import _TYPES, Fields
from .token import Rows as Rows

ROWS = ", ".join(f"{_TYPES[of]} {name}" for name, of in Fields(Rows).types.items())
namespace = torch.ops.r1kernels
