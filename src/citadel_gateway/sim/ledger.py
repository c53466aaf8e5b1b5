"""What became of every request, for tests and for the curious."""

from __future__ import annotations

import enum
from collections import deque
from typing import Any

import attrs


class Ending(enum.StrEnum):
    """How a request ended."""

    FINISHED = "finished"
    ABORTED = "aborted"  # the client left, or the engine was stopped
    REJECTED = "rejected"  # a 4xx of the engine's own, or its queue was full
    FAILED = "failed"  # by an injected fault


@attrs.frozen(kw_only=True)
class Entry:
    """One request.

    :param id: the ``x-request-id`` it came with, or one made up.
    :param fault: the kind of fault it was given, also when it finished in spite of it.
    :param completion_tokens: those made before it ended.
    """

    id: str
    path: str
    ended: Ending
    fault: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0


@attrs.define(eq=False)
class Ledger:
    """The last requests, oldest first."""

    entries: deque[Entry] = attrs.field(factory=lambda: deque(maxlen=10_000))

    def record(self, entry: Entry) -> None:
        self.entries.append(entry)

    def of(self, request_id: str) -> list[Entry]:
        """Every attempt made under *request_id*."""
        return [entry for entry in self.entries if entry.id == request_id]

    def as_json(self) -> list[dict[str, Any]]:
        return [attrs.asdict(entry) for entry in self.entries]
