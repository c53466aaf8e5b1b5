"""What must be true of every run, whatever went wrong in it.

Each invariant is a function that yields complaints.  They ask what clients and engines saw, what
was logged and counted, and what was left; how the gateway does it is its own affair.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import combinations, pairwise, takewhile
from typing import Any

import orjson

from citadel_gateway.io.keep_alive import COMMENT
from citadel_gateway.wire.retry_after import parse_retry_after
from tests.sim import speech
from tests.sim.clients import Fate, Seen
from tests.sim.draw import Habit, JobFault
from tests.sim.engines import Job
from tests.sim.scripts import End
from tests.sim.speech import Said
from tests.sim.world import Run
from tests.support.raw_client import RawResponse

Invariant = Callable[[Run], Iterator[str]]
INVARIANTS: list[Invariant] = []

_SAME = 1e-6  # seconds: floats that mean the same instant
_MOST_MALFORMED = 5  # events in a row that the gateway bears
_IDLE = 20.0  # seconds, by default
_LAST_LOOK = 0.05 + _SAME  # seconds that the gateway waits for the end behind [DONE]


def invariant(check: Invariant) -> Invariant:
    INVARIANTS.append(check)
    return check


def violations(run: Run) -> list[str]:
    """Everything that is wrong with *run*, each with the name of what it violates."""
    found: list[str] = []
    for check in INVARIANTS:
        try:
            found += [f"{check.__name__}: {said}" for said in check(run)]
        except Exception as exc:  # what was seen is of no kind that was thought of
            found.append(f"{check.__name__}: cannot be told: {exc!r}")
    return found


@invariant
def the_run_comes_to_its_end(run: Run) -> Iterator[str]:
    yield from run.problems


@invariant
def the_gateway_does_not_crash(run: Run) -> Iterator[str]:
    for _, line in run.lines:
        if line["event"] in {"crash", "background task crashed"}:
            yield str(line)


@invariant
def engines_are_asked_properly(run: Run) -> Iterator[str]:
    for engine in run.fleet:
        yield from engine.complaints


@invariant
def answers_are_http(run: Run) -> Iterator[str]:
    for seen in run.seen:
        if seen.problem is not None:
            yield f"{seen.id}: {seen.problem}"


@invariant
def each_request_has_one_outcome(run: Run) -> Iterator[str]:
    """One line in the log for what reached the application; none for what did not."""
    lines = Counter(line["request_id"] for _, _, line in _finished(run))
    for seen in run.seen:
        found = lines.pop(seen.id, 0)
        if found > 1:
            yield f"{seen.id} has {found} outcomes"
        elif found == 0 and seen.response is not None and not _is_refused_by_server(seen):
            yield f"{seen.id} was answered {seen.status}, and has no outcome"
        elif found == 0 and seen.fate is Fate.LEFT and _was_there(run, seen):
            yield f"{seen.id} was asked, and has no outcome"
        elif found == 0 and any(job.request_id == seen.id for job in run.fleet.jobs):
            yield f"{seen.id} was sent to an engine, and has no outcome"
        elif seen.fate is Fate.NOTHING and not _may_get_nothing(run, seen, logged=found > 0):
            yield f"{seen.id} got no answer at all ({_outcomes(run).get(seen.id)})"
        elif seen.fate is None:
            yield f"{seen.id} never ended"
    lines.pop("", None)  # what was no request, or not worth a name
    if lines:
        yield f"outcomes of requests that nobody made: {sorted(lines)}"


@invariant
def clients_and_log_agree(run: Run) -> Iterator[str]:
    at = {line["request_id"]: when for when, line in _requests(run)}
    found = _outcomes(run)
    for seen in run.seen:
        outcome = found.get(seen.id)
        if outcome is None:
            continue
        if (problem := _disagreement(run, seen, outcome, at[seen.id])) is not None:
            yield f"{seen.id} is {outcome!r} in the log, but {problem}"


@invariant
def metrics_and_log_agree(run: Run) -> Iterator[str]:
    logged = Counter(line["outcome"] for _, line in _requests(run) if "outcome" in line)
    counted = _by(run, "citadel_gateway_requests_total", "outcome")
    if logged != counted:
        yield f"requests: {_difference(logged, counted)}"
    attempts = sum(line.get("attempts", 0) for _, line in _requests(run))
    tried = sum(_by(run, "citadel_gateway_attempts_total", "endpoint").values())
    if attempts != tried:
        yield f"attempts: {attempts} in the log, {tried} counted"
    hedges = Counter(line["hedge"] for _, line in _requests(run) if "hedge" in line)
    hedged = _by(run, "citadel_gateway_hedges_total", "result")
    if hedges != hedged:
        yield f"hedges: {_difference(hedges, hedged)}"
    left = sum(_by(run, "citadel_gateway_cancellations_total", "phase").values())
    if left != logged["client_closed"]:
        yield f"cancellations: {logged['client_closed']} in the log, {left} counted"
    limited = sum(_by(run, "citadel_gateway_limiter_rejections_total", "limit").values())
    if limited != logged["rate_limited"]:
        yield f"rate limits: {logged['rate_limited']} in the log, {limited} counted"
    malformed = sum(_by(run, "citadel_gateway_malformed_events_total", "model").values())
    sent = sum(_malformed_sent(job) for job in run.fleet.jobs)
    if malformed > sent:
        yield f"malformed events: {malformed} counted, {sent} sent"


@invariant
def who_is_turned_away_at_the_door_is_noted(run: Run) -> Iterator[str]:
    told = sum(seen.error_code() == "too_many_connections" for seen in run.seen)
    noted = sum(line["outcome"] == "too_many_connections" for _, _, line in _finished(run))
    if told > noted:
        yield f"{told} clients were told that there were too many, {noted} are in the log"


@invariant
def attempts_are_what_engines_were_asked(run: Run) -> Iterator[str]:
    """Each job is an attempt; attempts that are none have failed on the way there."""
    tried = _by(run, "citadel_gateway_attempts_total", "endpoint")
    for engine in run.fleet:
        url = run.scenario.endpoint(engine.plan.host)
        if len(engine.jobs) > tried[url]:
            yield f"{engine.plan.host}: {len(engine.jobs)} jobs, {tried[url]} attempts"
    jobs = Counter(job.request_id for job in run.fleet.jobs)
    for _, line in _requests(run):
        name = line["request_id"]
        if name and jobs[name] > line.get("attempts", 0):
            yield f"{name}: {jobs[name]} jobs, {line.get('attempts', 0)} attempts in the log"


@invariant
def dead_connections_are_not_used(run: Run) -> Iterator[str]:
    """Where a socket tells of its end, no attempt is made on one that has ended before."""
    tried = _by(run, "citadel_gateway_attempts_total", "endpoint")
    for engine in run.fleet:
        attempts = tried[run.scenario.endpoint(engine.plan.host)]
        if engine.plan.direct and attempts > len(engine.jobs) + engine.lost:
            missing = attempts - len(engine.jobs) - engine.lost
            yield f"{missing} attempts at {engine.plan.host} have come to nobody's notice"


@invariant
def nothing_is_left(run: Run) -> Iterator[str]:
    rest = run.rest
    if rest is not None:
        if rest.tasks != run.tasks_before:
            yield f"tasks: {run.tasks_before} before, {rest.tasks} after"
        if rest.in_flight or rest.seats or rest.queued:
            yield f"slots {rest.in_flight}, seats {rest.seats}, queued {rest.queued}"
        if rest.client_connections:
            yield f"{rest.client_connections} connections of clients that have gone"
        if rest.upstream_connections != rest.open_at_engines:
            yield (
                f"{rest.open_at_engines} connections are open to engines, "
                f"the gateway knows of {rest.upstream_connections}"
            )
        if rest.working:
            yield f"engines still work: {rest.working}"
    if run.open_at_end:
        yield f"{run.open_at_end} connections to engines outlive the gateway"


@invariant
def caps_are_kept(run: Run) -> Iterator[str]:
    """As the engines count: of jobs that were not over when the next began."""
    for engine in run.fleet:
        most = _most_at_once(engine.jobs)
        if most > engine.plan.max_concurrent:
            yield f"{engine.plan.host} had {most} at once, not {engine.plan.max_concurrent}"
    most = _most_at_once(run.fleet.jobs)
    seats = run.config["performance"]["max_concurrent_requests"]
    if most > seats:
        yield f"all engines together had {most} at once, not {seats}"


@invariant
def nobody_waits_beside_room(run: Run) -> Iterator[str]:
    """Who can be placed is called in the very instant, besides those who are there already."""
    yield from run.waited_in_vain


@invariant
def rate_limits_are_kept(run: Run) -> Iterator[str]:
    limits = run.config["performance"]
    if not limits["rate_limiting_enabled"]:
        return
    passed: dict[str, list[float]] = defaultdict(list)
    for when, line in _requests(run):
        refused = {"rate_limited", "unauthorized"}
        if line.get("outcome") in refused or not line["request_id"] or "outcome" not in line:
            continue
        began = when - line["duration_ms"] / 1000
        passed["everybody"].append(began)
        passed[line.get("key_id", "")].append(began)
    yield from _exceeded(
        "everybody", passed["everybody"], limits["rate_limit_rps"], limits["rate_limit_burst"]
    )
    keyed = {key["id"]: key for key in run.config["security"]["api_keys"]}
    for name, times in passed.items():
        key = keyed.get(name, {})
        if "rate_limit_rps" in key:
            yield from _exceeded(name, times, key["rate_limit_rps"], key["rate_limit_burst"])
        elif "client_rate_limit_rps" in limits and name != "everybody":
            rate, burst = limits["client_rate_limit_rps"], limits["client_rate_limit_burst"]
            yield from _exceeded(name or "the client", times, rate, burst)


@invariant
def whole_answers_are_what_one_engine_said(run: Run) -> Iterator[str]:
    jobs = _by_request(run)
    for seen in run.seen:
        if seen.plan.stream or seen.fate is not Fate.ANSWERED or seen.response is None:
            continue
        body = seen.response.body
        if not any(_is_assembled(body, j) if j.stream else j.body == body for j in jobs[seen.id]):
            yield f"{seen.id} got what no engine has answered: {body[:200]!r}"


@invariant
def streams_are_whole_or_say_that_they_are_not(run: Run) -> Iterator[str]:
    """They end in a ``[DONE]``, or else in one error; and with that they end.

    But for who does not read: the error waits for its write timeout, and for a second at a drain.
    """
    lines = {line["request_id"]: line for _, line in _requests(run)}
    for seen, response in _streams(run):
        said = speech.heard(response.body)
        drained = lines.get(seen.id, {}).get("outcome") == "draining"
        patience = 1.0 if drained else run.config["service"]["write_timeout"]
        if response.complete and not (response.body.endswith(speech.DONE) and said.dones == 1):
            yield f"{seen.id} has an end, but no [DONE], or two: {response.body[-200:]!r}"
        if said.dones and said.errors:
            yield f"{seen.id} is broken, and has a [DONE]: {response.body[-200:]!r}"
        if said.behind:
            yield f"{seen.id} goes on behind its end: {said.behind}"
        if seen.fate is Fate.CUT and seen.dawdled < patience:
            if len(said.errors) != 1:
                yield f"{seen.id} is cut with {len(said.errors)} errors: {response.body[-200:]!r}"
            if said.dones:
                yield f"{seen.id} is cut, and has a [DONE]"


@invariant
def texts_are_right_to_the_byte(run: Run) -> Iterator[str]:
    """However many engines took part: the text is as one of them would have written it alone."""
    jobs = _by_request(run)
    for seen, response in _streams(run):
        said = speech.heard(response.body)
        is_whole = seen.fate is Fate.ANSWERED
        if is_whole and not (said.is_finished and len(said.texts) == seen.plan.choices):
            yield f"{seen.id} is passed off as whole: {said.texts}"
        if any(count > 1 for count in said.finishes.values()):
            yield f"{seen.id} has ended more than once: {response.body!r}"
        for choice, text in said.texts.items():
            if speech.count_tokens(text) > (seen.plan.max_tokens or math.inf):
                yield f"{seen.id} may have {seen.plan.max_tokens} tokens, and got {text!r}"
            known = {job.answer.texts[choice] for job in jobs[seen.id]} if choice >= 0 else set()
            if not (text in known if is_whole else any(each.startswith(text) for each in known)):
                yield f"{seen.id}, choice {choice}: {text!r} instead of one of {sorted(known)}"


@invariant
def usage_is_summed_truthfully(run: Run) -> Iterator[str]:
    """To clients that asked for it and in the log, as if one engine had said it all."""
    lines = {line["request_id"]: line for _, _, line in _finished(run)}
    jobs = _by_request(run)
    for seen, response in _streams(run):
        spoke = sum(1 for job in jobs[seen.id] if _has_content(job))
        said, line = speech.heard(response.body), lines.get(seen.id)
        tokens = sum(map(speech.count_tokens, said.texts.values()))
        prompt = speech.PROMPT_TOKENS
        for told, so_far in said.usage:
            true = (prompt, so_far, prompt + so_far)
            if tuple(told.values()) != true:
                yield f"{seen.id} was told {told}, and it was {true}"
        is_whole = seen.fate is Fate.ANSWERED
        is_cut = seen.fate is Fate.CUT and not seen.dawdled and len(said.errors) == 1
        if line is None or not (is_whole or is_cut):
            continue
        logged = line.get("completion_tokens", 0)
        if logged != tokens if is_whole else logged < tokens:
            yield f"{seen.id} has {logged} tokens in the log, and had {tokens}"
        told = line.get("prompt_tokens", 0)
        # The next engine's prompt has what the last one said, and splits it as it likes.
        if told and abs(told - prompt) > max(0, spoke - 1):
            yield f"{seen.id} has a prompt of {told} tokens in the log, not {prompt}"


@invariant
def events_are_the_engines_own(run: Run) -> Iterator[str]:
    """Those of the engine that began, byte for byte; and who goes on does so under its name."""
    jobs = _by_request(run)
    for seen, response in _streams(run):
        got = [
            block
            for block in speech.blocks(response.body)
            if block not in {COMMENT, speech.DONE} and not block.startswith(b'data: {"error"')
        ]
        names = speech.heard(b"".join(got)).ids
        if not names and not got:
            continue  # nothing yet
        job = next((job for job in jobs[seen.id] if job.name in names), None)
        if (job is None and names) or len(names) > 1:
            yield f"{seen.id} got the answer to another request, too: {names}"
            continue
        if job is None:
            continue  # but for comments
        own = speech.as_the_client_sees(job.events, usage=seen.plan.usage)
        same = sum(
            1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(got, own, strict=False))
        )
        rest = got[same:]
        if not rest and (same == len(own) or seen.fate is not Fate.ANSWERED):
            continue
        gave_up = _came_with_a_clock(run, job) or _malformed_sent(job) > _MOST_MALFORMED
        if not rest and gave_up and b'"choices":[]' in own[same]:
            continue  # the answer was whole by then, and nobody has waited for its usage
        roles = [speech.heard(b"".join(part)).roles for part in (got[:same], rest)]
        if not _may_be_joined(run, seen, jobs[seen.id], job):
            yield f"{seen.id}: {got!r} is not what {job.name} has said: {own!r}"
        elif roles[1] > (0 if roles[0] else 1):
            yield f"{seen.id} was told once more whose message it is: {rest!r}"


@invariant
def comments_are_only_for_those_who_wait(run: Run) -> Iterator[str]:
    """Where they are configured: before the first token, or while a stream is continued."""
    streaming = run.config["streaming"]
    for seen, response in _streams(run):
        has_begun = False
        for block in speech.blocks(response.body):
            has_begun = has_begun or block.startswith(b"data: ")
            option = "keep_alive" if has_begun else "keep_alive_before_first_token"
            if block == COMMENT and streaming[option] is None:
                yield f"{seen.id} got a comment that nobody has asked for: {response.body!r}"
                break


@invariant
def streams_go_on_from_what_their_clients_have(run: Run) -> Iterator[str]:
    """An engine that is to go on is told what was said, and is of the same model."""
    jobs = _by_request(run)
    for seen, response in _streams(run):
        heard = speech.heard(response.body)
        said = heard.texts.get(0, "")
        is_seen = seen.fate in {Fate.ANSWERED, Fate.CUT} and not seen.dawdled
        # What one says in the moment in which it is left is not heard.
        first = next((job for job in jobs[seen.id] if job.name in heard.ids), None)
        for job in jobs[seen.id]:
            given = job.answer.given
            if is_seen and not said.startswith(given):
                yield f"{job.name} was given {given!r}, but the client of {seen.id} has {said!r}"
            if given and first is not None and _model(run, job) != _model(run, first):
                yield f"{job.name} goes on with what {first.name} began"


@invariant
def continuations_are_counted(run: Run) -> Iterator[str]:
    counted = _by(run, "citadel_gateway_continuations_total", "way")
    if not run.config["streaming"]["continue_broken"] and counted["resume"] + counted["replay"]:
        yield f"continued, though it is turned off: {counted}"
    resumed = sum(bool(job.answer.given) for job in run.fleet.jobs)
    if resumed > counted["resume"]:
        yield f"{resumed} jobs were resumed, {counted['resume']} counted"
    jobs = _by_request(run)
    broken = sum(
        seen.fate is not Fate.ANSWERED and any(map(_has_content, jobs[seen.id]))
        for seen, _ in _streams(run)
    )
    if counted["none"] > broken:
        yield f"{counted['none']} streams counted as broken, of {broken} that had begun"


@invariant
def nobody_works_for_a_client_that_left(run: Run) -> Iterator[str]:
    """The engine sees the hang-up in the very instant in which the gateway can."""
    jobs = _by_request(run)
    for seen in run.seen:
        if seen.fate is not Fate.LEFT or seen.pipelined:
            continue
        for job in jobs[seen.id]:
            if job.began > seen.ended + _SAME:
                yield f"{job.name} began {job.began - seen.ended:g} s after {seen.id} had left"
            elif _over(job) > seen.ended + _SAME:
                late = _over(job) - seen.ended
                yield f"{job.name} worked on for {late:g} s after {seen.id} had left"


@invariant
def nobody_works_for_a_request_that_is_over(run: Run) -> Iterator[str]:
    jobs = _by_request(run)
    for when, line in _requests(run):
        for job in jobs[line["request_id"]] if line["request_id"] else ():
            if _over(job) > when + _SAME:
                yield f"{job.name} works {_over(job) - when:g} s longer than its request"


@invariant
def requests_end_within_their_clocks(run: Run) -> Iterator[str]:
    """Nobody waits for longer than the request may take, until its answer begins.

    But for who lets the gateway wait: for its body, or with the comments that precede the answer.
    """
    longest = run.config["performance"]["request_timeout_seconds"]
    lines = {line["request_id"]: line for _, line in _requests(run)}
    for seen in run.seen:
        if seen.sent is None or seen.pipelined or seen.id not in lines:
            continue
        line = lines[seen.id]
        allowed = min(longest, seen.plan.timeout or math.inf)
        first = line.get("first_byte_ms", line["duration_ms"]) / 1000
        slow = seen.dawdled or seen.plan.habit in {Habit.WRITES_SLOWLY, Habit.LEAVES_IN_BODY}
        if first > allowed + _SAME + 0.001 and not slow:
            yield f"{seen.id} waited {first:g} s for its answer, with {allowed:g} s to go"


@invariant
def attempts_are_bounded(run: Run) -> Iterator[str]:
    """No more than configured, and never twice what may have been executed twice.

    Whoever goes on with a broken stream executes something else, which in turn may be repeated.
    """
    balancing = run.config["load_balancer"]
    twice = balancing["retry_ambiguous"] == "stateless"
    asked = {seen.id: seen for seen in run.seen}
    for name, jobs in _by_request(run).items():
        may_repeat = twice and not asked[name].plan.body.get("store")
        stages = _stages(jobs) if _may_be_continued(run, asked[name]) else [jobs]
        # A connection that had gone stale costs one more.
        if len(jobs) > balancing["max_attempts"] + len(stages):
            yield f"{name} was sent {len(jobs)} times"
        for stage in stages:
            executed = [
                job
                for job in stage
                if not (
                    _is_certainly_not_executed(job)
                    or _was_outrun(job, jobs)
                    or _may_replay_instead(run, job)
                )
            ]
            if len(executed) > 1 + may_repeat:
                yield f"{name} may have been executed by {[job.name for job in executed]}"


@invariant
def retries_stay_within_their_budget(run: Run) -> Iterator[str]:
    """In any ten seconds, of the retries that have reached an engine."""
    balancing = run.config["load_balancer"]
    ratio, floor = balancing["retry_budget_ratio"], balancing["retry_budget_floor"]
    retries = sorted(
        min(before.ended, after.began)  # of a hedge, the one that it is beside goes on
        for jobs in _by_request(run).values()
        for before, after in pairwise(jobs)
        if before.ended is not None and not (_is_stale(before) or before.refused_usage)
    )
    arrivals = sorted(when - duration for when, duration, _ in _finished(run))
    for place, at in enumerate(retries):
        # Both are counted by whole seconds, so that the ten may be nine and a moment.  A request
        # counts when its body is there.
        spent = place + 1 - bisect_left(retries, at - 9.0)
        earned = bisect_right(arrivals, at) - bisect_left(arrivals, at - 14.0)
        if spent > ratio * earned + 10 * floor + 1:
            yield f"{spent} retries in the 9 s before {at:g}, for {earned} requests"


@invariant
def two_work_for_one_request_only_as_a_hedge(run: Run) -> Iterator[str]:
    """A second engine is asked beside the first once, where and when that is configured.

    It is another one of the same model, and as soon as one of them has content, the other is let
    go.
    """
    asked = {seen.id: seen for seen in run.seen}
    models = {host.host: host.model for host in run.scenario.hosts}
    for name, jobs in _by_request(run).items():
        pairs = [pair for pair in combinations(jobs, 2) if _overlap(*pair)]
        if len(pairs) > 1:
            yield f"{name} is with more than two: {[[a.name, b.name] for a, b in pairs]}"
        for first, second in pairs:
            names, plan = f"{first.name} and {second.name}", asked[name].plan
            model = run.config["models"][models[first.host]]
            if not model.get("hedge") or not plan.stream or plan.body.get("store"):
                yield f"{names} work for {name}, which is not to be hedged"
            if first.host == second.host or models[first.host] != models[second.host]:
                yield f"{names} work for {name}"
            # Whose connection takes its time comes later than it was asked.
            latency = max(run.fleet.engines[job.host].plan.latency for job in (first, second))
            soonest = (model.get("hedge_after") or 0.05) - latency
            if second.began - first.began < soonest - _SAME:
                early = second.began - first.began
                yield f"{names} work for {name}, the second after {early:g} s already"
            content = [job.content_at for job in (first, second) if job.content_at is not None]
            until = min(_over(first), _over(second))
            if content and until > min(content) + _SAME:
                late = until - min(content)
                yield f"{names} both work for {name}, {late:g} s after its first word"


@invariant
def nobody_is_asked_twice(run: Run) -> Iterator[str]:
    """A retry goes elsewhere, unless the last one was no fault of the endpoint.

    One that asked for time may be asked again when it is over, see :func:`cool_downs_are_honoured`.
    """
    for name, jobs in _by_request(run).items():
        failed: set[str] = set()
        for job in jobs:
            if job.host in failed:
                yield f"{name} came to {job.host} once more: {[job.name for job in jobs]}"
            if not (
                _is_stale(job)
                or job.refused_usage
                or _asked_for_time(job)
                or _was_outrun(job, jobs)
                or _may_replay_instead(run, job)
            ):
                failed.add(job.host)


@invariant
def cool_downs_are_honoured(run: Run) -> Iterator[str]:
    for engine in run.fleet:
        rests = [
            (job.ended, job.ended + _asked_to_wait(job))
            for job in engine.jobs
            if job.script.status in {429, 503}
            and job.ended is not None
            and job.end is End.REFUSED
            and _was_heard(run, job)
        ]
        for job in engine.jobs:
            for since, until in rests:
                if since + engine.plan.latency + _SAME < job.began < until - _SAME:
                    early = until - job.began
                    yield f"{job.name} began {early:g} s before the end of a cool-down"


@invariant
def open_breakers_are_left_alone(run: Run) -> Iterator[str]:
    """Nothing goes to an endpoint that rests; and when it may be probed, one request at a time."""
    for engine in run.fleet:
        url = run.scenario.endpoint(engine.plan.host)
        changes = [
            (when, line["after"])
            for when, line in run.lines
            if line["event"] == "breaker" and line["endpoint"] == url
        ]
        for (since, state), (until, _) in pairwise([*changes, (math.inf, "")]):
            from_then = since + engine.plan.latency + _SAME
            began = [job for job in engine.jobs if from_then < job.began < until - _SAME]
            if state == "open" and began:
                yield f"{began[0].name} began though the breaker was open since {since:g}"
            if state == "half_open" and _most_at_once(began) > 1:
                yield f"{engine.plan.host} was probed by {_most_at_once(began)} at once"


@invariant
def endpoints_come_back(run: Run) -> Iterator[str]:
    """Once nothing goes wrong any more, no breaker, probe or cool-down keeps an endpoint out."""
    if run.unavailable:
        yield f"not available again: {run.unavailable}"
    if run.unused:
        yield f"they got nothing though all others were full: {run.unused}"
    if run.still_half_open:
        yield f"probed with success, and still half-open: {run.still_half_open}"


@invariant
def all_is_well_once_engines_are(run: Run) -> Iterator[str]:
    if run.healed_at is None or run.rest is None:
        return
    excused = {"rate_limit_exceeded", "queue_full", "queue_timeout", "too_many_connections"}
    if run.to_be_probed:
        excused.add("no_healthy_backend")  # one at a time
    for seen in run.seen:
        if not seen.id.startswith("after-") or seen.fate is Fate.ANSWERED:
            continue
        if seen.fate is not Fate.REFUSED:
            yield f"{seen.id} came after all faults and was {seen.fate}"
        elif seen.error_code() not in excused:
            yield f"{seen.id} came after all faults and was refused: {seen.error_code()}"


@invariant
def refusals_are_explained(run: Run) -> Iterator[str]:
    """Every error has OpenAI's four members; who is to return is told when."""
    for seen in run.seen:
        if seen.fate is not Fate.REFUSED or seen.response is None:
            continue
        error = orjson.loads(seen.response.body).get("error", {})
        if error.keys() != {"message", "type", "param", "code"}:
            yield f"{seen.id} was refused with {seen.response.body!r}"
        if seen.status in {429, 503} and seen.response.header("retry-after") is None:
            yield f"{seen.id} was refused with {seen.status}, and not told when to return"


