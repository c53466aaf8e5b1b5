"""What a seed means: a configuration, a fleet with its misfortunes, and a crowd of clients.

Everything is drawn here, before the run begins, so that a new option of the gateway has one place
to be drawn in.
"""

from __future__ import annotations

import enum
import hashlib
import random
from typing import Any

import attrs

PORT = 8000
_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")


class HostFault(enum.Enum):
    """What befalls a whole engine for a while."""

    REFUSES = "refuses connections"
    SILENT = "lets connections hang"
    DEAD = "is killed"
    ILL = "fails its probes"
    DUMB = "leaves its probes without an answer"


class JobFault(enum.Enum):
    """What goes wrong with one answer."""

    REFUSES = "refuses"
    HANGS = "says nothing"
    STALLS = "stalls"
    TRICKLES = "trickles"
    CUTS = "cuts"
    RESETS = "resets"
    GARBAGE = "is no HTTP"
    HTML = "is a web page"
    EMPTY = "is empty"
    TOO_SHORT = "has a length that is too large"
    SURPLUS = "has bytes behind it"
    INTERIM = "has 1xx responses in front"
    ERROR_IN_200 = "is an error with status 200"
    MALFORMED = "has malformed events"
    NO_DONE = "lacks its [DONE]"
    NO_FINISH = "lacks its finish_reason"
    ERROR_EVENT = "ends in an error event"
    LINGERS = "does not end behind its end"
    CLOSES = "closes behind it, in spite of keep-alive"
    ONLY_ROLES = "has events without content"
    UNTIL_CLOSE = "ends with the connection"
    NO_BLANK_LINE = "ends with the connection, in the middle of its last line"
    TOO_LONG = "refuses the prompt as too long"


BREAKING = (
    JobFault.CUTS, JobFault.RESETS, JobFault.STALLS, JobFault.NO_FINISH, JobFault.ERROR_EVENT,
    JobFault.TRICKLES, JobFault.UNTIL_CLOSE,
)  # fmt: skip


class Prefill(enum.Enum):
    """What an engine makes of a chat that ends in a message of its own."""

    FLAGGED = "goes on with it if it is told so"
    LAST_MESSAGE = "goes on with it"
    REFUSES = "refuses it"
    IGNORES = "says the next one"


class Habit(enum.Enum):
    """What a client does other than waiting for its answer."""

    PATIENT = "waits"
    LEAVES = "leaves after a while"
    LEAVES_AT_FIRST = "leaves at the first event"
    LEAVES_IN_BODY = "leaves in the middle of its request"
    STOPS_READING = "stops reading for a while"
    READS_SLOWLY = "reads slowly"
    WRITES_SLOWLY = "sends slowly"
    BAD_JSON = "sends what is no JSON"
    TOO_LARGE = "sends too much"


@attrs.frozen(kw_only=True)
class HostPlan:
    """One engine.

    :param direct: the gateway sees the socket, as with plain TCP.
    :param latency: seconds until a connection is up; *think* until an answer begins; *gap* between
        events.
    :param badness: the share of jobs that go wrong, in one of the ways of *faults*.
    :param refuses_usage: it does not know ``stream_options``.
    :param engine: what the configuration says that it is; *server* what it says itself.
    :param lies: it says something else each time, even where it was asked to be deterministic.
    :param leading: its tokens have their white space in front.
    :param counts: its streams say all along how many tokens there were.
    :param packs: it sends two tokens in one event now and then.
    :param troubles: when, for how long, and what befalls the engine as a whole.
    """

    host: str
    model: str
    max_concurrent: int
    api_key: str | None
    direct: bool
    latency: float
    think: float
    gap: float
    badness: float
    refuses_usage: bool
    engine: str
    server: str | None
    prefill: Prefill
    lies: bool
    leading: bool
    counts: bool
    packs: bool
    faults: tuple[JobFault, ...]
    troubles: tuple[tuple[float, float, HostFault], ...]


