"""``citadel-gateway demo``: four engines and the gateway, with nothing to set up."""

from __future__ import annotations

from functools import partial

import click

from citadel_gateway.cli.common import EXIT_CONFIG, PORT, leave, load_or_exit, run_until_stopped
from citadel_gateway.config.flat import UnifiedAPIGatewayConfig, as_schema
from citadel_gateway.config.loader import ConfigError
from citadel_gateway.config.schema import GatewayConfigSchema
from citadel_gateway.demo.run import run_demo

_PORT_HINT = """
Choose other ports with --port (the gateway) and --prometheus-port (its metrics), or, for the
engines as well, with --config and a copy of config/demo.yaml."""


@click.command()
@click.option("--llm", is_flag=True, help="Real engines (llama.cpp) instead of simulated ones.")
@click.option("--config", "-c", "config_path", metavar="FILE", help="Default: the demo's own.")
@click.option(
    "--port", type=PORT, default=8000, show_default=True, help="Of the gateway, without --config."
)
@click.option(
    "--prometheus-port", type=PORT, default=9090, show_default=True,
    help="Of the metrics, without --config.",
)  # fmt: skip
def demo(llm: bool, config_path: str | None, port: int, prometheus_port: int) -> None:
    """Run four engines on ports 11400 to 11403 and the gateway in front of them."""
    config = load_or_exit(config_path) if config_path else _own_config(port, prometheus_port)
    run_until_stopped(partial(run_demo, config, llm), port_hint=_PORT_HINT)


def _own_config(port: int, prometheus_port: int) -> GatewayConfigSchema:
    try:
        return as_schema(
            UnifiedAPIGatewayConfig(
                host="127.0.0.1", port=port, prometheus_port=prometheus_port, workers=1
            )
        )
    except ConfigError as exc:
        leave(str(exc), EXIT_CONFIG)
