"""Which hosts share a store, for people who look at the status of one of them."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any, NoReturn

import attrs
import orjson

from citadel_gateway.io.store.membership import Membership
from citadel_gateway.io.ticks import sleep_until_tick

_EVERY = 10.0  # seconds between two signs of life
_GONE = 35.0  # seconds after the last one
_KIND = "host "


@attrs.define(eq=False)
class Presence:
    """Says from time to time that this host is there, and knows which others have.

    All processes of a host say the same, and so a host counts once.

    :param workers: how many processes serve on this host.
    """

    membership: Membership
    workers: int
    host: str = attrs.field(factory=socket.gethostname)
    _others: dict[str, tuple[int, float]] = attrs.field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        self.membership.readers.append(self._read)

    async def run(self) -> NoReturn:
        """Be there."""
        while True:
            said = {"workers": self.workers, "at": round(self.membership.now())}
            self.membership.post(_KIND + self.host, orjson.dumps(said).decode())
            await sleep_until_tick(_EVERY)

    def report(self) -> list[dict[str, Any]]:
        """For ``/models/status``: this host first, then those that were heard of lately."""
        now = self.membership.now()
        for host in [h for h, (_, at) in self._others.items() if now - at > _GONE]:
            del self._others[host]
        others = {host: said for host, said in self._others.items() if host != self.host}
        return [
            {"host": self.host, "workers": self.workers, "seen_seconds_ago": 0.0},
            *(
                {"host": host, "workers": workers, "seen_seconds_ago": round(max(0, now - at), 1)}
                for host, (workers, at) in sorted(others.items())
            ),
        ]

    def _read(self, posts: Mapping[str, str]) -> None:
        for post, text in posts.items():
            if post.startswith(_KIND):
                said = orjson.loads(text)
                self._others[post.removeprefix(_KIND)] = (said["workers"], said["at"])
