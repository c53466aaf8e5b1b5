"""Tell the service manager how the gateway is doing: systemd's notify protocol.

One datagram per message, to the socket that ``NOTIFY_SOCKET`` names.  Started by hand there is no
such variable, and every method does nothing, so callers never ask who started them.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from typing import Self

import attrs
import trio

log = logging.getLogger(__name__)

# The manager empties its socket all the time, so a send returns at once; were the queue full, a
# short stall is better than a lost READY=1, for which the manager would kill the process.
PATIENCE = 0.25


@attrs.frozen
class Notifier:
    """The way to the service manager, or to nobody.

    A message that cannot be sent is logged and lost: the gateway serves on without a manager.

    :param address: of the manager's datagram socket; a leading NUL means the abstract namespace.
    :param watchdog_interval: seconds between pings, half of what the manager allows.
    """

    address: str | None = None
    watchdog_interval: float | None = None

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Self:
        """Read ``NOTIFY_SOCKET``, ``WATCHDOG_USEC`` and ``WATCHDOG_PID``."""
        name = environ.get("NOTIFY_SOCKET", "")
        if not name.startswith(("/", "@")):
            if name:
                log.warning("NOTIFY_SOCKET=%s is not a Unix socket: not notifying", name)
            return cls()
        # The kernel marks abstract names with a NUL, which no environment variable can hold.
        address = "\0" + name[1:] if name.startswith("@") else name
        return cls(address, _watchdog_interval(environ))

    def ready(self) -> None:
        """The listeners are bound: dependent units may start."""
        self._send("READY=1")

    def reloading(self) -> None:
        """The configuration is being read again; :meth:`ready` says that this is over."""
        # The manager compares it with its own clock, so as to know which reload is meant.
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def handed_over(self, pid: int) -> None:
        """Another process is the service from now on; we only finish what we have begun.

        Until now its signs of life did not count, and after this ours do not
        (``NotifyAccess=main``), so this is one, too: the next may be a whole interval away.
        """
        self._send(f"MAINPID={pid}\nWATCHDOG=1")

    def stopping(self) -> None:
        """The drain has begun."""
        self._send("STOPPING=1")

    def status(self, text: str) -> None:
        """One line for ``systemctl status``."""
        # A line break would begin another assignment.
        self._send("STATUS=" + " ".join(text.split()))

    def watchdog(self) -> None:
        """Still alive."""
        self._send("WATCHDOG=1")

    def _send(self, message: str) -> None:
        if self.address is None:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.settimeout(PATIENCE)
                sock.connect(self.address)
                sock.sendall(message.encode(errors="replace"))
        except (OSError, ValueError) as exc:  # ValueError: a NUL within the name
            log.warning("cannot notify the service manager: %s (%s)", exc, message)


def _watchdog_interval(environ: Mapping[str, str]) -> float | None:
    mine = str(os.getpid())
    # Set for another process when a wrapper was started and we are its child.
    if environ.get("WATCHDOG_PID", mine) != mine:
        return None
    try:
        allowed = int(environ.get("WATCHDOG_USEC", "0"))
    except ValueError:
        return None
    return allowed / 2 / 1e6 if allowed > 0 else None


async def feed_watchdog(notifier: Notifier, *, alive: Callable[[], bool]) -> None:
    """Ping the manager for as long as *alive* says so; runs until cancelled.

    Being scheduled is itself the sign of life: a blocked event loop misses its pings.  An answer
    of false skips one, and the manager restarts the service unless a later answer is true in time.
    Returns at once when no watchdog watches.
    """
    interval = notifier.watchdog_interval
    if interval is None:
        await trio.lowlevel.checkpoint()
        return
    while True:
        if alive():
            notifier.watchdog()
        await trio.sleep(interval)
