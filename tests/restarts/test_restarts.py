"""Nobody notices a reload or a restart.  CITADEL_RESTARTS=20 and CITADEL_RELOADS=100 for more."""

from __future__ import annotations

import os
from pathlib import Path

from tests.restarts.program import hand_over_often, reload_often, restart_often, roll_often

RELOADS = int(os.environ.get("CITADEL_RELOADS", "10"))
RESTARTS = int(os.environ.get("CITADEL_RESTARTS", "3"))
ROLLS = int(os.environ.get("CITADEL_RESTARTS", "1"))
HAND_OVERS = int(os.environ.get("CITADEL_RESTARTS", "2"))


async def test_reloads_under_load_lose_nothing(tmp_path: Path) -> None:
    result = await reload_often(tmp_path, RELOADS)

    assert result.is_clean, result
    assert set(result.tally.answered) == {"fresh", "kept", "stream"}


async def test_restarts_on_a_socket_that_stays_lose_nothing(tmp_path: Path) -> None:
    result = await restart_often(tmp_path, RESTARTS)

    assert result.is_clean, result
    assert set(result.tally.answered) == {"fresh", "kept", "stream"}


async def test_handing_over_to_a_successor_loses_nothing(tmp_path: Path) -> None:
    result = await hand_over_often(tmp_path, HAND_OVERS)

    assert result.is_clean, result
    assert set(result.tally.answered) == {"fresh", "kept", "stream"}


async def test_replacing_worker_by_worker_loses_nothing(tmp_path: Path) -> None:
    result = await roll_often(tmp_path, ROLLS, workers=2)

    assert result.is_clean, result
    assert set(result.tally.answered) == {"fresh", "kept", "stream"}
