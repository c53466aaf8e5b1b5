"""The right number of requests at once is found, kept, and found again, in virtual time."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import pytest

from citadel_gateway.policy.adaptive import AdaptiveLimit, Kind, Sample
from tests.support.batching_engine import Engine, Trial

FLOOR, CEILING = 4, 200
SEEDS = pytest.mark.parametrize("seed", range(3))


def many(_: float) -> int:
    """More clients than any engine could serve."""
    return 1000


def adapting(
    engine: Engine,
    seed: int,
    offered: Callable[[float], int] = many,
    *,
    floor: int = FLOOR,
    whole: bool = False,
) -> Trial:
    return Trial(engine, AdaptiveLimit(floor, CEILING), offered, seed, whole=whole)


def throughput(trial: Trial) -> float:
    return trial.tokens / trial.now


def tokens_per_second(engine: Engine, at_once: int) -> float:
    return throughput(Trial(engine, None, many, fixed=at_once).run(120))


def first_token(trial: Trial) -> float:
    """The median time to it, in the second half of the trial."""
    return median(seconds for at, seconds in trial.first_tokens if at > trial.now / 2)


# --- it finds the knee -------------------------------------------------------------------------


@SEEDS
@pytest.mark.parametrize("slots", [8, 16, 32, 64, 128])
def test_it_finds_how_many_an_engine_works_on_at_once(slots: int, seed: int) -> None:
    trial = adapting(Engine(slots=slots), seed).run(400)

    assert trial.mean_limit(since=150) == pytest.approx(slots, rel=0.2, abs=3)
    assert min(limit for _, limit in trial.trace) >= FLOOR
    assert max(limit for _, limit in trial.trace) <= CEILING


@SEEDS
def test_nearly_all_that_the_engine_can_do_is_done(seed: int) -> None:
    engine = Engine(slots=32)
    trial = adapting(engine, seed).run(150)
    begun = trial.tokens
    trial.run(400)

    assert (trial.tokens - begun) / 250 >= 0.9 * tokens_per_second(engine, CEILING)


@SEEDS
def test_nobody_waits_long_inside_the_engine(seed: int) -> None:
    engine = Engine(slots=32)
    idle = Trial(engine, None, many, seed, fixed=2).run(200)
    unbounded = Trial(engine, None, many, seed, fixed=100).run(200)
    trial = adapting(engine, seed).run(400)

    assert first_token(trial) <= 8 * first_token(idle)
    assert first_token(unbounded) > 50 * first_token(idle)


@SEEDS
def test_an_engine_without_slots_is_filled_until_its_delay_has_tripled(seed: int) -> None:
    engine = Engine(slots=10_000, base=0.032, per_sequence=0.001)
    idle = Trial(engine, None, many, seed, fixed=2).run(200)
    trial = adapting(engine, seed, lambda now: 3 if now < 60 else 1000).run(600)

    assert first_token(trial) == pytest.approx(3 * first_token(idle), rel=0.3)


@SEEDS
def test_a_small_machine_that_reads_prompts_slowly(seed: int) -> None:
    engine = Engine(slots=4, base=0.08, per_sequence=0.005, per_prompt_token=0.002)
    trial = adapting(engine, seed, floor=1).run(900)

    assert 3 <= trial.mean_limit(since=300) <= 8
    assert throughput(trial) >= 0.85 * tokens_per_second(engine, CEILING)


@SEEDS
def test_whole_answers_say_it_more_coarsely(seed: int) -> None:
    """A whole answer takes twice as long when as many wait in the engine as it works on."""
    trial = adapting(Engine(slots=32), seed, whole=True).run(900)

    assert 32 * 0.8 <= trial.mean_limit(since=300) <= 32 * 2


@SEEDS
def test_it_stays_below_what_the_engine_refuses(seed: int) -> None:
    trial = adapting(Engine(slots=64, refuses_at=24), seed).run(300)

    assert trial.mean_limit(since=100) == pytest.approx(22, abs=3)
    assert trial.refused < 0.05 * trial.sent


# --- it finds it again -------------------------------------------------------------------------


@SEEDS
def test_it_follows_an_engine_that_has_fewer_slots_for_a_while(seed: int) -> None:
    engine = Engine(slots=32)
    trial = adapting(engine, seed).run(200)
    engine.slots = 8
    trial.run(400)
    assert trial.mean_limit(since=300) == pytest.approx(8, rel=0.35)

    engine.slots = 32
    trial.run(600)
    assert trial.mean_limit(since=450) == pytest.approx(32, rel=0.2)


@SEEDS
@pytest.mark.parametrize("factor", [1 / 3, 1 / 2, 10.0])
def test_it_gets_used_to_a_machine_of_another_speed(seed: int, factor: float) -> None:
    engine = Engine(slots=32)
    trial = adapting(engine, seed).run(200)
    engine.be_slower_by(factor)
    trial.run(200 + 600 * max(1.0, factor))

    assert trial.mean_limit(since=trial.now * 0.7) == pytest.approx(32, rel=0.25)


@SEEDS
@pytest.mark.parametrize("factor", [1.5, 3.0])
def test_of_one_that_is_a_little_slower_it_needs_to_see_a_quiet_moment(
    seed: int, factor: float
) -> None:
    """Until then, slowness looks like too much to do."""
    engine = Engine(slots=32)
    trial = adapting(engine, seed, lambda now: 3 if 400 < now < 500 else 1000).run(200)
    engine.be_slower_by(factor)
    trial.run(400)
    assert trial.mean_limit(since=300) >= FLOOR
    trial.run(1000)

    assert trial.mean_limit(since=700) == pytest.approx(32, rel=0.25)


@SEEDS
def test_a_pause_of_the_engine_costs_little_and_not_for_long(seed: int) -> None:
    trial = adapting(Engine(slots=32), seed).run(200)
    trial.now += 5.0  # nobody gets a token
    trial.run(260)

    assert trial.mean_limit(since=230) == pytest.approx(32, rel=0.25)


# --- it says nothing that it does not know -------------------------------------------------------


@SEEDS
def test_a_low_load_does_not_change_it(seed: int) -> None:
    trial = adapting(Engine(slots=32), seed, lambda now: 1000 if now < 200 else 3).run(260)
    before = trial.limit
    assert before is not None
    limit = before.limit
    trial.run(800)

    assert before.limit == limit
    assert limit >= 16


def sample(
    seconds: float = 1.0, *, kind: Kind = Kind.STREAM, in_flight: int = 4, began: float = 0.0
) -> Sample:
    return Sample(kind=kind, size=100, seconds=seconds, began=began, in_flight=in_flight)


def grown(to: int) -> AdaptiveLimit:
    limit = AdaptiveLimit(FLOOR, CEILING)
    while limit.limit < to:
        limit.learn(sample(in_flight=limit.limit), 0.0)
    return limit


def test_it_begins_at_the_floor_and_grows_by_what_goes_well() -> None:
    limit = AdaptiveLimit(FLOOR, CEILING)
    assert limit.limit == 4

    for _ in range(4):
        limit.learn(sample(in_flight=4), 0.0)
    assert limit.limit == 8


def test_what_is_not_used_does_not_grow() -> None:
    limit = grown(40)
    for _ in range(500):
        limit.learn(sample(in_flight=20), 0.0)

    assert limit.limit == 40


def test_it_never_grows_above_the_ceiling() -> None:
    limit = AdaptiveLimit(FLOOR, 10)
    for _ in range(500):
        limit.learn(sample(in_flight=limit.limit), 0.0)

    assert limit.limit == 10


@pytest.mark.parametrize("kind", [Kind.REFUSED, Kind.TIMED_OUT])
def test_what_is_too_much_takes_effect_at_once_and_only_once(kind: Kind) -> None:
    limit = grown(40)
    for _ in range(30):  # they were all sent before the first of them came back
        limit.learn(sample(kind=kind, in_flight=40, began=1.0), 2.0)
    assert limit.limit == 34

    limit.learn(sample(kind=kind, in_flight=34, began=2.5), 3.0)
    assert limit.limit == 28


def test_what_was_sent_before_a_decrease_says_nothing_about_the_limit_after_it() -> None:
    limit = grown(40)
    limit.learn(sample(kind=Kind.REFUSED, in_flight=40, began=1.0), 2.0)
    for _ in range(100):
        limit.learn(sample(50.0, in_flight=40, began=1.5), 3.0)
    assert limit.limit == 34

    for _ in range(20):
        limit.learn(sample(50.0, in_flight=34, began=2.5), 3.0)
    assert limit.limit < 34


def test_a_refusal_of_few_is_believed_about_few() -> None:
    limit = grown(100)
    limit.learn(sample(kind=Kind.REFUSED, in_flight=33, began=1.0), 1.0)

    assert limit.limit == 28


def test_it_never_sinks_below_the_floor() -> None:
    limit = grown(40)
    for now in range(1, 100):
        limit.learn(sample(kind=Kind.TIMED_OUT, in_flight=40, began=now), float(now))

    assert limit.limit == FLOOR


def test_slow_answers_to_few_say_nothing_about_many() -> None:
    limit = grown(40)
    for _ in range(200):
        limit.learn(sample(9.0, in_flight=19), 1.0)

    assert limit.limit == 40


def test_a_few_slow_ones_among_many_do_not_matter() -> None:
    limit = grown(40)
    for turn in range(400):
        limit.learn(sample(50.0 if turn % 3 == 0 else 1.0, in_flight=30), 1.0)

    assert limit.limit == 40


def test_a_long_prompt_is_compared_with_long_prompts_only() -> None:
    limit = grown(40)
    long = Sample(kind=Kind.STREAM, size=100_000, seconds=30.0, began=0.0, in_flight=40)
    for _ in range(100):
        limit.learn(long, 1.0)

    assert limit.limit >= 40


def test_a_floor_above_the_ceiling_is_the_ceiling() -> None:
    assert AdaptiveLimit(10, 3).limit == 3


def test_an_answer_in_no_time_at_all_is_no_trouble() -> None:
    limit = AdaptiveLimit(FLOOR, CEILING)
    for _ in range(20):
        limit.learn(sample(0.0, in_flight=limit.limit), 0.0)

    assert limit.limit > FLOOR
