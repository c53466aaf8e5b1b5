"""What the commands share: exit codes, options, configurations, running, and asking a gateway."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

import click
import httpx
import trio

from citadel_gateway.config.loader import ConfigError, load_config
from citadel_gateway.config.schema import GatewayConfigSchema
from citadel_gateway.demo.engines import EngineFailed
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


def ask_gateway(
    method: str,
    url: str,
    path: str,
    key: str | None,
    *,
    expects: str,
    json: Any = None,
    within: float = 10.0,
) -> dict[str, Any]:
    """The report of a running gateway; leaves with 1 when it refuses, with 69 when there is none.

    :param expects: a field that the report has, by which a stranger at *url* is told apart.
    :param within: seconds to wait for it.
    """
    headers = {b"authorization": f"Bearer {key}".encode()} if key else {}
    try:
        with httpx.Client(trust_env=False, timeout=within) as client:
            response = client.request(method, url.rstrip("/") + path, headers=headers, json=json)
    except (httpx.HTTPError, httpx.InvalidURL) as exc:
        leave(f"no gateway answers at {url}: {exc}", EXIT_UNAVAILABLE)
    if response.status_code != 200:
        leave(f"{url}: {_explain(response)}", EXIT_FAILED)
    try:
        report = response.json()
    except ValueError:
        report = None
    if not isinstance(report, dict) or expects not in report:
        leave(f"something else than a gateway answers at {url}", EXIT_UNAVAILABLE)
    return report


def _explain(response: httpx.Response) -> str:
    try:
        message: str = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"status {response.status_code}"
    return message
