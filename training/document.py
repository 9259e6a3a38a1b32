"""A text that next-token training learns from."""

from dataclasses import dataclass

from training.prompts import Turns


@dataclass(frozen=True)
class Document:
    """A training text. Without a prompt it is learnt whole, as in pretraining. Behind the turns of a prompt it is a response:
    the prompt carries no loss, and the end of the turn is learnt."""

    text: str
    prompt: Turns = ()
