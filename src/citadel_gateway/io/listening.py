"""Sockets that listen: those that we were started with, and how to close one without a loss."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import socket
import struct
from collections.abc import Mapping

import attrs

log = logging.getLogger(__name__)

FIRST = 3  # descriptor, after standard input, output and error
_MOST = 64
_BACKLOG = 2048

HANDED_OVER_BY = "CITADEL_HANDED_OVER_BY"
"""The process that started us with its own sockets; it cannot know our number beforehand."""

# Classic BPF (Linux, Documentation/networking/filter.rst).  The kernel shows a TCP socket's filter
# the segment from its TCP header on, where byte 13 has the flags.
_NO_SYN = (
    (0x30, 0, 0, 13),  # load the flags
    (0x54, 0, 0, 0x12),  # keep SYN and ACK
    (0x15, 0, 1, 0x02),  # SYN alone: somebody new
    (0x06, 0, 0, 0),  # drop it
    (0x06, 0, 0, 0xFFFFFFFF),  # let it pass
)
_SO_ATTACH_FILTER = 26


class CannotListen(Exception):
    """An address that the gateway was told to listen on is not to be had."""


@attrs.frozen
class Address:
    """Where to listen, and with which TLS certificate, if any."""

    host: str
    port: int
    certfile: str | None = None
    keyfile: str | None = None

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def open_listener(address: Address) -> socket.socket:
    """Raises :class:`CannotListen`."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        return socket.create_server(
            (address.host, address.port),
            family=family,
            backlog=_BACKLOG,
            dualstack_ipv6=family is socket.AF_INET6 and socket.has_dualstack_ipv6(),
        )
    except OSError as exc:
        reason = "it is in use" if exc.errno == errno.EADDRINUSE else str(exc)
        raise CannotListen(f"cannot listen on {address}: {reason}") from exc


@attrs.frozen
class Inherited:
    """A listening socket that was there before us, and its name (``FileDescriptorName=``)."""

    name: str
    socket: socket.socket

    def __str__(self) -> str:
        host, port, *_ = self.socket.getsockname()
        return f"{host}:{port} ({self.name})" if self.name else f"{host}:{port}"

    def is_at(self, host: str, port: int) -> bool:
        """Whether it listens where *host* and *port* say; a name is looked up."""
        bound, bound_port, *_ = self.socket.getsockname()
        if port != bound_port:
            return False
        try:
            found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM)
        except OSError:
            return False
        return bound in {sockaddr[0] for *_, sockaddr in found}


API = "api"
MONITORING_LISTENER = "monitoring"
"""Names of our two listeners, for whoever passes them on."""


@attrs.define(eq=False)
class Passed:
    """Sockets that were passed on, each to be taken once."""

    left: list[Inherited]

    def take(self, name: str, host: str, port: int) -> socket.socket | None:
        """The one called *name*, else the one that listens at *host* and *port*, if it is there."""
        named = [each for each in self.left if each.name == name]
        there = [
            each
            for each in self.left
            if each.name not in {API, MONITORING_LISTENER} and each.is_at(host, port)
        ]
        for found in (*named, *there):
            self.left.remove(found)
            return found.socket
        return None

    def close_rest(self) -> list[str]:
        """Close those that nobody has taken; returns what they were."""
        rest = [str(each) for each in self.left]
        for each in self.left:
            each.socket.close()
        self.left.clear()
        return rest


def inherited_sockets(environ: Mapping[str, str]) -> list[Inherited]:
    """The sockets that were passed on to this process, which now owns these descriptors.

    The protocol is that of ``sd_listen_fds(3)``: they are there from descriptor 3 on,
    ``LISTEN_FDS`` of them, named by ``LISTEN_FDNAMES``, for the process ``LISTEN_PID``.  A process
    that hands over to us says who it is instead.  What is no listening TCP socket is reported and
    left alone.
    """
    mine = (environ.get("LISTEN_PID") == str(os.getpid())) or (
        environ.get(HANDED_OVER_BY) == str(os.getppid())
    )
    count = environ.get("LISTEN_FDS", "")
    if not mine or not count.isdecimal():
        return []
    names = environ.get("LISTEN_FDNAMES", "").split(":")
    found = []
    for place in range(min(int(count), _MOST)):
        descriptor = FIRST + place
        sock = _listening(descriptor)
        if sock is None:
            log.warning("descriptor %d is no TCP socket that listens: not used", descriptor)
        else:
            found.append(Inherited(names[place] if place < len(names) else "", sock))
    return found


def _listening(descriptor: int) -> socket.socket | None:
    try:
        os.set_inheritable(descriptor, False)
        sock = socket.socket(fileno=descriptor)
    except OSError:
        return None
    if (
        sock.family in {socket.AF_INET, socket.AF_INET6}
        and sock.type == socket.SOCK_STREAM
        and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    ):
        return sock
    sock.detach()
    return None


def refuse_newcomers(listener: socket.socket) -> bool:
    """Let nobody new begin to connect; who has begun may still complete it.

    A filter on the socket drops their first segment, as if it were lost.  When they send it again,
    a second later, the listener is closed and they are refused: told the truth, instead of being
    accepted by the kernel and reset by our leaving.  False where that is not to be had.
    """
    code = b"".join(struct.pack("HBBI", *step) for step in _NO_SYN)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HP", len(_NO_SYN), ctypes.addressof(buffer))
    try:
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
    except OSError:
        return False
    return True