@invariant
def reports_are_to_be_had(run: Run) -> Iterator[str]:
    """Whatever is the matter with the engines, or with the load."""
    for path, status in run.reports:
        if status not in ({200, 503} if path == "/health" else {200}):
            is_full = status == 503 and run.config["service"]["max_connections"] < 100
            if not is_full:
                yield f"{path} was answered {status}"


@invariant
def stopping_loses_nothing(run: Run) -> Iterator[str]:
    """Who has asked before is answered, within the time there is; who comes later may find none."""
    patience = run.config["service"]["drain_timeout"]
    began = math.inf if run.drained_at is None else run.drained_at
    for when, _, line in _finished(run):
        if line["outcome"] == "draining" and when < began + patience - _SAME:
            yield f"{line['request_id']} was cut {began + patience - when:g} s too early"
    for seen in run.seen:
        if seen.fate is Fate.UNREACHED and seen.began < began:
            yield f"{seen.id} found nobody before the gateway was told to stop"


@invariant
def stopping_is_bounded(run: Run) -> Iterator[str]:
    if run.drained_at is None or run.stopped_at is None:
        return
    service = run.config["service"]
    longest = service["lame_duck"] + service["drain_timeout"] + 0.25 + 1.5 + 2.0
    took = run.stopped_at - run.drained_at
    if took > longest + _SAME:
        yield f"stopping took {took:g} s, not {longest:g}"