@attrs.frozen(kw_only=True)
class AskPlan:
    """One request of a client, *pause* seconds after its last one."""

    id: str
    path: str
    body: dict[str, Any]
    habit: Habit
    after: float
    pause: float
    timeout: float | None
    key: str | None
    returns: int

    @property
    def stream(self) -> bool:
        return bool(self.body.get("stream"))

    @property
    def choices(self) -> int:
        return int(self.body.get("n", 1))

    @property
    def usage(self) -> bool:
        return bool(self.body.get("stream_options"))

    @property
    def max_tokens(self) -> int | None:
        return self.body.get("max_tokens")


@attrs.frozen(kw_only=True)
class ClientPlan:
    """A client, and its requests one after the other over one connection, while that lives."""

    name: str
    at: float
    asks: tuple[AskPlan, ...]
    pipelines: bool


@attrs.frozen(kw_only=True)
class Scenario:
    """All that a run depends on."""

    seed: int
    config: dict[str, Any]
    hosts: tuple[HostPlan, ...]
    clients: tuple[ClientPlan, ...]
    length: float
    drains_at: float | None
    send_buffer: int
    reports: bool

    def endpoint(self, host: str) -> str:
        return f"http://{host}:{PORT}"


def draw(seed: int) -> Scenario:
    return _Draw(random.Random(seed)).scenario(seed)


