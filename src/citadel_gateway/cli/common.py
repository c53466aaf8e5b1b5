"""What the commands share: exit codes, options, configurations and running."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from typing import NoReturn

import click
import trio

from citadel_gateway.config.loader import ConfigError, load_config
from citadel_gateway.config.schema import GatewayConfigSchema
from citadel_gateway.demo import EngineFailed
from citadel_gateway.io.config_file import ConfigFile
from citadel_gateway.io.listening import CannotListen

EXIT_FAILED = 1
EXIT_UNAVAILABLE = 69
EXIT_CONFIG = 78

PORT = click.IntRange(0, 65535)

config_option = click.option(
    "--config", "-c", "config_path", required=True, metavar="FILE", help="The configuration file."
)
url_option = click.option(
    "--url", default="http://127.0.0.1:8000", show_default=True, help="A running gateway."
)
key_option = click.option(
    "--key", envvar="CITADEL_API_KEY", help="API key, if the gateway needs one ($CITADEL_API_KEY)."
)


def load_or_exit(file: str | ConfigFile) -> GatewayConfigSchema:
    """The configuration in *file*; every problem on standard error and exit code 78 otherwise."""
    try:
        return file.load() if isinstance(file, ConfigFile) else load_config(file)
    except ConfigError as exc:
        leave(str(exc), EXIT_CONFIG)


def leave(message: str, code: int) -> NoReturn:
    click.echo(message, err=True)
    sys.exit(code)


def run_until_stopped(main: Callable[[], Awaitable[None]], *, port_hint: str = "") -> None:
    """Run *main* in Trio.  A port or an engine that is not to be had is one line and exit code 69.

    Ctrl-C is a proper end also before *main* has begun to listen for it.

    :param port_hint: how to choose another port; said when one cannot be had.
    """
    try:
        trio.run(main)
    except* CannotListen as group:
        leave(f"{_first(group)}{port_hint}", EXIT_UNAVAILABLE)
    except* EngineFailed as group:
        leave(str(_first(group)), EXIT_UNAVAILABLE)
    except* KeyboardInterrupt:
        sys.exit(0)


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
