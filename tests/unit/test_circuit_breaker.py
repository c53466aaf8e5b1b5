"""When an endpoint is left alone and when it is asked again, to the request and the second."""

from __future__ import annotations

from collections.abc import Iterable

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from citadel_gateway.policy.circuit_breaker import (
    BreakerPolicy,
    CircuitBreaker,
    Permit,
    State,
    Transition,
    Verdict,
)
from citadel_gateway.policy.sliding_window import Window

steady = settings(deadline=None, derandomize=True)

GOOD, BAD, NO_OPINION = Verdict.GOOD, Verdict.BAD, Verdict.NO_OPINION
CLOSED, HALF_OPEN, OPEN = State.CLOSED, State.HALF_OPEN, State.OPEN


def breaker(*, jitter: float = 0.5, policy: BreakerPolicy | None = None) -> CircuitBreaker:
    return CircuitBreaker(policy or BreakerPolicy(), lambda: jitter)


def permit(b: CircuitBreaker, now: float) -> Permit:
    given_ = b.admit(now)
    assert given_ is not None
    return given_


def feed(b: CircuitBreaker, verdicts: Iterable[Verdict], now: float = 0.0) -> list[Transition]:
    changes = [b.settle(permit(b, now), verdict, now) for verdict in verdicts]
    return [change for change in changes if change is not None]


def tripped(*, jitter: float = 0.5) -> CircuitBreaker:
    b = breaker(jitter=jitter)
    feed(b, [BAD] * 5)
    return b


def test_the_fifth_failure_in_a_row_opens_and_the_sixth_request_is_refused() -> None:
    b = breaker()

    assert feed(b, [BAD] * 4) == []
    assert feed(b, [BAD]) == [Transition(CLOSED, OPEN, "consecutive failures")]
    assert b.admit(0.0) is None


def test_one_success_between_failures_keeps_it_closed() -> None:
    b = breaker()

    assert feed(b, [BAD] * 4 + [GOOD] + [BAD] * 4) == []
    assert b.state(0.0) is CLOSED


def test_a_thousand_requests_without_an_opinion_change_nothing() -> None:
    b = breaker()

    assert feed(b, [NO_OPINION] * 1000) == []
    assert b.state(0.0) is CLOSED


def test_no_opinion_between_failures_does_not_end_the_row() -> None:
    b = breaker()

    changes = feed(b, [BAD, NO_OPINION] * 4 + [BAD])

    assert changes == [Transition(CLOSED, OPEN, "consecutive failures")]


def test_half_of_twenty_opens_and_of_nineteen_does_not() -> None:
    b = breaker()
    verdicts = [GOOD, BAD] * 10

    assert feed(b, verdicts[:19]) == []
    assert feed(b, verdicts[19:]) == [Transition(CLOSED, OPEN, "failure ratio")]


def test_a_success_never_opens_it_and_the_next_failure_does() -> None:
    """The twentieth makes the window count, but what has just worked is not to be left alone."""
    b = breaker()

    assert feed(b, [BAD, GOOD] * 10) == []
    assert b.state(0.0) is CLOSED
    assert feed(b, [BAD]) == [Transition(CLOSED, OPEN, "failure ratio")]


def test_failures_that_left_the_window_do_not_count() -> None:
    b = breaker()
    feed(b, [BAD, GOOD] * 9, now=0.0)

    assert feed(b, [BAD, GOOD], now=30.0) == []
    assert b.state(30.0) is CLOSED


@pytest.mark.parametrize(
    ("jitter", "rest"), [(0.0, 54.0), (0.5, 60.0), (1.0, 66.0)], ids=["least", "middle", "most"]
)
def test_a_rest_lasts_sixty_seconds_give_or_take_a_tenth(jitter: float, rest: float) -> None:
    b = tripped(jitter=jitter)

    assert b.opens_again_at() == pytest.approx(rest, abs=1e-9)
    assert b.state(rest - 0.001) is OPEN
    assert b.admit(rest - 0.001) is None
    assert b.retry_after(rest - 10) == pytest.approx(10.0, abs=1e-9)
    assert b.state(rest + 0.001) is HALF_OPEN


def test_of_a_hundred_requests_at_half_open_one_gets_through() -> None:
    b = tripped()

    permits = [b.admit(60.0) for _ in range(100)]

    assert [p for p in permits if p is not None] == [Permit(1, probe=True)]
    assert b.retry_after(60.0) == 1.0


def test_one_good_probe_closes() -> None:
    b = tripped()

    assert feed(b, [GOOD], now=60.0) == [Transition(HALF_OPEN, CLOSED, "probe succeeded")]
    assert b.retry_after(60.0) == 0.0


