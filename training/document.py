"""A text that next-token training learns from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from training.prompts import Turns


class Stored(NamedTuple):
    """What a teacher said of each token of a response, its end included: ids that it thought likely, and their log-probs."""

    ids: Sequence[Sequence[int]]
    logp: Sequence[Sequence[float]]

    def part(self, first: int, count: int) -> "Stored":
        """Of `count` tokens from that one on."""
        return Stored(self.ids[first : first + count], self.logp[first : first + count])


@dataclass(frozen=True)
class Document:
    """A training text. Without a prompt it is learnt whole, as in pretraining. Behind the turns of a prompt it is a response:
    the prompt carries no loss, and the end of the turn is learnt. `stored`: of a response, for a student that learns from that."""

    text: str
    prompt: Turns = ()
    stored: Stored | None = None
