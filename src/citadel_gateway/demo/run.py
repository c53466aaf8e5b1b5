"""The demo: engines, gateway, a table of what runs, and a line to try."""

from __future__ import annotations

from functools import partial

import trio
from rich.console import Console
from rich.table import Table

from citadel_gateway.app.service import UnifiedAPIGatewayService
from citadel_gateway.config.schema import GatewayConfigSchema
from citadel_gateway.demo.engines import engine_server, run_llama
from citadel_gateway.io.listening import Address
from citadel_gateway.io.target import split_url
from citadel_gateway.sim import profile_for


async def run_demo(config: GatewayConfigSchema, llm: bool) -> None:
    """Run an engine for every endpoint of *config*, and the gateway, until SIGINT or SIGTERM.

    Raises ``CannotListen`` or ``EngineFailed``.
    """
    async with trio.open_nursery() as engines:
        async with trio.open_nursery() as starting:
            for seed, (model, address) in enumerate(_endpoints(config)):
                if llm:
                    starting.start_soon(engines.start, partial(run_llama, model, address))
                else:
                    server = engine_server(profile_for(model), address, seed=seed)
                    starting.start_soon(engines.start, server.run)
        service = UnifiedAPIGatewayService(config)
        async with trio.open_nursery() as gateway:
            address = await gateway.start(service.run)
            _show(config, address, "llama.cpp, SmolLM2-135M" if llm else "simulated")
        engines.cancel_scope.cancel()


def _endpoints(config: GatewayConfigSchema) -> list[tuple[str, Address]]:
    found = []
    for name, model in config.models.items():
        for endpoint in model.all_endpoints():
            origin, _ = split_url(endpoint.url)
            found.append((str(name), Address(origin.host, origin.port)))
    return found


def _show(config: GatewayConfigSchema, address: Address, engine: str) -> None:
    console = Console()
    table = Table(title="Citadel Gateway, demo")
    for heading in ("what", "where", "engine"):
        table.add_column(heading)
    for model, each in _endpoints(config):
        table.add_row(model, f"http://{each}", engine)
    monitoring = config.monitoring
    table.add_row("[bold]gateway[/]", f"http://{address}", "try /docs in a browser")
    if monitoring.prometheus_port is not None:
        metrics = f"http://{monitoring.prometheus_host}:{monitoring.prometheus_port}"
        table.add_row("metrics", metrics + monitoring.metrics_endpoint, "")
    console.print(table)
    console.print("Try:\n", highlight=False)
    body = '{"messages": [{"role": "user", "content": "Say hello"}], "max_tokens": 30}'
    print(  # noqa: T201  # as it is, to be copied: the console would wrap it
        f"  curl http://{address}/v1/chat/completions -H 'Content-Type: application/json' \\\n"
        f"    -d '{body}'\n\nCtrl-C ends everything.",
        flush=True,
    )
