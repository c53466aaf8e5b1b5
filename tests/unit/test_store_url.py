"""Where a store's URL says that it is."""

from __future__ import annotations

import pytest

from citadel_gateway.config.store_url import StorePlace, Topology, parse_store_url


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("redis://Store", StorePlace(hosts=(("store", 6379),))),
        ("redis://store:7000/3", StorePlace(hosts=(("store", 7000),), db=3)),
        ("rediss://[::1]:7000/", StorePlace(hosts=(("::1", 7000),), uses_tls=True)),
        ("unix:/run/redis.sock", StorePlace(path="/run/redis.sock")),
        (
            "redis+sentinel://a,b:1,[2001:db8::1]:2/main",
            StorePlace(
                topology=Topology.SENTINEL,
                hosts=(("a", 26379), ("b", 1), ("2001:db8::1", 2)),
                service="main",
            ),
        ),
        (
            "rediss+sentinel://a/main.group/5",
            StorePlace(
                topology=Topology.SENTINEL,
                hosts=(("a", 26379),),
                service="main.group",
                db=5,
                uses_tls=True,
            ),
        ),
        (
            "redis+cluster://a,b:7001",
            StorePlace(topology=Topology.CLUSTER, hosts=(("a", 6379), ("b", 7001))),
        ),
    ],
)
def test_what_it_says(url: str, place: StorePlace) -> None:
    assert parse_store_url(url) == place


@pytest.mark.parametrize(
    "url",
    ["", "redis:", "redis://", "redis:///0", "redis://a b", "redis://a:99999", "redis://::1",
     "redis://a?x=1", "unix:", "unix:redis.sock", "http://a", "redis+sentinel://a/", "a:6379",
     "redis+sentinel://a/main/x", "redis+cluster://", "redis://u:p@a"],
)  # fmt: skip
def test_what_says_nothing_of_the_kind_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"^(is|has) "):
        parse_store_url(url)
