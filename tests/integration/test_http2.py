"""HTTP/2 over real TLS sockets: the whole gateway, scripted engines, and clients of every kind."""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import attrs
import httpx
import pytest
import trio
import trustme

from tests.support.h2_client import H2Answer, H2Client, h2_client
from tests.support.raw_client import RawClient
from tests.support.scripted_engine import (
    MODEL,
    Script,
    ScriptedEngine,
    hang,
    serve_tcp,
    stream_chat,
    tell,
    wait,
    whole_chat,
)

CHAT = "/v1/chat/completions"
WHOLE = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
STREAMED = {**WHOLE, "stream": True}
PATIENCE = 20.0
LAST = 2**31 - 1


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@attrs.define(eq=False)
class Gateway:
    """A `citadel-gateway serve` of its own process, behind TLS."""

    process: trio.Process
    trust: ssl.SSLContext
    engine: ScriptedEngine
    port: int = 0
    log: list[dict[str, Any]] = attrs.field(factory=list)
    _said: trio.Event = attrs.field(factory=trio.Event, init=False)

    async def read_log(self) -> None:
        assert self.process.stderr is not None
        unread = b""
        async for data in self.process.stderr:
            *lines, unread = (unread + data).split(b"\n")
            self.log += [json.loads(line) for line in lines]
            self._said.set()

    async def wait_for(self, event: str, count: int = 1) -> list[dict[str, Any]]:
        """The first *count* log lines that tell of *event*."""
        while True:
            found = [line for line in self.log if line.get("event") == event]
            if len(found) >= count:
                return found
            self._said = trio.Event()
            await self._said.wait()

    async def connect(self, *protocols: str) -> trio.SSLStream[trio.SocketStream]:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols(protocols)
        tcp = await trio.open_tcp_stream("127.0.0.1", self.port)
        stream = trio.SSLStream(tcp, context, server_hostname="localhost", https_compatible=True)
        await stream.do_handshake()
        return stream

    @asynccontextmanager
    async def client(self, **options: Any) -> AsyncIterator[H2Client]:
        stream = await self.connect("h2", "http/1.1")
        assert stream.selected_alpn_protocol() == "h2"
        async with h2_client(stream, **options) as client:
            yield client

    async def metric(self, line: str) -> float:
        """The value of a line of `/metrics` that begins with *line*."""
        async with RawClient(await self.connect("http/1.1")) as client:
            page = (await client.request("GET", "/metrics")).body.decode()
        return sum(
            float(found.rpartition(" ")[2]) for found in page.splitlines() if found.startswith(line)
        )

    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    async def until_back(self, tasks: float, descriptors: int) -> None:
        """Wait until no more is held than when it was idle; the connection that asks is one."""
        while (  # noqa: ASYNC110  # it is another process
            await self.metric("citadel_gateway_tasks") > tasks
            or self.descriptors() > descriptors + 1
        ):
            await trio.sleep(0.02)

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)


@asynccontextmanager
async def gateway(
    path: Path, authority: trustme.CA, engine: ScriptedEngine | None = None, **sections: Any
) -> AsyncIterator[Gateway]:
    """A gateway in front of *engine*; stopped at the end, and expected to end well."""
    engine = engine or ScriptedEngine()
    issued = authority.issue_cert("localhost", "127.0.0.1")
    cert, key = path / "cert.pem", path / "key.pem"
    issued.cert_chain_pems[0].write_to_path(cert)
    issued.private_key_pem.write_to_path(key)
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            url = f"http://127.0.0.1:{await serve_tcp(engine, nursery)}"
            config = {
                "service": {
                    "host": "127.0.0.1",
                    "port": 0,
                    "workers": 1,
                    "lame_duck": 0.2,
                    "drain_timeout": 1,
                    "tls_certfile": str(cert),
                    "tls_keyfile": str(key),
                    **sections.pop("service", {}),
                },
                "models": {MODEL: {"endpoint": url, "max_concurrent": 200}},
                "monitoring": {"prometheus_port": None},
                "performance": {"rate_limiting_enabled": False, **sections.pop("performance", {})},
                **sections,
            }
            file = path / "gateway.yaml"
            file.write_text(json.dumps(config))  # JSON is YAML, too
            process = await trio.lowlevel.open_process(
                [sys.executable, "-m", "citadel_gateway", "serve", "--config", str(file)],
                stderr=subprocess.PIPE,
                env=dict(os.environ),
            )
            trust = ssl.create_default_context()
            authority.configure_trust(trust)
            running = Gateway(process, trust, engine)
            try:
                nursery.start_soon(running.read_log)
                (listening,) = await running.wait_for("listening")
                running.port = int(listening["address"].rpartition(":")[2])
                yield running
                if process.returncode is None:
                    running.terminate()
                assert await process.wait() == 0
            finally:
                if process.returncode is None:
                    process.kill()
                with trio.move_on_after(2, shield=True):
                    await process.wait()
            nursery.cancel_scope.cancel()
    assert not [line for line in running.log if line.get("event") == "crash"]


