"""What both training loops share: the learning rate, the guarded optimizer step, and the resume point."""

from __future__ import annotations

import logging
import math
from typing import Any, NamedTuple

import torch
from torch import nn

from training import checkpoint, optional
from training.errors import UserError
from training.model import StepLoad
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


def unfinished_warmup(stage: str, warmup: int, steps: int) -> str:
    """What a person should know of a warm-up that is longer than the stage; "" where it is not."""
    if warmup <= steps:
        return ""
    return f"{stage}.warmup = {warmup}: {steps} steps in all, in which the learning rate does not come up to {stage}.lr"


class Stepped(NamedTuple):
    """An optimizer step: loss and norm of the gradient, of all ranks, and whether the step was taken."""

    loss: float
    norm: float
    taken: bool


class Optimizer:
    """AdamW with clipping that skips a step whose loss or gradient is not finite, and stops after some in a row."""

    def __init__(
        self, model: nn.Module, *, weight_decay: float, grad_clip: float, kind: str = "adamw"
    ) -> None:
        """kind: as `optimizer` of a stage."""
        self.model = model
        self.grad_clip = grad_clip
        self.skipped = 0
        self.unsaved_seconds = 0.0  # of rank 0 at the latest step, the same on all ranks
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

    def step(
        self, loss: float, lr: float, load: StepLoad | None = None, unsaved_seconds: float = 0.0
    ) -> Stepped:
        """Applies the gradients that are there, added up over the ranks: in one exchange with the loss, the load of the experts and
        what tells all of them when a resume point is due.

        Args:
            loss: this rank's part.
            load: of this rank; it becomes that of all.
            unsaved_seconds: since the last resume point, see `unsaved_seconds` of the optimizer.

        Raises:
            UserError: the loss or the gradient was not finite MAX_BAD_STEPS times in a row.
        """
        self.unsaved_seconds = unsaved_seconds
        if ranks.world() > 1:
            loss, self.unsaved_seconds = self._exchange(loss, load, unsaved_seconds)
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
        return Stepped(loss, norm, good)

    def _exchange(self, loss: float, load: StepLoad | None, seconds: float) -> tuple[float, float]:
        """Adds gradients and load up over the ranks; the sum of the losses, and the seconds of rank 0."""
        numbers = torch.tensor([loss, seconds if ranks.main() else 0.0])
        if load is not None:
            numbers = torch.cat([numbers, load.counts.to(numbers)])
        if is_divided(self.model):  # its gradients are sums already
            numbers = ranks.sum_tensor(numbers)
        else:
            trained = (each for each in self.model.parameters() if each.requires_grad)
            numbers = ranks.sum_gradients(trained, numbers)
        if load is not None:
            load.be(numbers[2:])
        return float(numbers[0]), float(numbers[1])

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
