"""``citadel-gateway status``: what a running gateway is doing, as a table."""

from __future__ import annotations

import sys
import time
from typing import Any

import click
import orjson
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from citadel_gateway.cli.asking import ask_gateway
from citadel_gateway.cli.common import (
    EXIT_FAILED,
    key_option,
    url_option,
)

_COLOURS = {"closed": "green", "half_open": "yellow", "open": "red"}


@click.command()
@url_option
@key_option
@click.option("--once", is_flag=True, help="Print one table and leave, even on a terminal.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON and leave.")
@click.option(
    "--interval", type=click.FloatRange(0.1), default=1.0, show_default=True,
    help="Seconds between two looks.",
)  # fmt: skip
def status(url: str, key: str | None, once: bool, as_json: bool, interval: float) -> None:
    """Show models, endpoints, breakers and load; live on a terminal.

    Exits with 0 when everything is available, 1 when something is not, 69 when there is no
    gateway.
    """
    report = _fetch(url, key)
    if as_json:
        click.echo(orjson.dumps(report, option=orjson.OPT_INDENT_2).decode())
    elif once or not sys.stdout.isatty():
        Console().print(status_table(report))
    else:
        report = _watch(url, key, interval, report)
    sys.exit(0 if report["status"] == "healthy" else EXIT_FAILED)


def _watch(url: str, key: str | None, interval: float, report: dict[str, Any]) -> dict[str, Any]:
    with Live(status_table(report), auto_refresh=False) as live:
        try:
            while True:
                time.sleep(interval)
                report = _fetch(url, key)
                live.update(status_table(report), refresh=True)
        except KeyboardInterrupt:
            return report


def _fetch(url: str, key: str | None) -> dict[str, Any]:
    return ask_gateway("GET", url, "/models/status", key, expects="limits")


def status_table(report: dict[str, Any]) -> Table:
    """The report of ``/models/status`` as a table."""
    limits = report["limits"]
    table = Table(
        box=None,  # fits a terminal of 80 columns
        pad_edge=False,
        title=f"{report['gateway']}: {report['status']}",
        caption=(
            f"{limits['in_flight']} of {limits['max_concurrent_requests']} requests in flight, "
            f"{report['waiting_for_any_model']} waiting for any model"
            f"{_workers(report.get('workers') or [])}"
            f"{_hosts(report.get('hosts') or [])}"
            f"{_configuration(report.get('configuration') or {})}"
        ),
    )
    for heading in ("model", "endpoint"):
        table.add_column(heading, no_wrap=True)
    for heading in ("health", "breaker"):
        table.add_column(heading, overflow="fold")
    for heading in ("load", "queue", "latency"):
        table.add_column(heading, justify="right")
    for model, entry in report["models"].items():
        heading, waiting = model, str(entry["waiting"])
        for endpoint in entry["endpoints"]:
            table.add_row(heading, *_cells(endpoint, waiting))
            heading = waiting = ""  # said once for all endpoints of a model
    return table


def _workers(found: list[dict[str, Any]]) -> str:
    """How many of several serve, and how often one had to be replaced."""
    if not found:
        return ""
    ready = sum(worker["state"] == "ready" for worker in found)
    text = f"\n{ready} workers serve"
    for state in ("starting", "draining"):
        if count := sum(worker["state"] == state for worker in found):
            text += f", {count} {state}"
    deaths = {worker["worker"]: worker["replaced"] for worker in found}
    if replaced := sum(deaths.values()):
        text += f"; replaced: {replaced}"
    return text


def _hosts(found: list[dict[str, Any]]) -> str:
    """Who shares the store, if it is more than this host."""
    if len(found) < 2:
        return ""
    return f"\n{len(found)} hosts: {escape(', '.join(each['host'] for each in found))}"


def _configuration(found: dict[str, Any]) -> str:
    """Which configuration is in use, once there was more than one, and why not the latest."""
    text = ""
    if found.get("generation", 1) > 1:
        text += f"\nconfiguration {found['generation']}, since {found['since'][:19]} UTC"
    if refused := found.get("refused"):
        text += f"\n[red]the file was refused:[/] {escape('; '.join(refused['problems']))}"
    return text


def _cells(endpoint: dict[str, Any], waiting: str) -> tuple[str, ...]:
    known = endpoint["engine"]
    health = "[green]up[/]" + ("" if known == "auto" else f" {known}")
    if endpoint["cordoned"]:
        health = "[yellow]cordoned[/]"
    elif not endpoint["healthy"]:
        health = f"[red]down[/] {endpoint['last_error'] or ''}"
    colour = _COLOURS[endpoint["breaker"]]
    latency = endpoint["latency_seconds"]
    return (
        endpoint["url"],
        health,
        f"[{colour}]{endpoint['breaker']}[/]",
        f"{endpoint['in_flight']}/{endpoint['limit']}",
        waiting,
        f"{latency * 1000:.0f} ms" if latency else "-",
    )
