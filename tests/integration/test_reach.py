"""Engines on Unix sockets, behind TLS and on IPv6: requests and probes over real sockets."""

from __future__ import annotations

import datetime
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
import trustme

from citadel_gateway.app.service import UnifiedAPIGatewayService
from citadel_gateway.config.loader import parse
from citadel_gateway.io.resolver import Resolver
from tests.support import scripted_engine as scripted
from tests.support.gateway import CapturedLog, World
from tests.support.memory_net import MemoryNet
from tests.support.raw_client import RawResponse, reset_stream
from tests.support.scripted_engine import Script, ScriptedEngine, serve_tcp


@asynccontextmanager
async def gateway(entry: dict[str, Any], **service: Any) -> AsyncIterator[World]:
    """A gateway with one endpoint, in front of whatever is there on real sockets."""
    log = CapturedLog()
    config = parse({"models": {"m": {"endpoints": [entry]}}})
    made = UnifiedAPIGatewayService(config, log=log, **service)
    async with made.open(), trio.open_nursery() as nursery:
        yield World(made, MemoryNet(nursery), log, {}, nursery)
        nursery.cancel_scope.cancel()


def answered(response: RawResponse, engine: ScriptedEngine) -> bool:
    """Whether it came from *engine*, which was probed as well."""
    return (
        response.status == 200
        and len(engine.posts) == 1
        and any(entry.method == "GET" for entry in engine.ledger)
    )


# --- Unix sockets


@asynccontextmanager
async def on_socket(path: Path, engine: ScriptedEngine) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        with trio.socket.socket(trio.socket.AF_UNIX) as listening:
            await listening.bind(str(path))
            listening.listen()
            listener = trio.SocketListener(listening)
            nursery.start_soon(trio.serve_listeners, engine.serve, [listener])
            yield
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("base", ["", ":/base"])
async def test_an_engine_on_a_unix_socket_is_probed_and_asked(tmp_path: Path, base: str) -> None:
    engine, path = ScriptedEngine(), tmp_path / "vllm.sock"
    async with on_socket(path, engine), gateway({"url": f"unix:{path}{base}"}) as world:
        response = await world.ask("m")
        page = await world.metrics_page()

    assert answered(response, engine)
    assert response.header("x-citadel-backend") == f"unix:{path}{base}"
    assert {e.headers["host"] for e in engine.ledger} == {"localhost"}
    prefix = base.removeprefix(":")
    assert engine.posts[0].path == f"{prefix}/v1/chat/completions"
    assert engine.ledger[0].path == f"{prefix}/health"
    assert f'endpoint="unix:{path}{base}"' in page


async def test_a_socket_that_disappears_is_a_connection_error(tmp_path: Path) -> None:
    engine, path = ScriptedEngine(), tmp_path / "vllm.sock"
    began, release = trio.Event(), trio.Event()
    slow = [scripted.tell(began), scripted.wait(release), *scripted.whole_chat("ok").steps]
    engine.scripts.append(Script(slow))
    async with (
        on_socket(path, engine),
        gateway({"url": f"unix:{path}"}) as world,
        trio.open_nursery() as asking,
    ):
        asking.start_soon(world.ask, "m")  # has the kept connection
        await began.wait()
        path.unlink()
        response = await world.ask("m")
        release.set()

    assert response.status == 502
    assert response.json()["error"]["code"] == "upstream_connection_error"


async def test_who_starts_before_its_engines_socket_sees_it_when_it_is_there(
    tmp_path: Path,
) -> None:
    engine, path = ScriptedEngine(), tmp_path / "vllm.sock"
    async with gateway({"url": f"unix:{path}"}) as world:
        early = await world.ask("m")
        async with on_socket(path, engine):
            await world.service.watch.look_once(5)
            late = await world.ask("m")

    assert early.json()["error"]["code"] == "no_healthy_backend"
    assert answered(late, engine)


# --- names


@attrs.define(eq=False)
class Moving:
    """Two engines on the same port of two addresses, and a name that has some of them."""

    port: int
    first: ScriptedEngine
    second: ScriptedEngine
    known: list[str]

    def resolver(self) -> Resolver:
        async def lookup(_: str) -> list[str]:
            await trio.lowlevel.checkpoint()
            if not self.known:
                raise OSError("the name server is down")
            return [*self.known]

        return Resolver(ttl=0.1, lookup=lookup)


@asynccontextmanager
async def moving() -> AsyncIterator[Moving]:
    first, second = ScriptedEngine(), ScriptedEngine()
    async with trio.open_nursery() as nursery:
        port = await serve_tcp(first, nursery, "127.0.0.1")
        await nursery.start(partial(trio.serve_tcp, second.serve, port, host="127.0.0.2"))
        yield Moving(port, first, second, ["127.0.0.1"])
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("resolve", ["together", "each"])
async def test_when_a_name_moves_new_requests_follow_and_those_under_way_finish(
    resolve: str,
) -> None:
    async with moving() as engines:
        entry = {"url": f"http://engine:{engines.port}", "resolve": resolve}
        async with gateway(entry, resolver=engines.resolver()) as world:
            began, release = trio.Event(), trio.Event()
            slow = [scripted.tell(began), scripted.wait(release), *scripted.whole_chat("ok").steps]
            engines.first.scripts.append(Script(slow))
            answers: list[RawResponse] = []

            async def ask() -> None:
                answers.append(await world.ask("m"))

            async with trio.open_nursery() as asking:
                asking.start_soon(ask)
                await began.wait()
                for _ in range(5):  # one after the other, so over one connection
                    await world.ask("m")
                before = (len(engines.first.posts), len(engines.second.posts))
                engines.known[:] = ["127.0.0.2"]
                await trio.sleep(0.5)
                for _ in range(5):
                    await world.ask("m")
                after = (len(engines.first.posts), len(engines.second.posts))
                engines.known.clear()
                await trio.sleep(0.3)
                last = await world.ask("m")
                release.set()

    assert (before, after) == ((6, 0), (6, 5))
    assert last.status == 200
    assert [answer.status for answer in answers] == [200]


