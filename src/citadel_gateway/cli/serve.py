"""``citadel-gateway serve``: run the gateway until it is told to stop."""

from __future__ import annotations

import os
from functools import partial

import click
import trio

from citadel_gateway.app.server import CannotListen
from citadel_gateway.app.service import UnifiedAPIGatewayService
from citadel_gateway.cli.common import EXIT_UNAVAILABLE, config_option, leave, load_or_exit
from citadel_gateway.io.libraries import route_library_logs
from citadel_gateway.io.systemd import Notifier


@click.command()
@config_option
def serve(config_path: str) -> None:
    """Serve until SIGTERM or SIGINT; then finish what is running and exit with 0."""
    service = UnifiedAPIGatewayService(load_or_exit(config_path))
    route_library_logs(service.log)
    run_until_stopped(service, Notifier.from_environ(os.environ))


def run_until_stopped(service: UnifiedAPIGatewayService, notifier: Notifier) -> None:
    """Run the service; a port that is taken ends the program with 69 and one line."""
    try:
        trio.run(partial(service.run, notifier=notifier))
    except* CannotListen as group:
        leave(str(group.exceptions[0]), EXIT_UNAVAILABLE)
    finally:
        service.log.flush_now()
