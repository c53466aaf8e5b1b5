"""What gateways that share a store tell each other of endpoints: one's knowledge is all's.

For each endpoint one of them holds the task of probing it, the others take over what it finds; who
suspects an endpoint asks the holder to look.  Breakers that open or close do so everywhere, and of
all gateways one sends the request that tries an endpoint whose rest is over: that, too, is a task,
and who has had it for a while without a request to send leaves it to the others.
"""

from __future__ import annotations

import ipaddress
import random
import socket
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

import attrs
import orjson
import trio

from citadel_gateway.app.watch import Watch
from citadel_gateway.io.health_monitoring import HealthChecker
from citadel_gateway.io.store.membership import Membership
from citadel_gateway.policy.circuit_breaker import State, Transition
from citadel_gateway.policy.endpoint import Endpoint

_HOLDS = 1.0  # seconds that somebody may keep the task of trying an endpoint, and not do it
_PASSES = 2.0  # seconds that he then leaves it to others, on average
_KINDS = ("health ", "doubt ", "cool ", "breaker ")  # of posts


@attrs.define(eq=False)
class Findings:
    """Of one gateway, about the endpoints that it watches.

    :param watch: the current one.
    :param on_transition: told of breakers that follow another gateway's.
    :param on_rest: told that an endpoint is to be left alone for a while.
    :param on_room: told that an endpoint may take requests that could not before.
    """

    membership: Membership
    watch: Callable[[], Watch]
    on_transition: Callable[[Endpoint, Transition], None]
    on_rest: Callable[[], None]
    on_room: Callable[[], None]
    host: str = attrs.field(factory=socket.gethostname)
    _news: trio.Event = attrs.field(factory=trio.Event, init=False)
    _unread: dict[str, str] = attrs.field(factory=dict, init=False)
    _probing: frozenset[str] = attrs.field(default=frozenset(), init=False)
    _trying: dict[Endpoint, float] = attrs.field(factory=dict, init=False)  # since when
    _passing: dict[Endpoint, float] = attrs.field(factory=dict, init=False)  # until when

    def __attrs_post_init__(self) -> None:
        self.membership.claims = self._claims
        self.membership.readers.append(self._heard)
        self.membership.on_news = self._note_news

    # For the checkers.

    def is_prober(self, endpoint: Endpoint) -> bool:
        """Whether this gateway is the one that probes it."""
        return self.membership.has_won(self._task("probe", endpoint))

    def found(self, endpoint: Endpoint) -> None:
        """A probe of ours has had a result."""
        health = endpoint.health
        said = {"healthy": health.healthy, "error": health.last_error, "engine": endpoint.engine}
        self._post("health", endpoint, said)

    def suspects(self, endpoint: Endpoint) -> None:
        """Whoever probes it should look at it now."""
        self._post("doubt", endpoint, {})

    async def divide(self) -> None:
        """Find out who probes what, and what the others know."""
        await self.membership.meet()

    async def wait_for(self, endpoints: Iterable[Endpoint]) -> None:
        """Until something is known of all of them, by whomever."""
        while not all(map(_is_known, endpoints)):
            await self._news.wait()

    # For breakers and cool-downs.

    def changed(self, endpoint: Endpoint, transition: Transition) -> None:
        """A breaker has changed through what happened here."""
        now, breaker = trio.current_time(), endpoint.breaker
        match transition.after:
            case State.OPEN:
                breaker.may_try = not self.membership.is_good()
                until = self._to_store(now + breaker.retry_after(now), now)
                self._post("breaker", endpoint, {"until": until, "trips": breaker.trips})
            case State.CLOSED:
                self._post("breaker", endpoint, {"until": None, "trips": 0})
            case State.HALF_OPEN:
                self.membership.hurry()  # for the task of trying it

    def cooled(self, endpoint: Endpoint) -> None:
        """It asked to be left alone."""
        until = self._to_store(endpoint.cooling_until, trio.current_time())
        self._post("cool", endpoint, {"until": until})

    # With the others.

    def _claims(self) -> list[str]:
        now = trio.current_time()
        claims = []
        for endpoint in self.watch():
            claims.append(self._task("probe", endpoint))
            if endpoint.breaker.state(now) is State.HALF_OPEN and self._would_try(endpoint, now):
                claims.append(self._task("try", endpoint))
        return claims

    def _would_try(self, endpoint: Endpoint, now: float) -> bool:
        since = self._trying.get(endpoint, now)
        if now - since > _HOLDS and not endpoint.breaker.is_trying:
            del self._trying[endpoint]
            self._passing[endpoint] = now + _PASSES * (0.5 + random.random())
        if self._passing.get(endpoint, now) > now:
            return False
        self._passing.pop(endpoint, None)
        return True

    def _note_news(self) -> None:
        """The tasks may have other holders than before."""
        now, won = trio.current_time(), self.membership.won
        if self._unread:
            self._read()
        for checker in self.watch().checkers:
            endpoint = checker.endpoint
            probe = self._task("probe", endpoint)
            if probe in won and probe not in self._probing and _is_known(endpoint):
                checker.suspect()  # as what is known of it may be old
            self._note_trial(endpoint, now)
        self._probing = won
        self._news.set()
        self._news = trio.Event()

    def _note_trial(self, endpoint: Endpoint, now: float) -> None:
        breaker = endpoint.breaker
        if breaker.state(now) is State.CLOSED:
            self._trying.pop(endpoint, None)
            self._passing.pop(endpoint, None)
            return
        may_try = self.membership.has_won(self._task("try", endpoint))
        if may_try:
            self._trying.setdefault(endpoint, now)
        else:
            self._trying.pop(endpoint, None)
        if may_try and not breaker.may_try:
            breaker.may_try = True
            endpoint.eased()
            self.on_room()
        breaker.may_try = may_try

    def _heard(self, posts: Mapping[str, str]) -> None:
        self._unread |= {post: said for post, said in posts.items() if post.startswith(_KINDS)}
        self._read()

    def _read(self) -> None:
        """What is about endpoints that are not known here is kept until they are."""
        now = trio.current_time()
        checkers = {self.name(c.endpoint): c for c in self.watch().checkers}
        for post, text in [*self._unread.items()]:
            kind, _, name = post.partition(" ")
            if (checker := checkers.get(name)) is not None:
                del self._unread[post]
                self._take_in(kind, checker, orjson.loads(text), now)

    def _take_in(self, kind: str, checker: HealthChecker, said: dict[str, Any], now: float) -> None:
        endpoint = checker.endpoint
        match kind:
            case "health" if not self.is_prober(endpoint):
                checker.learn(said["error"], healthy=said["healthy"])
                endpoint.engine = said["engine"]
            case "doubt" if self.is_prober(endpoint):
                checker.suspect()
            case "cool":
                endpoint.cool_down(self._to_ours(said["until"], now) - now, now)
                self.on_rest()
            case "breaker":
                self._follow(endpoint, said, now)

    def _follow(self, endpoint: Endpoint, said: dict[str, Any], now: float) -> None:
        breaker = endpoint.breaker
        if said["until"] is None:
            transition = breaker.follow_closed(now)
            if transition is not None:
                endpoint.start_slowly(now)
                endpoint.eased()
                self.on_room()
        else:
            breaker.may_try = False
            transition = breaker.follow_open(self._to_ours(said["until"], now), said["trips"], now)
        if transition is not None:
            self.on_transition(endpoint, transition)

    def _post(self, kind: str, endpoint: Endpoint, said: Mapping[str, Any]) -> None:
        self.membership.post(self._task(kind, endpoint), orjson.dumps(said).decode())

    def _task(self, kind: str, endpoint: Endpoint) -> str:
        return f"{kind} {self.name(endpoint)}"

    def name(self, endpoint: Endpoint) -> str:
        """The same for every gateway for which it is the same server."""
        return self.name_of(endpoint.model, endpoint.url)

    def name_of(self, model: str, url: str) -> str:
        """The name of an endpoint that need not be known here."""
        name = f"{model} {url}"
        return f"{name} on {self.host}" if _is_local(url) else name

    def _to_store(self, time: float, now: float) -> float:
        return time - now + self.membership.now()

    def _to_ours(self, time: float, now: float) -> float:
        return time - self.membership.now() + now


@lru_cache(4096)
def _is_local(url: str) -> bool:
    """Whether every host means a server of its own by it."""
    host = urlsplit(url.partition(" [")[0]).hostname or ""
    if url.startswith("unix:") or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_known(endpoint: Endpoint) -> bool:
    return endpoint.health.observed_at is not None