class _Draw:
    """Draws in a fixed order from one source.

    A quarter of the scenarios are about streams that break, and engines that can go on with them.
    """

    breaks: bool

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def scenario(self, seed: int) -> Scenario:
        rng = self.rng
        length = rng.uniform(2, 12)
        self.breaks = rng.random() < 0.25
        names = [f"m{n}" for n in range(rng.choice([1, 1, 2, 3]))]
        hosts = [
            self.host(f"{name}-{letter}", name, length)
            for name in names
            for letter in "abcd"[: rng.choice([2, 3, 4] if self.breaks else [1, 1, 2, 2, 3])]
        ]
        config = self.config(names, hosts)
        keys = [key["id"] for key in config["security"]["api_keys"]]
        scenario = Scenario(
            seed=seed,
            config=config,
            hosts=tuple(hosts),
            clients=self.crowd(names, keys, length, config),
            length=length,
            drains_at=self.moment(length / 3, length) if rng.random() < 0.15 else None,
            send_buffer=rng.choice([4608, 8192, 65536]),
            reports=rng.random() < 0.05,
        )
        self.hedge(config)
        self.affinity(scenario)
        return scenario

    # The fleet.

    def host(self, name: str, model: str, length: float) -> HostPlan:
        rng = self.rng
        badness = rng.choice([0.1, 0.3, 0.5] if self.breaks else [0.0, 0.1, 0.3, 0.5, 0.8])
        kinds = list(BREAKING if self.breaks else JobFault)
        engine, prefill, server = self.engine()
        counts = rng.random() < 0.3
        return HostPlan(
            host=name,
            model=model,
            max_concurrent=rng.choice([1, 1, 2, 2, 3, 5]),
            api_key=f"key-of-{name}" if rng.random() < 0.3 else None,
            direct=rng.random() < 0.75,
            latency=rng.choice([0.0, 0.0, 0.001, 0.05]),
            think=rng.choice([0.01, 0.1, 0.3, 1.0]),
            gap=rng.choice([0.0, 0.0, 0.02, 0.2, 0.5]),
            badness=badness,
            # Whole answers of llama.cpp are asked for as streams, of which it counts the tokens.
            refuses_usage=rng.random() < 0.1 and "llama" not in f"{engine} {server}",
            engine=engine,
            server=server,
            prefill=prefill,
            lies=rng.random() < 0.2,
            leading=rng.random() < 0.6,
            counts=counts,
            packs=counts and rng.random() < 0.5,
            faults=tuple(rng.sample(kinds, rng.randint(1, len(kinds)))),
            troubles=self.troubles(length),
        )

    def engine(self) -> tuple[str, Prefill, str | None]:
        """What it is said to be, what it does if asked to go on, and what it says that it is.

        Nobody says of an engine that it goes on, if it does not, but that it may refuse.
        """
        rng = self.rng
        engine = rng.choice(
            ["auto", "auto", "vllm", "vllm", "sglang", "llamacpp", "ollama", "tgi", "openai"]
        )
        match engine:
            case "auto":
                prefill = rng.choice(list(Prefill))
                goes_on = prefill in {Prefill.LAST_MESSAGE, Prefill.REFUSES}
                return engine, prefill, "llama.cpp" if goes_on and rng.random() < 0.5 else None
            case "openai":
                return engine, rng.choice([Prefill.IGNORES, Prefill.REFUSES]), None
            case "llamacpp" | "ollama":
                goes_on_as = Prefill.LAST_MESSAGE
            case _:
                goes_on_as = Prefill.FLAGGED
        return engine, Prefill.REFUSES if rng.random() < 0.2 else goes_on_as, None

    def troubles(self, length: float) -> tuple[tuple[float, float, HostFault], ...]:
        rng = self.rng
        found, at = [], 0.0
        for _ in range(rng.choice([0, 0, 1, 1, 2, 3])):
            at += self.moment(0, length / 2)
            lasts = self.moment(0.05, length / 3)
            found.append((at, lasts, rng.choice(list(HostFault))))
            at += lasts
        return tuple(found)

    # The configuration.

    def config(self, names: list[str], hosts: list[HostPlan]) -> dict[str, Any]:
        return {
            "service": self.service(),
            "gateway": self.routing(),
            "load_balancer": self.balancing(),
            "streaming": self.streaming(),
            "models": {name: self.model(name, names, hosts) for name in names},
            "performance": self.performance(),
            "monitoring": {"prometheus_port": None},
            "security": self.security(names),
        }

    def service(self) -> dict[str, Any]:
        rng = self.rng
        return {
            "lame_duck": rng.choice([0, 0.2, 1.0]),
            "drain_timeout": rng.choice([0.5, 2.0, 10.0]),
            "keep_alive_timeout": rng.choice([0.5, 2.0, 10.0]),
            "header_timeout": rng.choice([0.5, 2.0]),
            "body_timeout": rng.choice([0.7, 3.0]),
            "write_timeout": rng.choice([0.5, 2.0, 8.0]),
            "max_connections": rng.choice([8, 30, 4096, 4096]),
        }

    def routing(self) -> dict[str, Any]:
        rng = self.rng
        return {
            "model_routing_enabled": rng.random() < 0.93,
            "intelligent_routing": rng.random() < 0.7,
            "cost_optimization_enabled": rng.random() < 0.5,
        }

    def balancing(self) -> dict[str, Any]:
        rng = self.rng
        return {
            "algorithm": rng.choice(
                ["round_robin", "weighted_round_robin", "random", "least_connections",
                 "power_of_two", "least_latency", "cost"]
            ),
            "health_check_interval": rng.choice([3.0, 8.0, 20.0]),
            "health_check_timeout": rng.choice([0.3, 1.0, 2.0]),
            "healthy_after": rng.choice([1, 1, 2]),
            "unhealthy_after": rng.choice([1, 2, 3]),
            "circuit_breaker_threshold": rng.choice([1, 2, 3, 5]),
            "circuit_breaker_timeout": rng.choice([0.3, 0.6, 1.5, 3.0]),
            "circuit_breaker_failure_ratio": rng.choice([0.3, 0.5, 0.9]),
            "circuit_breaker_window": rng.choice([3.0, 10.0, 30.0]),
            "circuit_breaker_min_requests": rng.choice([3, 8, 20]),
            "queue_size": rng.choice([0, 1, 3, 8, 20]),
            "queue_timeout": rng.choice([0.3, 1.0, 3.0, 8.0]),
            "max_attempts": rng.choice([1, 2, 3, 3, 5]),
            "retry_ambiguous": rng.choice(["stateless", "stateless", "never"]),
            "retry_budget_ratio": rng.choice([0.0, 0.1, 0.2, 0.5]),
            "retry_budget_floor": rng.choice([3.0] if self.breaks else [0.05, 0.1, 0.5, 3.0]),
        }  # fmt: skip

    def streaming(self) -> dict[str, Any]:
        rng = self.rng
        return {
            "continue_broken": rng.random() < 0.85,
            "continue_max_bytes": rng.choice([20, 2**18, 2**18, 2**18]),
            "keep_alive": rng.choice([None, 0.05, 0.3, 10.0]),
            "keep_alive_before_first_token": rng.choice([None, None, None, 0.05, 0.3, 2.0]),
        }

    def model(self, name: str, names: list[str], hosts: list[HostPlan]) -> dict[str, Any]:
        rng = self.rng
        others = [other for other in names if other != name]
        rng.shuffle(others)
        own = [host for host in hosts if host.model == name]
        endpoints = [
            {
                "url": f"http://{host.host}:{PORT}",
                "weight": rng.choice([0.5, 1.0, 1.0, 3.0]),
                "max_concurrent": host.max_concurrent,
                "engine": host.engine,
                **({"api_key": host.api_key} if host.api_key else {}),
            }
            for host in own
        ]
        return {
            "endpoints": endpoints,
            "aliases": [f"alias-{name}"],
            "upstream_model": rng.choice([name, f"org/{name}"]),
            "fallbacks": others[: rng.choice([0, 1, 1, 2])],
            "cost_per_request": rng.choice([1.0, 2.0, 10.0]),
            "context_window": rng.choice([2000, 4000, 8000]),
            "timeouts": self.clocks(),
        }

    def hedge(self, config: dict[str, Any]) -> None:
        """Let some models hedge, mostly after a fixed time: few runs are long enough to measure."""
        rng = self.rng
        for model in config["models"].values():
            if len(model["endpoints"]) > 1 and rng.random() < 0.6:
                model["hedge"] = True
                model["hedge_after"] = rng.choice([0.02, 0.05, 0.1, 0.3, 1.0, None])
                config["load_balancer"]["retry_ambiguous"] = "stateless"

    def affinity(self, scenario: Scenario) -> None:
        """Drawn after all else, too: requests that belong together."""
        rng = self.rng
        if rng.random() < 0.2:
            algorithm = rng.choice(["consistent_hash", "session_affinity"])
            scenario.config["load_balancer"]["algorithm"] = algorithm
            users = rng.choice([1, 2, 5])
            for ask in (ask for client in scenario.clients for ask in client.asks):
                if rng.random() < 0.8:
                    ask.body["user"] = f"user-{rng.randrange(users)}"

    def clocks(self) -> dict[str, float]:
        rng = self.rng
        choices = {
            "connect": [0.1, 0.5, 1.0],
            "headers": [0.4, 2.0, 5.0],
            "first_token": [0.5, 2.0, 5.0],
            "idle": [0.3, 1.0, 4.0],
            "total": [1.0, 6.0],
        }
        return {
            name: rng.choice(values)
            for name, values in choices.items()
            if rng.random() < (0.7 if name != "total" else 0.2)
        }

    def performance(self) -> dict[str, Any]:
        rng = self.rng
        rps = rng.choice([2.0, 5.0, 20.0])
        limits = {
            "rate_limiting_enabled": rng.random() < 0.3,
            "rate_limit_rps": rps,
            "rate_limit_burst": rng.choice([3, 10, 40]),
        }
        if rng.random() < 0.3:
            limits["client_rate_limit_rps"] = rng.choice([1.0, 4.0])
            limits["client_rate_limit_burst"] = rng.choice([2, 10])
        return {
            **limits,
            "request_timeout_seconds": rng.choice([1.5, 4.0, 10.0]),
            "max_concurrent_requests": rng.choice([2, 5, 12, 100]),
            "max_body_bytes": 4096,
            "timeouts": self.clocks(),
        }

    def security(self, names: list[str]) -> dict[str, Any]:
        rng = self.rng
        if rng.random() < 0.7:
            return {"api_keys": []}
        keys = []
        for n in range(rng.choice([1, 2])):
            key = {"id": f"key{n}", "sha256": hashlib.sha256(f"sk-{n}".encode()).hexdigest()}
            if rng.random() < 0.3:
                key["allowed_models"] = rng.sample(names, 1)  # type: ignore[assignment]
            if rng.random() < 0.3:
                key["rate_limit_rps"] = rng.choice([1.0, 5.0])  # type: ignore[assignment]
                key["rate_limit_burst"] = rng.choice([2, 8])  # type: ignore[assignment]
            keys.append(key)
        return {"api_keys": keys}

    # The crowd.

    def crowd(
        self, names: list[str], keys: list[str], length: float, config: dict[str, Any]
    ) -> tuple[ClientPlan, ...]:
        rng = self.rng
        clients: list[ClientPlan] = []
        asks = 0
        wanted = rng.choice([8, 15, 25, 40])
        floods = [self.moment(0, length) for _ in range(rng.choice([0, 0, 1, 2]))]
        while asks < wanted:
            at = rng.choice(floods) if floods and rng.random() < 0.4 else self.moment(0, length)
            count = rng.choice([1, 1, 1, 2, 4])
            plans = []
            for _ in range(count):
                plans.append(self.ask(f"r{asks}", names, keys))
                asks += 1
            pipelines = count > 1 and rng.random() < 0.2
            name = f"client-{len(clients)}"
            clients.append(ClientPlan(name=name, at=at, asks=tuple(plans), pipelines=pipelines))
        return tuple(clients)

    def ask(self, name: str, names: list[str], keys: list[str]) -> AskPlan:
        rng = self.rng
        path = rng.choices(_PATHS, [8, 3, 1])[0]
        model = rng.choice([*names, *names, f"alias-{names[0]}", "auto", None])
        if rng.random() < 0.02:
            model = "no-such-model"
        body: dict[str, Any] = {} if model is None else {"model": model}
        match path:
            case "/v1/chat/completions":
                body["messages"] = [{"role": "user", "content": f"say {name};"}]
            case "/v1/completions":
                body["prompt"] = f"say {name};"
                if rng.random() < 0.3:
                    body["prompt"] = [body["prompt"]]
            case _:
                body["input"] = f"say {name};"
        if path != "/v1/embeddings":
            body["stream"] = rng.random() < (0.9 if self.breaks else 0.6)
            if rng.random() < 0.1:
                body["n"] = 2
            if (temperature := rng.choice([None, 0, 0, 0.7])) is not None:
                body["temperature"] = temperature
            if rng.random() < 0.2:
                body["max_tokens"] = rng.randint(1, 8)
            if body["stream"] and rng.random() < 0.3:
                body["stream_options"] = {"include_usage": True}
        if rng.random() < 0.1:
            body["store"] = True
        habit = Habit.PATIENT
        if rng.random() < 0.4:
            habit = rng.choice([*Habit, Habit.LEAVES, Habit.LEAVES, Habit.LEAVES_AT_FIRST])
        return AskPlan(
            id=name,
            path=path,
            body=body,
            habit=habit,
            after=self.moment(0, rng.choice([0.3, 1.0, 4.0])),
            pause=rng.choice([0.0, 0.0, self.moment(0, 3)]),
            timeout=rng.choice([0.3, 1.0, 100.0]) if rng.random() < 0.1 else None,
            key=self.key(keys),
            returns=rng.choice([0, 0, 0, 2]),
        )

    def key(self, keys: list[str]) -> str | None:
        if not keys:
            return None
        return f"sk-{self.rng.choice(keys)[3:]}" if self.rng.random() < 0.95 else "sk-wrong"

    def moment(self, low: float, high: float) -> float:
        """Often a round number, so that things happen in the very same instant."""
        at = self.rng.uniform(low, high)
        return max(low, round(at * 4) / 4) if self.rng.random() < 0.3 else at