# What the invariants look at.


def _requests(run: Run) -> list[tuple[float, dict[str, Any]]]:
    return [(when, line) for when, line in run.lines if line["event"] == "request"]


def _finished(run: Run) -> list[tuple[float, float, dict[str, Any]]]:
    """Requests for inference: when they ended, after how long, and their lines."""
    return [
        (when, line["duration_ms"] / 1000, line)
        for when, line in _requests(run)
        if "outcome" in line
    ]


def _outcomes(run: Run) -> dict[str, str]:
    return {line["request_id"]: line["outcome"] for _, _, line in _finished(run)}


def _by_request(run: Run) -> dict[str, list[Job]]:
    """The jobs of each request, in their order."""
    found: dict[str, list[Job]] = defaultdict(list)
    for job in sorted(run.fleet.jobs, key=lambda job: job.serial):
        found[job.request_id].append(job)
    return found


def _by(run: Run, name: str, label: str) -> Counter[str]:
    """A metric, summed up by one of its labels."""
    sums: Counter[str] = Counter()
    for (key, labels), value in run.metrics.items():
        if key == name:
            sums[dict(labels)[label]] += int(value)
    return sums


def _difference(logged: Counter[str], counted: Counter[str]) -> str:
    return f"{dict(logged - counted)} only in the log, {dict(counted - logged)} only counted"


