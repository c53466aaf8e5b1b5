"""This gateway comes through the scenarios; `python -m tests.scenarios` tells it at length."""

from __future__ import annotations

import pytest

from tests.scenarios.gateways import CITADEL
from tests.scenarios.judging import Grade
from tests.scenarios.runner import Card, run
from tests.scenarios.scenario import SCENARIOS


@pytest.fixture(scope="module")
def card() -> Card:
    """All of them at once, with short clocks: about twelve seconds."""
    return run(CITADEL)


def test_all_were_played(card: Card) -> None:
    assert card.problem == ""
    assert [result.scenario.id for result in card.results] == sorted(SCENARIOS)


@pytest.mark.parametrize("name", sorted(SCENARIOS))
def test_passes(card: Card, name: str) -> None:
    result = next(result for result in card.results if result.scenario.id == name)

    assert result.verdict.grade is Grade.PASS, result.verdict.why
