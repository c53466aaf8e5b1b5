"""An operator's orders to one gateway, known to all that share its store.

What is told is how things are to be: for a model and a URL, whether it is cordoned, and what was
added.  So it does not matter in which order it is heard, or how often, and a gateway that comes
later hears it, too.  Of two orders about the same the later one counts.

An address that means a server of its own on every host, such as 127.0.0.1, is told to the gateways
of the same host only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import attrs
import orjson

from citadel_gateway.app.operations import Operations
from citadel_gateway.io.store.membership import Membership

_CORDON, _ADDED = "cordon", "added"

Name: TypeAlias = "tuple[str, str]"
"""A model and a URL."""


@attrs.define(eq=False)
class FleetOrders:
    """Of one gateway.

    :param host_of: of a URL: where it means something, if that is not everywhere.
    """

    membership: Membership
    operations: Operations
    host_of: Callable[[str], str | None]
    _cordons: set[Name] = attrs.field(factory=set, init=False)
    _added: dict[Name, Mapping[str, Any]] = attrs.field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        self.membership.readers.append(self._hear)
        self.operations.on_change = self._tell

    def _tell(self) -> None:
        """Let the others know what is otherwise than they know it."""
        cordons, added = self._ordered()
        for name in sorted(cordons ^ self._cordons):
            self._post(_CORDON, name, name in cordons)
        for name in sorted(added.keys() | self._added.keys()):
            if added.get(name) != self._added.get(name):
                self._post(_ADDED, name, added.get(name))
        self._cordons, self._added = cordons, added

    def _post(self, kind: str, name: Name, how: Any) -> None:
        model, url = name
        host = self.host_of(url)
        said = {"model": model, "url": url, "host": host, "is": how}
        where = "" if host is None else f" on {host}"
        self.membership.post(f"{kind} {model} {url}{where}", orjson.dumps(said).decode())

    def _hear(self, posts: Mapping[str, str]) -> None:
        cordons: dict[Name, bool] = {}
        added: dict[Name, Mapping[str, Any] | None] = {}
        for post, text in posts.items():
            kind = post.partition(" ")[0]
            if kind not in {_CORDON, _ADDED}:
                continue
            self.membership.keep(post, text)
            said = orjson.loads(text)
            if said["host"] != self.host_of(said["url"]):
                continue
            name = said["model"], said["url"]
            if kind == _CORDON:
                cordons[name] = said["is"]
            else:
                added[name] = said["is"]
        if cordons or added:
            self.operations.take_over(cordons, added)
            self._cordons, self._added = self._ordered()

    def _ordered(self) -> tuple[set[Name], dict[Name, Mapping[str, Any]]]:
        added = {(model, url): options for model, url, options in self.operations.added()}
        return {*self.operations.cordoned()}, added
