"""The files we ship say what the code does."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from ruamel.yaml import YAML

from citadel_gateway.config import GatewayConfigSchema, load_config, parse
from citadel_gateway.config.environment import VARIABLES, endpoint_variable
from citadel_gateway.config.json_schema import dumps, json_schema
from citadel_gateway.config.schema import EndpointConfig
from citadel_gateway.config.show import MASK, effective_yaml
from citadel_gateway.config.values import Algorithm, LogLevel, Name, Url

CONFIG = Path(__file__).parents[2] / "config"
GATEWAY = CONFIG / "gateway.yaml"
PHI = Name("phi-3-mini")


def load(name: str) -> GatewayConfigSchema:
    return load_config(CONFIG / name, environ={})


def uncomment(text: str) -> str:
    """Use every option: one "#" goes, unless a single space behind it makes the line prose."""
    return re.sub(r"^( *)#(?! \S|$)", r"\1", text, flags=re.MULTILINE)


def from_yaml(text: str) -> Any:
    return YAML(typ="safe", pure=True).load(text)


def environment() -> dict[str, str]:
    lines = (CONFIG / ".env.example").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def test_the_seeds_file_has_the_seeds_values() -> None:
    config = load("gateway.yaml")

    service, gateway, balancer = config.service, config.gateway, config.load_balancer
    performance, monitoring = config.performance, config.monitoring
    assert service.name == "unified-api-gateway"
    assert (service.host, service.port, service.workers) == ("0.0.0.0", 8000, 4)
    assert gateway.default_model == "mixtral-8x7b"
    assert gateway.model_routing_enabled
    assert gateway.intelligent_routing
    assert gateway.cost_optimization_enabled
    assert balancer.algorithm is Algorithm.ROUND_ROBIN
    assert balancer.health_check_interval == 30.0
    assert balancer.circuit_breaker_threshold == 5
    assert balancer.circuit_breaker_timeout == 60.0
    assert [
        (name, m.endpoint, m.weight, m.max_concurrent, m.cost_per_request)
        for name, m in config.models.items()
    ] == [
        ("mixtral-8x7b", "http://192.168.10.29:11400", 1.0, 10, 0.1),
        ("hermes-2", "http://192.168.10.29:11401", 0.8, 20, 0.05),
        ("openchat-3.5", "http://192.168.10.29:11402", 0.6, 50, 0.02),
        ("phi-3-mini", "http://192.168.10.29:11403", 0.4, 100, 0.01),
    ]
    assert performance.request_timeout_seconds == 30.0
    assert performance.max_concurrent_requests == 100
    assert performance.rate_limiting_enabled
    assert performance.rate_limit_rps == 50.0
    assert performance.memory_limit_gb == 2.0
    assert performance.cpu_cores == 4
    assert monitoring.prometheus_port == 9090
    assert monitoring.health_check_endpoint == "/health"
    assert monitoring.metrics_endpoint == "/metrics"
    assert monitoring.log_level is LogLevel.INFO


def test_the_seeds_values_are_the_defaults() -> None:
    seed, least = load("gateway.yaml"), load("minimal.yaml")

    assert least.workers == seed.workers == 4
    assert attrs.evolve(
        seed, models={}, gateway=least.gateway, service=attrs.evolve(seed.service, workers=None)
    ) == attrs.evolve(least, models={})
    assert attrs.evolve(seed.gateway, default_model=None) == least.gateway


def test_the_demo_differs_from_the_seed_in_its_addresses_only() -> None:
    seed, demo = load("gateway.yaml"), load("demo.yaml")

    here = {
        name: attrs.evolve(m, endpoint=Url(str(m.endpoint).replace("192.168.10.29", "127.0.0.1")))
        for name, m in seed.models.items()
    }
    local = attrs.evolve(seed.service, host="127.0.0.1")
    assert demo == attrs.evolve(seed, models=here, service=local)


def test_the_minimal_file_has_one_model() -> None:
    assert len(load("minimal.yaml").models) == 1


@pytest.mark.parametrize("name", ["gateway.yaml", "demo.yaml", "minimal.yaml"])
def test_editors_find_the_schema_of_every_file(name: str) -> None:
    first = (CONFIG / name).read_text().splitlines()[0]

    assert first == "# yaml-language-server: $schema=gateway.schema.json"


def test_every_commented_out_option_is_valid_and_has_its_default() -> None:
    full = parse(from_yaml(uncomment(GATEWAY.read_text())))

    phi = full.models[PHI]
    [example] = phi.endpoints
    [key] = full.security.api_keys
    assert example == EndpointConfig(url=example.url)
    assert (key.allowed_models, key.rate_limit_rps, key.rate_limit_burst) == ((), None, None)
    models = {**full.models, PHI: attrs.evolve(phi, endpoints=())}
    security = attrs.evolve(full.security, api_keys=())
    assert attrs.evolve(full, models=models, security=security) == load("gateway.yaml")


def test_every_single_option_is_valid_when_it_alone_is_uncommented() -> None:
    text, plain = GATEWAY.read_text(), load("gateway.yaml")
    options = list(re.finditer(r"^( +)#(?=\w+: \S)", text, flags=re.MULTILINE))

    assert len(options) > 30
    for option in options:
        alone = f"{text[: option.start()]}{option[1]}{text[option.end() :]}"
        assert parse(from_yaml(alone)) == plain


def test_the_full_file_shows_every_option_there_is() -> None:
    shown = set(paths(from_yaml(uncomment(GATEWAY.read_text()))))
    every = set(paths(from_yaml(effective_yaml(parse(from_yaml(uncomment(GATEWAY.read_text())))))))

    # Models other than the one that shows the options are not complete.
    others = re.compile(r"models\.(mixtral|hermes|openchat)")
    assert {p for p in every if not others.match(p)} == {p for p in shown if not others.match(p)}


def paths(data: Any, prefix: str = "") -> Iterator[str]:
    match data:
        case dict():
            for key, value in data.items():
                yield f"{prefix}{key}"
                yield from paths(value, f"{prefix}{key}.")
        case list():
            for value in data:
                yield from paths(value, f"{prefix}[].")


def test_the_example_environment_changes_nothing() -> None:
    assert load_config(GATEWAY, environ=environment()) == load("gateway.yaml")


def test_the_example_environment_names_every_variable() -> None:
    of_models = {endpoint_variable(name) for name in load("gateway.yaml").models}

    assert set(environment()) == set(VARIABLES) | of_models


# --- JSON Schema


def test_the_shipped_schema_is_the_generated_one() -> None:
    # To renew it, write citadel_gateway.config.json_schema.dumps() to the file.
    assert (CONFIG / "gateway.schema.json").read_text() == dumps()


def test_the_schema_is_strict_and_explains_every_option() -> None:
    schema: Any = json_schema()

    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    objects = [schema, *(d for d in schema["$defs"].values() if d.get("type") == "object")]
    assert len(objects) == 15
    for section in objects:
        assert section["additionalProperties"] is False
        assert section["description"]
        assert all(option["description"] for option in section["properties"].values())


def test_the_schema_knows_defaults_words_and_what_is_required() -> None:
    definitions: Any = json_schema()["$defs"]

    balancer = definitions["LoadBalancerConfig"]["properties"]
    assert balancer["algorithm"]["default"] == "round_robin"
    assert definitions["Algorithm"]["enum"] == [a.value for a in Algorithm]
    assert definitions["EndpointConfig"]["required"] == ["url"]
    assert json_schema()["anyOf"] == [{"required": ["models"]}, {"required": ["backends"]}]


def test_the_schemas_duration_pattern_is_the_loaders() -> None:
    definitions: Any = json.loads(dumps())["$defs"]
    pattern = re.compile(definitions["Seconds"]["anyOf"][1]["pattern"])

    assert all(map(pattern.search, ["250ms", "30s", "5m", "1.5h"]))
    assert not any(map(pattern.search, ["30", "soon", "5d", "1.h", " 5m"]))


# --- Effective configuration


def with_secrets() -> GatewayConfigSchema:
    return parse(
        {
            "models": {
                "m": {
                    "endpoint": "http://a",
                    "api_key": "env:KEY",
                    "endpoints": [{"url": "http://b", "api_key": "hush-literal"}],
                }
            },
            "security": {"api_keys": [{"id": "x", "sha256": "ab" * 32}]},
        },
        environ={"KEY": "hush-env"},
    )


def test_the_effective_configuration_masks_every_secret() -> None:
    shown = effective_yaml(with_secrets())

    assert "hush" not in shown
    assert "abab" not in shown
    assert shown.count(MASK) == 3


def test_what_is_shown_is_a_complete_configuration() -> None:
    full = load("gateway.yaml")

    shown = effective_yaml(full)

    assert parse(from_yaml(shown)) == full
    assert set(from_yaml(shown)) == {field.name for field in attrs.fields(GatewayConfigSchema)}


def test_only_the_masks_keep_a_shown_configuration_from_being_the_same(tmp_path: Path) -> None:
    config = with_secrets()
    path = tmp_path / "shown.yaml"

    # A masked hash is no hash, so that a masked file cannot come into service by accident.
    path.write_text(effective_yaml(config).replace(f"sha256: '{MASK}'", f"sha256: {'ab' * 32}"))

    shown = load_config(path, environ={})
    assert attrs.evolve(shown, models=config.models) == config
    assert [e.api_key for e in shown.models[Name("m")].all_endpoints()] == [MASK, MASK]
