"""The gateways that can be put through the scenarios, each set up as its documentation says.

All get the same clocks and limits where they have such a thing: see `CLOCKS`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import trio
from bench.peers import GATEWAYS, KEY, Launch

from tests.scenarios.reference import serve_reference
from tests.scenarios.scenario import CLOCKS, Stage


@attrs.frozen(kw_only=True)
class Place:
    """Where a gateway is to run; one that can may take a port of its own choice instead."""

    folder: Path
    port: int
    metrics_port: int

    def write(self, name: str, text: str) -> str:
        file = self.folder / name
        file.write_text(text, "utf-8")
        return str(file)


def _given_port(place: Place, _: str) -> int:
    return place.port


@attrs.frozen(kw_only=True)
class Gateway:
    """:param inside: serves a scenario in this process instead; the port.
    :param stages_each: how many scenarios one process serves, each with models of its own.
    :param processes: how many processes run at once.
    :param at_once: how many scenarios are played at once with one process.
    :param find_port: where it listens, by what it has written; `None` while it does not say.
    """

    name: str
    requirement: str
    install: Callable[[str], tuple[str, str]]
    launch: Callable[[str, Place, Sequence[Stage], float], Launch] | None = None
    inside: Callable[[Stage, trio.Nursery], Awaitable[int]] | None = None
    note: str
    stages_each: int
    processes: int
    at_once: int
    find_port: Callable[[Place, str], int | None] = _given_port


_FIRST_BACK_OFF, _LONGEST_BACK_OFF = 0.5, 8.0  # LiteLLM's defaults in seconds, to be shrunk


def _url(port: int) -> str:
    return f"http://127.0.0.1:{port}"


def _launch_citadel(program: str, place: Place, stages: Sequence[Stage], pace: float) -> Launch:
    models: dict[str, Any] = {}
    for stage in stages:
        ports = [stage.primary.port]
        model: dict[str, Any] = {"engine": "vllm"}
        if stage.backup is not None and stage.scenario.together:
            ports.append(stage.backup.port)
        elif stage.backup is not None:
            backup = f"{stage.model}-backup"
            models[backup] = {"endpoint": _url(stage.backup.port), "context_window": 32768}
            model |= {"fallbacks": [backup], "context_window": 4096}
        model["endpoints"] = [{"url": _url(port)} for port in ports]
        models[stage.model] = model
    silence = CLOCKS.silence * pace
    config = {
        "service": {
            "host": "127.0.0.1", "port": 0, "workers": 1, "lame_duck": 0, "drain_timeout": 1
        },
        "gateway": {"intelligent_routing": False},
        "load_balancer": {
            "algorithm": "round_robin",
            "max_attempts": CLOCKS.retries + 1,
            "circuit_breaker_threshold": CLOCKS.failures,
            "circuit_breaker_timeout": CLOCKS.rest * pace,
            "health_check_interval": CLOCKS.health * pace,
        },
        "models": models,
        "performance": {
            "request_timeout_seconds": CLOCKS.request * pace,
            "timeouts": {"headers": silence, "first_token": silence, "idle": silence},
            "rate_limit_rps": 1000,
        },
        "monitoring": {"prometheus_port": None},
        "security": {
            "api_keys": [{"id": "scenarios", "sha256": hashlib.sha256(KEY.encode()).hexdigest()}]
        },
    }  # fmt: skip
    text = json.dumps(config, indent=1)  # JSON is YAML, too
    file = place.write("citadel.yaml", text)
    return Launch(
        command=(program, "-m", "citadel_gateway", "serve", "--config", file), config=text
    )


def _citadels_port(_: Place, written: str) -> int | None:
    found = re.search(r'"listening".*?"address":"[^"]*?:(\d+)"', written)
    return int(found[1]) if found else None


def _launch_litellm(program: str, place: Place, stages: Sequence[Stage], pace: float) -> Launch:
    silence = CLOCKS.silence * pace
    deployments, fallbacks = [], []

    def deploy(name: str, served: str, port: int) -> None:
        deployments.append(
            {
                "model_name": name,
                "litellm_params": {
                    "model": f"openai/{served}", "api_base": f"{_url(port)}/v1", "api_key": "none",
                    "timeout": silence, "stream_timeout": silence,
                },
            }
        )  # fmt: skip

    for stage in stages:
        deploy(stage.model, stage.model, stage.primary.port)
        if stage.backup is not None:
            backup = f"{stage.model}-backup"
            deploy(backup, backup, stage.backup.port)
            fallbacks.append({stage.model: [backup]})
            if stage.scenario.together:
                deploy(stage.model, backup, stage.backup.port)
    config = {
        "model_list": deployments,
        "router_settings": {
            "num_retries": CLOCKS.retries,
            "retry_policy": {"TimeoutErrorRetries": 0},
            "timeout": CLOCKS.request * pace,
            "allowed_fails": CLOCKS.failures - 1,
            "cooldown_time": CLOCKS.rest * pace,
            "fallbacks": fallbacks,
            "context_window_fallbacks": fallbacks,
        },
        "litellm_settings": {"request_timeout": CLOCKS.request * pace},
        "general_settings": {"master_key": KEY},
    }
    text = json.dumps(config, indent=1)
    file = place.write("litellm.yaml", text)
    command = (
        str(Path(program).with_name("litellm")), "--config", file, "--host", "127.0.0.1",
        "--port", str(place.port), "--num_workers", "1", "--telemetry", "False",
    )  # fmt: skip
    env = {
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "INITIAL_RETRY_DELAY": f"{_FIRST_BACK_OFF * pace:g}",
        "MAX_RETRY_DELAY": f"{_LONGEST_BACK_OFF * pace:g}",
    }
    return Launch(command=command, config=text, env=env)


def _launch_sglang(program: str, place: Place, stages: Sequence[Stage], pace: float) -> Launch:
    (stage,) = stages
    engines = [stage.primary, *([stage.backup] if stage.backup is not None else [])]

    def whole(seconds: float) -> str:
        return str(max(1, math.ceil(seconds * pace)))

    command = (
        program, "-m", "sglang_router.launch_router",
        "--worker-urls", *(_url(engine.port) for engine in engines),
        "--host", "127.0.0.1", "--port", str(place.port),
        "--prometheus-port", str(place.metrics_port),
        "--policy", "round_robin", "--log-level", "warn", "--api-key", KEY,
        "--worker-startup-check-interval", "1",
        "--request-timeout-secs", whole(CLOCKS.silence),
        "--retry-max-retries", str(CLOCKS.retries + 1),
        "--cb-failure-threshold", str(CLOCKS.failures),
        "--cb-timeout-duration-secs", whole(CLOCKS.rest),
        "--health-check-interval-secs", whole(CLOCKS.health),
    )  # fmt: skip
    return Launch(command=command)


_PEERS = {gateway.name: gateway for gateway in GATEWAYS}


def _nothing(_: str) -> tuple[str, str]:
    return "", ""


async def _faulty_engine(stage: Stage, _: trio.Nursery) -> int:
    return stage.primary.port


DIRECT = Gateway(
    name="no gateway",
    requirement="",
    install=_nothing,
    inside=_faulty_engine,
    note="The client asks the faulty engine itself, once.",
    stages_each=100,
    processes=2,
    at_once=100,
)
REFERENCE = attrs.evolve(
    DIRECT,
    name="reference",
    inside=serve_reference,
    note="Does it right, for as much as one request needs.",
)
CITADEL = Gateway(
    name="citadel",
    requirement=_PEERS["citadel"].requirement,
    install=_PEERS["citadel"].install,
    launch=_launch_citadel,
    note="One key; breaker, health checks, clocks and fallbacks as the scenarios' baseline says; "
    "a rate limit that is never reached; all else at its defaults.",
    stages_each=8,
    processes=8,
    at_once=30,
    find_port=_citadels_port,
)
LITELLM = Gateway(
    name="litellm",
    requirement=_PEERS["litellm"].requirement,
    install=_PEERS["litellm"].install,
    launch=_launch_litellm,
    note="One worker. Two retries, `fallbacks` and `context_window_fallbacks` for every model, "
    "`allowed_fails` and `cooldown_time`; `timeout` and `stream_timeout` of 10 s for each attempt "
    "rather than 30, and no retry after a timeout (`retry_policy`), so that a fallback can still "
    "be asked within 30 s: that is for S06, and in S07 it cuts what would come late. Where two "
    "engines serve one model, both are deployments of it, and the second is its fallback, too, "
    "which a cut stream needs.",
    stages_each=100,
    processes=2,
    at_once=8,
)
SGLANG = Gateway(
    name="sglang-router",
    requirement=_PEERS["sglang-router"].requirement,
    install=_PEERS["sglang-router"].install,
    launch=_launch_sglang,
    note="It has no fallback models, so both engines are always workers of one pool, and a "
    "request is repeated until the faulty one has been asked. Three attempts, breaker and health "
    "checks as the baseline says, in whole seconds rounded up, as it takes no others; "
    "`--request-timeout-secs` is 10, so that a second attempt fits into 30 s: that is for S06, and "
    "in S07 it cuts what would come late.",
    stages_each=1,
    processes=4,
    at_once=1,
)