def _is_refused_by_server(seen: Seen) -> bool:
    """Before the application has seen a request."""
    return seen.error_code() in {"bad_http_request", "too_many_connections"}


def _was_there(run: Run, seen: Seen) -> bool:
    """Whether the gateway has had a whole request, and time to look at it.

    It may have been busy with the end of the last one on the same connection.
    """
    until = math.inf if run.drained_at is None else run.drained_at
    soonest = _SAME if seen.first_on_connection else _LAST_LOOK
    return seen.sent is not None and seen.sent + soonest < seen.ended < until


def _may_get_nothing(run: Run, seen: Seen, *, logged: bool) -> bool:
    """A kept connection may be closed just as it is used again, and everything ends in the end."""
    if logged:
        return False
    sent = math.inf if seen.sent is None else seen.sent
    is_late = run.drained_at is not None and sent >= run.drained_at
    return is_late or not seen.first_on_connection


def _disagreement(run: Run, seen: Seen, outcome: str, when: float) -> str | None:
    """What speaks against *outcome*, if anything does."""
    is_stopping = run.drained_at is not None and when >= run.drained_at
    gave_up = seen.dawdled >= run.config["service"]["write_timeout"]
    match seen.fate:
        case Fate.ANSWERED if outcome != "ok":
            return "its client has the whole answer"
        case Fate.REFUSED if outcome in {"ok", "client_closed", "stream_broken"}:
            return f"its client was refused: {seen.status} {seen.error_code()}"
        case Fate.CUT if outcome == "draining" and is_stopping:
            return None
        case Fate.CUT if outcome == "client_closed" and gave_up:
            return None
        case Fate.CUT if outcome != "stream_broken":
            return "its client was cut off"
        case Fate.NOTHING if not is_stopping:
            return "its client got nothing"
        case Fate.UNREACHED:
            return "its client did not even get a connection"
        case Fate.LEFT if outcome == "client_closed" and when > seen.ended + _SAME:
            return f"its client had left {when - seen.ended:g} s before"
        case Fate.LEFT if outcome != "client_closed" and when > seen.ended + _LAST_LOOK:
            return f"its client had left {when - seen.ended:g} s before"
    return None


