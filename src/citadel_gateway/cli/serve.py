"""``citadel-gateway serve``: run the gateway until it is told to stop."""

from __future__ import annotations

import os
from functools import partial

import click

from citadel_gateway.app.service import UnifiedAPIGatewayService
from citadel_gateway.cli.common import config_option, load_or_exit, run_until_stopped
from citadel_gateway.io.descriptors import raise_limit
from citadel_gateway.io.libraries import route_library_logs
from citadel_gateway.io.systemd import Notifier


@click.command()
@config_option
def serve(config_path: str) -> None:
    """Serve until SIGTERM or SIGINT; then finish what is running and exit with 0."""
    raise_limit()
    service = UnifiedAPIGatewayService(load_or_exit(config_path))
    route_library_logs(service.log)
    try:
        run_until_stopped(partial(service.run, notifier=Notifier.from_environ(os.environ)))
    finally:
        service.log.flush_now()
