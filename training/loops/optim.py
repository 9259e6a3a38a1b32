"""What both training loops share: the learning rate, the guarded optimizer step, and the resume point."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import nn

from training import checkpoint, optional
from training.errors import UserError
from training.parallel import ranks
from training.parallel.shard import is_divided, whole
from training.run_dir import State

MAX_BAD_STEPS = 5
SAVE_SECONDS = 600.0


def learning_rate(
    step: float, steps: int, *, lr: float, lr_end: float, schedule: str, warmup: int = 0
) -> float:
    """The learning rate of `step` (from 0) out of `steps`: linear warm-up, then constant, linear or cosine to lr_end."""
    if step < warmup:
        return lr * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    if schedule == "constant":
        return lr
    if schedule == "linear":
        return lr + (lr_end - lr) * done
    return lr_end + (lr - lr_end) * 0.5 * (1 + math.cos(math.pi * done))


class Optimizer:
    """AdamW with clipping that skips a step whose loss or gradient is not finite, and stops after some in a row."""

    def __init__(
        self, model: nn.Module, *, weight_decay: float, grad_clip: float, kind: str = "adamw"
    ) -> None:
        """kind: as `optimizer` of a stage."""
        self.model = model
        self.grad_clip = grad_clip
        self.skipped = 0
        self.bad_in_a_row = 0
        matrices = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
        vectors = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        settings: dict[str, Any] = {"lr": 0.0, "betas": (0.9, 0.95)}
        if kind == "adamw":
            self.adamw: torch.optim.Optimizer = torch.optim.AdamW(groups, **settings, fused=True)
        else:  # blocks of 256 moments share a scale; tensors below 4,096 keep float32 moments
            logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses packages for 4 bits
            bitsandbytes = optional.load("bitsandbytes", "optimizer: adamw_8bit")
            self.adamw = bitsandbytes.optim.AdamW8bit(groups, **settings)

    def step(self, loss: float, lr: float) -> tuple[float, bool]:
        """Applies the gradients that are there, added up over the ranks. Returns (their norm, whether the step was taken).

        loss: of all ranks.

        Raises:
            UserError: the loss or the gradient was not finite MAX_BAD_STEPS times in a row.
        """
        if not is_divided(self.model):  # those of a divided model are sums already
            ranks.sum_gradients(each for each in self.model.parameters() if each.requires_grad)
        norm = float(whole(nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip or math.inf)))
        good = math.isfinite(norm) and math.isfinite(loss)
        if good:
            for group in self.adamw.param_groups:
                group["lr"] = lr
            self.adamw.step()
            self.bad_in_a_row = 0
        else:
            self.skipped += 1
            self.bad_in_a_row += 1
        self.adamw.zero_grad(set_to_none=True)
        if self.bad_in_a_row >= MAX_BAD_STEPS:
            raise UserError(
                f"loss or gradient was not a finite number {self.bad_in_a_row} steps in a row: lower the learning rate"
            )
        return norm, good

    def tensors(self) -> dict[str, torch.Tensor]:
        """Model and optimizer as tensors, for a resume point."""
        return {**checkpoint.model_tensors(self.model), **checkpoint.optimizer_tensors(self.adamw)}

    def counters(self) -> dict[str, Any]:
        """Counters of a resume point."""
        return {"skipped": self.skipped, "bad_in_a_row": self.bad_in_a_row}

    def restore(self, state: State) -> None:
        """Puts model, optimizer and counters back as `tensors` and `counters` gave them."""
        moments = checkpoint.empty_optimizer_tensors(self.adamw, state.described)
        state.read_into({**checkpoint.model_tensors(self.model), **moments})
        checkpoint.load_optimizer_tensors(self.adamw, moments)
        self.skipped, self.bad_in_a_row = state.counters["skipped"], state.counters["bad_in_a_row"]


def save_due(step: int, steps: int, every: int, unsaved_seconds: float) -> bool:
    """Whether a resume point is due after `step` finished steps of `steps` (not after the last: the stage ends).

    It is after every `every` steps, and sooner where a kill would cost more than SAVE_SECONDS of work; never where every is 0.
    """
    return bool(every) and step < steps and (step % every == 0 or unsaved_seconds >= SAVE_SECONDS)
