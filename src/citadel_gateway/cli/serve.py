"""``citadel-gateway serve``: run the gateway until it is told to stop."""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable, Callable
from functools import partial

import click
import trio

from citadel_gateway.app.supervisor import Supervisor, WorkerFailed
from citadel_gateway.cli.common import (
    EXIT_CONFIG,
    config_option,
    leave,
    load_or_exit,
    run_until_stopped,
)
from citadel_gateway.config.loader import ConfigError
from citadel_gateway.config.schema import GatewayConfigSchema
from citadel_gateway.io.config_file import ConfigFile
from citadel_gateway.io.descriptors import raise_limit
from citadel_gateway.io.heap import keep_collections_short
from citadel_gateway.io.libraries import route_library_logs
from citadel_gateway.io.listening import Inherited, inherited_sockets
from citadel_gateway.io.logs import JsonLog
from citadel_gateway.io.successor import Successor, outlive_predecessor, tell_predecessor
from citadel_gateway.io.systemd import Notifier
from citadel_gateway.io.workers import is_worker


@click.command()
@config_option
def serve(config_path: str) -> None:
    """Serve until SIGTERM or SIGINT; then finish what is running and exit with 0.

    With service.workers above 1 this process supervises that many others, which serve.

    SIGHUP reads the configuration again.  SIGUSR2 starts the program anew without a gap: worker by
    worker, or, where there is one process only, by a new one that takes over the listeners before
    this one ends.
    """
    raise_limit()
    inherited = inherited_sockets(os.environ)  # first: these descriptors are ours from now on
    if is_worker(os.environ):
        _work(inherited)
        return
    file = ConfigFile(config_path)
    config = load_or_exit(file)
    if config.workers > 1:
        _supervise(config, file, inherited)
    else:
        _serve_alone(config, file, inherited)


def _command() -> list[str]:
    return [sys.executable, *sys.orig_argv[1:]]


def _work(inherited: list[Inherited]) -> None:
    # Imported here, because a supervisor needs nothing of all that.
    from citadel_gateway.app.worker import make_worker

    try:
        worker = make_worker(os.environ)
    except ConfigError as exc:
        leave(str(exc), EXIT_CONFIG)
    _run(partial(worker.run, inherited), worker.service.log)


def _supervise(config: GatewayConfigSchema, file: ConfigFile, inherited: list[Inherited]) -> None:
    supervisor = Supervisor(config, file, _command(), Notifier.from_environ(os.environ))
    try:
        run = partial(supervisor.run, inherited, partial(tell_predecessor, os.environ))
        _run(run, supervisor.log)
    except* WorkerFailed as group:
        failed = group.exceptions[0]
        while isinstance(failed, BaseExceptionGroup):
            failed = failed.exceptions[0]
        leave(str(failed), failed.code if isinstance(failed, WorkerFailed) else 1)


def _serve_alone(config: GatewayConfigSchema, file: ConfigFile, inherited: list[Inherited]) -> None:
    from citadel_gateway.app.service import UnifiedAPIGatewayService

    service = UnifiedAPIGatewayService(config, file=file)
    run = partial(
        service.run,
        notifier=Notifier.from_environ(os.environ),
        inherited=inherited,
        successor=Successor(_command()),
    )

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(run)
            keep_collections_short()
            tell_predecessor(os.environ)
        await outlive_predecessor(os.environ, service.config.service.drain_timeout)

    _run(main, service.log)


def _run(main: Callable[[], Awaitable[None]], log: JsonLog) -> None:
    route_library_logs(log)
    try:
        run_until_stopped(main)
    finally:
        log.flush_now()