def flood() -> Script:
    """More of a stream than sockets have room for."""
    return Script([*stream_chat(["x" * 60_000] * 300).steps[:-2], hang()])


# Requests.


async def test_requests_are_answered_as_over_http_1_1(
    tmp_path: Path, authority: trustme.CA
) -> None:
    pages = {"cors": {"allow_origins": ["https://a.example"]}}
    headers = [("x-request-id", "mine"), ("origin", "https://a.example")]
    async with gateway(tmp_path, authority, security=pages) as running:
        async with running.client() as client:
            new = await client.finish(await client.post(CHAT, WHOLE, headers))
            health = await client.fetch("GET", "/health")
            wrong = await client.finish(await client.post(CHAT, {"model": "none"}, headers))
            missing = await client.fetch("GET", "/nothing")
        async with RawClient(await running.connect("http/1.1")) as client_1:
            old = await client_1.request("POST", CHAT, WHOLE, headers)
            wrong_1 = await client_1.request("POST", CHAT, {"model": "none"}, headers)
        lines = await running.wait_for("request", 5)

    def shape(found: Any) -> set[str]:
        return {name for name, _ in found.headers}

    assert (new.status, new.complete, health.status) == (200, True, 200)
    assert new.json()["choices"] == old.json()["choices"]
    assert shape(new) == shape(old)
    assert new.header("x-request-id") == "mine"
    assert new.header("access-control-allow-origin") == "https://a.example"
    assert (wrong.status, wrong.json()) == (wrong_1.status, wrong_1.json())
    assert (missing.status, missing.json()["error"]["code"]) == (404, "not_found")
    first, _, _, fourth, _ = lines
    assert set(first) == set(fourth)
    assert (first["outcome"], first["status"], first["request_id"]) == ("ok", 200, "mine")


async def test_httpx_is_served(tmp_path: Path, authority: trustme.CA) -> None:
    engine = ScriptedEngine(default=stream_chat(["a", "b", "c"]))
    async with gateway(tmp_path, authority, engine) as running:
        url = f"https://127.0.0.1:{running.port}"
        async with httpx.AsyncClient(http2=True, verify=running.trust, base_url=url) as client:
            async with client.stream("POST", CHAT, json=STREAMED) as response:
                lines = [line async for line in response.aiter_lines() if line]
            health = await client.get("/health")

    assert (response.http_version, response.status_code) == ("HTTP/2", 200)
    assert lines[-1] == "data: [DONE]"
    assert health.status_code == 200


async def test_fifty_streams_on_one_connection(tmp_path: Path, authority: trustme.CA) -> None:
    words = [f"w{n} " for n in range(40)]
    engine = ScriptedEngine(default=stream_chat(words))
    async with gateway(tmp_path, authority, engine) as running:
        tasks, descriptors = await running.metric("citadel_gateway_tasks"), running.descriptors()
        async with running.client() as client:
            answers = [await client.post(CHAT, STREAMED) for _ in range(50)]
            for found in answers:
                await client.finish(found)
            async with running.client() as other:
                assert (await other.fetch("GET", "/health")).status == 200
        await running.wait_for("request", 50)
        held = await running.metric("citadel_gateway_tasks")

    assert all(found.complete and found.body.endswith(b"data: [DONE]\n\n") for found in answers)
    assert len({found.body.count(b"data: ") for found in answers}) == 1
    assert held <= tasks
    assert descriptors > 0


# Clients that leave.