# --- IPv6


async def test_an_engine_on_ipv6_is_probed_and_asked(nursery: trio.Nursery) -> None:
    engine = ScriptedEngine()
    try:
        port = await serve_tcp(engine, nursery, "::1")
    except OSError:
        pytest.skip("no IPv6 here")
    async with gateway({"url": f"http://[::1]:{port}"}) as world:
        response = await world.ask("m")
    nursery.cancel_scope.cancel()

    assert answered(response, engine)
    assert response.header("x-citadel-backend") == f"http://[::1]:{port}"
    assert {e.headers["host"] for e in engine.ledger} == {f"[::1]:{port}"}


# --- TLS


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def ca_file(authority: trustme.CA, tmp_path: Path) -> str:
    path = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(path)
    return str(path)


@asynccontextmanager
async def behind_tls(engine: ScriptedEngine, certificate: trustme.LeafCert) -> AsyncIterator[int]:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols(["h2", "http/1.1"])
    certificate.configure_cert(context)

    async def serve(stream: trio.SocketStream) -> None:
        tls = trio.SSLStream(stream, context, server_side=True, https_compatible=True)
        try:
            await tls.do_handshake()
            assert tls.selected_alpn_protocol() == "http/1.1"
            await engine.serve(tls)
        except trio.BrokenResourceError:
            pass  # the client did not like us

    async with trio.open_nursery() as nursery:
        listeners: list[trio.SocketListener] = await nursery.start(
            partial(trio.serve_tcp, serve, 0, host="127.0.0.1")
        )
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def test_an_engine_behind_tls_is_probed_and_asked(
    authority: trustme.CA, ca_file: str
) -> None:
    engine = ScriptedEngine()
    async with behind_tls(engine, authority.issue_cert("engine.example")) as port:
        tls = {"ca_file": ca_file, "server_name": "engine.example"}
        async with gateway({"url": f"https://127.0.0.1:{port}", "tls": tls}) as world:
            response = await world.ask("m")

    assert answered(response, engine)


PAST = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
BAD: dict[str, Callable[[trustme.CA], trustme.LeafCert]] = {
    "expired": lambda ca: ca.issue_cert("127.0.0.1", not_after=PAST),
    "wrong name": lambda ca: ca.issue_cert("other.example"),
    "unknown authority": lambda _: trustme.CA().issue_cert("127.0.0.1"),
}


@pytest.mark.parametrize("fault", [*BAD])
async def test_a_bad_certificate_is_a_connection_error_and_nothing_is_sent(
    fault: str, authority: trustme.CA, ca_file: str
) -> None:
    engine = ScriptedEngine()
    async with behind_tls(engine, BAD[fault](authority)) as port:
        entry = {"url": f"https://127.0.0.1:{port}", "tls": {"ca_file": ca_file}}
        async with gateway(entry) as world:
            (upstream,) = world.service.balancer.upstreams
            complaint = upstream.endpoint.health.last_error or ""
            upstream.endpoint.health.observe(None, 0.0)  # whatever the probe says
            upstream.endpoint.eased()
            response = await world.ask("m")

    error = response.json()["error"]
    assert (response.status, error["code"]) == (502, "upstream_connection_error")
    assert "certificate verify failed" in complaint
    assert engine.ledger == []


async def test_a_reset_in_the_handshake_is_a_connection_error_and_never_plain_text(
    nursery: trio.Nursery,
) -> None:
    heard: list[bytes] = []

    async def reset(stream: trio.SocketStream) -> None:
        heard.append(bytes(await stream.receive_some()))
        await reset_stream(stream)

    listeners: list[trio.SocketListener] = await nursery.start(
        partial(trio.serve_tcp, reset, 0, host="127.0.0.1")
    )
    port = listeners[0].socket.getsockname()[1]
    async with gateway({"url": f"https://127.0.0.1:{port}"}) as world:
        (upstream,) = world.service.balancer.upstreams
        upstream.endpoint.health.observe(None, 0.0)
        upstream.endpoint.eased()
        response = await world.ask("m")
    nursery.cancel_scope.cancel()

    assert response.json()["error"]["code"] == "upstream_connection_error"
    assert all(said[:1] == b"\x16" for said in heard)  # a TLS handshake record


async def test_not_verifying_is_said_at_the_start(authority: trustme.CA) -> None:
    engine = ScriptedEngine()
    async with behind_tls(engine, authority.issue_cert("other.example")) as port:
        url = f"https://127.0.0.1:{port}"
        async with gateway({"url": url, "tls": {"insecure_skip_verify": True}}) as world:
            response = await world.ask("m")
            said = [line for line in world.log.lines if "not verified" in line["event"]]

    assert answered(response, engine)
    assert [line["endpoint"] for line in said] == [url]
