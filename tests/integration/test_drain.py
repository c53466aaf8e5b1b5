"""Stopping: what is running ends well, what hangs does not hold us, and nobody is left guessing."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from tests.support.raw_client import NoResponseError, RawClient, http_request
from tests.support.scripted_engine import (
    MODEL,
    Script,
    ScriptedEngine,
    serve_tcp,
    stream_chat,
    tell,
    wait,
    whole_chat,
)

CHAT = "/v1/chat/completions"
STREAMED = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": True}
WHOLE = {**STREAMED, "stream": False}
PATIENCE = 15.0


@attrs.define(eq=False)
class Gateway:
    """A `citadel-gateway serve` of its own process."""

    process: trio.Process
    port: int = 0
    log: list[dict[str, Any]] = attrs.field(factory=list)
    clients: list[RawClient] = attrs.field(factory=list)
    _said: trio.Event = attrs.field(factory=trio.Event, init=False)

    async def read_log(self) -> None:
        assert self.process.stderr is not None
        unread = b""
        async for data in self.process.stderr:
            *lines, unread = (unread + data).split(b"\n")
            self.log += [json.loads(line) for line in lines]
            self._said.set()

    async def wait_for(self, event: str) -> dict[str, Any]:
        """The log line that tells of *event*."""
        while True:
            for line in self.log:
                if line.get("event") == event:
                    return line
            self._said = trio.Event()
            await self._said.wait()

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    async def connect(self) -> RawClient:
        """Closed at the end of the test at the latest."""
        client = await RawClient.connect(self.port)
        self.clients.append(client)
        return client


def write_config(path: Path, engine_port: int, **service: Any) -> Path:
    config = {
        "service": {"host": "127.0.0.1", "port": 0, "workers": 1, "lame_duck": 0.2, **service},
        "models": {MODEL: {"endpoint": f"http://127.0.0.1:{engine_port}"}},
        "monitoring": {"prometheus_port": None},
        "performance": {"rate_limiting_enabled": False},
    }
    file = path / "gateway.yaml"
    file.write_text(json.dumps(config))  # JSON is YAML, too
    return file


def command(config: Path) -> list[str]:
    return [sys.executable, "-m", "citadel_gateway", "serve", "--config", str(config)]


@asynccontextmanager
async def gateway(
    path: Path, engine: ScriptedEngine, env: dict[str, str] | None = None, **service: Any
) -> AsyncIterator[Gateway]:
    """A gateway in front of *engine*; the body must stop it."""
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            config = write_config(path, await serve_tcp(engine, nursery), **service)
            process = await trio.lowlevel.open_process(
                command(config), stderr=subprocess.PIPE, env={**os.environ, **(env or {})}
            )
            found = Gateway(process)
            try:
                nursery.start_soon(found.read_log)
                listening = await found.wait_for("listening")
                found.port = int(listening["address"].rpartition(":")[2])
                yield found
                await process.wait()
            finally:
                if process.returncode is None:
                    process.kill()
                for client in found.clients:
                    await trio.aclose_forcefully(client.stream)
                with trio.move_on_after(2, shield=True):
                    await process.wait()
            nursery.cancel_scope.cancel()


async def ask(client: RawClient, body: object) -> None:
    await client.send(http_request("POST", CHAT, body))


def held(script: Script, started: trio.Event, go_on: trio.Event) -> Script:
    """*script* with a pause in its middle (before its last two steps at the latest)."""
    middle = max(len(script.steps) - 2, 0)
    steps = script.steps
    return Script([*steps[:middle], tell(started), wait(go_on), *steps[middle:]])


async def test_what_is_running_finishes_and_the_exit_is_clean(tmp_path: Path) -> None:
    started, going, go_on = trio.Event(), trio.Event(), trio.Event()
    engine = ScriptedEngine(
        [
            held(stream_chat(["a", "b", "c"]), started, go_on),
            Script([tell(going), wait(go_on), *whole_chat("whole").steps]),
        ]
    )
    async with gateway(tmp_path, engine, drain_timeout=10, lame_duck=0.5) as running:
        stream, whole = await running.connect(), await running.connect()
        idle, watching = await running.connect(), await running.connect()
        assert (await idle.request("GET", "/health")).status == 200
        assert (await watching.request("GET", "/readyz")).status == 200
        await ask(stream, STREAMED)
        events = stream.read_events()
        first = await anext(events)
        await started.wait()
        await ask(whole, WHOLE)
        await going.wait()

        running.terminate()
        await running.wait_for("draining")
        ready = await watching.request("GET", "/readyz")
        assert (ready.status, ready.header("connection")) == (503, "close")
        with pytest.raises(NoResponseError, match=r"^fin after b''"):
            await idle.read_head()  # it was closed, and cleanly
        await watching.aclose()
        with pytest.raises(OSError, match="all attempts to connect"):
            await running.connect()
        go_on.set()
        data = [first, *[event async for event in events]]
        answer = await whole.read_response()

        assert (data[-1], events.response.complete) == ("[DONE]", True)
        assert (answer.status, answer.complete) == (200, True)
        assert answer.json()["choices"][0]["message"]["content"] == "whole"
        assert answer.header("connection") == "close"
        for client in (stream, whole, idle):
            await client.aclose()
        assert await running.process.wait() == 0
    assert not [line for line in running.log if line.get("event") == "crash"]


async def test_a_stream_that_outlasts_the_drain_is_told_and_cut(tmp_path: Path) -> None:
    endless, going = trio.Event(), trio.Event()
    started = trio.Event()
    engine = ScriptedEngine(
        [
            held(stream_chat(["a", "b", "c"]), started, endless),
            Script([tell(going), wait(endless)]),
        ]
    )
    async with gateway(tmp_path, engine, drain_timeout=0.5) as running:
        stream, whole = await running.connect(), await running.connect()
        await ask(stream, STREAMED)
        events = stream.read_events()
        data = [await anext(events)]
        await ask(whole, WHOLE)
        await going.wait()

        running.terminate()
        asked = trio.current_time()
        data += [event async for event in events]
        answer = await whole.read_response()

        assert json.loads(data[-1])["error"]["code"] == "draining"
        assert "[DONE]" not in data
        assert not events.response.complete
        assert (answer.status, answer.json()["error"]["code"]) == (503, "draining")
        assert await running.process.wait() == 0
        assert trio.current_time() - asked < 0.2 + 0.5 + 3


@pytest.mark.parametrize("server", ["llhttp", "hypercorn"])
async def test_a_client_that_stopped_reading_cannot_hold_us(tmp_path: Path, server: str) -> None:
    *opening, token = stream_chat(["x" * 60_000], finish=None, done=False).steps[:-1]
    engine = ScriptedEngine([Script([*opening, *[token] * 1000])])  # more than sockets hold
    async with gateway(tmp_path, engine, drain_timeout=0.5, server=server) as running:
        stalled = await running.connect()
        await ask(stalled, STREAMED)
        await stalled.read_head()
        await trio.sleep(0.3)  # for the sockets' buffers to fill
        assert engine.posts[0].ended == "running"  # it, too, is held up

        running.terminate()
        asked = trio.current_time()

        assert await running.process.wait() == 0
        assert trio.current_time() - asked < 0.2 + 0.5 + 3


async def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    endless, started = trio.Event(), trio.Event()
    engine = ScriptedEngine([held(stream_chat(["a", "b", "c"]), started, endless)])
    async with gateway(tmp_path, engine, drain_timeout=60) as running:
        stream = await running.connect()
        await ask(stream, STREAMED)
        events = stream.read_events()
        await anext(events)
        running.terminate()
        await running.wait_for("draining")

        running.terminate()
        asked = trio.current_time()
        rest = [event async for event in events]

        assert json.loads(rest[-1])["error"]["code"] == "draining"
        assert await running.process.wait() == 0
        assert trio.current_time() - asked < 3


async def test_requests_that_race_with_the_stop_are_answered_or_cleanly_closed(
    tmp_path: Path,
) -> None:
    async def keep_asking(running: Gateway, ends: list[str]) -> None:
        async with await running.connect() as client:
            while True:
                try:
                    await ask(client, WHOLE)
                    answer = await client.read_response()
                except (NoResponseError, trio.BrokenResourceError) as exc:
                    ends.append(str(exc))
                    return
                assert (answer.status, answer.complete) == (200, True)
                if answer.header("connection") == "close":
                    ends.append("told")
                    return

    ends: list[str] = []
    async with gateway(tmp_path, ScriptedEngine(), drain_timeout=5) as running:
        async with trio.open_nursery() as clients:
            for _ in range(20):
                clients.start_soon(keep_asking, running, ends)
            await trio.sleep(0.2)
            running.terminate()
        assert await running.process.wait() == 0

    assert ends == ["told"] * 20


async def test_the_service_manager_is_told(tmp_path: Path) -> None:
    address = tmp_path / "notify"
    with trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        await manager.bind(str(address))
        env = {"NOTIFY_SOCKET": str(address)}
        async with gateway(tmp_path, ScriptedEngine(), env) as running:
            ready = await manager.recv(1000)
            client = await running.connect()
            assert (await client.request("GET", "/readyz")).status == 200
            running.terminate()

            assert (ready.splitlines()[0], await manager.recv(1000)) == (b"READY=1", b"STOPPING=1")
            await client.aclose()


async def test_an_interrupt_is_as_good_as_a_term(tmp_path: Path) -> None:
    async with gateway(tmp_path, ScriptedEngine()) as running:
        running.process.send_signal(signal.SIGINT)

        assert await running.process.wait() == 0


def run(config: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(config), capture_output=True, text=True, timeout=PATIENCE, check=False
    )


def told(result: subprocess.CompletedProcess[str]) -> list[str]:
    """What was said that is not a log line."""
    return [line for line in result.stderr.splitlines() if not line.startswith("{")]


def test_a_port_that_is_taken_is_one_line_and_69(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run(write_config(tmp_path, 1, port=port))

    assert result.returncode == 69
    assert told(result) == [f"cannot listen on 127.0.0.1:{port}: it is in use"]


def test_a_certificate_that_is_no_certificate_is_one_line_and_69(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.pem"
    wrong.write_text("nonsense")
    result = run(write_config(tmp_path, 1, tls_certfile=str(wrong), tls_keyfile=str(wrong)))

    assert result.returncode == 69
    (line,) = told(result)
    assert line.startswith("cannot listen on 127.0.0.1:0: ")


def test_a_certificate_that_is_not_there_is_a_bad_configuration(tmp_path: Path) -> None:
    result = run(write_config(tmp_path, 1, tls_certfile="/no.pem", tls_keyfile="/no.key"))

    assert result.returncode == 78
    assert "service.tls_certfile: there is no file '/no.pem'" in result.stderr


def test_a_bad_configuration_is_78(tmp_path: Path) -> None:
    result = run(write_config(tmp_path, 1, drain_timeout="soon"))

    assert result.returncode == 78
    assert "service.drain_timeout" in result.stderr
