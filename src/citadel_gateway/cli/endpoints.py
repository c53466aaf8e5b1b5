"""``citadel-gateway cordon``, ``uncordon``, ``drain``, ``add`` and ``remove``: of endpoints."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import click

from citadel_gateway.app.admin import ADMIN
from citadel_gateway.app.operations import DRAIN, LONGEST_DRAIN
from citadel_gateway.cli.asking import ask_gateway
from citadel_gateway.cli.common import EXIT_FAILED, key_option

F = TypeVar("F", bound=Callable[..., Any])

_MORE = 10.0  # seconds for the answer itself

_within = click.option(
    "--within", type=click.FloatRange(0, LONGEST_DRAIN), default=DRAIN, show_default=True,
    help="Seconds to wait for its requests to end.",
)  # fmt: skip


def _order(command: F) -> F:
    """What the commands have in common."""
    for decorate in (
        key_option,
        click.option(
            "--url", default="http://127.0.0.1:9090", show_default=True,
            help="A running gateway: its listener for metrics, or any with an admin key.",
        ),
        click.option("--model", help="Only as an endpoint of this model; default: of all."),
        click.argument("endpoint"),
    ):  # fmt: skip
        command = decorate(command)
    return command


@click.command()
@_order
def cordon(endpoint: str, model: str | None, url: str, key: str | None) -> None:
    """Give ENDPOINT (its URL) nothing new; what it has, it finishes.

    It stays cordoned until it is uncordoned or the gateway restarts.
    """
    _print(_send("cordon", endpoint, model, url, key))


@click.command()
@_order
def uncordon(endpoint: str, model: str | None, url: str, key: str | None) -> None:
    """Give ENDPOINT (its URL) requests again."""
    _print(_send("uncordon", endpoint, model, url, key))


@click.command()
@_within
@_order
def drain(endpoint: str, model: str | None, url: str, key: str | None, within: float) -> None:
    """Cordon ENDPOINT (its URL) and wait until it has no requests any more.

    Exits with 1 if it still has some; it stays cordoned then, too.
    """
    _tell(_send("drain", endpoint, model, url, key, within=within))


@click.command()
@click.option("--weight", type=float, help="Its share of the load; default: the model's.")
@click.option("--max-concurrent", type=int, help="Requests at once; default: the model's.")
@click.option("--engine", help="What serves it; default: the model's.")
@click.option("--resolve", help="What the addresses of its name are; default: the model's.")
@_order
def add(endpoint: str, model: str | None, url: str, key: str | None, **options: Any) -> None:
    """Let a model have one more endpoint, ENDPOINT (its URL); --model is needed.

    It stays until it is removed or the gateway restarts.
    """
    given = {name: said for name, said in options.items() if said is not None}
    _print(_send("add", endpoint, model, url, key, **given))


@click.command()
@_within
@_order
def remove(endpoint: str, model: str | None, url: str, key: str | None, within: float) -> None:
    """Take back ENDPOINT (its URL), which was added, and wait until it has no requests any more.

    Exits with 1 if it still has some; it gets no others.
    """
    _tell(_send("remove", endpoint, model, url, key, within=within))


def _send(
    what: str, endpoint: str, model: str | None, url: str, key: str | None, **more: Any
) -> dict[str, Any]:
    order: dict[str, Any] = {"endpoint": endpoint, **more}
    if model is not None:
        order["model"] = model
    return ask_gateway(
        "POST", url, f"{ADMIN}/{what}", key, expects="endpoints", json=order,
        within=more.get("within", 0.0) + _MORE,
    )  # fmt: skip


def _tell(report: dict[str, Any]) -> NoReturn:
    """Whether its requests have ended is the exit code."""
    _print(report)
    sys.exit(0 if report["drained"] else EXIT_FAILED)


def _print(report: dict[str, Any]) -> None:
    for each in report["endpoints"]:
        state = "cordoned" if each["cordoned"] else "in service"
        busy = f"{each['in_flight']} in flight"
        click.echo(f"{each['model']}  {each['endpoint']}  {state}, {busy}")
