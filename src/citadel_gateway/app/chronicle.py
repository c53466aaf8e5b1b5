"""What happens in the gateway, told to the log and to the metrics."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import attrs

from citadel_gateway.config.schema import GatewayConfigSchema
from citadel_gateway.io.listening import Address
from citadel_gateway.io.logs import JsonLog, redact
from citadel_gateway.io.metrics import Metrics
from citadel_gateway.policy.circuit_breaker import Transition
from citadel_gateway.policy.endpoint import Endpoint
from citadel_gateway.policy.watermarks import Level, Use


@attrs.frozen
class Chronicle:
    """One gateway's."""

    log: JsonLog
    metrics: Metrics

    # Of endpoints.

    def transition(self, endpoint: Endpoint, transition: Transition) -> None:
        self.metrics.changed(endpoint, transition)
        self._say(
            logging.WARNING, "breaker", endpoint,
            before=transition.before.value, after=transition.after.value, why=transition.why,
        )  # fmt: skip

    def flip(self, endpoint: Endpoint) -> None:
        """It has become well or ill."""
        health = endpoint.health
        level = logging.INFO if health.healthy else logging.WARNING
        self._say(level, "health", endpoint, healthy=health.healthy, error=health.last_error)

    def order(self, what: str, endpoint: Endpoint) -> None:
        """It has been taken out of service or back by command."""
        self._say(logging.INFO, what, endpoint, in_flight=endpoint.in_flight)

    def arrival(self, endpoint: Endpoint, has_come: bool) -> None:
        self.metrics.arrived(endpoint, has_come=has_come)
        known = "from now on" if has_come else "no longer: it is listed nowhere any more"
        self._say(logging.INFO, "endpoint", endpoint, known=known)

    def list_trouble(self, path: str, problems: Sequence[str]) -> None:
        """A file with endpoints is bad, or good again."""
        if not problems:
            self.log.event(logging.INFO, "the list of endpoints is good again", file=path)
        for problem in problems:
            self.log.event(
                logging.ERROR,
                "the list of endpoints is not taken; the last good one stays in use",
                file=path,
                problem=redact(problem),
            )

    def backend_trouble(self, url: str, problem: str | None) -> None:
        """A backend does not say what it has, or does again."""
        if problem is None:
            self.log.event(logging.INFO, "the backend lists its models again", endpoint=url)
            return
        self.log.event(
            logging.WARNING,
            "the backend does not list its models; what it listed last stays in use",
            endpoint=url,
            error=redact(problem),
        )

    def name_trouble(self, host: str, error: OSError | None) -> None:
        if error is None:
            self.log.event(logging.INFO, "the name can be looked up again", host=host)
            return
        self.log.event(
            logging.WARNING,
            "the name cannot be looked up; its last addresses stay in use",
            host=host,
            error=str(error),
        )

    def _say(self, level: int, what: str, endpoint: Endpoint, **fields: Any) -> None:
        self.log.event(level, what, model=endpoint.model, endpoint=endpoint.url, **fields)

    # Of the gateway.

    def level(self, resource: str, level: Level, use: Use) -> None:
        """A watermark has been passed, upwards or downwards."""
        self.log.event(
            logging.WARNING if level else logging.INFO,
            "overload",
            resource=resource,
            state=level.name.lower(),
            used=use.used,
            limit=use.limit,
        )

    def panic(self, model: str, begins: bool) -> None:
        self.log.event(
            logging.WARNING if begins else logging.INFO,
            "panic",
            model=model,
            state="too few endpoints are healthy; all are used" if begins else "over",
        )

    def store(self, is_alone: bool, why: str) -> None:
        if is_alone:
            self.log.event(
                logging.WARNING,
                "the store cannot be asked: local limits, each gateway its share, until it can",
                error=why,
            )
        else:
            self.log.event(logging.INFO, "the store can be asked again")

    def trust(self, config: GatewayConfigSchema) -> None:
        """Endpoints may pretend to be others."""
        for endpoint in config.all_endpoints():
            if endpoint.tls is not None and endpoint.tls.insecure_skip_verify:
                self.log.event(
                    logging.WARNING,
                    "certificates are not verified (insecure_skip_verify)",
                    endpoint=endpoint.url,
                )

    def listening(self, address: Address, config: GatewayConfigSchema, *, is_alone: bool) -> None:
        """It serves; with what nobody may have meant."""
        self.log.event(
            logging.INFO, "listening", address=str(address), python=sys.version.split()[0]
        )
        if config.workers > 1 and is_alone:
            self.log.event(
                logging.WARNING,
                f"service.workers is {config.workers}, and one process serves: only "
                "`citadel-gateway serve` starts workers",
            )
        if not config.security.api_keys and not _is_loopback(address.host):
            self.log.event(
                logging.WARNING,
                "no API key is configured: everybody who can connect may use the models",
            )

    def crash(self, where: str, exc: Exception) -> None:
        """An exception was caught at a boundary: a bug, to be counted and written down."""
        self.metrics.crashed(where)
        trace = "".join(traceback.format_exception(exc))
        self.log.event(logging.ERROR, "crash", where=where, exception=redact(trace))

    def background_crash(self, name: str, exc: Exception) -> None:
        self.log.event(logging.ERROR, "background task crashed", task=name)
        self.crash("background", exc)


def _is_loopback(host: str) -> bool:
    return host.startswith("127.") or host in {"localhost", "::1"}
