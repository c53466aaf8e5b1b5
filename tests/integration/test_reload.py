"""A gateway of its own process is told to read its configuration again, or to make way."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
import trustme
from cryptography import x509

from tests.restarts.load import CHAT
from tests.restarts.program import Scene, end, port_of, scene
from tests.support import scripted_engine as engines
from tests.support.ledger import Metrics, parse_metrics, total
from tests.support.raw_client import NoResponseError, RawClient, RawResponse, http_request
from tests.support.scripted_engine import MODEL, Script

ASK = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
PATIENCE = 30.0


@attrs.define(eq=False)
class Running:
    here: Scene
    process: trio.Process
    port: int

    async def ask(self) -> int:
        return (await self.get("POST", CHAT, ASK)).status

    async def get(self, method: str, path: str, body: object = None) -> RawResponse:
        async with await RawClient.connect(self.port) as client:
            return await client.request(method, path, body)

    async def configuration(self) -> dict[str, Any]:
        found: dict[str, Any] = (await self.get("GET", "/models/status")).json()["configuration"]
        return found

    async def metrics(self) -> Metrics:
        return parse_metrics((await self.get("GET", "/metrics")).body.decode())

    async def tell(self, number: signal.Signals, awaited: str) -> list[dict[str, Any]]:
        """Send a signal and wait for an *awaited* log line; all lines from then on."""
        start = len(self.here.log.lines)
        self.process.send_signal(number)
        await self.here.log.wait_for(awaited, start)
        return self.here.log.lines[start:]


@asynccontextmanager
async def running(
    path: Path, env: dict[str, str] | None = None, **service: Any
) -> AsyncIterator[Running]:
    with trio.fail_after(PATIENCE):
        async with scene(path) as here:
            here.write(**service)
            process = await here.start(env=env)
            try:
                port = port_of(await here.log.wait_for("listening"))
                yield Running(here, process, port)
            finally:
                await end(process)


async def test_a_bad_file_changes_nothing_and_every_problem_is_said(tmp_path: Path) -> None:
    async with running(tmp_path) as gateway:
        gateway.here.put("models: {}\nservice: {prot: 1}\nload_balancer: {queue_size: -1}\n")
        lines = await gateway.tell(signal.SIGHUP, "the configuration is not taken")
        await trio.sleep(0.2)
        lines = [line for line in gateway.here.log.lines if "problem" in line]
        served, report = await gateway.ask(), await gateway.configuration()
        metrics = await gateway.metrics()
        gateway.here.write(1)
        await gateway.tell(signal.SIGHUP, "configuration")
        after = await gateway.configuration()

    problems = [line["problem"] for line in lines]
    assert len(problems) == 3
    assert all(any(name in p for p in problems) for name in ("models", "prot", "queue_size"))
    assert (served, report["generation"], after["generation"]) == (200, 1, 2)
    assert report["refused"]["problems"] == problems
    assert after["refused"] is None
    assert after["sha256"] not in {None, report["sha256"]}
    assert total(metrics, "citadel_gateway_config_refused") == 1
    assert total(metrics, "citadel_gateway_config_reloads_total", result="refused") == 1


@pytest.mark.parametrize("way", ["renamed", "in place"])
async def test_a_change_of_the_file_is_enough(tmp_path: Path, way: str) -> None:
    async with running(tmp_path) as gateway:
        start = len(gateway.here.log.lines)
        gateway.here.write(1)
        if way == "in place":
            text = gateway.here.file.read_text()
            gateway.here.file.write_text(text + "\n")
        line = await gateway.here.log.wait_for("configuration", start)
        assert await gateway.ask() == 200

    assert (line["generation"], len(line["removed"])) == (2, 1)


async def test_a_change_is_let_be_where_that_is_wanted(tmp_path: Path) -> None:
    async with running(tmp_path, reload_on_change=False) as gateway:
        gateway.here.write(1, reload_on_change=False)
        await trio.sleep(3)
        before = (await gateway.configuration())["generation"]
        await gateway.tell(signal.SIGHUP, "configuration")

        assert (before, (await gateway.configuration())["generation"]) == (1, 2)


async def test_the_service_manager_follows_a_reload(tmp_path: Path) -> None:
    address = tmp_path / "notify"
    with trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        await manager.bind(str(address))
        async with running(tmp_path, {"NOTIFY_SOCKET": str(address)}) as gateway:
            heard = [await manager.recv(1000)]
            await gateway.tell(signal.SIGHUP, "configuration")
            heard += [await manager.recv(1000), await manager.recv(1000)]
            gateway.here.put("nonsense")
            await gateway.tell(signal.SIGHUP, "the configuration is not taken")
            heard += [await manager.recv(1000), await manager.recv(1000)]

    words = [message.partition(b"\nMONOTONIC_USEC=")[0] for message in heard]
    assert words == [b"READY=1", b"RELOADING=1", b"READY=1", b"RELOADING=1", b"READY=1"]
    assert int(heard[1].partition(b"MONOTONIC_USEC=")[2]) > 0


async def test_new_connections_get_the_new_certificate(tmp_path: Path) -> None:
    authority = trustme.CA()
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"

    def issue() -> int:
        issued = authority.issue_cert("localhost")
        issued.cert_chain_pems[0].write_to_path(cert)
        issued.private_key_pem.write_to_path(key)
        return x509.load_pem_x509_certificate(cert.read_bytes()).serial_number

    async def shown(port: int) -> int:
        stream = await trio.open_ssl_over_tcp_stream("localhost", port, ssl_context=trusting)
        async with RawClient(stream) as client:
            assert (await client.request("POST", CHAT, ASK)).status == 200
            return int(stream.getpeercert()["serialNumber"], 16)

    serials = [issue()]
    tls: dict[str, Any] = {"tls_certfile": str(cert), "tls_keyfile": str(key)}
    async with running(tmp_path, **tls) as gateway:
        seen = [await shown(gateway.port)]
        serials.append(issue())
        start = len(gateway.here.log.lines)
        await gateway.here.log.wait_for("configuration", start)  # the file's change is enough
        seen.append(await shown(gateway.port))
        cert.write_text("nonsense")
        lines = await gateway.tell(signal.SIGHUP, "the configuration is not taken")
        seen.append(await shown(gateway.port))

    assert seen == [*serials, serials[1]]
    assert any("service.tls_certfile" in line.get("problem", "") for line in lines)


async def test_a_successor_that_cannot_start_changes_nothing(tmp_path: Path) -> None:
    async with running(tmp_path, reload_on_change=False) as gateway:
        gateway.here.put("nonsense")
        failed = "the successor failed; serving on without it"
        lines = await gateway.tell(signal.SIGUSR2, failed)
        served = await gateway.ask()
        gateway.here.write()
        (told,) = [line for line in lines if line["event"] == failed]
        lines = await gateway.tell(signal.SIGUSR2, "handed over")
        pid = next(line["pid"] for line in lines if line["event"] == "handed over")
        try:
            assert await gateway.process.wait() == 0
            again = await gateway.ask()
        finally:
            os.kill(pid, signal.SIGTERM)

    assert "ended with status 78 before it was ready" in told["error"]
    assert (served, again) == (200, 200)


async def test_the_service_manager_learns_of_the_successor(tmp_path: Path) -> None:
    address = tmp_path / "notify"
    with trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        await manager.bind(str(address))
        async with running(tmp_path, {"NOTIFY_SOCKET": str(address)}) as gateway:
            heard = [await manager.recv(1000)]
            lines = await gateway.tell(signal.SIGUSR2, "handed over")
            pid = next(line["pid"] for line in lines if line["event"] == "handed over")
            await gateway.process.wait()
            heard += [await manager.recv(1000), await manager.recv(1000)]
            os.kill(pid, signal.SIGTERM)
            heard.append(await manager.recv(1000))

    # Its own words come before it counts as the main process, and those of a process that does
    # not are passed over.
    assert heard == [b"READY=1", b"READY=1", b"MAINPID=%d\nWATCHDOG=1" % pid, b"STOPPING=1"]


async def test_the_watchdog_is_fed_by_the_process_that_is_the_service(tmp_path: Path) -> None:
    address = tmp_path / "notify"
    heard: list[tuple[int, bytes]] = []
    env = {"NOTIFY_SOCKET": str(address), "WATCHDOG_USEC": "400000"}
    with trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        await manager.bind(str(address))

        async def listen() -> None:
            while True:
                said, credentials, *_ = await manager.recvmsg(1000, socket.CMSG_SPACE(12))
                heard.append((struct.unpack("3i", credentials[0][2])[0], said))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen)
            async with running(tmp_path, env) as gateway, working(gateway):
                pid = await hand_over(gateway)
                await trio.sleep(1.5)
                os.kill(pid, signal.SIGTERM)
            nursery.cancel_scope.cancel()

    first = gateway.process.pid
    at = heard.index((first, b"MAINPID=%d\nWATCHDOG=1" % pid))
    assert (first, b"WATCHDOG=1") in heard[:at]
    assert {who for who, _ in heard[at + 1 :]} == {pid}  # although the first has a request still
    assert heard[at + 1 :].count((pid, b"WATCHDOG=1")) > 4


async def test_a_successor_that_is_stopped_does_not_leave_its_predecessor_behind(
    tmp_path: Path,
) -> None:
    """A manager would kill it, with all that it has not finished yet."""
    async with running(tmp_path) as gateway:
        async with working(gateway):
            ending, start = os.pidfd_open(await hand_over(gateway)), len(gateway.here.log.lines)
            signal.pidfd_send_signal(ending, signal.SIGTERM)
            await gateway.here.log.wait_for("stopped", start)
            with trio.move_on_after(0.5) as waiting:
                await trio.lowlevel.wait_readable(ending)
        assert await gateway.process.wait() == 0
        await trio.lowlevel.wait_readable(ending)
        os.close(ending)

    assert waiting.cancelled_caught


@asynccontextmanager
async def working(gateway: Running) -> AsyncIterator[None]:
    """While the gateway has a request, which is answered in the end."""
    begun, let_go = trio.Event(), trio.Event()
    answers: list[int] = []
    for engine in gateway.here.engines:
        steps = [engines.tell(begun), engines.wait(let_go), *engines.whole_chat("x").steps]
        engine.default = Script(steps)

    async def ask() -> None:
        answers.append(await gateway.ask())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await begun.wait()
        yield
        let_go.set()
    assert answers == [200]


async def hand_over(gateway: Running) -> int:
    """Returns the successor's number."""
    lines = await gateway.tell(signal.SIGUSR2, "handed over")
    pid: int = next(line["pid"] for line in lines if line["event"] == "handed over")
    return pid


