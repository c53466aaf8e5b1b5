"""What the commands share: exit codes, options, and loading a configuration or leaving."""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import click
import httpx

from citadel_gateway.config.loader import ConfigError, load_config
from citadel_gateway.config.schema import GatewayConfigSchema

EXIT_FAILED = 1
EXIT_UNAVAILABLE = 69
EXIT_CONFIG = 78

config_option = click.option(
    "--config", "-c", "config_path", required=True, metavar="FILE", help="The configuration file."
)
url_option = click.option(
    "--url", default="http://127.0.0.1:8000", show_default=True, help="A running gateway."
)
key_option = click.option(
    "--key", envvar="CITADEL_API_KEY", help="API key, if the gateway needs one ($CITADEL_API_KEY)."
)


def load_or_exit(path: str) -> GatewayConfigSchema:
    """The configuration at *path*; every problem on standard error and exit code 78 otherwise."""
    try:
        return load_config(path)
    except ConfigError as exc:
        leave(str(exc), EXIT_CONFIG)


def leave(message: str, code: int) -> NoReturn:
    click.echo(message, err=True)
    sys.exit(code)


def ask_gateway(
    method: str, url: str, path: str, key: str | None, json: Any = None
) -> httpx.Response:
    """A request to a running gateway; leaves with 69 when there is none."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        with httpx.Client(trust_env=False, timeout=10.0) as client:
            return client.request(method, url.rstrip("/") + path, headers=headers, json=json)
    except httpx.HTTPError as exc:
        leave(f"no gateway answers at {url}: {exc}", EXIT_UNAVAILABLE)


def explain_error(response: httpx.Response) -> str:
    """The message of an error answer."""
    try:
        message: str = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"status {response.status_code}"
    return message
