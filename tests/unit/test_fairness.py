"""One key's flood and the others' waits, simulated with policies alone: no tasks, no clock."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable
from heapq import heappop, heappush

import attrs
import pytest

from citadel_gateway.policy.circuit_breaker import BreakerPolicy, CircuitBreaker, Verdict
from citadel_gateway.policy.endpoint import Endpoint, Slot
from citadel_gateway.policy.health_tracker import HealthTracker
from citadel_gateway.policy.priority import Party
from citadel_gateway.policy.waitroom import Refused, Ticket, Waitroom

Draw = Callable[[random.Random], float]


@attrs.frozen
class Job:
    """A request that works for so many seconds, and costs so many tokens."""

    party: Party
    seconds: float
    prompt: int = 100
    answer: int = 0
    again: bool = False  # its client comes back with the same as soon as it is done


@attrs.define(eq=False)
class Office:
    """An endpoint with *slots*, and everybody who comes to it.

    :param ends: how many requests ended in which way: ``served``, ``refused``, ``displaced`` or
        ``timeout``, by tenant.
    """

    slots: int
    room: int = 100
    patience: float = 10.0
    lower_share: float = 0.1
    now: float = 0.0
    ends: Counter[tuple[str, str]] = attrs.field(factory=Counter)
    waits: dict[str, list[float]] = attrs.field(factory=lambda: defaultdict(list))
    tokens: Counter[str] = attrs.field(factory=Counter)
    busy: float = 0.0  # seconds that its slots have worked
    waitroom: Waitroom = attrs.field(init=False)
    endpoint: Endpoint = attrs.field(init=False)
    _events: list[tuple[float, int, Callable[[], None]]] = attrs.field(factory=list)
    _serial: int = 0

    def __attrs_post_init__(self) -> None:
        breaker = CircuitBreaker(BreakerPolicy(), lambda: 0.5)
        self.endpoint = Endpoint(
            "m", "u", 1.0, self.slots, None, breaker, HealthTracker(healthy=True)
        )
        self.waitroom = Waitroom(10**6, self.room, self.patience, self.lower_share)

    def at(self, when: float, what: Callable[[], None]) -> None:
        self._serial += 1
        heappush(self._events, (when, self._serial, what))

    def run(self, until: float = math.inf) -> None:
        while self._events and self._events[0][0] <= until:
            self.now, _, what = heappop(self._events)
            what()
            assert self.endpoint.in_flight <= self.slots
            waiting = self.waitroom.depth("m")
            assert not waiting or self.endpoint.in_flight == self.slots, "work is conserved"

    def comes(self, job: Job) -> None:
        ticket = Ticket("m", "m", self._choose, job.party, job.prompt)
        jobs[ticket] = (job, self.now)
        try:
            self.waitroom.enter(ticket, self.now)
        except Refused:
            self._end(job, "refused")
            return
        if ticket.outcome is not None:
            self._begin(ticket)
        else:
            self.at(self.now + self.patience, lambda: self._give_up(ticket))
        self._pump()

    def _choose(self, now: float) -> Endpoint | None:
        return self.endpoint if self.endpoint.has_room() else None

    def _begin(self, ticket: Ticket) -> None:
        job, came = jobs[ticket]
        self.waits[str(job.party.tenant)].append(self.now - came)
        self.busy += job.seconds
        self.at(self.now + job.seconds, lambda: self._finish(ticket))

    def _finish(self, ticket: Ticket) -> None:
        job, _ = jobs.pop(ticket)
        ticket.settle(job.prompt, job.answer)
        self.tokens[str(job.party.tenant)] += job.prompt + 2 * job.answer
        self.waitroom.leave(ticket, Verdict.GOOD, self.now)
        self._end(job, "served")
        self._pump()
        if job.again:
            self.comes(job)

    def _give_up(self, ticket: Ticket) -> None:
        if ticket in jobs and ticket.outcome is None:
            self.waitroom.leave(ticket, Verdict.NO_OPINION, self.now)
            self._end(jobs.pop(ticket)[0], "timeout")
            self._pump()

    def _pump(self) -> None:
        for ticket in self.waitroom.pump(self.now):
            if isinstance(ticket.outcome, Slot):
                self._begin(ticket)
            else:
                self._end(jobs.pop(ticket)[0], "displaced")

    def _end(self, job: Job, how: str) -> None:
        self.ends[str(job.party.tenant), how] += 1

    def share(self, tenant: str) -> float:
        return self.tokens[tenant] / self.tokens.total()


jobs: dict[Ticket, tuple[Job, float]] = {}


def offer(office: Office, rng: random.Random, tenant: str, rate: float, draw: Draw) -> int:
    """Requests at random times for 100 seconds; returns how many."""
    when, count = rng.expovariate(rate), 0
    while when < 100:
        job = Job(Party(tenant), draw(rng), rng.randint(50, 150), rng.randint(50, 150))
        office.at(when, lambda job=job: office.comes(job))  # type: ignore[misc]
        when += rng.expovariate(rate)
        count += 1
    return count


def p95(waits: list[float]) -> float:
    return sorted(waits)[int(0.95 * len(waits))]


def constant(rng: random.Random) -> float:
    return 1.0


def varying(rng: random.Random) -> float:
    return rng.uniform(0.4, 1.6)


@pytest.mark.parametrize("draw", [constant, varying])
@pytest.mark.parametrize("slots", [4, 16])
@pytest.mark.parametrize("seed", range(3))
def test_twenty_times_the_load_of_one_key_costs_another_one_service_time_at_most(
    slots: int, seed: int, draw: Draw
) -> None:
    p95s = []
    for times in (1, 20):
        office = Office(slots)
        calm = offer(office, random.Random(seed), "calm", 0.15 * slots, draw)
        loud = offer(office, random.Random(~seed), "loud", 0.15 * slots * times, draw)
        office.run()
        assert office.ends["calm", "served"] == calm, "nobody is refused for another's load"
        assert sum(n for (tenant, _), n in office.ends.items() if tenant == "loud") == loud
        p95s.append(p95(office.waits["calm"]))

    assert p95s[1] - p95s[0] <= 1.0  # seconds: the mean service time


@pytest.mark.parametrize("slots", [1, 2, 8])
def test_a_client_that_asks_again_and_again_waits_one_service_time_beside_a_flood(
    slots: int,
) -> None:
    office = Office(slots)
    for _ in range(20 * slots):
        office.comes(Job(Party("loud"), 1.0, again=True))
    office.at(3.3, lambda: office.comes(Job(Party("calm"), 1.0, again=True)))
    office.run(200)

    assert p95(office.waits["calm"]) <= 1.0 + 1e-6


@pytest.mark.parametrize("weights", [(1, 1, 1), (1, 2, 4), (5, 1, 1)])
def test_weights_are_shares_of_the_tokens_whatever_requests_are_like(
    weights: tuple[int, int, int],
) -> None:
    """Long prompts, long answers, and neither: each kind of work from one tenant."""
    office, rng = Office(8, room=10**4, patience=1e9), random.Random(1)
    kinds = ((2000, 10, 0.6), (20, 600, 1.5), (40, 20, 0.1))
    for tenant, weight, (prompt, answer, seconds) in zip("abc", weights, kinds, strict=True):
        for _ in range(40):
            seconds = seconds * rng.uniform(0.9, 1.1)
            job = Job(Party(tenant, float(weight)), seconds, prompt, answer, again=True)
            office.comes(job)
    office.run(200)

    for tenant, weight in zip("abc", weights, strict=True):
        assert office.share(tenant) == pytest.approx(weight / sum(weights), rel=0.05)
    assert office.busy == pytest.approx(8 * 200, rel=0.01), "no slot was idle"


def test_a_lower_class_has_its_share_beside_a_flood_of_a_higher_one() -> None:
    office = Office(4, patience=1e9)
    for rank, tenant in ((1, "chat"), (3, "batch")):
        for _ in range(40):
            office.comes(Job(Party(tenant, 1.0, rank), 1.0, again=True))
    office.run(300)

    assert office.share("batch") == pytest.approx(1 / 11, abs=0.01)


@pytest.mark.parametrize("draw", [constant, varying])
def test_of_those_who_are_let_in_few_wait_in_vain(draw: Draw) -> None:
    """Predictions are true enough: at ten times the load most of those who wait are served."""
    office = Office(8, room=1000)
    came = offer(office, random.Random(7), "a", 80.0, draw)
    office.run()

    ends = {how: office.ends["a", how] for how in ("served", "refused", "timeout", "displaced")}
    assert sum(ends.values()) == came
    assert ends["served"] == pytest.approx(8 * 110, rel=0.05)
    assert ends["timeout"] <= 0.1 * ends["served"]
    assert ends["displaced"] == 0
    assert max(office.waits["a"]) <= 10.0


@pytest.mark.parametrize("tenants", [1, 5, 500])
@pytest.mark.parametrize("waiting", [2000, 8000])
def test_thousands_may_wait(waiting: int, tenants: int) -> None:
    """The heaps look at few entries for each operation, however many wait."""
    office = Office(4, room=10**5, patience=1e9)
    for i in range(waiting):
        office.comes(Job(Party(f"t{i % tenants}"), 1.0))
    looked_at = _count_counters_asked(office)
    office.run(100)

    assert office.ends.total() == 400
    assert looked_at() <= 400 * 12


def _count_counters_asked(office: Office) -> Callable[[], int]:
    """How often a position in the heap of tenants was looked at or changed."""
    (line,) = office.waitroom._lines.values()
    (lane,) = line._lanes.values()
    before = lane.fresh.counters._serial
    return lambda: lane.fresh.counters._serial - before
