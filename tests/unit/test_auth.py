"""Who is let in by which header."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from citadel_gateway.policy.auth import ApiKey, KeyRing, generate_key

steady = settings(deadline=None, derandomize=True)

SECRET = "sk-cit-alice-0123456789"
ALICE = ApiKey(id="alice", digest=hashlib.sha256(SECRET.encode()).digest())
RING = KeyRing.of([ALICE])


@pytest.mark.parametrize("scheme", [b"Bearer", b"bearer", b"BEARER"])
def test_a_known_key_is_found_however_the_scheme_is_spelled(scheme: bytes) -> None:
    assert RING.find([scheme + b" " + SECRET.encode()]) is ALICE


@pytest.mark.parametrize(
    "authorization",
    [
        [],
        [b""],
        [b"Bearer"],
        [b"Bearer "],
        [SECRET.encode()],
        [b"Basic " + SECRET.encode()],
        [b"Bearer  " + SECRET.encode()],
        [b"Bearer\t" + SECRET.encode()],
        [b" Bearer " + SECRET.encode()],
        [b"Bearer " + SECRET.encode() + b" "],
        [b"Bearer " + SECRET.encode() + b"\n"],
        [b"Bearer " + SECRET.encode() + b","],
        [b"Bearer " + SECRET.encode() + b", Bearer x"],
        [b"Bearer " + SECRET.encode()] * 2,
        [b"Bearer " + SECRET.encode(), b"Bearer wrong"],
        [b"Bearer " + SECRET.encode()[:-1]],
        [b"Bearer " + SECRET.upper().encode()],
        [b"Bearer " + "schlüssel".encode()],
        [b"Bearer " + b"x" * 600],
        [b"Bearer \x00"],
    ],
    ids=repr,
)
def test_anything_else_is_nobody(authorization: list[bytes]) -> None:
    assert RING.find(authorization) is None


@steady
@given(st.lists(st.binary(max_size=600), max_size=3))
def test_no_header_makes_it_fail(authorization: list[bytes]) -> None:
    assert RING.find(authorization) is None


def test_the_right_one_of_many_is_found() -> None:
    keys = {name: generate_key(name) for name in ("a", "b", "c")}
    ring = KeyRing.of(
        [ApiKey(id=name, digest=bytes.fromhex(digest)) for name, (_, digest) in keys.items()]
    )

    found = {name: ring.find([b"Bearer " + key.encode()]) for name, (key, _) in keys.items()}

    assert {name: key.id for name, key in found.items() if key} == {"a": "a", "b": "b", "c": "c"}


def test_a_ring_without_keys_is_false() -> None:
    assert (bool(KeyRing()), bool(RING)) == (False, True)


def test_a_key_without_a_list_may_use_every_model_and_one_with_a_list_only_those() -> None:
    limited = ApiKey(id="x", digest=b"", allowed_models=frozenset({"small"}))

    assert ALICE.may_use("anything")
    assert limited.may_use("small")
    assert not limited.may_use("large")


def test_a_generated_key_fits_its_hash_names_its_owner_and_is_new_every_time() -> None:
    key, digest = generate_key("bob")

    assert digest == hashlib.sha256(key.encode()).hexdigest()
    assert key.startswith("sk-cit-bob-")
    assert len(key) == len("sk-cit-bob-") + 43
    assert generate_key("bob")[0] != key
