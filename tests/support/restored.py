"""One model for runs that follow each other, with its first weights again for each: to build and try one takes longer than a step."""

from collections.abc import Callable, Mapping
from functools import cache

from torch import Tensor, nn


def restored(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """``build`` for whoever has done with the model before the next one asks; it is built once in a process."""

    @cache
    def built() -> tuple[nn.Module, dict[str, Tensor]]:
        model = build()
        return model, cloned(model.state_dict())

    def model() -> nn.Module:
        found, weights = built()
        found.load_state_dict(weights)
        found.zero_grad()
        return found

    return model


def cloned(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}
