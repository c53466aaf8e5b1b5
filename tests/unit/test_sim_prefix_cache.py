from __future__ import annotations

from citadel_gateway.sim.prefix_cache import PrefixCache


def words(count: int, name: str = "w") -> list[str]:
    return [f"{name}{i}" for i in range(count)]


def test_nothing_is_cached_at_first() -> None:
    assert PrefixCache(1000).match(words(64)) == 0


def test_whole_blocks_of_a_known_beginning_are_cached() -> None:
    cache = PrefixCache(1000)
    cache.remember(words(40))

    assert cache.match([*words(40), "and", "more"]) == 32
    assert cache.match(words(20)) == 16


def test_the_last_token_is_always_read() -> None:
    cache = PrefixCache(1000)
    cache.remember(words(32))

    assert cache.match(words(32)) == 16
    assert cache.match(words(33)) == 32


def test_a_difference_at_the_front_spoils_everything_after_it() -> None:
    cache = PrefixCache(1000)
    cache.remember(words(64))

    assert cache.match(["other", *words(64)[1:]]) == 0


def test_the_least_recently_used_prompt_leaves_first() -> None:
    cache = PrefixCache(64)
    cache.remember(words(32, "a"))
    cache.remember(words(32, "b"))
    cache.remember(words(32, "a"))
    cache.remember(words(32, "c"))

    assert cache.match(words(33, "a")) == 32
    assert cache.match(words(33, "b")) == 0
    assert cache.match(words(33, "c")) == 32


def test_the_end_of_a_prompt_leaves_before_its_beginning() -> None:
    cache = PrefixCache(48)
    cache.remember(words(48, "a"))
    cache.remember(words(16, "b"))

    assert cache.match(words(49, "a")) == 32


def test_a_cache_of_no_size_remembers_nothing() -> None:
    cache = PrefixCache(0)
    cache.remember(words(64))

    assert cache.match(words(64)) == 0
