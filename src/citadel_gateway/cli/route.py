"""``citadel-gateway route``: why would this prompt go where it goes?"""

from __future__ import annotations

import time
from typing import Any

import click
import orjson
from rich.console import Console
from rich.table import Table

from citadel_gateway.app.load_balancer import LoadBalancer
from citadel_gateway.app.reports import Reports
from citadel_gateway.cli.asking import ask_gateway
from citadel_gateway.cli.common import (
    EXIT_FAILED,
    key_option,
    leave,
    load_or_exit,
    url_option,
)
from citadel_gateway.config.schema import GatewayConfigSchema
from citadel_gateway.errors import GatewayError
from citadel_gateway.policy.waitroom import Waitroom
from citadel_gateway.wire.openai_request import Kind
from citadel_gateway.wire.session import parse_with_key


@click.command()
@click.argument("prompt")
@click.option("--model", help="The model asked for; default: none, as 'auto'.")
@click.option("--max-tokens", type=click.IntRange(1), help="The bound on the answer.")
@url_option
@key_option
@click.option(
    "--config",
    "-c",
    "config_path",
    metavar="FILE",
    help="Explain by this file alone, as if every endpoint were healthy and idle.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the explanation as JSON.")
def route(
    prompt: str,
    model: str | None,
    max_tokens: int | None,
    url: str,
    key: str | None,
    config_path: str | None,
    as_json: bool,
) -> None:
    """Explain where PROMPT would be sent, without sending it."""
    body: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}]}
    if model is not None:
        body["model"] = model
    if max_tokens is not None:
        body["max_tokens"] = max_tokens
    if config_path is not None:
        report = _offline(load_or_exit(config_path), body)
    else:
        report = _live(url, key, body)
    if as_json:
        click.echo(orjson.dumps(report, option=orjson.OPT_INDENT_2).decode())
    else:
        _print(report)


def _live(url: str, key: str | None, body: dict[str, Any]) -> dict[str, Any]:
    return ask_gateway("POST", url, "/models/route", key, expects="groups", json=body)


def _offline(config: GatewayConfigSchema, body: dict[str, Any]) -> dict[str, Any]:
    balancer = LoadBalancer(config)
    now = time.monotonic()
    for upstream in balancer.upstreams:
        upstream.endpoint.health.observe(None, now)
    reports = Reports(balancer, Waitroom(1, 0), 0)
    try:
        request, session = parse_with_key(Kind.CHAT, orjson.dumps(body), None)
        return reports.route(request, session, None, now)
    except GatewayError as error:
        leave(error.message, EXIT_FAILED)


def _print(report: dict[str, Any]) -> None:
    console = Console()
    pick = report["would_pick"]
    where = f"{pick['model']} at {pick['endpoint']}" if pick else "nowhere: it would wait or fail"
    console.print(f"[bold]{where}[/]")
    console.print(
        f"because: {report['reason']} ({report['algorithm']}), "
        f"about {report['prompt_tokens_estimate']} prompt tokens"
    )
    for group in report["groups"]:
        table = Table(title=f"{group['role']}: {group['name']}")
        for heading in ("model", "endpoint", "eligible", "in flight", "weight", "cost", "share"):
            table.add_column(heading, overflow="fold")
        for each in group["candidates"]:
            table.add_row(
                each["model"],
                each["endpoint"],
                "yes" if each["eligible"] else f"no: {each['why_not']}",
                f"{each['in_flight']}/{each['limit']}",
                f"{each['weight']:g}",
                "-" if each["cost"] is None else f"{each['cost']:g}",
                f"{each['cost_share']:.2f}",
            )
        console.print(table)