def _streams(run: Run) -> Iterator[tuple[Seen, RawResponse]]:
    """Those that have begun, and what their clients have of them."""
    for seen in run.seen:
        response = seen.response
        if seen.plan.stream and response is not None and response.status == 200:
            yield seen, response


def _is_assembled(body: bytes, job: Job) -> bool:
    """Whether *body* is what *job* has streamed, in one piece."""
    told, answer = orjson.loads(body), job.answer
    texts = tuple(c["text"] if "text" in c else c["message"]["content"] for c in told["choices"])
    finishes = {choice["finish_reason"] for choice in told["choices"]}
    is_same = told["id"] == job.name and texts == answer.texts and finishes == {answer.finish}
    return is_same and told.get("usage") in (None, answer.usage())


def _malformed_sent(job: Job) -> int:
    return sum(event.said is Said.MALFORMED for event in job.events)


def _most_at_once(jobs: Iterable[Job]) -> int:
    """Who ends in an instant makes room for who begins in it."""
    changes = [(job.began, 1) for job in jobs]
    changes += [(job.ended, -1) for job in jobs if job.ended is not None]
    now = most = 0
    for _, change in sorted(changes):
        now += change
        most = max(most, now)
    return most


def _exceeded(who: str, times: list[float], rate: float, burst: float) -> Iterator[str]:
    """Whether more came through in some span than *rate* and *burst* allow."""
    times = sorted(times)
    for first, since in enumerate(times):
        for last in range(first, len(times)):
            came, allowed = last - first + 1, burst + rate * (times[last] - since)
            if came > allowed + 0.01:
                yield f"{who}: {came} in {times[last] - since:g} s, where {allowed:g} may come"
                return


