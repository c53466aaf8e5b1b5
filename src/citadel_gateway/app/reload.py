"""Reading the configuration again while the gateway serves.

A file is validated completely first, down to the certificates that it names.  A bad one changes
nothing: every problem is a line in the log, and the gateway serves on by what it has.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, NoReturn, Protocol

import attrs
import trio

from citadel_gateway.config.loader import ConfigError
from citadel_gateway.config.schema import GatewayConfigSchema
from citadel_gateway.io.config_file import ConfigFile
from citadel_gateway.io.endpoint_files import in_thread
from citadel_gateway.io.logs import redact
from citadel_gateway.io.ticks import next_tick

_EVERY = 1.0  # seconds between two looks at the file


@attrs.frozen(kw_only=True)
class Refusal:
    """A configuration that was not taken.

    :param at: seconds since 1970.
    """

    at: float
    problems: tuple[str, ...]

    def report(self) -> dict[str, Any]:
        """For ``/models/status``."""
        at = datetime.fromtimestamp(self.at, UTC).isoformat()
        return {"at": at, "problems": [redact(problem) for problem in self.problems]}


class Observer(Protocol):
    """Who wants to know what comes of it."""

    def began(self, why: str) -> None: ...

    def refused(self, problems: list[str]) -> None: ...

    def crashed(self, exc: Exception) -> None: ...

    def ended(self, *, taken: bool) -> None: ...


@attrs.define(eq=False)
class Reloader:
    """Takes in the configuration when asked to, and when its file has changed.

    :param adopt: takes a valid configuration and the SHA-256 of its file into service; raises
        ``ConfigError``, and then has changed nothing.
    :param watches: whether to look at the file without being asked.
    """

    file: ConfigFile
    adopt: Callable[[GatewayConfigSchema, str], Awaitable[None]]
    watches: Callable[[], bool]
    observer: Observer
    refusal: Refusal | None = attrs.field(default=None, init=False)
    _reading: trio.Lock = attrs.field(factory=trio.Lock, init=False)
    _asked: trio.Event = attrs.field(factory=trio.Event, init=False)

    def ask(self) -> None:
        """Read the file again, soon; asking twice before that is asking once."""
        self._asked.set()

    async def run(self) -> NoReturn:
        """Wait for changes, for ever; one is dealt with at a time."""
        while True:
            with trio.move_on_at(next_tick(_EVERY)):
                await self._asked.wait()
            if self._asked.is_set():
                self._asked = trio.Event()
                await self.reload("asked to")
            elif self.watches() and await in_thread(self.file.has_changed):
                await self.reload("the file has changed")

    async def reload(self, why: str) -> None:
        """Read it now; :attr:`refusal` says what came of it."""
        async with self._reading:
            await self._reload(why)

    async def _reload(self, why: str) -> None:
        self.observer.began(why)
        try:
            config = await in_thread(self.file.load)
            await self.adopt(config, self.file.digest)
            self.refusal = None
        except ConfigError as exc:
            self.refusal = Refusal(at=time.time(), problems=tuple(exc.problems))
            self.observer.refused(exc.problems)
        except Exception as exc:  # a bug: the old configuration had better stay alive, too
            self.refusal = Refusal(at=time.time(), problems=("an internal error; see the log",))
            self.observer.crashed(exc)
        finally:
            self.observer.ended(taken=self.refusal is None)
