"""What a supervisor and its workers say to each other, and the start of a worker."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

import attrs
import trio

from citadel_gateway.io.listening import HANDED_OVER_BY
from citadel_gateway.io.spawn import spawn
from citadel_gateway.io.successor import READY_DESCRIPTOR

SUPERVISOR_DESCRIPTOR = "CITADEL_SUPERVISOR_FD"
CROWD_DESCRIPTOR = "CITADEL_CROWD_FD"

NOT_FOR_WORKERS = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)
"""Signals that a terminal sends to every process, and that are for the supervisor."""

# The supervisor alone speaks to the service manager and to a predecessor.
_NOT_FOR_WORKERS = frozenset({"NOTIFY_SOCKET", "WATCHDOG_USEC", READY_DESCRIPTOR})


class Said(StrEnum):
    """The kinds of message."""

    ORDERS = "orders"  # the first one, to a worker: what to be
    READY = "ready"  # it serves
    BEAT = "beat"  # it is alive
    PAGE = "page"  # its metrics; to the supervisor: those of all
    LEAVING = "leaving"  # it drains, unasked
    NEWS = "news"  # how the others are
    DRAIN = "drain"  # true: nobody takes over the sockets
    CUT = "cut"  # end now
    REPORT = "report"  # its models and endpoints; to the supervisor: those of the others
    ENDPOINTS = "endpoints"
    ORDER = "order"  # of an operator
    ADOPT = "adopt"  # another configuration


@attrs.frozen(kw_only=True)
class Orders:
    """What a worker is to be.

    :param number: from 1 to *workers*; it has that share of every limit.
    :param place: in the crowd, which it shares with nobody.
    :param source: the name of the file that *text* is from, and *digest* its SHA-256.
    :param generation: number of this configuration.
    :param cordons: models and URLs that operators have taken out of service.
    :param added: models, URLs and options of endpoints that operators have added.
    :param sockets_stay: whether they go on listening when the gateway has ended.
    """

    number: int
    workers: int
    place: int
    source: str
    text: str
    digest: str
    generation: int
    cordons: Sequence[Sequence[str]]
    added: Sequence[Sequence[Any]]
    sockets_stay: bool


def missed_orders(before: Orders, now: Orders) -> list[tuple[str, dict[str, Any]]]:
    """What operators have wanted since a worker was told of it *before*, and how to tell it."""

    def order(model: str, url: str, options: Mapping[str, Any]) -> dict[str, Any]:
        return {"url": url, "model": model, "within": 0.0, "options": options}

    added, adds = ({(m, u): said for m, u, said in o.added} for o in (before, now))
    cordoned, cordons = ({(m, u) for m, u in o.cordons} for o in (before, now))
    return [
        *(("remove", order(*name, {})) for name in added if name not in adds),
        *(("add", order(*name, said)) for name, said in adds.items() if added.get(name) != said),
        *(("uncordon", order(*name, {})) for name in cordoned - cordons),
        *(("cordon", order(*name, {})) for name in cordons - cordoned),
    ]


def is_worker(environ: Mapping[str, str]) -> bool:
    """Whether a supervisor has started this process."""
    return SUPERVISOR_DESCRIPTOR in environ and environ.get(HANDED_OVER_BY) == str(os.getppid())


def spawn_worker(
    command: Sequence[str], sockets: Mapping[str, socket.socket], crowd: int
) -> tuple[int, socket.socket]:
    """Its process number, and our end of the channel to it.  Raises ``CannotSpawn``."""
    ours, theirs = socket.socketpair()
    with theirs:
        others = {SUPERVISOR_DESCRIPTOR: theirs.fileno(), CROWD_DESCRIPTOR: crowd}
        try:
            pid = spawn(command, sockets, others, without=_NOT_FOR_WORKERS, blocked=NOT_FOR_WORKERS)
        except BaseException:
            ours.close()
            raise
    return pid, ours


async def wait_exit(pid: int) -> int:
    """How our child *pid* ends: its status, or minus the signal."""
    descriptor = os.pidfd_open(pid)
    try:
        await trio.lowlevel.wait_readable(descriptor)
    finally:
        os.close(descriptor)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])  # noqa: ASYNC222  # it is over
