"""Whose request it is, as far as a queue is concerned: its key, its weight and its class."""

from __future__ import annotations

import enum
from collections.abc import Hashable

import attrs


class Priority(enum.Enum):
    """A class of requests.  Higher ones, which come first here, go first when there is a queue."""

    SYSTEM = "system"
    INTERACTIVE = "interactive"
    DEFAULT = "default"
    BULK = "bulk"


CLASSES = tuple(Priority)
"""By rank: the lower the rank, the sooner its turn."""

NAMES = tuple([priority.value for priority in CLASSES])
RANKS = {priority: rank for rank, priority in enumerate(CLASSES)}
_DEFAULT = RANKS[Priority.DEFAULT]


@attrs.frozen
class Party:
    """Those who share one place in the order of a queue.

    :param tenant: who they are; whoever has the same tenant shares the same turns.
    :param weight: their share of a contended queue, relative to other tenants.
    :param rank: of their class; see :data:`CLASSES`.
    """

    tenant: Hashable
    weight: float = 1.0
    rank: int = _DEFAULT


NEWCOMER = Party("")
"""Somebody of the default class whom nobody has seen before."""


def rank_named(name: bytes) -> int:
    """The rank of the class called *name*, in whatever case; that of ``default`` if none is."""
    return _BY_NAME.get(name.strip().lower(), _DEFAULT)


_BY_NAME = {priority.value.encode(): rank for priority, rank in RANKS.items()}
