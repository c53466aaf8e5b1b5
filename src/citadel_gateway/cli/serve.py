"""``citadel-gateway serve``: run the gateway until it is told to stop."""

from __future__ import annotations

import gc
import os
import sys
from functools import partial

import click
import trio

from citadel_gateway.app.service import UnifiedAPIGatewayService
from citadel_gateway.cli.common import config_option, load_or_exit, run_until_stopped
from citadel_gateway.io.config_file import ConfigFile
from citadel_gateway.io.descriptors import raise_limit
from citadel_gateway.io.libraries import route_library_logs
from citadel_gateway.io.listening import inherited_sockets
from citadel_gateway.io.successor import Successor, tell_predecessor
from citadel_gateway.io.systemd import Notifier


@click.command()
@config_option
def serve(config_path: str) -> None:
    """Serve until SIGTERM or SIGINT; then finish what is running and exit with 0.

    SIGHUP reads the configuration again, and SIGUSR2 starts the program anew without a gap: the
    new process takes over the listeners, and this one ends when its requests have.
    """
    raise_limit()
    inherited = inherited_sockets(os.environ)  # first: these descriptors are ours from now on
    file = ConfigFile(config_path)
    service = UnifiedAPIGatewayService(load_or_exit(file), file=file)
    route_library_logs(service.log)
    run = partial(
        service.run,
        notifier=Notifier.from_environ(os.environ),
        inherited=inherited,
        successor=Successor([sys.executable, *sys.orig_argv[1:]]),
    )

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(run)
            # What is there now stays.  Looking through all of it again and again for garbage holds
            # up every request for tens of milliseconds, most often when there are many.
            gc.collect()
            gc.freeze()
            tell_predecessor(os.environ)

    try:
        run_until_stopped(main)
    finally:
        service.log.flush_now()
