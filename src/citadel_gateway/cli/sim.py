"""``citadel-gateway sim``: one simulated engine."""

from __future__ import annotations

import click
import trio

from citadel_gateway.cli.common import PORT, run_until_stopped
from citadel_gateway.demo.engines import engine_server
from citadel_gateway.io.listening import Address
from citadel_gateway.sim import PROFILES, profile_for


@click.command()
@click.option("--model", default="mixtral-8x7b", show_default=True, help="The model it plays.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=PORT, default=11400, show_default=True)
@click.option("--seed", default=0, show_default=True, help="Of its random choices.")
def sim(model: str, host: str, port: int, seed: int) -> None:
    """Run a simulated engine: OpenAI-compatible, honest about being simulated.

    Faults are put in with PUT /sim/faults; its ledger is at GET /sim/ledger.
    """

    async def run() -> None:
        server = engine_server(profile_for(model), Address(host, port), seed=seed)
        async with trio.open_nursery() as nursery:
            address = await nursery.start(server.run)
            known = "" if model in PROFILES else " (an unknown model: middling speed)"
            click.echo(f"simulated {model}{known} listens on http://{address}; Ctrl-C ends it")

    run_until_stopped(run)
