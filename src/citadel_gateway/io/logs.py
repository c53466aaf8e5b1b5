"""Log lines as JSON, one object a line, written in batches and never in the way of a request."""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, NoReturn

import attrs
import orjson
import trio

_MOST_PENDING = 4 * 2**20  # bytes; beyond it lines are dropped and counted
_EVERY = 0.1
_LAST_LINES = 1.0  # seconds
_LEVELS = {level: name.lower() for name, level in logging.getLevelNamesMapping().items()}
_SECRETS = re.compile(r"sk-[A-Za-z0-9_-]{6,}|[Bb]earer\s+\S+")


@attrs.define(eq=False)
class JsonLog:
    """Collects lines and writes them from a thread, so that a slow disk or pipe delays nobody.

    :param descriptor: where lines go; standard error by default.
    :param always: fields of every line.
    """

    descriptor: int = 2
    level: int = logging.INFO
    always: Mapping[str, Any] = attrs.field(factory=dict)
    dropped: int = attrs.field(default=0, init=False)
    _pending: list[bytes] = attrs.field(factory=list, init=False)
    _size: int = attrs.field(default=0, init=False)
    _sleeper: tuple[trio.lowlevel.TrioToken, trio.Event] | None = attrs.field(
        default=None, init=False
    )
    _writing: threading.Lock = attrs.field(factory=threading.Lock, init=False)

    def write(self, fields: dict[str, Any]) -> None:
        """Add a line; a time stamp is put in front."""
        line = _encode({"ts": _now(), **self.always, **fields})
        if self._size + len(line) > _MOST_PENDING:
            self.dropped += 1
            return
        self._pending.append(line)
        self._size += len(line)
        if self._sleeper is not None:
            self._wake(*self._sleeper)

    def request(self, fields: dict[str, Any]) -> None:
        """A line of the access log."""
        if self.level <= logging.INFO:
            self.write({"level": "info", "event": "request", **fields})

    def event(self, level: int, event: str, **fields: Any) -> None:
        """A line about the gateway itself."""
        if level >= self.level:
            name = _LEVELS.get(level) or logging.getLevelName(level).lower()
            self.write({"level": name, "event": event, **fields})

    async def flush_for_ever(self) -> NoReturn:
        """Write lines soon after they have come; while none come there is nothing to do."""
        while True:
            await self._wait_for_lines()
            await trio.sleep(_EVERY)
            await self.flush()

    async def _wait_for_lines(self) -> None:
        news = trio.Event()
        # Before the look: a line that another thread adds after it finds whom to wake.
        self._sleeper = trio.lowlevel.current_trio_token(), news
        try:
            if not self._pending:
                await news.wait()
        finally:
            self._sleeper = None

    def _wake(self, token: trio.lowlevel.TrioToken, news: trio.Event) -> None:
        """From any thread, and from where the event loop would not learn of an event in time."""
        self._sleeper = None
        with suppress(trio.RunFinishedError):
            token.run_sync_soon(news.set)

    async def flush(self) -> None:
        """Write what is pending, from a thread that nobody waits for while stopping."""
        if lines := self._take():
            await trio.to_thread.run_sync(self._write_out, lines, abandon_on_cancel=True)

    def flush_now(self) -> None:
        """Write what is pending, for the end of the process: a pipe nobody reads cannot hold it."""
        writer = threading.Thread(target=self._write_out, args=(self._take(),), daemon=True)
        writer.start()
        writer.join(_LAST_LINES)

    def _take(self) -> list[bytes]:
        lines, self._pending, self._size = self._pending, [], 0
        return lines

    def _write_out(self, lines: list[bytes]) -> None:
        with self._writing:  # one thread at a time, so that lines are not torn
            self._write_all(lines)

    def _write_all(self, lines: list[bytes]) -> None:
        data = b"".join(lines)
        while data:
            try:
                data = data[os.write(self.descriptor, data) :]
            except OSError:  # a full disk or a closed pipe costs log lines, not the service
                self.dropped += len(lines)
                return


@attrs.define(eq=False)
class LogHandler(logging.Handler):
    """Sends the log records of the libraries that we use to a :class:`JsonLog`."""

    log: JsonLog

    def __attrs_pre_init__(self) -> None:
        super().__init__()

    def emit(self, record: logging.LogRecord) -> None:
        message = redact(record.getMessage())
        fields: dict[str, Any] = {"logger": record.name}
        if record.exc_info:
            fields["exception"] = redact(logging.Formatter().formatException(record.exc_info))
        self.log.event(record.levelno, message, **fields)


def _encode(fields: Mapping[str, Any]) -> bytes:
    try:
        return orjson.dumps(fields, default=str, option=orjson.OPT_APPEND_NEWLINE)
    except orjson.JSONEncodeError:  # a lone surrogate, an integer above 64 bits
        return json.dumps(fields, default=str).encode() + b"\n"


def redact(text: str) -> str:
    """*text* without anything that looks like a credential."""
    return _SECRETS.sub("[redacted]", text)


_second: tuple[int, str] = (0, "")


def _now() -> str:
    """The time of day in UTC, to the millisecond; all but that is made once a second."""
    global _second  # a cache of one

    now = time.time()
    whole = int(now)
    if _second[0] != whole:
        _second = (whole, datetime.fromtimestamp(whole, UTC).isoformat()[:-6])
    return f"{_second[1]}.{int((now - whole) * 1000):03d}+00:00"
