"""The whole gateway in virtual time, by seeds; `make sim SEEDS=10000` plays more of them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import trio

from citadel_gateway.app.client_response import ClientResponse
from citadel_gateway.config.loader import parse
from tests.sim import speech
from tests.sim.campaign import campaign, find
from tests.sim.draw import draw
from tests.sim.world import simulate

RUNS = 240
JOBS = min(2, os.cpu_count() or 1)
WITHIN = 60  # runs
QUICKLY_FOUND = [
    "slot_kept_on_cancel", "ticket_leaked_on_timeout", "connection_leaked", "breaker_never_closes",
    "cool_down_ignored", "cap_off_by_one", "seats_off_by_one", "cut_passed_off_as_whole",
    "event_lost", "ambiguous_repeated", "tried_forgotten", "departure_unnoticed",
    "deadline_lost", "counted_twice", "outcome_lost", "loser_not_called_off", "hedge_slot_leaked",
    "deadline_lost", "counted_twice", "outcome_lost", "joined_one_word_early",
    "joined_one_token_late", "replay_said_twice", "replay_not_compared", "usage_counted_twice",
    "prefill_taken_for_granted", "identity_of_the_second", "error_behind_done",
    "broken_said_twice", "comment_counts_as_content", "left_in_silence",
]  # fmt: skip


def test_no_run_violates_an_invariant() -> None:
    summary = campaign(range(RUNS), JOBS, tell=lambda _: None)

    assert summary.runs == RUNS
    assert not summary.failed, summary  # `python -m tests.sim --seed N` replays one


def test_a_seed_gives_the_same_history_in_another_process() -> None:
    seeds = [1, 4, 17, 66, 71]
    here = [simulate(seed).history.digest() for seed in seeds]

    code = (
        "from tests.sim.world import simulate\n"
        f"print(*[simulate(seed).history.digest() for seed in {seeds}])"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert there.stdout.split() == here


def test_other_seeds_give_other_histories() -> None:
    assert len({simulate(seed).history.digest() for seed in range(5)}) == 5


@pytest.mark.parametrize("seed", range(10))
def test_what_is_drawn_is_a_valid_configuration(seed: int) -> None:
    parse(draw(seed).config, source=f"seed {seed}")


@pytest.mark.parametrize("name", QUICKLY_FOUND)
def test_a_planted_bug_is_found(name: str) -> None:
    assert find(name, WITHIN) is not None


@pytest.mark.parametrize("voice", [speech.PLAIN, speech.Voice("~e/0", 2)])
def test_engines_go_on_from_every_word_and_count_alike(voice: speech.Voice) -> None:
    for name in (f"r{n}" for n in range(40)):
        text = speech.text(name, "m", 0, voice)
        for leading in (False, True):
            tokens = speech.tokens(text, leading=leading)
            assert "".join(tokens) == text
            assert speech.count_tokens(text) == len(tokens)
            for place in range(1, len(tokens) + 1):
                said = "".join(tokens[:place])
                assert speech.count_tokens(said) == place
                given = said.rstrip()
                if given and voice is speech.PLAIN:
                    assert speech.goes_on(name, "m", given) == text[len(given) :]
        assert speech.goes_on(name, "m", text.rstrip()) == text[len(text.rstrip()) :]
        assert speech.goes_on(name, "m", "x" + text.rstrip()) is None


async def _sleep_for_ever(*_: object) -> None:
    await trio.sleep_forever()


async def _spin(*_: object) -> None:
    while True:
        await trio.lowlevel.checkpoint()


@pytest.mark.parametrize(
    ("stuck", "complaint"),
    [(_sleep_for_ever, "not over after"), (_spin, "an instant that does not end")],
    ids=["sleeps", "spins"],
)
def test_a_run_that_does_not_end_is_ended_and_shows_its_tasks(
    stuck: Callable[..., Any], complaint: str
) -> None:
    with mock.patch.object(ClientResponse, "whole", stuck):
        run = simulate(1)

    (problem,) = run.problems
    assert problem.startswith(complaint)
    assert stuck.__name__ in problem
