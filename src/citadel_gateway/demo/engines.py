"""The demo's engines: simulated ones in this process, or llama.cpp in processes of its own."""

from __future__ import annotations

import sys
import time

import httpx
import trio

from citadel_gateway.app.server import Server
from citadel_gateway.config.schema import ServiceConfig
from citadel_gateway.config.values import Seconds
from citadel_gateway.demo import EngineFailed
from citadel_gateway.io.listening import Address
from citadel_gateway.io.transport import make_probe_client
from citadel_gateway.sim import AbortConnection, EngineProfile, create_engine_app

_READY_WITHIN = 60.0


def engine_server(profile: EngineProfile, address: Address, *, seed: int) -> Server:
    """A simulated engine, ready to be run.  Like uvicorn, it closes idle connections after 5 s."""
    app = create_engine_app(profile, seed=seed, wall=time.time)
    service = ServiceConfig(keep_alive_timeout=Seconds(5.0))
    return Server(app, address, service, _report_unless_meant)


def _report_unless_meant(where: str, exc: Exception) -> None:
    if not isinstance(exc, AbortConnection):
        sys.stderr.write(f"simulated engine: {where}: {exc!r}\n")


async def run_llama(
    model: str,
    address: Address,
    *,
    task_status: trio.TaskStatus[Address] = trio.TASK_STATUS_IGNORED,
) -> None:
    """A real engine called *model* in a process of its own; reports started once it is healthy.

    Cancelling ends the process.  Raises :class:`EngineFailed`.
    """
    command = [
        sys.executable, "-m", "citadel_gateway.demo.llama_server",
        "--alias", model, "--host", address.host, "--port", str(address.port),
    ]  # fmt: skip
    async with trio.open_nursery() as nursery:
        # In a session of its own, so that Ctrl-C reaches the gateway alone, which then drains.
        nursery.start_soon(_run_process, model, command)
        await _wait_until_healthy(model, address)
        task_status.started(address)


async def _run_process(model: str, command: list[str]) -> None:
    process = await trio.run_process(
        command, check=False, start_new_session=True, stdout=sys.stderr.fileno()
    )
    raise EngineFailed(f"the engine for {model} ended with code {process.returncode}")


async def _wait_until_healthy(model: str, address: Address) -> None:
    with trio.move_on_after(_READY_WITHIN):
        async with make_probe_client() as client:
            while not await _is_healthy(client, f"http://{address}/health"):  # noqa: ASYNC110
                await trio.sleep(0.1)  # another process: there is no event to wait for
        return
    raise EngineFailed(f"the engine for {model} was not ready within {_READY_WITHIN:g} s")


async def _is_healthy(client: httpx.AsyncClient, url: str) -> bool:
    try:
        return (await client.get(url)).status_code == 200
    except httpx.TransportError:
        return False
