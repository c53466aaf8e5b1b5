"""What comes out of a nursery within a request."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import trio


@contextmanager
def one_cancellation() -> Iterator[None]:
    """Tasks of a nursery that were all cancelled from outside raise one ``Cancelled``, no group."""
    try:
        yield
    except BaseExceptionGroup as group:
        if group.split(trio.Cancelled)[1] is not None:
            raise
        raise group.exceptions[0] from None
