"""What comes of reading the configuration again, told to all who want to know."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

import attrs

from citadel_gateway.io.logs import JsonLog, redact
from citadel_gateway.io.systemd import Notifier


class Counts(Protocol):
    """Metrics that count reloads."""

    def reloaded(self, result: str) -> None: ...


@attrs.frozen(kw_only=True)
class ReloadNews:
    """For the log, the metrics and the service manager.

    :param notifier: the one that is in use then.
    :param on_crash: told of bugs.
    :param on_end: called when it is over, whatever came of it.
    """

    log: JsonLog
    metrics: Counts
    notifier: Callable[[], Notifier]
    on_crash: Callable[[str, Exception], None]
    on_end: Callable[[], None]

    def began(self, why: str) -> None:
        self.notifier().reloading()
        self.log.event(logging.INFO, "reading the configuration again", why=why)

    def refused(self, problems: list[str]) -> None:
        self.metrics.reloaded("refused")
        for problem in problems:
            self.log.event(logging.ERROR, "the configuration is not taken", problem=redact(problem))

    def crashed(self, exc: Exception) -> None:
        self.metrics.reloaded("crashed")
        self.on_crash("reload", exc)

    def ended(self, *, taken: bool) -> None:
        if taken:
            self.metrics.reloaded("taken")
        self.on_end()