def test_after_a_good_probe_the_row_of_failures_starts_anew() -> None:
    b = tripped()
    feed(b, [GOOD], now=60.0)

    assert feed(b, [BAD] * 4, now=61.0) == []


def test_a_probe_whose_client_left_gives_its_slot_back() -> None:
    b = tripped()
    abandoned = permit(b, 60.0)
    assert not b.would_admit(60.0)

    assert b.settle(abandoned, NO_OPINION, 61.0) is None

    assert b.state(61.0) is HALF_OPEN
    assert permit(b, 61.0).probe


def test_rests_double_up_to_five_times_the_first() -> None:
    b, now, rests = tripped(), 0.0, []
    for _ in range(6):
        rests.append(b.retry_after(now))
        now += rests[-1]
        feed(b, [BAD], now)

    assert rests == [60.0, 120.0, 240.0, 300.0, 300.0, 300.0]


@pytest.mark.parametrize(("streak", "rest"), [(9, 120.0), (10, 60.0)], ids=["nine", "ten"])
def test_ten_successes_in_a_row_forget_earlier_trips(streak: int, rest: float) -> None:
    b = tripped()
    feed(b, [GOOD] * streak, now=60.0)  # the probe is the first of them

    feed(b, [BAD] * 5, now=60.0)

    assert b.retry_after(60.0) == rest


def test_a_straggler_from_before_the_trip_says_nothing() -> None:
    b = breaker()
    straggler = permit(b, 0.0)
    feed(b, [BAD] * 5)
    probe = permit(b, 60.0)

    assert b.settle(straggler, GOOD, 60.0) is None

    assert not b.would_admit(60.0), "the probe is still out"
    assert b.settle(probe, GOOD, 60.0) == Transition(HALF_OPEN, CLOSED, "probe succeeded")


def test_stragglers_that_fail_after_recovery_do_not_open_it_again() -> None:
    b = breaker()
    stragglers = [permit(b, 0.0) for _ in range(10)]
    feed(b, [BAD] * 5)
    feed(b, [GOOD], now=60.0)

    assert [b.settle(s, BAD, 61.0) for s in stragglers] == [None] * 10
    assert b.state(61.0) is CLOSED


def test_the_end_of_a_rest_is_told_once_and_changes_no_decision() -> None:
    b = tripped()

    assert b.ripen(59.0) is None
    assert b.ripen(60.0) == Transition(OPEN, HALF_OPEN, "rest is over")
    assert b.ripen(60.0) is None
    assert b.opens_again_at() is None
    assert b.would_admit(60.0)


def test_a_ripe_breaker_whose_probe_fails_rests_for_longer() -> None:
    b = tripped()
    b.ripen(60.0)

    assert feed(b, [BAD], now=60.0) == [Transition(HALF_OPEN, OPEN, "probe failed")]
    assert b.opens_again_at() == 180.0


@attrs.define
class Reference:
    """A window that remembers everything."""

    span: float
    seen: list[tuple[int, bool]] = attrs.field(factory=list)

    def counts(self, now: float) -> tuple[int, int]:
        newest = int(now * 10 / self.span)
        kept = [failed for bucket, failed in self.seen if bucket > newest - 10]
        return len(kept), sum(kept)


@steady
@given(st.lists(st.tuples(st.floats(0, 20), st.booleans()), max_size=60))
def test_the_window_counts_like_one_that_remembers_everything(
    events: list[tuple[float, bool]],
) -> None:
    window, reference, now = Window(30.0), Reference(30.0), 1000.0
    for pause, failed in events:
        now += pause
        window.add(now, failed=failed)
        reference.seen.append((int(now * 10 / 30.0), failed))

        assert window.counts(now) == reference.counts(now)


@steady
@given(
    st.lists(
        st.tuples(st.sampled_from(["admit", *Verdict]), st.integers(0, 40), st.integers(0, 9)),
        max_size=80,
    )
)
def test_whatever_happens_there_is_at_most_one_probe_and_it_never_wedges(
    steps: list[tuple[str | Verdict, int, int]],
) -> None:
    b, out, now = breaker(policy=BreakerPolicy(threshold=2)), [], 0.0
    for what, pause, which in steps:
        now += pause
        if what == "admit":
            would, wait, given_ = b.would_admit(now), b.retry_after(now), b.admit(now)
            assert would == (given_ is not None) == (wait == 0.0)
            out += [given_] if given_ else []
        elif out:
            assert isinstance(what, Verdict)
            b.settle(out.pop(which % len(out)), what, now)
        live = [p for p in out if p.probe and p.era == b._era]
        assert len(live) <= 1

    for left in out:
        b.settle(left, NO_OPINION, now)

    assert b.would_admit(now + 1000.0)
