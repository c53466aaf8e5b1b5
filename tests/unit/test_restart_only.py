"""What cannot change while the gateway runs is kept, and said."""

from __future__ import annotations

from typing import Any

from citadel_gateway.config.loader import parse
from citadel_gateway.config.restart import keep_what_is_fixed
from citadel_gateway.config.schema import GatewayConfigSchema


def config(**sections: Any) -> GatewayConfigSchema:
    return parse({"models": {"m": {"endpoint": "http://127.0.0.1:1"}}, **sections})


def test_the_same_is_the_same() -> None:
    assert keep_what_is_fixed(config(), config()) == (config(), [])


def test_what_can_change_does() -> None:
    wanted = config(performance={"rate_limit_rps": 1}, service={"drain_timeout": 5})

    assert keep_what_is_fixed(config(), wanted) == (wanted, [])


def test_addresses_stay_and_everything_else_does_not() -> None:
    wanted = config(
        service={"host": "127.0.0.1", "port": 9, "drain_timeout": 5},
        monitoring={"prometheus_port": None, "access_log": False},
    )

    kept, said = keep_what_is_fixed(config(), wanted)

    assert kept == config(service={"drain_timeout": 5}, monitoring={"access_log": False})
    assert said == [
        "service.host stays 0.0.0.0 until a restart; the file says 127.0.0.1",
        "service.port stays 8000 until a restart; the file says 9",
        "monitoring.prometheus_port stays 9090 until a restart; the file says null",
    ]
