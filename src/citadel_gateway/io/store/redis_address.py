"""Which server of a Redis installation has the data right now, and a client for it.

A single server is where its URL says.  Of a group that sentinels watch it is the primary, which
they know; of a cluster the node that has the slot of the keys, which any node knows.  Either may
change at any time, and who finds himself at the wrong one asks again.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
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
        """Ask one after the other until one knows."""
        if place.topology is Topology.SINGLE:
            return place.hosts[0]
        why = "nobody was asked"
        for host, port in place.hosts:
            try:
                with trio.fail_after(_ASKING):
                    return await self._ask(place, host, port, key)
            except* (RedisError, OSError, trio.TooSlowError, StoreUnavailable) as group:
                first = group.exceptions[0]
                why = f"{host}:{port}: {str(first) or type(first).__name__}"
        raise StoreUnavailable(f"no {place.topology.value} node tells where the data is: {why}")

    async def _ask(self, place: StorePlace, host: str, port: int, key: bytes) -> tuple[str, int]:
        where = {"host": host, "port": port}
        if place.topology is Topology.SENTINEL:
            username, password = self.sentinel_username, self.sentinel_password
            async with self._client(place, where, _ASKING, username, password) as sentinel:
                found = await sentinel.sentinel_get_master_addr_by_name(place.service)
                if found is None:
                    raise StoreUnavailable(f"there is no service {place.service}")
                return found
        async with self._client(place, where, _ASKING, self.username, self.password) as node:
            slot = await node.cluster_keyslot(key)
            for (first, last), nodes in (await node.cluster_slots()).items():
                if first <= slot <= last:
                    return nodes[0]["host"] or host, nodes[0]["port"]
        raise StoreUnavailable(f"no node has slot {slot}")
