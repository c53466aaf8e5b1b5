"""Several processes on one address are one gateway, whatever happens to any of them."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from bench.processes import tree

from tests.restarts.load import CHAT
from tests.restarts.program import Scene, end, port_of, scene
from tests.support.ledger import Metrics, parse_metrics, total
from tests.support.raw_client import NoResponseError, RawClient, RawResponse, http_request
from tests.support.scripted_engine import (
    MODEL,
    LedgerEntry,
    Script,
    ScriptedEngine,
    answered,
    serve_tcp,
    sleep,
    status,
    stream_chat,
    whole_chat,
)
from tests.support.several import Load

ASK = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
PATIENCE = 60.0
WORDS = [f"w{n} " for n in range(40)]


def slowly(entry: LedgerEntry) -> Script:
    """Streams take two seconds."""
    if not entry.json.get("stream"):
        return whole_chat("ok")
    steps = []
    for step in stream_chat(WORDS).steps:
        steps += [step, sleep(0.05)]
    return Script(steps)


@attrs.define(eq=False)
class Workers:
    """A gateway of several processes.

    :param seen: process numbers of all workers that there ever were, as far as we looked.
    """

    here: Scene
    process: trio.Process
    port: int
    seen: set[int] = attrs.field(factory=set)

    async def get(self, path: str, method: str = "GET", body: object = None) -> RawResponse:
        async with await RawClient.connect(self.port) as client:
            return await client.request(method, path, body)

    async def report(self) -> dict[str, Any]:
        found: dict[str, Any] = (await self.get("/models/status")).json()
        self.seen |= {worker["pid"] for worker in found["workers"]}
        return found

    async def until_ready(self, workers: int) -> None:
        while (await self.get("/health")).json()["workers"]["ready"] != workers:  # noqa: ASYNC110
            await trio.sleep(0.05)

    @property
    def working(self) -> int:
        """Requests that the engines have."""
        return sum(engine.in_flight for engine in self.here.engines)

    async def metrics(self) -> Metrics:
        return parse_metrics((await self.get("/metrics")).body.decode())

    async def stream(self, outcomes: Counter[str]) -> None:
        """Whether a stream comes whole, or is cut."""
        try:
            async with await RawClient.connect(self.port) as client:
                await client.send(http_request("POST", CHAT, {**ASK, "stream": True}))
                response = await client.read_response("POST")
        except (NoResponseError, trio.BrokenResourceError):
            outcomes["cut"] += 1
            return
        whole = response.complete and response.body.endswith(b"data: [DONE]\n\n")
        outcomes["whole" if whole else "cut"] += 1

    async def tell(self, number: signal.Signals, *awaited: str) -> None:
        start = len(self.here.log.lines)
        self.process.send_signal(number)
        for event in awaited:
            await self.here.log.wait_for(event, start)

    def events(self, name: str) -> list[dict[str, Any]]:
        return [line for line in self.here.log.lines if line.get("event") == name]


@asynccontextmanager
async def serving(
    path: Path,
    workers: int,
    *,
    listener: socket.socket | None = None,
    env: dict[str, str] | None = None,
    sections: dict[str, Any] | None = None,
    **service: Any,
) -> AsyncIterator[Workers]:
    """All workers serve; afterwards none is left."""
    with trio.fail_after(PATIENCE):
        async with scene(path) as here:
            for engine in here.engines:
                engine.default = slowly
            here.write(workers=workers, **service)
            if sections:
                here.put(json.dumps({**json.loads(here.file.read_text()), **sections}))
            process = await here.start(listener, env=env)
            gateway = Workers(here, process, 0)
            try:
                gateway.port = port_of(await here.log.wait_for("listening"))
                await here.log.wait_for("all workers serve")
                await gateway.report()
                yield gateway
            finally:
                await end(process)
            await wait_until_gone(gateway.seen)


async def wait_until_gone(pids: set[int]) -> None:
    """Nobody is left behind; a zombie is gone, too."""
    await until(lambda: not any(map(_lives, pids)))


async def until(holds: Callable[[], bool]) -> None:
    """Nothing tells us of what other processes do."""
    while not holds():  # noqa: ASYNC110
        await trio.sleep(0.02)


def _lives(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def failed(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if line.get("level") == "error"]


async def test_a_killed_worker_costs_its_own_connections_and_no_count(tmp_path: Path) -> None:
    outcomes: Counter[str] = Counter()
    async with serving(tmp_path, 4) as gateway:
        for _ in range(12):
            assert (await gateway.get(CHAT, "POST", ASK)).status == 200
        before = await gateway.metrics()
        async with trio.open_nursery() as clients:
            for _ in range(8):
                clients.start_soon(gateway.stream, outcomes)
            await until(lambda: gateway.working == 8)
            report = await gateway.report()
            victim = max(report["workers"], key=lambda worker: int(worker["in_flight"]))
            os.kill(victim["pid"], signal.SIGKILL)
            await gateway.here.log.wait_for("a worker died")
            between = await gateway.metrics()
        await gateway.until_ready(4)
        report = await gateway.report()
        after = await gateway.metrics()

    assert [w["in_flight"] for w in report["workers"]] == [0, 0, 0, 0]
    assert outcomes == {"cut": victim["in_flight"], "whole": 8 - victim["in_flight"]}
    assert 1 <= victim["in_flight"] <= 4
    assert {w["replaced"] for w in report["workers"] if w["worker"] == victim["worker"]} == {1}
    assert victim["pid"] not in {w["pid"] for w in report["workers"]}
    for earlier, later in ((before, between), (between, after)):
        fallen = {
            key
            for key, value in earlier.items()
            if key[0].endswith(("_total", "_count", "_bucket", "_sum")) and later[key] < value
        }
        assert not fallen
    counted = total(after, "citadel_gateway_requests_total", outcome="ok")
    assert counted == 12 + outcomes["whole"]
    assert total(after, "citadel_gateway_worker_deaths_total") == 1
    assert total(after, "citadel_gateway_workers_ready") == 4
    assert total(after, "citadel_gateway_in_flight_requests") == 0


async def test_connections_are_spread_evenly(tmp_path: Path) -> None:
    async with serving(tmp_path, 2) as gateway:
        kept = []
        for _ in range(10):
            kept.append(await RawClient.connect(gateway.port))
            assert (await kept[-1].request("GET", "/livez")).status == 200
        await trio.sleep(0.7)
        report = json.loads((await kept[0].request("GET", "/models/status")).body)
        for client in kept:
            await client.aclose()

    # The first to come is seldom left waiting for the other one on a busy machine.
    assert sum(worker["connections"] for worker in report["workers"]) == 10
    assert min(worker["connections"] for worker in report["workers"]) >= 3
    assert report["limits"]["max_concurrent_requests"] == 100
    assert {e["max_concurrent"] for e in report["models"][MODEL]["endpoints"]} == {50}


async def test_rates_and_caps_are_those_of_all_workers_together(tmp_path: Path) -> None:
    rate, burst, cap, peak = 60, 20, 3, 0
    limits = {
        "rate_limiting_enabled": True, "rate_limit_rps": rate, "rate_limit_burst": burst,
        "max_concurrent_requests": cap,
    }  # fmt: skip
    # Of the machine that this runs on little is promised.
    sections = {"performance": limits, "store": {"timeout": 0.5}}
    async with serving(tmp_path, 4, sections=sections) as workers:

        def watched(entry: LedgerEntry) -> Script:
            nonlocal peak
            peak = max(peak, workers.working)
            # Its work is done before its answer can be read, and the next request be sent.
            return Script([sleep(0.01), answered(), *whole_chat("ok").steps])

        for engine in workers.here.engines:
            engine.default = watched
        load = Load(clients=8)
        await load.run([workers], 2.0)
        status = await workers.report()

    assert set(load.statuses) == {200, 429}
    assert load.statuses[200] <= burst + rate * (load.last - load.first) + 1
    assert load.statuses[200] >= 0.9 * (burst + rate * (load.last - load.first)) - 1
    assert 1 < peak <= cap
    assert (status["limits"]["max_concurrent_requests"], status["limits"]["rate_limit_rps"]) == (
        cap, rate,
    )  # fmt: skip


async def test_all_drain_together_and_streams_end_whole(tmp_path: Path) -> None:
    outcomes: Counter[str] = Counter()
    async with serving(tmp_path, 2) as gateway, trio.open_nursery() as clients:
        for _ in range(6):
            clients.start_soon(gateway.stream, outcomes)
        await until(lambda: gateway.working == 6)
        gateway.process.terminate()
        assert await gateway.process.wait() == 0
        with pytest.raises(OSError, match="connect"):
            await RawClient.connect(gateway.port)

    assert outcomes == {"whole": 6}
    assert failed(gateway.here.log.lines) == []
    assert len(gateway.events("stopped")) == 2


async def test_workers_whose_supervisor_is_killed_drain_and_end(tmp_path: Path) -> None:
    outcomes: Counter[str] = Counter()
    async with serving(tmp_path, 2) as gateway, trio.open_nursery() as clients:
        for _ in range(4):
            clients.start_soon(gateway.stream, outcomes)
        await until(lambda: gateway.working == 4)
        gateway.process.kill()

    assert outcomes == {"whole": 4}
    assert len(gateway.events("stopped")) == 2


async def test_all_take_a_good_file_and_none_a_bad_one(tmp_path: Path) -> None:
    async with serving(tmp_path, 2) as gateway:
        gateway.here.put("models: {}\nservice: {prot: 1}\n")
        await gateway.tell(signal.SIGHUP, "the configuration is not taken")
        await trio.sleep(0.2)
        bad = [(await gateway.report())["configuration"] for _ in range(4)]
        gateway.here.write(2, workers=2)
        start = len(gateway.here.log.lines)
        await gateway.tell(signal.SIGHUP)
        await until(lambda: len({e["worker"] for e in gateway.events("configuration")}) == 2)
        reports = [await gateway.report() for _ in range(4)]
        lines = gateway.here.log.lines[start:]
        metrics = await gateway.metrics()

    assert {found["generation"] for found in bad} == {1}
    assert {len(found["refused"]["problems"]) for found in bad} == {2}
    assert {found["configuration"]["generation"] for found in reports} == {2}
    assert {found["configuration"]["refused"] for found in reports} == {None}
    assert failed(lines) == []
    assert total(metrics, "citadel_gateway_config_reloads_total", result="taken") == 1
    assert total(metrics, "citadel_gateway_config_reloads_total", result="refused") == 1
    assert total(metrics, "citadel_gateway_config_generation") == 2


async def test_orders_reach_all_workers_and_those_that_come_later(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    monitoring = {"prometheus_port": port, "access_log": False}
    async with serving(tmp_path, 2, sections={"monitoring": monitoring}) as gateway:
        url = f"http://127.0.0.1:{gateway.here.ports[0]}"
        async with await RawClient.connect(port) as operator:
            told, unknown = [
                await operator.request(
                    "POST", "/admin/endpoints/cordon", {"endpoint": each}, [("host", "localhost")]
                )
                for each in (url, "http://127.0.0.1:1")
            ]
            page = (await operator.request("GET", "/metrics")).body.decode()
        for _ in range(20):
            assert (await gateway.get(CHAT, "POST", ASK)).status == 200
        asked = [len(engine.posts) for engine in gateway.here.engines]
        start = len(gateway.here.log.lines)
        os.kill((await gateway.report())["workers"][0]["pid"], signal.SIGKILL)
        await gateway.here.log.wait_for("listening", start)
        await gateway.until_ready(2)
        for _ in range(20):
            assert (await gateway.get(CHAT, "POST", ASK)).status == 200
        later = [len(engine.posts) for engine in gateway.here.engines]

    assert (told.status, unknown.status) == (200, 404)
    assert [each["cordoned"] for each in told.json()["endpoints"]] == [True]
    assert total(parse_metrics(page), "citadel_gateway_endpoint_cordoned", endpoint=url) == 1
    assert (asked, later) == ([0, 20], [0, 40])


async def test_endpoints_that_are_added_reach_all_workers_and_those_that_come_later(
    tmp_path: Path,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    monitoring = {"prometheus_port": port, "access_log": False}
    async with serving(tmp_path, 2, sections={"monitoring": monitoring}) as gateway:
        urls = [f"http://127.0.0.1:{each}" for each in gateway.here.ports]

        async def order(what: str, **fields: Any) -> RawResponse:
            async with await RawClient.connect(port) as operator:
                path = f"/admin/endpoints/{what}"
                return await operator.request("POST", path, fields, [("host", "localhost")])

        async def listed() -> list[int]:
            report = (await gateway.get("/models/status")).json()["models"]
            return [len(model["endpoints"]) for model in report.values()]

        name = next(iter((await gateway.get("/models/status")).json()["models"]))
        alias = urls[0].replace("127.0.0.1", "localhost")
        before = await listed()
        added = await order("add", endpoint=alias, model=name, weight=2)
        bad = await order("add", endpoint=alias, model=name, weight=-2)
        start = len(gateway.here.log.lines)
        os.kill((await gateway.report())["workers"][0]["pid"], signal.SIGKILL)
        await gateway.here.log.wait_for("listening", start)
        await gateway.until_ready(2)
        later = [await listed() for _ in range(4)]
        await gateway.tell(signal.SIGUSR2, "all workers have been replaced")
        rolled = [await listed() for _ in range(4)]
        removed = await order("remove", endpoint=alias)
        after = [await listed() for _ in range(4)]

    more = [before[0] + 1, *before[1:]]
    assert (added.status, bad.status, bad.json()["error"]["param"]) == (200, 400, "weight")
    assert [each["endpoint"] for each in added.json()["endpoints"]] == [alias]
    assert later == rolled == [more] * 4
    assert removed.json()["drained"]
    assert after == [before] * 4


async def test_the_models_of_a_backend_come_and_go_at_all_workers(tmp_path: Path) -> None:
    backend = ScriptedEngine(default=whole_chat("ok"))

    def lists(*names: str) -> None:
        listed = {"object": "list", "data": [{"id": name, "object": "model"} for name in names]}
        backend.routes["GET", "/v1/models"] = status(200, json.dumps(listed).encode())

    async with trio.open_nursery() as nursery:
        lists("one")
        url = f"http://127.0.0.1:{await serve_tcp(backend, nursery)}"
        sections = {"backends": [{"url": url}], "load_balancer": {"models_interval": 1}}
        async with serving(tmp_path, 2, sections=sections) as gateway:

            async def answers(name: str) -> set[int]:
                """Of a dozen connections, which the workers share."""
                asked = [await gateway.get(CHAT, "POST", {**ASK, "model": name}) for _ in range(12)]
                return {answer.status for answer in asked}

            async def until_all_say(code: int, name: str) -> None:
                while await answers(name) != {code}:  # noqa: ASYNC110
                    await trio.sleep(0.1)

            at_first = await answers("one"), await answers("two")
            lists("two")
            await until_all_say(404, "one")
            await until_all_say(200, "two")
            listed = [(await gateway.get("/v1/models")).json()["data"] for _ in range(6)]
        nursery.cancel_scope.cancel()

    assert at_first == ({200}, {404})
    assert all("two" in {model["id"] for model in each} for each in listed)


async def test_the_service_manager_hears_of_one_gateway(tmp_path: Path) -> None:
    address = tmp_path / "notify"
    with trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        await manager.bind(str(address))
        env = {"NOTIFY_SOCKET": str(address), "WATCHDOG_USEC": "400000"}
        async with serving(tmp_path, 2, env=env) as gateway:
            await gateway.tell(signal.SIGHUP, "configuration")
            await trio.sleep(0.5)
            gateway.process.terminate()
            await gateway.process.wait()
        heard = []
        with trio.move_on_after(0.1):
            while True:
                heard.append((await manager.recv(1000)).decode().partition("\n")[0])

    status = "STATUS=2 of 2 workers serve"
    assert [word for word in heard if word != "WATCHDOG=1"] == [
        "READY=1", status, "RELOADING=1", "READY=1", status, "STOPPING=1"
    ]  # fmt: skip
    assert heard.count("WATCHDOG=1") >= 2


async def test_sockets_of_the_service_manager_stay(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with serving(tmp_path, 2, listener=listener) as gateway:
            assert gateway.port == listener.getsockname()[1]
            assert (await gateway.get(CHAT, "POST", ASK)).status == 200
            gateway.process.terminate()
            assert await gateway.process.wait() == 0
            waits = await RawClient.connect(gateway.port)
            await waits.aclose()


@pytest.mark.parametrize(
    ("what", "code", "lines"),
    [("bad file", 78, 2), ("port taken", 69, 1), ("bad certificate", 69, 2)],
)
async def test_what_no_worker_could_do_ends_the_start(
    tmp_path: Path, what: str, code: int, lines: int
) -> None:
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("nonsense")
    with socket.create_server(("127.0.0.1", 0)) as taken, trio.fail_after(PATIENCE):
        async with scene(tmp_path) as here:
            match what:
                case "bad file":
                    here.write(workers=0)
                case "port taken":
                    here.write(workers=2, port=taken.getsockname()[1])
                case _:
                    files: dict[str, Any] = {
                        "tls_certfile": str(nonsense),
                        "tls_keyfile": str(nonsense),
                    }
                    here.write(workers=2, **files)
            process = await here.start()
            ended = await process.wait()
            await trio.sleep(0.1)
            said = [line["text"] for line in here.log.lines if "text" in line]

    assert ended == code
    assert (
        len([text for text in said if "worker" not in text or code == 78]) == {69: 1, 78: 2}[code]
    )


async def test_one_worker_has_no_supervisor(tmp_path: Path) -> None:
    with trio.fail_after(PATIENCE):
        async with scene(tmp_path) as here:
            here.write(workers=1)
            process = await here.start()
            try:
                port = port_of(await here.log.wait_for("listening"))
                children = tree(process.pid)
                async with await RawClient.connect(port) as client:
                    report = (await client.request("GET", "/models/status")).json()
            finally:
                with suppress(ProcessLookupError):
                    await end(process)

    assert children == [process.pid]
    assert "workers" not in report
