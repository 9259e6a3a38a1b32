"""The one exception that speaks to the user."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake or fault that the user can act on, told in one clear line.

    The command line prints the message without a traceback and leaves with exit code 2. Everything else that
    is raised is a bug of the trainer and keeps its traceback.
    """


@contextmanager
def named(key: str) -> Iterator[None]:
    """Puts the key of a setting before the message of a UserError of the block."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
