"""Sends what the libraries log to our own log, in our own form."""

from __future__ import annotations

import logging

from citadel_gateway.io.logs import JsonLog, LogHandler

_CHATTY = ("hypercorn", "httpx", "quart", "anyio")


def route_library_logs(log: JsonLog) -> None:
    """From now on the standard library's log records go to *log*, warnings and worse."""
    logging.basicConfig(handlers=[LogHandler(log)], level=logging.WARNING, force=True)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    # It writes a traceback for every attempt to connect; whoever asks the store is told why not.
    logging.getLogger("coredis").setLevel(logging.CRITICAL)