@pytest.mark.parametrize("how", ["reset", "close", "abort"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_client_that_leaves_frees_the_engine_at_once(
    tmp_path: Path, authority: trustme.CA, how: str, stream: bool
) -> None:
    begun = Script([*stream_chat(["a", "b"]).steps[:2], hang()]) if stream else Script([hang()])
    engine = ScriptedEngine(default=begun)
    async with gateway(tmp_path, authority, engine) as running:
        tasks, descriptors = await running.metric("citadel_gateway_tasks"), running.descriptors()
        async with running.client() as client:
            answers = [await client.post(CHAT, {**WHOLE, "stream": stream}) for _ in range(5)]
            while len(engine.posts) < 5:  # noqa: ASYNC110  # engines have no event for it
                await trio.sleep(0.005)
            if stream:
                for found in answers:
                    await client.until(found, size=1)
            left_at = trio.current_time()
            match how:
                case "reset":
                    for found in answers:
                        await client.give_up(found)
                case "close":
                    await client.stream.aclose()
                case _:
                    await trio.aclose_forcefully(client.stream)
            while not all(entry.client_left_at for entry in engine.posts):  # noqa: ASYNC110
                await trio.sleep(0.001)
            took = max(entry.client_left_at or 0 for entry in engine.posts) - left_at
            lines = await running.wait_for("request", 5)
        await running.until_back(tasks, descriptors)

    assert took < 1  # the measured time is in the notes of the benchmark, not here
    assert {line["outcome"] for line in lines} == {"client_closed"}


async def test_a_window_that_is_never_opened_frees_the_engine(
    tmp_path: Path, authority: trustme.CA
) -> None:
    engine = ScriptedEngine(default=flood())
    async with gateway(tmp_path, authority, engine, service={"write_timeout": 0.5}) as running:
        tasks, descriptors = await running.metric("citadel_gateway_tasks"), running.descriptors()
        async with running.client(window=0, lazy=True) as client:
            answers = [await client.post(CHAT, STREAMED) for _ in range(5)]
            for found in answers:
                await client.finish(found)
            assert (await client.fetch("GET", "/health")).reset is not None  # it has no window
            while not all(entry.client_left_at for entry in engine.posts):  # noqa: ASYNC110
                await trio.sleep(0.01)
        await running.until_back(tasks, descriptors)

        lines = await running.wait_for("request", 5)
    assert {line["outcome"] for line in lines[:5]} == {"client_closed"}
    assert [found.reset for found in answers] == [2] * 5
    assert {found.body for found in answers} == {b""}


async def test_a_socket_that_nobody_reads_frees_the_engine(
    tmp_path: Path, authority: trustme.CA
) -> None:
    engine = ScriptedEngine(default=flood())
    async with gateway(tmp_path, authority, engine, service={"write_timeout": 0.5}) as running:
        tasks, descriptors = await running.metric("citadel_gateway_tasks"), running.descriptors()
        async with running.client(window=2**30) as client:
            client.h2.increment_flow_control_window(2**30)
            await client.fetch("GET", "/health")
            client.deaf = True
            for _ in range(3):
                await client.post(CHAT, STREAMED)
            lines = await running.wait_for("request", 3)
            while not all(entry.client_left_at for entry in engine.posts):  # noqa: ASYNC110
                await trio.sleep(0.01)
            await running.until_back(tasks, descriptors)

    assert {line["outcome"] for line in lines} == {"client_closed"}


# Requests that are none.


async def test_limits_hold(tmp_path: Path, authority: trustme.CA) -> None:
    limit = {"max_body_bytes": 100_000}
    async with gateway(tmp_path, authority, performance=limit) as running:
        async with running.client() as client:
            head = await client.fetch("GET", "/health", headers=[("x", "a" * 17_000)])
            said = [("content-type", "application/json"), ("content-length", "200000")]
            announced = await client.ask("POST", CHAT, headers=said, end=False)
            await client.finish(announced)
            grown = client.open("POST", CHAT, headers=said[:1], end=False)
            await client.upload(grown, 3_000_000)
            await client.finish(grown)
            after = await client.finish(await client.post(CHAT, WHOLE))
        lines = await running.wait_for("request", 4)

    assert (head.status, head.json()["error"]["code"]) == (431, "bad_http_request")
    assert (announced.status, announced.json()["error"]["code"]) == (413, "request_too_large")
    assert (grown.status, grown.reset) == (413, 0)
    assert after.status == 200
    assert [line["status"] for line in lines] == [431, 413, 413, 200]


async def test_a_body_that_does_not_come_is_logged_for_what_it_was(
    tmp_path: Path, authority: trustme.CA
) -> None:
    async with gateway(tmp_path, authority, service={"body_timeout": 0.2}) as running:
        async with running.client() as client:
            found = await client.fetch(
                "POST", CHAT, headers=[("content-type", "application/json")], end=False
            )
        (line,) = await running.wait_for("request")

    assert (found.status, found.json()["error"]["code"]) == (408, "bad_http_request")
    assert (line["status"], line["code"]) == (408, "bad_http_request")


@pytest.mark.parametrize("protocol", ["h2", "http/1.1"])
async def test_websockets_are_refused(tmp_path: Path, authority: trustme.CA, protocol: str) -> None:
    async with gateway(tmp_path, authority) as running:
        if protocol == "h2":
            async with running.client() as client:
                head = [
                    (":method", "CONNECT"),
                    (":protocol", "websocket"),
                    (":scheme", "https"),
                    (":path", "/v1/realtime"),
                    (":authority", "localhost"),
                    ("sec-websocket-version", "13"),
                ]
                client.h2.send_headers(1, head)
                found = client.answers[1] = H2Answer(1)
                await client.flush()
                await client.finish(found)
                status, body = found.status, found.json()
        else:
            async with RawClient(await running.connect("http/1.1")) as client_1:
                upgrade = [
                    ("connection", "Upgrade"),
                    ("upgrade", "websocket"),
                    ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
                    ("sec-websocket-version", "13"),
                ]
                answer = await client_1.request("GET", "/v1/realtime", headers=upgrade)
                status, body = answer.status, answer.json()
        (line,) = await running.wait_for("request")

    assert (status, body["error"]["code"]) == (400, "bad_http_request")
    assert body["error"]["message"] == "WebSocket is not served here"
    assert line["status"] == 400


async def test_http_2_without_tls_is_not_spoken(tmp_path: Path, authority: trustme.CA) -> None:
    off = {"tls_certfile": None, "tls_keyfile": None}
    async with (
        gateway(tmp_path, authority, service=off) as running,
        await RawClient.connect(running.port) as client,
    ):
        await client.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(24))
        assert (await client.read_response()).status == 505


async def annoy(client: H2Client, noise: bytes = b"") -> None:
    """Send *noise*, or streams that are reset at once, until the server has had enough."""
    with suppress(trio.BrokenResourceError):
        for _ in range(1000):
            for _ in range(0 if noise else 20):
                found = client.open("POST", CHAT, headers=[("content-type", "application/json")])
                client.h2.reset_stream(found.stream_id)
            await client.send(noise)
    await client.until_ended()


async def test_a_flood_costs_its_own_connection_alone(
    tmp_path: Path, authority: trustme.CA
) -> None:
    ping = b"\x00\x00\x08\x06\x00\x00\x00\x00\x00" + bytes(8)
    engine = ScriptedEngine(default=Script([hang()]))
    async with gateway(tmp_path, authority, engine) as running:
        tasks, descriptors = await running.metric("citadel_gateway_tasks"), running.descriptors()
        async with running.client() as good, running.client() as pings, running.client() as resets:
            await annoy(pings, ping * 100)
            await annoy(resets)
            assert (await good.fetch("GET", "/health")).status == 200
        await running.until_back(tasks, descriptors)

    assert len(engine.posts) <= 200


# The end.


async def test_what_is_running_finishes_when_the_gateway_stops(
    tmp_path: Path, authority: trustme.CA
) -> None:
    started, going, go_on = trio.Event(), trio.Event(), trio.Event()
    steps = stream_chat(["a", "b", "c"]).steps
    engine = ScriptedEngine(
        [
            Script([*steps[:2], tell(started), wait(go_on), *steps[2:]]),
            Script([tell(going), wait(go_on), *whole_chat("whole").steps]),
        ]
    )
    async with (
        gateway(tmp_path, authority, engine, service={"drain_timeout": 10}) as running,
        running.client() as client,
        running.client() as idle,
    ):
        assert (await idle.fetch("GET", "/health")).status == 200
        stream = await client.post(CHAT, STREAMED)
        await started.wait()
        whole = await client.post(CHAT, WHOLE)
        await going.wait()

        running.terminate()
        await idle.until_ended()
        while not client.goaways:
            await client.news()
        assert client.goaways == [(LAST, 0)]
        await trio.sleep(0.5)
        late = await client.fetch("GET", "/health")
        go_on.set()
        await client.finish(stream)
        await client.finish(whole)
        await client.until_ended()

        assert await running.process.wait() == 0
    assert (stream.complete, stream.body.endswith(b"data: [DONE]\n\n")) == (True, True)
    assert (whole.status, whole.complete) == (200, True)
    assert late.reset == 7  # REFUSED_STREAM: it may be asked again elsewhere
    assert [code for _, code in (*client.goaways, *idle.goaways)] == [0, 0, 0]


async def test_who_outlasts_the_drain_is_told_and_who_reads_nothing_is_cut(
    tmp_path: Path, authority: trustme.CA
) -> None:
    steps = stream_chat(["a", "b"]).steps
    engine = ScriptedEngine([Script([*steps[:2], hang()]), flood()], default=Script([hang()]))
    async with (
        gateway(tmp_path, authority, engine, service={"drain_timeout": 0.5}) as running,
        running.client() as client,
        running.client(window=0, lazy=True) as deaf,
    ):
        stream = await client.post(CHAT, STREAMED)
        await client.until(stream, size=1)
        await deaf.post(CHAT, STREAMED)
        while len(engine.posts) < 2:  # noqa: ASYNC110
            await trio.sleep(0.01)
        whole = await client.post(CHAT, WHOLE)
        while len(engine.posts) < 3:  # noqa: ASYNC110
            await trio.sleep(0.01)
        deaf.deaf = True

        running.terminate()
        asked = trio.current_time()
        await client.finish(stream)
        await client.finish(whole)

        assert await running.process.wait() == 0
        assert trio.current_time() - asked < 0.2 + 0.5 + 3
    assert b'"code":"draining"' in stream.body
    assert (stream.complete, stream.reset) == (False, 2)
    assert (whole.status, whole.json()["error"]["code"]) == (503, "draining")