async def test_sigterm_during_a_hand_over_ends_both(tmp_path: Path) -> None:
    async with running(tmp_path) as gateway:
        await gateway.tell(signal.SIGUSR2, "starting a successor")
        gateway.process.terminate()

        assert await gateway.process.wait() == 0
        with suppress(OSError, NoResponseError, trio.BrokenResourceError):
            while True:  # until nobody listens any more; the test has an end in any case
                await gateway.get("GET", "/livez")
                await trio.sleep(0.1)


async def test_no_fresh_connection_is_reset_at_the_end(tmp_path: Path) -> None:
    """Whoever could connect is answered; later ones are refused."""
    failures: list[str] = []
    answered = 0

    async def keep_asking(port: int) -> None:
        nonlocal answered
        while True:
            try:
                client = await RawClient.connect(port)
            except OSError:
                return
            async with client:
                try:
                    await client.send(http_request("POST", CHAT, ASK))
                    response = await client.read_response("POST")
                except (NoResponseError, trio.BrokenResourceError) as exc:
                    failures.append(repr(exc))
                    continue
            if (response.status, response.complete) != (200, True):
                failures.append(f"status {response.status}")
            answered += 1

    async with running(tmp_path) as gateway, trio.open_nursery() as nursery:
        for _ in range(40):
            nursery.start_soon(keep_asking, gateway.port)
        await trio.sleep(1)
        gateway.process.terminate()

    assert failures == []
    assert answered > 40
