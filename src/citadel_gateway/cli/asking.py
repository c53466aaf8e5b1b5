"""Asking a running gateway, for the commands that do."""

from __future__ import annotations

from typing import Any

import httpx

from citadel_gateway.cli.common import EXIT_FAILED, EXIT_UNAVAILABLE, leave


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
