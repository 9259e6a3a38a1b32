"""Warnings that a person must see. Whoever runs the work decides where they go: a stage shows each kind once and keeps it.

The loops call `warn` without knowing who listens; outside of a `listening` block a warning goes to stderr.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_listener: ContextVar[Callable[[str, str], object] | None] = ContextVar("listener", default=None)


def warn(kind: str, text: str) -> None:
    """Says `text`, one line; of each kind only the first is heard in one `listening` block."""
    hear = _listener.get()
    if hear is None:
        print(f"warning: {text}", file=sys.stderr)
    else:
        hear(kind, text)


@contextmanager
def listening(hear: Callable[[str, str], object]) -> Iterator[None]:
    """Inside the block, `hear` gets kind and text of the first warning of each kind."""
    seen: set[str] = set()

    def first(kind: str, text: str) -> None:
        if kind not in seen:
            seen.add(kind)
            hear(kind, text)

    before = _listener.set(first)
    try:
        yield
    finally:
        _listener.reset(before)
