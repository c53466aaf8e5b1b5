"""Starting the process that comes after this one, with the sockets that this one listens on."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Mapping
from contextlib import suppress

import attrs
import trio

from citadel_gateway.io.listening import HANDED_OVER_BY
from citadel_gateway.io.spawn import CannotSpawn, spawn

READY_DESCRIPTOR = "CITADEL_READY_FD"
"""The successor writes a byte to it when it serves; closing it without one means that it failed."""


class SuccessorFailed(Exception):
    """It could not be started, or did not become ready."""


@attrs.define(eq=False)
class Successor:
    """The same program once more, as it is on the disk now.

    :param command: the program's path and its arguments.
    :param within: seconds in which it must be ready.
    """

    command: list[str]
    within: float = 60.0
    is_starting: bool = attrs.field(default=False, init=False)

    async def start(self, sockets: Mapping[str, socket.socket]) -> int:
        """Its process number, once it serves on the *sockets*.  Raises :class:`SuccessorFailed`.

        However this ends otherwise, the successor is no more.
        """
        self.is_starting = True
        reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            try:
                pid = self._spawn(sockets, writing)
            finally:
                os.close(writing)
            try:
                await self._wait_until_ready(pid, reading)
            except BaseException:
                self.end(pid, signal.SIGKILL)
                with suppress(ChildProcessError):
                    _reap(pid)
                raise
            return pid
        finally:
            os.close(reading)
            self.is_starting = False

    def end(self, pid: int, how: signal.Signals = signal.SIGTERM) -> None:
        """End the successor with number *pid* after all."""
        with suppress(ProcessLookupError):
            os.kill(pid, how)

    async def _wait_until_ready(self, pid: int, reading: int) -> None:
        with trio.move_on_after(self.within):
            await trio.lowlevel.wait_readable(reading)
            if os.read(reading, 1):
                return
            # Its end of the pipe has gone, and so it is going, too.
            code = _reap(pid)
            how = f"signal {-code}" if code < 0 else f"status {code}"
            raise SuccessorFailed(f"process {pid} ended with {how} before it was ready")
        raise SuccessorFailed(f"process {pid} was not ready within {self.within:g} s")

    def _spawn(self, sockets: Mapping[str, socket.socket], writing: int) -> int:
        try:
            return spawn(self.command, sockets, {READY_DESCRIPTOR: writing})
        except CannotSpawn as exc:
            raise SuccessorFailed(str(exc)) from exc


async def outlive_predecessor(environ: Mapping[str, str], within: float) -> None:
    """Wait until the process that started us to take its place has ended, *within* seconds.

    A service manager that stops us waits for us alone and then kills what is left, and so would
    cut what our predecessor is still finishing.  (``KillMode=mixed``; in a container, the same.)
    """
    parent = os.getppid()
    if environ.get(HANDED_OVER_BY) != str(parent):
        return
    with suppress(ProcessLookupError):
        ending = os.pidfd_open(parent)
        try:
            with trio.move_on_after(within):
                await trio.lowlevel.wait_readable(ending)
        finally:
            os.close(ending)


def _reap(pid: int) -> int:
    """How a process that is ending has ended: its status, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def tell_predecessor(environ: Mapping[str, str]) -> None:
    """We serve: the process that started us to take its place, if there is one, may go."""
    descriptor = environ.get(READY_DESCRIPTOR, "")
    if environ.get(HANDED_OVER_BY) == str(os.getppid()) and descriptor.isdecimal():
        with suppress(OSError):  # it has gone already
            os.write(int(descriptor), b"\n")
        with suppress(OSError):
            os.close(int(descriptor))
