"""Weights for a server: a folder that it reads, and how to tell whether it computes with all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from training import adapters, files, seeding

SHARE = 0.2  # of the size of a matrix's entries, by which `scrambled` moves them
VECTOR = 0.1  # by which it moves the entries of biases, norms and other vectors at least


def write(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """Writes config and weights of `model`, adapters merged, to `folder`, which appears whole or stays what it was.

    The head is written as a tensor of its own where it is tied to the embeddings, and the config says so: vLLM packs the head
    of a CPU once, and one that is tied would keep the weights that the server has started with.
    """
    state = {
        name: tensor.detach().to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in adapters.merged_state(model).items()
    }
    head, tied = _head(model)
    if tied:
        state[head] = state[head].clone()
    with files.replacing(folder) as temporary:
        temporary.mkdir()
        model.save_pretrained(temporary, state_dict=state)
        config = files.read_json(temporary / "config.json")
        untied = {"tie_word_embeddings": False} if tied else {}
        files.write_json(
            temporary / "config.json", {**config, "dtype": str(dtype).removeprefix("torch."), **untied}
        )


def _head(model: PreTrainedModel) -> tuple[str, bool]:
    """The name of the head's weight, and whether it is that of the embeddings."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is head)
    return f"{name}.weight", head.weight is embeddings.weight


@contextmanager
def scrambled(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block every weight and buffer of `model` is moved, so far that a server without one of them computes something else.

    The first update of a run is made so: a later one changes a tensor, such as the bias of a router, by so little that nothing
    would show at once whether it had arrived.
    """
    draws = seeding.numpy_rng("scrambled weights")
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if not tensor.is_floating_point() or tensor.data_ptr() in kept:
                continue
            kept[tensor.data_ptr()] = tensor, tensor.clone()
            size = float(tensor.float().square().mean().sqrt())
            by = SHARE * size if tensor.ndim > 1 and size else max(SHARE * size, VECTOR)
            noise = draws.standard_normal(tuple(tensor.shape), dtype=np.float32)
            tensor.add_(torch.from_numpy(by * noise).to(tensor))
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, before in kept.values():
                tensor.copy_(before)


def probe_ids(vocabulary: int, length: int) -> list[int]:
    """Token ids to compare log-probs on, drawn from the whole vocabulary, a function of the arguments."""
    drawn: list[int] = seeding.numpy_rng("probe", vocabulary).integers(vocabulary, size=length).tolist()
    return drawn


@torch.no_grad()
def logprobs(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """Log-prob of every token of `ids` but the first behind those before it, (len(ids) - 1,) float32 on the CPU."""
    device = model.device
    was_training = model.training
    model.eval()
    with torch.autocast(device.type, enabled=False):
        tokens = torch.tensor([ids], device=device)
        logits = model(input_ids=tokens, use_cache=False).logits[0, :-1].float()
    model.train(was_training)
    return logits.log_softmax(dim=-1).gather(-1, tokens[0, 1:, None])[:, 0].cpu()
