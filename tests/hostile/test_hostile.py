"""A short siege of a real gateway process; `python -m tests.hostile` is the long one."""

from __future__ import annotations

import pytest
import trio

from tests.hostile.program import SHORT, besiege

SEED = 20
PATIENCE = 50.0


@pytest.mark.parametrize(
    "names",
    [
        ["corpus", "closings", "pipelines"],
        ["mutants", "encodings"],
        ["deliveries", "departures", "silent engines", "crowds"],
        ["floods", "slowness", "stop"],
    ],
    ids=lambda names: names[0],
)
async def test_nothing_hostile_is_served_noticed_by_others_or_left_behind(names: list[str]) -> None:
    with trio.fail_after(PATIENCE):
        report = await besiege(names, SHORT, seed=SEED)

    report.assert_clean()