def _is_stale(job: Job) -> bool:
    """Sent over a connection that had been idle, and not answered with a single byte."""
    return job.reused and not job.spoke


def _is_certainly_not_executed(job: Job) -> bool:
    return job.end is End.REFUSED and (
        job.fault is JobFault.TOO_LONG
        or job.script.status in {401, 403, 404, 408, 429, 503}
        or job.fault is JobFault.ERROR_IN_200
        or job.refused_usage
        or job.refused_to_go_on
    )


def _asked_for_time(job: Job) -> bool:
    status, wait = job.script.status, job.script.retry_after
    return job.end is End.REFUSED and (status == 429 or (status == 503 and wait is not None))


def _may_replay_instead(run: Run, job: Job) -> bool:
    """Whether it has refused to go on, and could be asked to say the same once more."""
    seen = next(seen for seen in run.seen if seen.id == job.request_id)
    refuses = job.refused_to_go_on or job.script.status in {400, 404, 422, 501}
    return bool(job.answer.given) and refuses and seen.plan.body.get("temperature") == 0


def _may_be_continued(run: Run, seen: Seen) -> bool:
    plan = seen.plan
    is_on = run.config["streaming"]["continue_broken"]
    return is_on and plan.stream and plan.choices == 1 and not plan.body.get("store")


