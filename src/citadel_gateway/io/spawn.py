"""Starting this program once more, with descriptors of ours."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Mapping, Sequence

from citadel_gateway.io.listening import FIRST, HANDED_OVER_BY

_OUT_OF_THE_WAY = 100  # a number above those that the descriptors get there
_NOT_PASSED_ON = frozenset({"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "WATCHDOG_PID"})


class CannotSpawn(Exception):
    """The system would not start it."""


def spawn(
    command: Sequence[str],
    sockets: Mapping[str, socket.socket],
    others: Mapping[str, int],
    *,
    without: frozenset[str] = frozenset(),
    blocked: Sequence[int] = (),
) -> int:
    """The process number.  Raises :class:`CannotSpawn`.

    Descriptors have fixed numbers there: the *sockets*, which listen, from 3 on, in the way of
    ``sd_listen_fds(3)``, and behind them the *others*, which are named by variables.

    :param without: further variables that are not passed on.
    :param blocked: signals that do not reach it until it says so.
    """
    sources = [*(sock.fileno() for sock in sockets.values()), *others.values()]
    aside: list[int] = []
    try:
        aside += [fcntl.fcntl(s, fcntl.F_DUPFD_CLOEXEC, _OUT_OF_THE_WAY) for s in sources]
        actions = [
            (os.POSIX_SPAWN_DUP2, source, FIRST + place) for place, source in enumerate(aside)
        ]
        unwanted = _NOT_PASSED_ON | without
        environ = {k: v for k, v in os.environ.items() if k not in unwanted}
        environ |= {
            "LISTEN_FDS": str(len(sockets)),
            "LISTEN_FDNAMES": ":".join(sockets),
            HANDED_OVER_BY: str(os.getpid()),
        }
        for place, variable in enumerate(others):
            environ[variable] = str(FIRST + len(sockets) + place)
        return os.posix_spawn(
            command[0], [*command], environ, file_actions=actions, setsigmask=blocked
        )
    except OSError as exc:
        raise CannotSpawn(f"cannot start {command[0]}: {exc}") from exc
    finally:
        for descriptor in aside:
            os.close(descriptor)
