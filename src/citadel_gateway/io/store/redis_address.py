"""Which server of a Redis installation has the data right now, and a client for it.

A single server is where its URL says.  Of a group that sentinels watch it is the primary, which
they know; of a cluster the node that has the slot of the keys, which any node knows.  Either may
change at any time, and who finds himself at the wrong one asks again.
"""

from __future__ import annotations

import itertools
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, NoReturn

import attrs
import coredis
import trio
from coredis.exceptions import RedisError
from coredis.retry import NoRetryPolicy

from citadel_gateway.config.store_url import StorePlace, Topology, parse_store_url
from citadel_gateway.io.store.base import StoreUnavailable

_PATIENCE = 1.0  # seconds for a connection, and for what is sent over it
_ASKING = 0.3  # for one of several that may know where the data is, and may be dead
_LOOKS = 1.0  # between two looks at whom the sentinels name


@attrs.frozen(kw_only=True)
class RedisAddress:
    """An installation, and how to get in.

    :param url: see :func:`~citadel_gateway.config.store_url.parse_store_url`.
    :param username: at the servers with the data, as is *password*.
    :param sentinel_username: at the sentinels, as is *sentinel_password*.
    :param tls: for all of them, if the URL says so.
    """

    url: str
    username: str | None = None
    password: str | None = attrs.field(default=None, repr=False)
    sentinel_username: str | None = None
    sentinel_password: str | None = attrs.field(default=None, repr=False)
    tls: ssl.SSLContext | None = None
    _turns: Iterator[int] = attrs.field(factory=itertools.count, init=False, repr=False)

    @asynccontextmanager
    async def connect(self, key: bytes) -> AsyncIterator[coredis.Redis[bytes]]:
        """A client of the server that has *key*, and answers.

        Who was a primary serves on for seconds after sentinels have named another one, and all
        that is lost.  So the body is cancelled, with a group, when they do.

        Raises :class:`StoreUnavailable`, ``RedisError``, ``OSError``, or ``trio.TooSlowError``,
        alone or in a group.
        """
        place = parse_store_url(self.url)
        if place.path is not None:
            where: dict[str, Any] = {"unix_socket_path": place.path}
        else:
            host, port = await self._locate(place, key)
            where = {"host": host, "port": port, "db": place.db}
        async with self._client(place, where, _PATIENCE, self.username, self.password) as client:
            with trio.fail_after(_PATIENCE):
                await client.ping()
                if place.topology is Topology.SENTINEL and (await client.role()).role != "master":
                    raise StoreUnavailable(f"{host}:{port} is no primary any more")
            async with trio.open_nursery() as nursery:
                if place.topology is Topology.SENTINEL:
                    nursery.start_soon(self._watch, place, key, (host, port))
                yield client
                nursery.cancel_scope.cancel()

    async def _watch(self, place: StorePlace, key: bytes, server: tuple[str, int]) -> NoReturn:
        """Raises :class:`StoreUnavailable` when sentinels name another one than *server*."""
        while True:
            await trio.sleep(_LOOKS)
            try:
                named = await self._locate(place, key)
            except StoreUnavailable:
                continue  # it serves without sentinels, too
            if named != server:
                raise StoreUnavailable(f"sentinels name {named[0]}:{named[1]}")

    def _client(
        self,
        place: StorePlace,
        where: dict[str, Any],
        patience: float,
        username: str | None,
        password: str | None,
    ) -> coredis.Redis[bytes]:
        return coredis.Redis(
            **where,
            username=username,
            password=password,
            ssl_context=self.tls if place.uses_tls else None,
            connect_timeout=patience,
            stream_timeout=patience,
            max_connections=2,
            verify_version=False,  # old ones know CLUSTER SLOTS only, and new ones still do
            retry_policy=NoRetryPolicy(),  # a request is not charged twice
        )

    async def _locate(self, place: StorePlace, key: bytes) -> tuple[str, int]:
        """Where *key* is.  Raises :class:`StoreUnavailable`."""
        match place.topology:
            case Topology.SINGLE:
                return place.hosts[0]
            case Topology.SENTINEL:
                return await self._ask_sentinels(place)
            case Topology.CLUSTER:
                return await self._ask_nodes(place, key)

    async def _ask_sentinels(self, place: StorePlace) -> tuple[str, int]:
        """Ask all of them at once, and believe who knows of the latest fail-over.

        One that is cut off from the others still names the primary of before.
        """
        found: list[tuple[int, str, int]] = []
        trouble: list[str] = []

        async def ask(host: str, port: int) -> None:
            username, password = self.sentinel_username, self.sentinel_password
            with _in_words(trouble, host, port), trio.fail_after(_ASKING):
                where = {"host": host, "port": port}
                async with self._client(place, where, _ASKING, username, password) as sentinel:
                    said = await sentinel.sentinel_master(place.service)
                    told = {k: v.decode() for k, v in said.items() if isinstance(v, bytes)}
                    found.append((int(told["config-epoch"]), told["ip"], int(told["port"])))

        async with trio.open_nursery() as nursery:
            for host, port in place.hosts:
                nursery.start_soon(ask, host, port)
        if not found:
            raise StoreUnavailable(f"no sentinel names the primary: {'; '.join(trouble)}")
        return max(found)[1:]

    async def _ask_nodes(self, place: StorePlace, key: bytes) -> tuple[str, int]:
        """Ask one after the other until one knows, and another one first each time.

        One that is cut off from the others names who does not have the key any more.
        """
        trouble: list[str] = []
        first = next(self._turns) % len(place.hosts)
        for host, port in place.hosts[first:] + place.hosts[:first]:
            with _in_words(trouble, host, port), trio.fail_after(_ASKING):
                where = {"host": host, "port": port}
                username, password = self.username, self.password
                async with self._client(place, where, _ASKING, username, password) as node:
                    slot = await node.cluster_keyslot(key)
                    for (low, high), nodes in (await node.cluster_slots()).items():
                        if low <= slot <= high:
                            return nodes[0]["host"] or host, nodes[0]["port"]
                    raise StoreUnavailable(f"nobody has slot {slot}")
        raise StoreUnavailable(f"no node tells where the keys are: {'; '.join(trouble)}")


@contextmanager
def _in_words(trouble: list[str], host: str, port: int) -> Iterator[None]:
    """What goes wrong is written down, and that is all."""
    try:
        yield
    except* (RedisError, OSError, trio.TooSlowError, StoreUnavailable) as group:
        cause: BaseException = group
        while isinstance(cause, BaseExceptionGroup):
            cause = cause.exceptions[0]
        trouble.append(f"{host}:{port}: {str(cause) or type(cause).__name__}")
