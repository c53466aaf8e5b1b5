"""A real redis-server of our own, on a free port, which can be stopped, emptied and killed."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs
import pytest

_STARTS = 10.0  # seconds


@attrs.define(eq=False)
class RedisServer:
    """A program that runs.

    :param arguments: further options of ``redis-server``.
    :param config: text of a file of options, which the server may write to.
    """

    folder: Path
    port: int
    arguments: tuple[str, ...] = ()
    config: str | None = None
    _process: subprocess.Popen[bytes] | None = attrs.field(default=None, init=False)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        self.folder.mkdir(exist_ok=True)
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        if self.config is None:
            options += ["--save", ""]
        else:
            file = self.folder / "redis.conf"
            if not file.exists():
                file.write_text(self.config)
            options.insert(0, str(file))
        self._process = subprocess.Popen(
            ["redis-server", *options, *self.arguments], stdout=subprocess.DEVNULL
        )
        until = time.monotonic() + _STARTS
        while not self._answers():
            assert self._process.poll() is None, "redis-server ended"
            assert time.monotonic() < until, "redis-server does not start"
            time.sleep(0.01)

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1.0):
                return True
        except OSError:
            return False

    def command(self, *words: str) -> str:
        """What the server says to *words*, read as one line."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=5.0) as connection:
            connection.sendall((" ".join(words) + "\r\n").encode())
            return connection.recv(65536).decode()

    def pause(self) -> None:
        """It keeps its connections and says nothing, until it is resumed."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)


@contextmanager
def running_redis(
    folder: Path, *arguments: str, config: str | None = None
) -> Iterator[RedisServer]:
    """A server that answers; the test is skipped where there is no such program."""
    if shutil.which("redis-server") is None:
        pytest.skip("there is no redis-server; `make tools` installs it")
    server = RedisServer(folder, free_port(), arguments, config)
    server.start()
    try:
        yield server
    finally:
        server.kill()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
