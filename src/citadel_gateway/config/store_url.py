"""What the URL of a Redis store says: one server, a group watched by sentinels, or a cluster."""

from __future__ import annotations

import enum
import re

import attrs

_URL = re.compile(
    r"redis(?P<tls>s)?(\+(?P<kind>sentinel|cluster))?://(?P<hosts>[^/?#\s]+)(/(?P<path>[^?#\s]*))?"
)
_HOST = re.compile(
    r"(?P<name>[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?|\[[0-9a-fA-F:.]+\])"
    r"(:(?P<port>[0-9]{1,5}))?"
)
_SERVICE = re.compile(r"(?P<service>[A-Za-z0-9._-]+)(/(?P<db>[0-9]{1,5}))?")
_LIKE = (
    "is not like redis://host:6379, rediss://host, unix:/path, "
    "redis+sentinel://host1,host2/service or redis+cluster://host1:6379,host2:6379"
)


class Topology(enum.Enum):
    SINGLE = "single"
    SENTINEL = "sentinel"
    CLUSTER = "cluster"


_PORTS = {Topology.SINGLE: 6379, Topology.SENTINEL: 26379, Topology.CLUSTER: 6379}


@attrs.frozen(kw_only=True)
class StorePlace:
    """Where a store is.

    :param hosts: the server, or sentinels, or some of a cluster's nodes; none of a Unix socket.
    :param service: what sentinels call the group.
    :param path: of a Unix socket.
    """

    topology: Topology = Topology.SINGLE
    hosts: tuple[tuple[str, int], ...] = ()
    service: str = ""
    db: int = 0
    uses_tls: bool = False
    path: str | None = None


def parse_store_url(url: str) -> StorePlace:
    """Raises ``ValueError``, which says what is wrong with *url*, but not what it is."""
    if "@" in url:
        raise ValueError("has an '@': credentials belong in username and password, not in the URL")
    if url.startswith("unix:"):
        if not re.fullmatch(r"unix:(/[^/\s]+)+", url):
            raise ValueError("has no absolute path of a socket")
        return StorePlace(path=url.removeprefix("unix:"))
    parts = _URL.fullmatch(url)
    if parts is None:
        raise ValueError(_LIKE)
    topology = Topology(parts["kind"] or "single")
    hosts = tuple(_host(text, _PORTS[topology]) for text in parts["hosts"].split(","))
    if topology is Topology.SINGLE and len(hosts) > 1:
        raise ValueError("has several hosts: they need redis+sentinel:// or redis+cluster://")
    service, db = _service_and_db(topology, parts["path"] or "")
    return StorePlace(
        topology=topology, hosts=hosts, service=service, db=db, uses_tls=bool(parts["tls"])
    )


def _host(text: str, default: int) -> tuple[str, int]:
    found = _HOST.fullmatch(text)
    if found is None:
        raise ValueError(_LIKE)
    port = int(found["port"] or default)
    if not 0 < port < 65536:
        raise ValueError(f"has no valid port behind {found['name']}")
    return found["name"].strip("[]").lower(), port


def _service_and_db(topology: Topology, path: str) -> tuple[str, int]:
    match topology:
        case Topology.SENTINEL:
            found = _SERVICE.fullmatch(path)
            if found is None:
                raise ValueError("has no name of a service: redis+sentinel://host1,host2/service")
            return found["service"], int(found["db"] or 0)
        case Topology.CLUSTER:
            if path not in ("", "0"):
                raise ValueError("has something behind the hosts, but a cluster has one database")
            return "", 0
        case _:
            if not re.fullmatch(r"[0-9]{0,5}", path):
                raise ValueError("has more than the number of a database behind the host")
            return "", int(path or 0)