def _may_be_joined(run: Run, seen: Seen, jobs: list[Job], first: Job) -> bool:
    """Whether somebody may have gone on with what *first* began."""
    later = [job for job in jobs if job.serial > first.serial]
    same = any(_model(run, job) == _model(run, first) for job in later)
    return same and _may_be_continued(run, seen) and _has_content(first)


def _has_content(job: Job) -> bool:
    return any(event.said in {Said.CONTENT, Said.FINISH} for event in job.events)


def _model(run: Run, job: Job) -> str:
    return run.fleet.engines[job.host].plan.model


def _stages(jobs: list[Job]) -> list[list[Job]]:
    """Attempts at the same thing: who has said more than all before him was the last at it.

    But for a hedge, which was begun beside him.
    """
    stages: list[list[Job]] = [[]]
    furthest, last_at_it = "", -math.inf  # until when
    for job in jobs:
        if job.began < last_at_it:
            stages[-2].append(job)
            continue
        stages[-1].append(job)
        reached = job.answer.given + job.said
        if len(reached) > len(furthest) and reached.startswith(furthest):
            furthest, last_at_it = reached, _over(job)
            stages.append([])
    return stages


def _asked_to_wait(job: Job) -> float:
    wait = job.script.retry_after
    return parse_retry_after(None if wait is None else wait.encode())


