from __future__ import annotations

import pytest

from citadel_gateway.app.cors import Cors
from citadel_gateway.config.schema import CorsConfig
from citadel_gateway.config.values import Origin, Seconds
from citadel_gateway.wire.headers import Fields

PAGE = b"https://chat.example.org"


def cors(*origins: str) -> Cors:
    return Cors(
        CorsConfig(
            allow_origins=tuple(Origin(o) for o in origins),
            allow_headers=("authorization", "content-type"),
            max_age=Seconds(600),
        )
    )


def asked_by(origin: bytes | None) -> Fields:
    return Fields([(b"host", b"gateway")] + ([] if origin is None else [(b"origin", origin)]))


def test_without_configured_origins_nothing_is_said() -> None:
    assert cors().headers(asked_by(PAGE)) == []
    assert cors().preflight(asked_by(PAGE)) == []


def test_a_configured_origin_is_named_back() -> None:
    found = dict(cors(PAGE.decode(), "https://b").headers(asked_by(PAGE)))

    assert found[b"access-control-allow-origin"] == PAGE
    assert found[b"vary"] == b"origin"
    assert b"x-request-id" in found[b"access-control-expose-headers"]


@pytest.mark.parametrize(
    "origin",
    [
        None,
        b"null",
        b"https://evil.example.org",
        PAGE + b".evil.org",
        PAGE + b":8443",
        b"http://chat.example.org",
        PAGE.upper(),
        b"\xff",
    ],
)
def test_any_other_origin_is_told_nothing_but_to_mind_caches(origin: bytes | None) -> None:
    policy = cors(PAGE.decode())

    assert policy.headers(asked_by(origin)) == [(b"vary", b"origin")]
    assert policy.preflight(asked_by(origin)) == [(b"vary", b"origin")]


def test_a_star_is_for_everybody() -> None:
    found = dict(cors("*").headers(asked_by(PAGE)))

    assert found[b"access-control-allow-origin"] == b"*"


def test_credentials_are_never_allowed() -> None:
    for policy in (cors("*"), cors(PAGE.decode())):
        assert b"access-control-allow-credentials" not in dict(policy.preflight(asked_by(PAGE)))


def test_a_preflight_says_what_may_be_sent() -> None:
    found = dict(cors(PAGE.decode()).preflight(asked_by(PAGE)))

    assert found[b"access-control-allow-origin"] == PAGE
    assert found[b"access-control-allow-methods"] == b"GET, POST, OPTIONS"
    assert found[b"access-control-allow-headers"] == b"authorization, content-type"
    assert found[b"access-control-max-age"] == b"600"
