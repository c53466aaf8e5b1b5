"""An operator's orders to one gateway, known to all that share its store.

What is told is how things are to be: for a model and a URL, whether it is cordoned, and what was
added.  So it does not matter how often it is heard, and a gateway that comes later hears it, too.
Of two orders about the same the one with the later stamp counts; who hears of the earlier one
afterwards says the later one again, so that it is the last thing that the store knows.

An address that means a server of its own on every host, such as 127.0.0.1, is told to the gateways
of the same host only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import attrs
import orjson

from citadel_gateway.app.operations import ADDED, CORDON, Operations
from citadel_gateway.io.store.membership import Membership
from citadel_gateway.policy.cordons import Name
from citadel_gateway.policy.stamps import Stamps


@attrs.frozen
class _Post:
    stamp: int
    text: str


@attrs.define(eq=False)
class FleetOrders:
    """Of one gateway.

    :param name_of: of a model and a URL, the same for all for whom it means the same.
    """

    membership: Membership
    operations: Operations
    name_of: Callable[[str, str], str]
    _known: dict[str, _Post] = attrs.field(factory=dict, init=False)
    _stamps: Stamps = attrs.field(factory=Stamps, init=False)

    def __attrs_post_init__(self) -> None:
        self.membership.readers.append(self._hear)
        self.operations.on_change = self._tell

    def tell_restored(self) -> None:
        """Say what was restored and nobody knows: all who did have gone.

        For after the first meeting.
        """
        if not self.membership.is_good():
            return
        cordons, added = self.operations.cordoned(), self._added()
        for kind, names in ((CORDON, cordons), (ADDED, added)):
            self._tell(kind, [name for name in names if self._post(kind, name) not in self._known])

    def _tell(self, kind: str, names: Iterable[Name]) -> None:
        """An order was carried out here, about *names*."""
        cordons, added = {*self.operations.cordoned()}, self._added()
        for name in sorted(names):
            stamp = self._stamps.make(self.membership.name, self.membership.now())
            said = {
                "model": name[0],
                "url": name[1],
                "is": name in cordons if kind == CORDON else added.get(name),
                "stamp": stamp,
            }
            post, text = self._post(kind, name), orjson.dumps(said).decode()
            self._known[post] = _Post(stamp, text)
            self.membership.post(post, text)

    def _added(self) -> dict[Name, Mapping[str, Any]]:
        return {(model, url): options for model, url, options in self.operations.added()}

    def _post(self, kind: str, name: Name) -> str:
        return f"{kind} {self.name_of(*name)}"

    def _hear(self, posts: Mapping[str, str]) -> None:
        cordons: dict[Name, bool] = {}
        added: dict[Name, Mapping[str, Any] | None] = {}
        for post, text in posts.items():
            kind = post.partition(" ")[0]
            if kind not in {CORDON, ADDED}:
                continue
            said = orjson.loads(text)
            if not self._is_news(post, _Post(said["stamp"], text)):
                continue
            name = said["model"], said["url"]
            if post != self._post(kind, name):  # another host's
                continue
            if kind == CORDON:
                cordons[name] = said["is"]
            else:
                added[name] = said["is"]
        if cordons or added:
            self.operations.take_over(cordons, added)

    def _is_news(self, name: str, heard: _Post) -> bool:
        self._stamps.see(heard.stamp)
        known = self._known.get(name)
        if known is not None and known.stamp > heard.stamp:
            self.membership.post(name, known.text)
            return False
        self.membership.keep(name, heard.text)
        self._known[name] = heard
        return known is None or known.stamp < heard.stamp
