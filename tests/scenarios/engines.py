"""The engines behind the gateways: scripted, on real sockets, with a ledger of what was asked.

Most run beside the clients, so that one clock serves both ledgers.  One that is to be killed runs
in a process of its own and tells what it is asked on its standard output.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import attrs
import trio

from tests.scenarios.speech import Behaviour, Heard, speaks, speaks_slowly
from tests.support.scripted_engine import LedgerEntry, Script, ScriptedEngine, status

_ABOUT = (
    "/health",
    "/v1/models",
    "/get_server_info",
    "/server_info",
    "/get_model_info",
    "/model_info",
)
_STARTS_WITHIN = 20.0
_ROOT = Path(__file__).parents[2]


class Upstream(Protocol):
    """An engine, as those who judge see it."""

    port: int

    @property
    def posts(self) -> list[LedgerEntry]:
        """What it was asked since :meth:`begin`, in order; probes are left out."""
        ...

    def begin(self) -> None:
        """The gateway is warm: from now on it counts, and faults are in force."""
        ...

    async def wait_until(self, holds: Callable[[], bool]) -> None:
        """Wait for something about what it was asked."""
        ...


@attrs.define(eq=False)
class Engine:
    """Behaves well until :meth:`begin`, and as it is told from then on."""

    name: str
    behaviour: Behaviour
    pace: float
    port: int = 0
    scripted: ScriptedEngine = attrs.field(init=False)
    _begun_at: int | None = attrs.field(default=None, init=False)
    _heard: int = attrs.field(default=0, init=False)
    _trouble: Script | None = attrs.field(default=None, init=False)

    def __attrs_post_init__(self) -> None:
        self.scripted = ScriptedEngine(default=self._answer, routes=_routes(self.name))

    @property
    def posts(self) -> list[LedgerEntry]:
        return self.scripted.posts[self._begun_at or 0 :]

    def begin(self) -> None:
        self._begun_at = len(self.scripted.posts)

    async def wait_until(self, holds: Callable[[], bool]) -> None:
        await self.scripted.wait_until(holds)

    async def listen(self, nursery: trio.Nursery) -> None:
        """Serve for the nursery's life."""
        self.port = await _listen(self.scripted, nursery)

    def go_down(self, *, silently: bool = False) -> None:
        """Refuse everything with status 503, or *silently*, so that its health route is none the
        wiser, all requests with status 500.
        """
        self._trouble = _BROKEN if silently else _DOWN
        if not silently:
            self.scripted.routes = dict.fromkeys(self.scripted.routes, _DOWN)

    def come_back(self) -> None:
        self._trouble = None
        self.scripted.routes = _routes(self.name)

    def _answer(self, entry: LedgerEntry) -> Script:
        if self._trouble is not None:
            return self._trouble
        if self._begun_at is None:
            return speaks(Heard.of(entry, name=self.name, nth=1, pace=self.pace))
        self._heard += 1
        heard = Heard.of(entry, name=self.name, nth=self._heard, pace=self.pace)
        return self.behaviour(heard)


_ERROR = b'{"error":{"message":"down","type":"server_error","param":null,"code":null}}'
_DOWN = status(503, _ERROR)
_BROKEN = status(500, _ERROR)


async def _listen(engine: ScriptedEngine, nursery: trio.Nursery) -> int:
    """Serve on a real socket for the nursery's life; the port."""

    async def serve(stream: trio.abc.Stream) -> None:
        with suppress(ValueError):  # some ask in HTTP/2 first, and then as they are answered
            await engine.serve(stream)

    listeners: list[trio.SocketListener] = await nursery.start(
        partial(trio.serve_tcp, serve, 0, host="127.0.0.1")
    )
    port: int = listeners[0].socket.getsockname()[1]
    return port


def _routes(name: str) -> dict[tuple[str, str], Script]:
    """What gateways ask before they trust an engine: its health, its model, what kind it is."""
    about = {
        "object": "list",
        "data": [{"id": name, "object": "model", "created": 1, "owned_by": "scenarios"}],
        "status": "ok",
        "served_model_name": name,
        "is_generation": True,
    }
    return {("GET", path): status(200, json.dumps(about).encode()) for path in _ABOUT}


@attrs.frozen
class Mortal:
    """A behaviour for an engine in a process of its own: it speaks well, and can be killed.

    :param gap: real seconds between words.
    :param think: and before the first.
    """

    gap: float
    think: float = 0.0


@attrs.define(eq=False)
class MortalEngine:
    """An engine that can die as engines do: by SIGKILL, without a word."""

    process: trio.Process
    port: int = 0
    _posts: list[LedgerEntry] = attrs.field(factory=list, init=False)
    _begun_at: int = attrs.field(default=0, init=False)
    _asked: trio.Event = attrs.field(factory=trio.Event, init=False)

    @property
    def posts(self) -> list[LedgerEntry]:
        return self._posts[self._begun_at :]

    def begin(self) -> None:
        self._begun_at = len(self._posts)

    async def wait_until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            await self._asked.wait()

    def kill(self) -> None:
        self.process.kill()

    async def listen(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Keep its ledger from what it tells; started when its port is known."""
        assert self.process.stdout is not None
        unread = b""
        async for data in self.process.stdout:
            *lines, unread = (unread + data).split(b"\n")
            for line in lines:
                told = json.loads(line)
                if "port" in told:
                    self.port = told["port"]
                    task_status.started()
                else:
                    self._posts.append(_entry(told))
                    self._asked.set()
                    self._asked = trio.Event()


def _entry(told: dict[str, Any]) -> LedgerEntry:
    return LedgerEntry(
        request_id=told["request_id"],
        attempt=1,
        method="POST",
        path=told["path"],
        headers={},
        connection=0,
        received_at=trio.current_time(),
    )


@asynccontextmanager
async def mortal_engine(name: str, kind: Mortal) -> AsyncIterator[MortalEngine]:
    command = [sys.executable, "-m", "tests.scenarios.engines", "--name", name]
    command += ["--gap", str(kind.gap), "--think", str(kind.think)]
    process = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE, cwd=_ROOT)
    engine = MortalEngine(process)
    async with trio.open_nursery() as nursery:
        try:
            with trio.fail_after(_STARTS_WITHIN):
                await nursery.start(engine.listen)
            yield engine
        finally:
            process.kill()
            with trio.move_on_after(5, shield=True):
                await process.wait()
            nursery.cancel_scope.cancel(reason="the engine has ended")


async def _serve_mortal(name: str, gap: float, think: float) -> None:
    behaviour = speaks_slowly(gap, think=think)

    def tell(fields: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(fields) + "\n")
        sys.stdout.flush()

    def answer(entry: LedgerEntry) -> Script:
        tell({"request_id": entry.request_id, "path": entry.path})
        return behaviour(Heard.of(entry, name=name, nth=1, pace=1.0))

    engine = ScriptedEngine(default=answer, routes=_routes(name))
    async with trio.open_nursery() as nursery:
        tell({"port": await _listen(engine, nursery)})


def main() -> None:
    """The process of an engine that is to be killed."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--name", required=True)
    parser.add_argument("--gap", type=float, required=True)
    parser.add_argument("--think", type=float, required=True)
    asked = parser.parse_args()
    trio.run(partial(_serve_mortal, asked.name, asked.gap, asked.think))


if __name__ == "__main__":
    main()
