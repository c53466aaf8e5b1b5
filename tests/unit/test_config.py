"""A configuration is right, or every single thing that is wrong with it is said at once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from citadel_gateway.config import ConfigError, load_config, parse
from citadel_gateway.config.schema import TlsConfig
from citadel_gateway.config.values import Algorithm, Capability, Engine, LogLevel, Name, Resolve
from citadel_gateway.policy.priority import Priority

URL = "http://127.0.0.1:8080"
MINIMAL: dict[str, Any] = {"models": {"m": {"endpoint": URL}}}


def problems(raw: Any, **environ: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(raw, environ=environ)
    return caught.value.problems


def with_model(**options: object) -> dict[str, object]:
    return {"models": {"m": {"endpoint": URL, **options}}}


def with_section(section: str, **options: object) -> dict[str, object]:
    return {**MINIMAL, section: options}


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "gateway.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# --- Values


@pytest.mark.parametrize(
    ("written", "seconds"),
    [(2, 2.0), (2.5, 2.5), ("250ms", 0.25), ("30s", 30.0), ("5m", 300.0), ("1.5h", 5400.0)],
)
def test_a_duration_is_a_number_of_seconds_or_has_a_unit(written: object, seconds: float) -> None:
    config = parse(with_section("load_balancer", queue_timeout=written))

    assert config.load_balancer.queue_timeout == seconds


@pytest.mark.parametrize(
    "written", [0, -1, "0s", "soon", "30", "5 m", "5d", "", True, float("nan"), float("inf"),
                "9" * 400 + "h", "٣s", [], {}],
)  # fmt: skip
def test_what_is_not_a_duration_is_refused(written: object) -> None:
    [problem] = problems(with_section("load_balancer", queue_timeout=written))

    assert problem.startswith("load_balancer.queue_timeout: ")
    assert "is not a duration above zero" in problem


def test_a_grace_may_be_zero() -> None:
    assert parse(with_section("service", lame_duck=0)).service.lame_duck == 0.0


@pytest.mark.parametrize(
    ("section", "option", "value", "message"),
    [
        ("service", "port", "8000", "'8000' is not a port (0 to 65535)"),
        ("service", "port", 65536, "65536 is not a port (0 to 65535)"),
        ("service", "port", True, "true is not a port (0 to 65535)"),
        ("service", "port", None, "null is not a port (0 to 65535)"),
        ("service", "port", 8000.0, "8000.0 is not a port (0 to 65535)"),
        ("service", "workers", 0, "0 is not a whole number of at least 1"),
        ("service", "workers", 1.5, "1.5 is not a whole number of at least 1"),
        ("service", "host", 8, "8 is not a line of text"),
        ("service", "host", "a\nb", r"'a\nb' is not a line of text"),
        ("gateway", "intelligent_routing", "yes", "'yes' is not true or false"),
        ("gateway", "intelligent_routing", 1, "1 is not true or false"),
        ("load_balancer", "queue_size", -1, "-1 is not a whole number of at least 0"),
        ("load_balancer", "retry_budget_ratio", 1.1, "1.1 is not a number from 0 to 1"),
        ("load_balancer", "retry_budget_floor", 0, "0 is not a number above zero"),
        ("monitoring", "health_check_endpoint", "health", "'health' is not a path like /health"),
        ("monitoring", "metrics_endpoint", "/<x>", "'/<x>' is not a path like /health"),
    ],
)  # fmt: skip
def test_no_value_is_coerced(section: str, option: str, value: object, message: str) -> None:
    assert problems(with_section(section, **{option: value})) == [f"{section}.{option}: {message}"]


@pytest.mark.parametrize("digits", [400, 5000])
def test_a_number_too_large_to_handle_is_refused_without_printing_it(digits: int) -> None:
    assert problems(with_section("performance", rate_limit_rps=10**digits)) == [
        "performance.rate_limit_rps: a huge number is not a number above zero"
    ]


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("http://10.0.0.1:8000/", "http://10.0.0.1:8000"),
        ("https://GPU.example/v1//", "https://gpu.example/v1"),
        ("http://[::1]:8000", "http://[::1]:8000"),
        ("http://under_score:1", "http://under_score:1"),
        ("unix:/run/vllm.sock", "unix:/run/vllm.sock"),
        ("unix:/run/vllm@1.sock:/base/", "unix:/run/vllm@1.sock:/base"),
        ("http+unix://%2Frun%2Fvllm.sock/base", "unix:/run/vllm.sock:/base"),
        ("http+unix://%2frun%2fvllm.sock", "unix:/run/vllm.sock"),
    ],
)
def test_an_endpoint_is_kept_without_its_trailing_slash(written: str, kept: str) -> None:
    assert parse(with_model(endpoint=written)).models[Name("m")].endpoint == kept


@pytest.mark.parametrize(
    "written",
    ["", "gpu:8000", "ftp://gpu", "http://", "http:///v1", "http://:80", "http://h:", "http://h:0",
     "http://h:65536", "http://h:x", "http://[::1", "http://[v1.x]", "http://::1", "http://a b",
     "http://a\tb", " http://a", "http://a..b", "http://a/\n", "http://h?x", "http://h#x", 80,
     "unix:", "unix:run/a.sock", "unix:/run/a/", "unix://run/a.sock", "unix:/run/a.sock:base",
     "unix:/run/a b.sock", "unix:/run/a.sock?x", "unix:/" + "a" * 107, "http+unix:///run/a.sock",
     None],
)  # fmt: skip
def test_what_is_not_an_endpoint_is_refused(written: object) -> None:
    [problem] = problems({"models": {"m": {"endpoints": [{"url": written}]}}})

    assert problem.startswith("models.m.endpoints[0].url: ")


@pytest.mark.parametrize(
    ("written", "hint"),
    [
        ("https://chat.example.org/", "; did you mean 'https://chat.example.org'?"),
        ("https://Chat.example.org", "; did you mean 'https://chat.example.org'?"),
        ("chat.example.org", "or '*'"),
    ],
)
def test_an_origin_is_written_as_browsers_send_it(written: str, hint: str) -> None:
    [problem] = problems(with_section("security", cors={"allow_origins": [written]}))

    assert problem.startswith(f"security.cors.allow_origins[0]: {written!r} is not an origin")
    assert problem.endswith(hint)


@pytest.mark.parametrize(
    ("written", "why"),
    [
        ("authorization", "is not the name of a header that begins with X-"),
        ("x-a b", "is not the name of a header that begins with X-"),
        ("x-", "is not the name of a header that begins with X-"),
        (7, "is not the name of a header that begins with X-"),
        ("X-Request-ID", "means something else to the gateway"),
        ("x-citadel-timeout", "means something else to the gateway"),
    ],
)
def test_no_credential_can_be_taken_for_a_session(written: object, why: str) -> None:
    """As it is passed on."""
    [problem] = problems(with_section("load_balancer", session_header=written))

    assert problem == f"load_balancer.session_header: {written!r} {why}"


def test_the_name_of_the_sessions_header_may_be_written_in_any_case() -> None:
    config = parse(with_section("load_balancer", session_header="X-OpenWebUI-Chat-Id"))

    assert config.load_balancer.session_header == "x-openwebui-chat-id"


def test_a_network_has_no_host_bits() -> None:
    [problem] = problems(with_section("security", trusted_proxies=["10.0.0.0/8", "10.0.0.1/8", 1]))[
        :1
    ]

    assert problem.startswith("security.trusted_proxies[1]: '10.0.0.1/8' is not a network")
    assert "has host bits set" in problem


def test_lists_become_tuples_and_words_become_enums() -> None:
    config = parse(with_model(aliases=["a", "b"], capabilities=["chat"], engine="vllm"))

    model = next(iter(config.models.values()))
    assert model.aliases == ("a", "b")
    assert model.capabilities == (Capability.CHAT,)
    assert model.engine is Engine.VLLM


# --- Secrets


def test_a_secret_is_literal_or_from_the_environment_or_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("  from-file \nsecond line\n")
    keys = ["literal", "env:KEY", f"file:{tmp_path / 'key'}"]
    raw = {"models": {f"m{i}": {"endpoint": URL, "api_key": key} for i, key in enumerate(keys)}}

    config = parse(raw, environ={"KEY": "from-env"})

    assert [m.api_key for m in config.models.values()] == ["literal", "from-env", "from-file"]


def test_a_missing_secret_is_named(tmp_path: Path) -> None:
    raw = {"models": {"a": {"endpoint": URL, "api_key": "env:NOPE"},
                      "b": {"endpoint": URL, "api_key": f"file:{tmp_path / 'nope'}"},
                      "c": {"endpoint": URL, "api_key": "file:\0"}}}  # fmt: skip

    assert problems(raw) == [
        "models.a.api_key: environment variable 'NOPE' is not set",
        f"models.b.api_key: cannot read file {str(tmp_path / 'nope')!r}: No such file or directory",
        r"models.c.api_key: cannot read file '\x00' as text",
    ]


@pytest.mark.parametrize(
    "raw",
    [
        with_model(api_key=2718281828),
        with_model(api_key="2718281828\nx"),
        with_model(api_key=["2718281828"]),
        with_model(endpoint="http://user:2718281828@h"),
        with_model(endpoint="user:2718281828@h"),
        with_model(endpoint="h?key=2718281828"),
        with_model(endpoints={"api_key": "2718281828"}),
        with_section("security", api_keys=[{"id": "x", "sha256": "2718281828"}]),
        with_section("security", api_keys=["2718281828"]),
    ],
)
def test_a_message_never_repeats_what_may_be_a_secret(raw: dict[str, object]) -> None:
    assert "2718281828" not in "".join(problems(raw))


# --- Shape


def test_every_problem_is_reported_at_once_by_its_path() -> None:
    raw = {
        "service": {"port": "x", "worker": 4},
        "gatway": {},
        "monitoring": ["/health"],
        "load_balancer": {"algorithm": "round_robbin"},
        "models": {
            "hermes-2": {"weight": -1, "endpoints": [{"url": URL}, {"weigth": 2}, "x"]},
            "two words": {"endpoint": 5, "timeouts": {"idle": 0}},
        },
        "security": {"cors": {"allow_origins": "*"}},
    }

    assert problems(raw) == [
        "gatway: unknown option; did you mean 'gateway'?",
        "service.worker: unknown option; did you mean 'workers'?",
        "service.port: 'x' is not a port (0 to 65535)",
        "load_balancer.algorithm: 'round_robbin' is not one of round_robin, weighted_round_robin, "
        "random, least_connections, power_of_two, least_latency, cost, consistent_hash, "
        "session_affinity; did you mean 'round_robin'?",
        "models.two words: 'two words' is not a name: 1 to 128 characters without white space",
        "models.hermes-2.endpoints[1].weigth: unknown option; did you mean 'weight'?",
        "models.hermes-2.endpoints[1].url: is required",
        "models.hermes-2.endpoints[2]: text where a mapping of options should be",
        "models.hermes-2.weight: -1 is not a number above zero",
        "models.two words.endpoint: 5 is not a URL",
        "models.two words.timeouts.idle: 0 is not a duration above zero, "
        "like 2.5, 250ms, 30s, 5m or 1h",
        "monitoring: a list where a mapping of options should be",
        "security.cors.allow_origins: text where a list should be",
    ]


def test_an_unknown_key_without_a_neighbour_lists_what_there_is() -> None:
    assert problems(with_section("gateway", zzz=1)) == [
        "gateway.zzz: unknown option; known here: cost_optimization_enabled, default_model, "
        "intelligent_routing, model_routing_enabled, routing_headers"
    ]


def test_did_you_mean_looks_past_capitals() -> None:
    [problem] = problems(with_section("monitoring", log_level="info"))

    assert problem.endswith("did you mean 'INFO'?")
    assert parse(with_section("monitoring", log_level="INFO")).monitoring.log_level is LogLevel.INFO


def test_a_keys_place_in_a_queue_is_a_weight_and_a_class() -> None:
    key: dict[str, Any] = {"id": "x", "sha256": "0" * 64}
    plain, chosen = parse(
        with_section(
            "security",
            api_keys=[key, {**key, "id": "y", "weight": 2.5, "max_priority": "interactive"}],
        )
    ).security.api_keys
    bad = {**key, "weight": 0, "max_priority": "Bulk"}

    assert (plain.weight, plain.max_priority) == (1.0, Priority.DEFAULT)
    assert (chosen.weight, chosen.max_priority) == (2.5, Priority.INTERACTIVE)
    assert problems(with_section("security", api_keys=[bad])) == [
        "security.api_keys[0].weight: 0 is not a number above zero",
        "security.api_keys[0].max_priority: 'Bulk' is not one of system, interactive, default, "
        "bulk; did you mean 'bulk'?",
    ]
    assert problems(with_section("load_balancer", lower_priority_share=1.5)) == [
        "load_balancer.lower_priority_share: 1.5 is not a number from 0 to 1"
    ]


@pytest.mark.parametrize("raw", [{}, {"models": None}, {"models": {}}, {"models": []}])
def test_there_must_be_a_model(raw: dict[str, object]) -> None:
    [problem] = problems(raw)

    assert problem.startswith("models: ")


def test_a_null_section_or_list_means_its_defaults() -> None:
    nulls = {
        "service": None,
        "security": {"api_keys": None, "cors": None},
        "models": {"m": {"endpoint": URL, "timeouts": None, "capabilities": None}},
    }

    assert parse(nulls) == parse(MINIMAL)


def test_keys_that_are_not_text_are_reported() -> None:
    raw: Any = {"models": {1: {"endpoint": URL}}, None: 1, 2: 3}

    assert [p.partition(":")[0] for p in problems(raw)] == ["null", "2", "models.1"]


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["url", "endpoint", "endpoints", "weight", "timeouts", "aliases", "cors",
                         "api_keys", "port", "host", "default_model", "connect", "id"])
        | st.text(max_size=8) | st.integers() | st.none(),
        inner, max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip
sections = st.sampled_from(
    ["service", "gateway", "load_balancer", "models", "performance", "monitoring", "security"]
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(sections | st.text(max_size=5), json_like) | json_like)
def test_whatever_the_input_nothing_but_a_config_error_comes_out(raw: Any) -> None:
    error = None
    try:
        parse(raw)
    except ConfigError as exc:
        error = exc

    # One line each, whatever separators the input has.
    assert error is None or len(str(error).splitlines()) == 1 + len(error.problems) > 1


def test_an_endpoint_may_adapt_otherwise_than_its_model() -> None:
    raw = with_model(
        adaptive_concurrency=True, min_concurrent=3,
        endpoints=[{"url": "http://a", "adaptive_concurrency": False},
                   {"url": "http://b", "min_concurrent": 7}],
    )  # fmt: skip
    adapts = parse(raw).models[Name("m")].all_endpoints()

    assert [e.adaptive_concurrency for e in adapts] == [True, False, True]
    assert [e.min_concurrent for e in adapts] == [3, 3, 7]


# --- Rules between fields


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (
            {"models": {"m": {}, "n": None}},
            ["models.m: needs `endpoint`, `endpoints` or `endpoints_file`",
             "models.n: needs `endpoint`, `endpoints` or `endpoints_file`"],
        ),
        (
            with_section("gateway", default_model="n"),
            ["gateway.default_model: 'n' is not a model; models: m"],
        ),
        (
            {"models": {"auto": {"endpoint": URL}}},
            ["models.auto: 'auto' is reserved for requests that leave the choice"],
        ),
        (
            {"models": {"m": {"endpoint": URL, "aliases": ["auto", "n", "x", "x"]},
                        "n": {"endpoint": URL, "aliases": ["x"]}}},
            ["models.m.aliases[0]: 'auto' is reserved for requests that leave the choice",
             "models.m.aliases[1]: 'n' is the name of a model",
             "models.m.aliases[3]: 'x' is already an alias of 'm'",
             "models.n.aliases[0]: 'x' is already an alias of 'm'"],
        ),
        (
            with_model(endpoints=[{"url": "http://127.0.0.1:8080/"}, {"url": "http://h"},
                                  {"url": "http://H"}]),
            ["models.m.endpoints[0].url: http://127.0.0.1:8080 is there twice",
             "models.m.endpoints[2].url: http://h is there twice"],
        ),
        (
            with_model(max_concurrent=8, min_concurrent=9,
                       endpoints=[{"url": "http://a", "max_concurrent": 9},
                                  {"url": "http://b", "min_concurrent": 10},
                                  {"url": "http://c", "max_concurrent": 2}]),
            ["models.m.min_concurrent: 9 is more than max_concurrent, 8",
             "models.m.endpoints[1].min_concurrent: 10 is more than max_concurrent, 8",
             "models.m.endpoints[2].min_concurrent: 9 is more than max_concurrent, 2"],
        ),
        (
            with_model(hedge_after=0.5),
            ["models.m.hedge_after: needs `hedge: true`"],
        ),
        (
            {**with_model(hedge=True), "load_balancer": {"retry_ambiguous": "never"}},
            ["models.m.hedge: sends requests twice, which retry_ambiguous: never rules out"],
        ),
        (
            with_model(fallbacks=["m", "n"]),
            ["models.m.fallbacks[0]: a model cannot be its own fallback",
             "models.m.fallbacks[1]: 'n' is not a model; models: m"],
        ),
        (
            with_section("security", api_keys=[
                {"id": "x", "sha256": "0" * 64, "allowed_models": ["m", "n"]},
                {"id": "x", "sha256": "1" * 64}]),
            ["security.api_keys[0].allowed_models[1]: 'n' is not a model; models: m",
             "security.api_keys[1].id: 'x' is there twice"],
        ),
        (
            with_section("service", tls_certfile="cert.pem"),
            ["service.tls_keyfile: is required with tls_certfile"],
        ),
        (
            with_section("service", tls_keyfile="key.pem"),
            ["service.tls_certfile: is required with tls_keyfile"],
        ),
        (
            with_section("monitoring", prometheus_port=8000),
            ["monitoring.prometheus_port: 8000 is service.port, too, on the same host"],
        ),
        (
            with_section("monitoring", metrics_endpoint="/health"),
            ["monitoring.metrics_endpoint: is the health_check_endpoint, too"],
        ),
        (
            with_model(tls={"insecure_skip_verify": True}),
            ["models.m.tls: needs a URL that begins with https://"],
        ),
        (
            {"models": {"m": {"endpoints": [
                {"url": "https://a", "tls": {"ca_file": "/no/ca.pem"}},
                {"url": "https://b", "tls": {"cert_file": "/no/cert.pem"}},
                {"url": "http://c", "tls": {"server_name": "x"}}]}}},
            ["models.m.endpoints[0].tls.ca_file: there is no file '/no/ca.pem' that can be read",
             "models.m.endpoints[1].tls.key_file: is required with cert_file",
             "models.m.endpoints[1].tls.cert_file: "
             "there is no file '/no/cert.pem' that can be read",
             "models.m.endpoints[2].tls: needs a URL that begins with https://"],
        ),
        (
            {"models": {"m": {"endpoints": [
                {"url": "http://10.0.0.1", "resolve": "each"},
                {"url": "unix:/run/a.sock", "resolve": "each"},
                {"url": "http://[::1]:80", "resolve": "each"},
                {"url": "http://name", "resolve": "each"}]}}},
            [f"models.m.endpoints[{i}].resolve: 'each' needs a URL with a name in it"
             for i in range(3)],
        ),
        (
            with_section("security", cors={"allow_origins": ["*", "https://a.example"]}),
            ["security.cors.allow_origins: '*' already allows all the others"],
        ),
        (
            {"models": {"m": {"endpoints": [
                {"url": "http://_a._tcp.b:8000", "resolve": "srv"},
                {"url": "http://_a._tcp.b", "resolve": "srv"},
                {"url": "http://10.0.0.1", "resolve": "srv"}]}}},
            ["models.m.endpoints[0].resolve: "
             "'srv' needs a URL without a port, which the records tell",
             "models.m.endpoints[2].resolve: 'srv' needs a URL with a name in it"],
        ),
    ],
)  # fmt: skip
def test_what_contradicts_another_field_is_refused(
    raw: dict[str, object], expected: list[str]
) -> None:
    assert problems(raw) == expected


def test_files_for_tls_must_hold_what_their_names_say(tmp_path: Path) -> None:
    text, tls = tmp_path / "text", {"insecure_skip_verify": False}
    text.write_text("nothing of the kind")
    paths = dict.fromkeys(["ca_file", "cert_file", "key_file"], str(text))

    ca, cert = problems({"models": {"m": {"endpoint": "https://a", "tls": tls | paths}}})

    assert ca == f"models.m.tls.ca_file: {str(text)!r} holds no PEM certificates"
    assert cert.startswith("models.m.tls.cert_file: is no certificate with key_file's key: ")


def test_an_endpoint_has_the_models_tls_and_way_to_resolve_unless_it_has_its_own() -> None:
    raw = {
        "resolve": "each",
        "tls": {"server_name": "shared"},
        "endpoints": [
            {"url": "https://a"},
            {"url": "https://b", "resolve": "together", "tls": {"server_name": "own"}},
        ],
    }
    one, other = parse({"models": {"m": raw}}).models[Name("m")].all_endpoints()

    assert (one.resolve, one.tls) == (Resolve.EACH, TlsConfig(server_name="shared"))
    assert (other.resolve, other.tls) == (Resolve.TOGETHER, TlsConfig(server_name="own"))


def test_the_default_model_may_be_an_alias() -> None:
    raw = {**with_model(aliases=["x"]), "gateway": {"default_model": "x"}}

    assert parse(raw).gateway.default_model == "x"


@pytest.mark.parametrize(
    ("host", "port", "other_host", "other_port"),
    [("127.0.0.1", 8000, "127.0.0.2", 8000), ("127.0.0.1", 0, "127.0.0.1", 0),
     ("0.0.0.0", 8000, "127.0.0.1", 8001), ("0.0.0.0", 8000, "127.0.0.1", None)],
)  # fmt: skip
def test_two_listeners_may_share_what_does_not_clash(
    host: str, port: int, other_host: str, other_port: int | None
) -> None:
    raw = {
        **MINIMAL,
        "service": {"host": host, "port": port},
        "monitoring": {"prometheus_host": other_host, "prometheus_port": other_port},
    }

    assert parse(raw).monitoring.prometheus_port == other_port


# --- Files


def test_problems_of_a_file_have_their_lines(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "models:\n  m:\n    weight: -1\n    endpoints:\n      - url: x\n      - weight: 1\n"
        "service:\n  prot: 1\n",
    )

    with pytest.raises(ConfigError) as caught:
        load_config(path, environ={})

    assert str(caught.value) == (
        f"{path}: 4 problems\n"
        "  service.prot: unknown option; did you mean 'port'? (line 8)\n"
        "  models.m.endpoints[0].url: "
        "'x' does not begin with http://, https:// or unix:/ (line 5)\n"
        "  models.m.endpoints[1].url: is required (line 6)\n"
        "  models.m.weight: -1 is not a number above zero (line 3)"
    )
    assert caught.value.source == str(path)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3, column 1: duplicate key 'a'"),
        ("a: [1\nb: 2", "line 2, column 2: while parsing a flow sequence expected ',' or ']'"),
        ("a: *b", "line 1, column 4: found undefined alias 'b'"),
        ("a: !!python/object:os.system x", "line 1, column 4: could not determine a constructor"),
        ("a: 1\n---\nb: 2", "line 2, column 1: expected a single document"),
        ("a: \x01", "not valid YAML: unacceptable character"),
        ("a: 2001-99-99", "not valid YAML: month must be in 1..12"),
        ("9" * 5000, "not valid YAML: Exceeds the limit"),
        ("[" * 5000, "not valid YAML: nested too deeply"),
        ("", "the file is empty"),
        ("# only a comment\n", "the file is empty"),
        ("- a\n", "the configuration is not a mapping of sections"),
        ("text", "the configuration is not a mapping of sections"),
    ],
)
def test_a_file_that_is_not_a_configuration_is_explained(
    tmp_path: Path, text: str, problem: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text), environ={})

    assert caught.value.problems[0].startswith(problem)
    assert len(caught.value.problems) == 1


def test_a_duplicate_key_does_not_show_its_values(tmp_path: Path) -> None:
    path = write(tmp_path, "m:\n  api_key: first-secret\n  api_key: second-secret\n")

    with pytest.raises(ConfigError, match="line 3, column 3: duplicate key 'api_key'") as caught:
        load_config(path, environ={})

    assert "secret" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"\xff\xfe\xfa")
    for name, message in [
        ("missing", "cannot be read: No such file or directory"),
        (".", "cannot be read: Is a directory"),
        ("latin", "cannot be read as UTF-8 text"),
    ]:
        with pytest.raises(ConfigError, match=message) as caught:
            load_config(tmp_path / name)
        assert caught.value.source == str(tmp_path / name)


def test_a_loop_of_yaml_anchors_is_only_a_wrong_value(tmp_path: Path) -> None:
    path = write(tmp_path, "models: &x\n  m: *x\n")

    with pytest.raises(ConfigError, match=r"models.m.m: unknown option"):
        load_config(path, environ={})


# --- Environment


VARIABLES: list[tuple[str, str, str, object]] = [
    ("API_GATEWAY_PORT", "8001", "service.port", 8001),
    ("API_GATEWAY_HOST", "127.0.0.1", "service.host", "127.0.0.1"),
    ("API_GATEWAY_WORKERS", "2", "service.workers", 2),
    ("API_GATEWAY_MEMORY_GB", "1.5", "performance.memory_limit_gb", 1.5),
    ("API_GATEWAY_CPU_CORES", "8", "performance.cpu_cores", 8),
    ("LOAD_BALANCER_ALGORITHM", "cost", "load_balancer.algorithm", Algorithm.COST),
    ("HEALTH_CHECK_INTERVAL", "10s", "load_balancer.health_check_interval", 10.0),
    ("CIRCUIT_BREAKER_THRESHOLD", "7", "load_balancer.circuit_breaker_threshold", 7),
    ("CIRCUIT_BREAKER_TIMEOUT", "5", "load_balancer.circuit_breaker_timeout", 5.0),
    ("DEFAULT_MODEL", "phi-3", "gateway.default_model", "phi-3"),
    ("MODEL_ROUTING_ENABLED", "false", "gateway.model_routing_enabled", False),
    ("INTELLIGENT_ROUTING", "0", "gateway.intelligent_routing", False),
    ("COST_OPTIMIZATION_ENABLED", "OFF", "gateway.cost_optimization_enabled", False),
    ("REQUEST_TIMEOUT_SECONDS", "60", "performance.request_timeout_seconds", 60.0),
    ("MAX_CONCURRENT_REQUESTS", "5", "performance.max_concurrent_requests", 5),
    ("RATE_LIMITING_ENABLED", "no", "performance.rate_limiting_enabled", False),
    ("RATE_LIMIT_RPS", "12.5", "performance.rate_limit_rps", 12.5),
    ("PROMETHEUS_PORT", "9091", "monitoring.prometheus_port", 9091),
    ("HEALTH_CHECK_ENDPOINT", "/up", "monitoring.health_check_endpoint", "/up"),
    ("METRICS_ENDPOINT", "/numbers", "monitoring.metrics_endpoint", "/numbers"),
]
TWO_MODELS = {
    "models": {"phi-3": {"endpoints": [{"url": URL}]}, "hermes": {"endpoint": URL}},
    "monitoring": None,
}


@pytest.mark.parametrize(("variable", "text", "path", "value"), VARIABLES)
def test_a_variable_overrides_the_file(variable: str, text: str, path: str, value: object) -> None:
    config = parse(TWO_MODELS, environ={variable: text})

    section, option = path.split(".")
    found = getattr(getattr(config, section), option)
    assert found == value
    assert type(found) is type(value)
    assert found != getattr(getattr(parse(TWO_MODELS), section), option)


def test_a_models_variable_replaces_its_endpoints() -> None:
    config = parse(TWO_MODELS, environ={"PHI_3_ENDPOINT": "http://10.0.0.1:1/"})

    phi, hermes = config.models.values()
    assert [e.url for e in phi.all_endpoints()] == ["http://10.0.0.1:1"]
    assert [e.url for e in hermes.all_endpoints()] == [URL]


def test_a_model_without_an_endpoint_may_get_it_from_its_variable() -> None:
    config = parse({"models": {"m": None}}, environ={"M_ENDPOINT": URL})

    assert [e.url for m in config.models.values() for e in m.all_endpoints()] == [URL]


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        ("API_GATEWAY_PORT", "x", "'x' is not a port (0 to 65535)"),
        ("API_GATEWAY_PORT", "65536", "65536 is not a port (0 to 65535)"),
        ("API_GATEWAY_WORKERS", "1_0", "'1_0' is not a whole number of at least 1"),
        ("RATE_LIMIT_RPS", "nan", "'nan' is not a number above zero"),
        ("RATE_LIMIT_RPS", "1e999", "inf is not a number above zero"),
        ("RATE_LIMITING_ENABLED", "maybe", "'maybe' is not true or false"),
        ("DEFAULT_MODEL", "herms", "'herms' is not a model; did you mean 'hermes'?"),
        ("HERMES_ENDPOINT", "gpu", "'gpu' does not begin with http://, https:// or unix:/"),
    ],
)
def test_a_wrong_variable_is_reported_by_its_name(variable: str, text: str, message: str) -> None:
    assert problems(TWO_MODELS, **{variable: text}) == [f"{variable}: {message}"]


def test_an_empty_variable_counts_as_unset() -> None:
    empty = dict.fromkeys([name for name, *_ in VARIABLES] + ["HERMES_ENDPOINT"], "")

    assert parse(TWO_MODELS, environ=empty) == parse(TWO_MODELS)


def test_a_variable_of_two_models_is_refused() -> None:
    raw = {"models": {"a-b": {"endpoint": URL}, "a.b": {"endpoint": URL}}}

    assert problems(raw, A_B_ENDPOINT=URL) == [
        "A_B_ENDPOINT: is the variable of more than one model: a-b, a.b"
    ]
    assert len(parse(raw).models) == 2


def test_a_model_named_like_a_setting_does_not_take_its_variable() -> None:
    config = parse({"models": {"metrics": {"endpoint": URL}}}, environ={"METRICS_ENDPOINT": "/m"})

    assert config.monitoring.metrics_endpoint == "/m"
    assert [m.endpoint for m in config.models.values()] == [URL]


def test_a_variable_does_not_hide_a_section_of_the_wrong_kind() -> None:
    [problem] = problems({**MINIMAL, "service": []}, API_GATEWAY_PORT="1")

    assert problem == "service: a list where a mapping of options should be"


def test_files_are_loaded_with_the_processs_variables_and_dicts_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in os.environ:
        monkeypatch.delenv(name)
    monkeypatch.setenv("API_GATEWAY_PORT", "8001")

    assert load_config(write(tmp_path, f"models: {{m: {{endpoint: {URL}}}}}")).service.port == 8001
    assert parse(MINIMAL).service.port == 8000


def test_the_callers_data_stays_as_it_was() -> None:
    raw = {"models": {"m": {"endpoint": URL}}}

    parse(raw, environ={"API_GATEWAY_PORT": "1", "M_ENDPOINT": "http://h"})

    assert raw == {"models": {"m": {"endpoint": URL}}}


def test_a_wrong_value_does_not_hide_what_else_is_wrong(tmp_path: Path) -> None:
    raw = {
        "gateway": {"default_model": "nobody"},
        "models": {
            "a": {"endpoint": "http://a:99999"},
            "b": {"endpoint": "http://b", "fallbacks": ["c"]},
        },
    }
    with pytest.raises(ConfigError) as caught:
        parse(raw)

    assert [problem.partition(":")[0] for problem in caught.value.problems] == [
        "models.a.endpoint",
        "gateway.default_model",
        "models.b.fallbacks[0]",
    ]


@pytest.mark.parametrize(
    ("store", "problem"),
    [
        ({"kind": "redis"}, "store.url"),
        ({"url": "redis://a"}, "store.url"),
        ({"kind": "redis", "url": "redis://u:p@a"}, "store.url"),
        ({"kind": "redis", "url": "http://a"}, "store.url"),
        ({"kind": "redis", "url": "redis://a/b"}, "store.url"),
        ({"kind": "redis", "url": "redis://a,b"}, "redis+sentinel:// or redis+cluster://"),
        ({"kind": "redis", "url": "redis://a:0"}, "no valid port behind a"),
        ({"kind": "redis", "url": "redis+sentinel://a,b"}, "no name of a service"),
        ({"kind": "redis", "url": "redis+sentinel://a,,b/main"}, "store.url"),
        ({"kind": "redis", "url": "redis+cluster://a/1"}, "a cluster has one database"),
        ({"kind": "redis", "url": "redis+ring://a"}, "store.url"),
        (
            {"kind": "redis", "url": "redis://a", "sentinel_password": "x"},
            "store.sentinel_password",
        ),
        (
            {"kind": "redis", "url": "redis+cluster://a", "tls": {"insecure_skip_verify": True}},
            "store.tls",
        ),
        ({"kind": "redis", "url": "redis://a", "path": "/x"}, "store.path"),
        ({"kind": "redis", "url": "redis://a", "tls": {"insecure_skip_verify": True}}, "store.tls"),
        ({"kind": "lmdb", "password": "x"}, "store.password"),
        ({"kind": "redix"}, "store.kind"),
        ({"prefix": "a{b"}, "store.prefix"),
        ({"timeout": 3}, "store.timeout"),
    ],
)
def test_a_store_that_cannot_be_is_refused_by_its_path(store: Any, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse({"models": {"m": {"endpoint": "http://a"}}, "store": store})

    assert [problem in line for line in caught.value.problems] == [True]


def test_the_password_of_a_store_is_not_shown_when_its_url_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(
            {
                "models": {"m": {"endpoint": "http://a"}},
                "store": {"kind": "redis", "url": "redis+sentinel://user:hush@a/main"},
            }
        )

    assert "hush" not in str(caught.value)


def test_with_a_store_there_must_be_a_queue() -> None:
    sections = {"store": {"kind": "lmdb"}, "load_balancer": {"queue_size": 0}}
    with pytest.raises(ConfigError) as caught:
        parse({"models": {"m": {"endpoint": "http://a"}}, **sections})

    assert "load_balancer.queue_size" in caught.value.problems[0]
