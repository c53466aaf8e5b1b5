"""``citadel-gateway demo``: four engines and the gateway, with nothing to set up."""

from __future__ import annotations

import click
import trio

from citadel_gateway.app.server import CannotListen
from citadel_gateway.cli.common import EXIT_UNAVAILABLE, leave, load_or_exit
from citadel_gateway.config.flat import UnifiedAPIGatewayConfig, as_schema
from citadel_gateway.demo.run import EngineFailed, run_demo


@click.command()
@click.option("--llm", is_flag=True, help="Real engines (llama.cpp) instead of simulated ones.")
@click.option("--config", "-c", "config_path", metavar="FILE", help="Default: the demo's own.")
@click.option("--port", default=8000, show_default=True, help="Of the gateway, without --config.")
@click.option(
    "--prometheus-port", default=9090, show_default=True, help="Of the metrics, without --config."
)
def demo(llm: bool, config_path: str | None, port: int, prometheus_port: int) -> None:
    """Run four engines on ports 11400 to 11403 and the gateway in front of them."""
    if config_path is not None:
        config = load_or_exit(config_path)
    else:
        config = as_schema(
            UnifiedAPIGatewayConfig(
                host="127.0.0.1", port=port, prometheus_port=prometheus_port, workers=1
            )
        )
    try:
        trio.run(run_demo, config, llm)
    except* (CannotListen, EngineFailed) as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        leave(str(error), EXIT_UNAVAILABLE)
