"""Several real Redis servers that are one: watched by a sentinel, or as a cluster."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import attrs

from tests.support.redis_server import RedisServer, free_port, running_redis

_STARTS = 15.0  # seconds
_SLOTS = 16384
SERVICE = "main"


@attrs.frozen
class Watched:
    """A primary and a replica, and who makes that one the primary when the other has died."""

    primary: RedisServer
    replica: RedisServer
    sentinel: RedisServer

    @property
    def url(self) -> str:
        return f"redis+sentinel://127.0.0.1:{self.sentinel.port}/{SERVICE}"

    @property
    def url_with_a_dead_one(self) -> str:
        return _with_a_dead_one(self.url)


@contextmanager
def watched(folder: Path) -> Iterator[Watched]:
    folder.mkdir(exist_ok=True)
    with ExitStack() as stack:
        primary = stack.enter_context(
            running_redis(folder / "a", "--repl-diskless-sync-delay", "0")
        )
        replica = stack.enter_context(
            running_redis(folder / "b", "--replicaof", f"127.0.0.1 {primary.port}")
        )
        _wait(partial(_has_replica, primary))
        config = (
            f"sentinel monitor {SERVICE} 127.0.0.1 {primary.port} 1\n"
            f"sentinel down-after-milliseconds {SERVICE} 300\n"
            f"sentinel failover-timeout {SERVICE} 2000\n"
        )
        sentinel = stack.enter_context(running_redis(folder / "s", "--sentinel", config=config))
        _wait(lambda: str(replica.port) in sentinel.command("SENTINEL", "REPLICAS", SERVICE))
        yield Watched(primary, replica, sentinel)


@attrs.frozen
class Cluster:
    """Three primaries, and maybe replicas behind them."""

    nodes: tuple[RedisServer, ...]
    replicas: tuple[RedisServer, ...]

    @property
    def url(self) -> str:
        return "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)

    @property
    def url_with_a_dead_one(self) -> str:
        return _with_a_dead_one(self.url)

    def owner(self, key: str) -> RedisServer:
        """The primary that has *key*."""
        return self.nodes[self._slot(key) * len(self.nodes) // _SLOTS]

    def _slot(self, key: str) -> int:
        return int(self.nodes[0].command("CLUSTER", "KEYSLOT", key).strip(":\r\n"))

    def replica_of(self, node: RedisServer) -> RedisServer:
        return self.replicas[self.nodes.index(node)]

    def move(self, key: str, to: RedisServer) -> None:
        """Give the slot of *key* to another node, key by key, as resharding does."""
        source, slot = self.owner(key), str(self._slot(key))
        to.command("CLUSTER", "SETSLOT", slot, "IMPORTING", node_id(source))
        source.command("CLUSTER", "SETSLOT", slot, "MIGRATING", node_id(to))
        while keys := _words(source.command("CLUSTER", "GETKEYSINSLOT", slot, "10")):
            for each in keys:
                source.command("MIGRATE", "127.0.0.1", str(to.port), each, "0", "5000")
        for node in (to, source, *self.nodes):
            node.command("CLUSTER", "SETSLOT", slot, "NODE", node_id(to))


@contextmanager
def cluster(folder: Path, *, with_replicas: bool = False) -> Iterator[Cluster]:
    folder.mkdir(exist_ok=True)
    count = 3
    with ExitStack() as stack:
        servers = [
            stack.enter_context(
                running_redis(
                    folder / str(number),
                    "--cluster-enabled", "yes",
                    "--cluster-port", str(free_port()),
                    "--cluster-node-timeout", "500",
                    "--cluster-require-full-coverage", "no",
                    "--repl-diskless-sync-delay", "0",
                )
            )
            for number in range(2 * count if with_replicas else count)
        ]  # fmt: skip
        found = Cluster(tuple(servers[:count]), tuple(servers[count:]))
        bounds = [-(-_SLOTS * place // count) for place in range(count + 1)]
        for place, node in enumerate(found.nodes):
            first, last = bounds[place], bounds[place + 1] - 1
            node.command("CLUSTER", "ADDSLOTSRANGE", str(first), str(last))
        for server in servers[1:]:
            server.command(
                "CLUSTER", "MEET", "127.0.0.1", str(servers[0].port), servers[0].arguments[3]
            )
        known = f"cluster_known_nodes:{len(servers)}"
        _wait(lambda: all(_is_complete(server, known) for server in servers))
        for node, replica in zip(found.nodes, found.replicas, strict=False):
            replica.command("CLUSTER", "REPLICATE", node_id(node))
            _wait(partial(_has_replica, node))
        yield found


def node_id(server: RedisServer) -> str:
    return _words(server.command("CLUSTER", "MYID"))[0]


def _with_a_dead_one(url: str) -> str:
    """Which is asked first."""
    return url.replace("//", f"//127.0.0.1:{free_port()},")


def _has_replica(server: RedisServer) -> bool:
    return "state=online" in server.command("INFO", "replication")


def _is_complete(server: RedisServer, known: str) -> bool:
    info = server.command("CLUSTER", "INFO")
    return "cluster_state:ok" in info and known in info and f"assigned:{_SLOTS}" in info


def _words(reply: str) -> list[str]:
    """The strings in a reply, or in a list of them."""
    return [line for line in reply.split("\r\n") if line and line[0] not in "*$"]


def _wait(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + _STARTS
    while not condition():
        assert time.monotonic() < until, "the servers do not come together"
        time.sleep(0.02)
