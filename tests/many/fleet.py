"""Gateways of several workers each, and whose connections are whose."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs
from bench.processes import tree

from tests.support.several import GatewayProcess


@attrs.frozen
class Shape:
    """How many gateways, of how many workers each."""

    workers: int
    gateways: int = 1

    def __str__(self) -> str:
        workers = "1 worker" if self.workers == 1 else f"{self.workers} workers"
        if self.gateways == 1:
            return workers if self.workers == 1 else f"{workers}, LMDB"
        return f"{self.gateways} gateways of {workers}, Redis"

    @property
    def processes(self) -> int:
        return self.workers * self.gateways

    def store(self, url: str, folder: Path) -> dict[str, Any]:
        """The section of the configuration; nothing but what it needs, so all defaults count."""
        if self.gateways > 1:
            return {"kind": "redis", "url": url}
        return {} if self.workers == 1 else {"path": str(folder)}


def api_key(name: str, **options: Any) -> dict[str, Any]:
    """A key that is its own name."""
    return {"id": name, "sha256": hashlib.sha256(name.encode()).hexdigest(), **options}


def workers_of(several: Iterable[GatewayProcess]) -> list[int]:
    """Process numbers of all that serve."""
    found: list[int] = []
    for gateway in several:
        own, *children = tree(gateway.process.pid)
        found += children or [own]
    return found


def owners(ports: Iterable[int], pids: Sequence[int], *, of_peer: bool) -> dict[int, int]:
    """Which of *pids* have a connection from, or *of_peer*: with somebody on, which of *ports*."""
    inodes = _inodes(set(ports), 2 if of_peer else 1)
    found: dict[int, int] = {}
    for pid in pids:
        with suppress(OSError):
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    port = inodes.get(str(descriptor.readlink()))
                    if port is not None:
                        found[port] = pid
    return found


def _inodes(ports: set[int], field: int) -> dict[str, int]:
    """Sockets by the name that descriptors have for them."""
    found = {}
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        port = int(fields[field].rpartition(":")[2], 16)
        if port in ports:
            found[f"socket:[{fields[9]}]"] = port
    return found
