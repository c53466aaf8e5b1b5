"""Files that list endpoints, and what was last good in them.

Whoever writes them may write in place or put another file there; a change counts once the file has
looked the same twice, as with the configuration.  A file that is bad, or gone, changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterable, Sequence, Set
from typing import NoReturn, TypeAlias, TypeVar

import attrs
import trio

from citadel_gateway.config.endpoint_list import read_endpoints
from citadel_gateway.config.loader import ConfigError
from citadel_gateway.config.schema import EndpointConfig, ModelConfig
from citadel_gateway.io.config_file import Stamp, stamp_of
from citadel_gateway.io.ticks import sleep_until_tick

T = TypeVar("T")

InThread: TypeAlias = Callable[[Callable[[], T]], Awaitable[T]]

_EVERY = 0.5  # seconds between two looks; a change is taken in after the second one

_NEVER: Stamp = (0, 0, 0, -1)  # no file looks like that


async def in_thread(work: Callable[[], T]) -> T:
    """Files may be slow, and YAML is; nobody waits for the thread when the gateway stops."""
    return await trio.to_thread.run_sync(work, abandon_on_cancel=True)


@attrs.define(eq=False)
class _File:
    """A file as it is read for one model.

    :param endpoints: the last good list; ``None`` before there is one.
    :param loaded: how the file looked when it was last read, good or bad.
    """

    path: str
    model: ModelConfig
    endpoints: tuple[EndpointConfig, ...] | None = None
    problems: tuple[str, ...] = ()
    loaded: Stamp = _NEVER
    last: Stamp = _NEVER
    lock: trio.Lock = attrs.field(factory=trio.Lock)

    def has_changed(self) -> bool:
        before, self.last = self.last, stamp_of(self.path)
        return self.last == before and self.last != self.loaded

    def read(self) -> tuple[EndpointConfig, ...]:
        """Raises ``ConfigError``."""
        self.loaded = stamp_of(self.path)  # before it is read: what is written then is a change
        return read_endpoints(self.path, self.model, os.environ)


@attrs.define(eq=False)
class EndpointFiles:
    """Knows what the files of models list.

    :param on_change: told of a file whose list is another one than before.
    :param on_trouble: told what is wrong with a file, and (with nothing) when it is good again.
    """

    on_change: Callable[[str], None] = lambda _path: None
    on_trouble: Callable[[str, Sequence[str]], None] = lambda _path, _problems: None
    in_thread: InThread[bool] = in_thread
    _files: dict[tuple[str, str], _File] = attrs.field(factory=dict, init=False)

    def known(self, model_id: str, path: str) -> tuple[EndpointConfig, ...]:
        """What the file lists for the model, as far as is known; never waits."""
        file = self._files.get((model_id, path))
        return file.endpoints or () if file is not None else ()

    def problems(self, model_id: str, path: str) -> tuple[str, ...]:
        """Why what is known may be old; nothing if it is as in the file."""
        file = self._files.get((model_id, path))
        return file.problems if file is not None else ()

    async def look(self, model_id: str, path: str, model: ModelConfig) -> None:
        """Read the file, unless that was done for a *model* that is just like this one."""
        file = self._files.get((model_id, path))
        if file is None:
            file = self._files[model_id, path] = _File(path, model)
        elif file.model != model:
            file.model, file.loaded = model, _NEVER  # the same list may be wrong for this one
        async with file.lock:
            if file.loaded == _NEVER:
                await self._read(file)

    def forget_others(self, wanted: Set[tuple[str, str]]) -> None:
        """Look no longer at any file but those *wanted*, by model and path."""
        for key in self._files.keys() - wanted:
            del self._files[key]

    async def run(self) -> NoReturn:
        """Read every file again when it has changed, for ever."""
        while True:
            await sleep_until_tick(_EVERY)
            for file in [*self._files.values()]:
                async with file.lock:
                    if file.loaded != _NEVER and await self.in_thread(file.has_changed):
                        await self._read(file)

    async def _read(self, file: _File) -> None:
        found: list[tuple[EndpointConfig, ...]] = []
        problems: Iterable[str] = ()

        def read() -> bool:
            found.append(file.read())
            return True

        try:
            await self.in_thread(read)
        except ConfigError as exc:
            problems = exc.problems
        was_bad, file.problems = file.problems, tuple(problems)
        if file.problems != was_bad:
            self.on_trouble(file.path, file.problems)
        for endpoints in found:
            if endpoints != file.endpoints:
                file.endpoints = endpoints
                self.on_change(file.path)
