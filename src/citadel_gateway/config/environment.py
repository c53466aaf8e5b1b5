"""The seed's environment variables, laid over the file.

A variable's text becomes a boolean or a number here; whether it is a good one is decided where
the file's values are, and reported under the variable's name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import attrs

from citadel_gateway.config.problems import Problem, Steps

_SWITCHES = {
    "true": True, "yes": True, "on": True, "1": True,
    "false": False, "no": False, "off": False, "0": False,
}  # fmt: skip


def _text(text: str) -> object:
    return text


def _switch(text: str) -> object:
    return _SWITCHES.get(text.lower(), text)


def _number(text: str) -> object:
    """A number if it is written as one; else the text, for a message that shows it."""
    if re.fullmatch(r"[+-]?[0-9]{1,30}", text):
        return int(text)
    if re.fullmatch(r"[+-]?[0-9]{0,30}\.?[0-9]{1,30}([eE][+-]?[0-9]{1,3})?", text):
        return float(text)
    return text


VARIABLES: Mapping[str, tuple[str, str, Callable[[str], object]]] = {
    "API_GATEWAY_PORT": ("service", "port", _number),
    "API_GATEWAY_HOST": ("service", "host", _text),
    "API_GATEWAY_WORKERS": ("service", "workers", _number),
    "API_GATEWAY_MEMORY_GB": ("performance", "memory_limit_gb", _number),
    "API_GATEWAY_CPU_CORES": ("performance", "cpu_cores", _number),
    "LOAD_BALANCER_ALGORITHM": ("load_balancer", "algorithm", _text),
    "HEALTH_CHECK_INTERVAL": ("load_balancer", "health_check_interval", _number),
    "CIRCUIT_BREAKER_THRESHOLD": ("load_balancer", "circuit_breaker_threshold", _number),
    "CIRCUIT_BREAKER_TIMEOUT": ("load_balancer", "circuit_breaker_timeout", _number),
    "DEFAULT_MODEL": ("gateway", "default_model", _text),
    "MODEL_ROUTING_ENABLED": ("gateway", "model_routing_enabled", _switch),
    "INTELLIGENT_ROUTING": ("gateway", "intelligent_routing", _switch),
    "COST_OPTIMIZATION_ENABLED": ("gateway", "cost_optimization_enabled", _switch),
    "REQUEST_TIMEOUT_SECONDS": ("performance", "request_timeout_seconds", _number),
    "MAX_CONCURRENT_REQUESTS": ("performance", "max_concurrent_requests", _number),
    "RATE_LIMITING_ENABLED": ("performance", "rate_limiting_enabled", _switch),
    "RATE_LIMIT_RPS": ("performance", "rate_limit_rps", _number),
    "PROMETHEUS_PORT": ("monitoring", "prometheus_port", _number),
    "HEALTH_CHECK_ENDPOINT": ("monitoring", "health_check_endpoint", _text),
    "METRICS_ENDPOINT": ("monitoring", "metrics_endpoint", _text),
}


@attrs.frozen
class Overlaid:
    """The file's data with the variables laid over it, and which variable set what."""

    raw: Mapping[str, object]
    origins: Mapping[Steps, str]
    problems: tuple[Problem, ...] = ()

    def rename(self, problem: Problem) -> Problem:
        """Report a value under the name of the variable that set it."""
        if (variable := self.origins.get(problem.path)) is None:
            return problem
        return Problem((variable,), problem.message)


def endpoint_variable(model: str) -> str:
    return f"{re.sub(r'[^A-Z0-9]', '_', model.upper())}_ENDPOINT"


def overlay(raw: Mapping[str, object], environ: Mapping[str, str]) -> Overlaid:
    """Lay every variable that is set, and not empty, over *raw*, which stays as it is."""
    merged: dict[str, object] = dict(raw)
    origins: dict[Steps, str] = {}
    for variable, (section, option, read) in VARIABLES.items():
        entries = _mapping(merged.get(section))
        # A section of the wrong kind stays, to be reported as what it is.
        if (text := environ.get(variable)) and entries is not None:
            merged[section] = {**entries, option: read(text)}
            origins[section, option] = variable
    return _overlay_endpoints(merged, origins, environ)


def _overlay_endpoints(
    merged: dict[str, object], origins: dict[Steps, str], environ: Mapping[str, str]
) -> Overlaid:
    models = _mapping(merged.get("models")) or {}
    owners: dict[str, list[str]] = {}
    for name in models:
        variable = endpoint_variable(name) if isinstance(name, str) else ""
        # HEALTH_CHECK_ENDPOINT is a path, even if there is a model of that name.
        if environ.get(variable) and variable not in VARIABLES:
            owners.setdefault(variable, []).append(name)
    for variable, (name, *others) in owners.items():
        entries = _mapping(models[name])
        if entries is not None and not others:
            kept = {key: value for key, value in entries.items() if key != "endpoints"}
            models = {**models, name: {**kept, "endpoint": environ[variable]}}
            origins["models", name, "endpoint"] = variable
    if models:
        merged["models"] = models
    problems = tuple(
        Problem((variable,), f"is the variable of more than one model: {', '.join(names)}")
        for variable, names in owners.items()
        if len(names) > 1
    )
    return Overlaid(merged, origins, problems)


def _mapping(raw: object) -> dict[str, object] | None:
    """A section's entries; a null section has none."""
    if raw is None:
        return {}
    return dict(raw) if isinstance(raw, Mapping) else None