def _was_heard(run: Run, job: Job) -> bool:
    """Whether the gateway listened to the refusal, as opposed to giving up in that instant."""
    if job.ended is None:
        return False
    took = job.ended - job.began
    seen = next(seen for seen in run.seen if seen.id == job.request_id)
    config = run.config
    clocks = [*config["performance"]["timeouts"].values()]
    for model in config["models"].values():
        clocks += model["timeouts"].values()
    if any(abs(took - clock) < 0.001 for clock in clocks):
        return False
    allowed = min(config["performance"]["request_timeout_seconds"], seen.plan.timeout or math.inf)
    is_late = job.ended > seen.began + allowed - 0.001
    has_left = seen.fate is Fate.LEFT and seen.ended <= job.ended + _SAME
    return not (is_late or has_left)


def _overlap(first: Job, second: Job) -> bool:
    return second.began < _over(first) - _SAME and first.began < _over(second) - _SAME


def _was_outrun(job: Job, jobs: list[Job]) -> bool:
    """Whether it was called off because another one had its first content.

    That one may have come to its end in the same instant, and this one been called in it.
    """
    firsts = [
        other.content_at
        for other in jobs
        if other is not job and other.began <= _over(job) and job.began <= _over(other) + _SAME
    ]
    return job.end is End.LEFT and any(
        at is not None and at <= _over(job) <= at + _SAME for at in firsts
    )


def _came_with_a_clock(run: Run, job: Job) -> bool:
    """Whether its last word came in the very instant in which a clock struck, or had before."""
    every = [run.config["performance"]["timeouts"]]
    every += [model["timeouts"] for model in run.config["models"].values()]
    clocks = {_IDLE, *(clock for each in every for clock in each.values())}
    last = job.spoke_at[-1]
    if job.fault is JobFault.NO_BLANK_LINE:  # it is an event when the connection ends, a gap later
        last += last - job.spoke_at[-2] if len(job.spoke_at) > 1 else 0.0
    if any(last - job.began > each.get("total", math.inf) - 0.001 for each in every):
        return True
    since = (job.began, *job.spoke_at[:-1])
    return any(abs(last - at - clock) < 0.001 for at in since for clock in clocks)


def _over(job: Job) -> float:
    return math.inf if job.ended is None else job.ended
