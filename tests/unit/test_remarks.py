"""What is right in a configuration, and hardly meant."""

from __future__ import annotations

from typing import Any

import pytest

from citadel_gateway.config.loader import parse
from citadel_gateway.config.remarks import remarks


def config(workers: int, gb: float) -> dict[str, Any]:
    return {
        "service": {"workers": workers},
        "models": {"m": {"endpoint": "http://127.0.0.1:1"}},
        "performance": {"memory_limit_gb": gb},
    }


@pytest.mark.parametrize(("workers", "gb"), [(4, 0.5), (1, 0.2)])
def test_workers_with_hardly_any_memory_are_remarked_on(workers: int, gb: float) -> None:
    [remark] = remarks(parse(config(workers, gb), source="test"))

    assert remark.startswith("performance.memory_limit_gb: leaves ")


@pytest.mark.parametrize(("workers", "gb"), [(4, 1.0), (1, 0.25)])
def test_workers_with_enough_are_not(workers: int, gb: float) -> None:
    assert list(remarks(parse(config(workers, gb), source="test"))) == []
