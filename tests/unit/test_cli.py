"""The command line, as somebody at a prompt sees it: what it prints, and how it exits."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import attrs
import click
import httpx
import pytest
from click.testing import CliRunner, Result
from rich.text import Text

from citadel_gateway.cli import main
from citadel_gateway.cli.status import status_table
from citadel_gateway.config import load_config
from tests.integration.test_demo import Program, answers, free_ports

CONFIGS = Path(__file__).parents[2] / "config"
BAD = """
service: {prot: 8000}
load_balancer: {algorithm: fastest}
models: {m: {endpoint: "ftp://127.0.0.1"}}
"""


def run(*arguments: str, env: dict[str, str] | None = None) -> Result:
    return CliRunner(env=env).invoke(main, arguments)


def make_key(key_id: str) -> tuple[str, str]:
    """A key from `keygen`, and the lines for the configuration that it printed."""
    key, entry = run("keygen", key_id).stdout.split("\n\n")
    return key.split()[-1], entry.partition("\n")[2]


@attrs.frozen
class Running:
    url: str
    engine: str
    key: str


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A simulated engine and a gateway that wants a key, both from the command line."""
    directory = tmp_path_factory.mktemp("cli")
    port, engine_port = free_ports(2)
    key, entry = make_key("alice")
    config = directory / "gateway.yaml"
    config.write_text(
        f"service: {{host: 127.0.0.1, port: {port}, workers: 1}}\n"
        "monitoring: {prometheus_port: null}\n"
        f"models: {{small: {{endpoint: 'http://127.0.0.1:{engine_port}'}}}}\n"
        f"security:\n  api_keys:\n{entry}"
    )
    running = Running(f"http://127.0.0.1:{port}", f"http://127.0.0.1:{engine_port}", key)
    started: list[Program] = []
    try:
        for name, ready, arguments in (
            ("sim", f"{running.engine}/health", ("sim", "--port", str(engine_port))),
            ("serve", f"{running.url}/readyz", ("serve", "-c", str(config))),
        ):
            program = Program.start(directory / name, "citadel_gateway", *arguments)
            started.append(program)
            program.wait_until(lambda ready=ready: answers(ready))  # type: ignore[misc]
        yield running
    finally:
        for program in started:
            program.end()


# check


@pytest.mark.parametrize("name", ["minimal.yaml", "gateway.yaml", "demo.yaml"])
def test_check_prints_a_configuration_that_means_the_same(name: str, tmp_path: Path) -> None:
    result = run("check", "-c", str(CONFIGS / name))

    printed = tmp_path / "printed.yaml"
    printed.write_text(result.stdout)
    assert result.exit_code == 0
    assert load_config(printed, environ={}) == load_config(CONFIGS / name, environ={})


def test_check_names_every_mistake_at_once_on_standard_error(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(BAD)

    result = run("check", "-c", str(path))

    assert result.exit_code == 78
    assert result.stdout == ""
    assert f"{path}: 3 problems" in result.stderr
    for mistake in ("service.prot", "load_balancer.algorithm", "models.m.endpoint"):
        assert mistake in result.stderr


def test_check_of_a_file_that_is_not_there_is_a_configuration_error() -> None:
    result = run("check", "-c", "/nowhere/gateway.yaml")

    assert result.exit_code == 78
    assert "No such file" in result.stderr


def test_check_without_a_file_is_wrong_usage() -> None:
    assert run("check").exit_code == 2


def test_check_masks_secrets(tmp_path: Path) -> None:
    path = tmp_path / "secret.yaml"
    path.write_text("models: {m: {endpoint: 'http://127.0.0.1:1', api_key: hunter2hunter2}}")

    result = run("check", "-c", str(path))

    assert result.exit_code == 0
    assert "hunter2" not in result.output


def test_check_prints_the_schema_that_the_repository_holds() -> None:
    result = run("check", "--schema")

    assert result.exit_code == 0
    assert result.stdout == (CONFIGS / "gateway.schema.json").read_text()


# keygen


def test_a_key_made_by_keygen_works(gateway: Running) -> None:
    headers = {"authorization": f"Bearer {gateway.key}"}

    assert httpx.get(f"{gateway.url}/v1/models", trust_env=False).status_code == 401
    assert httpx.get(f"{gateway.url}/v1/models", headers=headers).status_code == 200


def test_every_key_is_another() -> None:
    assert make_key("alice")[0] != make_key("alice")[0]


@pytest.mark.parametrize("key_id", ["null", "123", "1e5", "a.b-c_d"])
def test_any_id_that_keygen_takes_is_taken_by_the_configuration(
    key_id: str, tmp_path: Path
) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(
        f"models: {{m: {{endpoint: 'http://127.0.0.1:1'}}}}\n"
        f"security:\n  api_keys:\n{make_key(key_id)[1]}"
    )

    assert [key.id for key in load_config(path).security.api_keys] == [key_id]


@pytest.mark.parametrize("key_id", ["", "a b", "a,b", "ä", "a\n", "x" * 129])
def test_keygen_refuses_an_id_that_no_header_could_carry(key_id: str) -> None:
    assert run("keygen", key_id).exit_code == 2


# route


def test_route_explains_by_a_file_alone() -> None:
    result = run("route", "Hi", "-c", str(CONFIGS / "demo.yaml"))

    assert result.exit_code == 0
    assert "auto:round_robin" in result.stdout
    for model in load_config(CONFIGS / "demo.yaml").models:
        assert model in result.stdout


def test_route_prints_json_when_asked() -> None:
    result = run("route", "Hi", "-c", str(CONFIGS / "demo.yaml"), "--model", "phi-3-mini", "--json")

    assert json.loads(result.stdout)["would_pick"]["model"] == "phi-3-mini"


def test_route_of_an_unknown_model_fails_and_names_the_known_ones() -> None:
    result = run("route", "Hi", "-c", str(CONFIGS / "demo.yaml"), "--model", "gpt")

    assert result.exit_code == 1
    assert "phi-3-mini" in result.stderr


def test_route_asks_a_running_gateway(gateway: Running) -> None:
    result = run("route", "Hi", "--url", gateway.url, "--key", gateway.key, "--json")

    assert result.exit_code == 0
    assert json.loads(result.stdout)["would_pick"] == {
        "model": "small",
        "endpoint": gateway.engine,
    }


# status


def test_status_shows_models_and_endpoints_once(gateway: Running) -> None:
    result = run("status", "--once", "--url", gateway.url, env={"CITADEL_API_KEY": gateway.key})

    assert result.exit_code == 0
    assert "healthy" in result.stdout
    assert "small" in result.stdout
    assert "closed" in result.stdout


@pytest.mark.parametrize(("engine", "shown"), [("vllm", "up vllm"), ("auto", "up")])
def test_the_table_says_which_engine_it_is_once_that_is_known(engine: str, shown: str) -> None:
    endpoint = {
        "url": "http://a", "engine": engine, "healthy": True, "cordoned": False, "in_flight": 0,
        "limit": 1, "breaker": "closed", "latency_seconds": None, "last_error": None,
    }  # fmt: skip
    report = {
        "gateway": "g", "status": "healthy", "waiting_for_any_model": 0,
        "models": {"m": {"waiting": 0, "endpoints": [endpoint]}},
        "limits": {"in_flight": 0, "max_concurrent_requests": 1},
    }  # fmt: skip

    (cell,) = status_table(report).columns[2].cells

    assert Text.from_markup(str(cell)).plain == shown


def test_status_prints_the_report_as_json(gateway: Running) -> None:
    result = run("status", "--json", "--url", gateway.url, "--key", gateway.key)

    assert result.exit_code == 0
    assert json.loads(result.stdout)["models"]["small"]["status"] == "available"


@pytest.mark.parametrize("key", [None, "wrong", "schlüssel"])
def test_status_with_a_wrong_key_says_so(gateway: Running, key: str | None) -> None:
    shown = () if key is None else ("--key", key)

    result = run("status", "--once", "--url", gateway.url, *shown)

    assert result.exit_code == 1
    assert "API key" in result.stderr


def test_status_of_a_gateway_that_is_not_well_exits_with_1(tmp_path: Path) -> None:
    port, nobody = free_ports(2)
    config = tmp_path / "gateway.yaml"
    config.write_text(
        f"service: {{host: 127.0.0.1, port: {port}, workers: 1}}\n"
        "monitoring: {prometheus_port: null}\n"
        f"models: {{lost: {{endpoint: 'http://127.0.0.1:{nobody}'}}}}\n"
    )
    program = Program.start(tmp_path / "output", "citadel_gateway", "serve", "-c", str(config))
    try:
        program.wait_until(lambda: answers(f"http://127.0.0.1:{port}/livez"))

        result = run("status", "--once", "--url", f"http://127.0.0.1:{port}")

        assert result.exit_code == 1
        assert "unhealthy" in result.stdout
        assert program.stop() == 0
    finally:
        program.end()


@pytest.mark.parametrize("url", ["http://127.0.0.1:{port}", "nonsense", "http://[::1"])
@pytest.mark.parametrize("command", [("status", "--once"), ("route", "Hi")])
def test_no_gateway_is_one_line_and_its_own_exit_code(command: tuple[str, ...], url: str) -> None:
    url = url.format(port=free_ports(1)[0])

    result = run(*command, "--url", url)

    assert result.exit_code == 69
    assert result.stderr.startswith(f"no gateway answers at {url}: ")
    assert result.stderr.count("\n") == 1


def test_something_else_at_the_address_is_not_taken_for_a_gateway(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stranger(*_: object, **__: object) -> httpx.Response:
        return httpx.Response(200, text="<html>welcome</html>")

    monkeypatch.setattr(httpx.Client, "request", stranger)

    result = run("status", "--once", "--url", "http://127.0.0.1:80")

    assert result.exit_code == 69
    assert "something else" in result.stderr


# cordon, drain and uncordon


@pytest.fixture
def operated(tmp_path: Path) -> Iterator[Running]:
    """A gateway with a listener for metrics, in front of a simulated engine."""
    port, second, engine_port = free_ports(3)
    config = tmp_path / "gateway.yaml"
    config.write_text(
        f"service: {{host: 127.0.0.1, port: {port}, workers: 1}}\n"
        f"monitoring: {{prometheus_port: {second}}}\n"
        f"models: {{small: {{endpoint: 'http://127.0.0.1:{engine_port}'}}}}\n"
    )
    running = Running(f"http://127.0.0.1:{second}", f"http://127.0.0.1:{engine_port}", "")
    started: list[Program] = []
    try:
        for name, ready, arguments in (
            ("sim", f"{running.engine}/health", ("sim", "--port", str(engine_port))),
            ("serve", f"{running.url}/readyz", ("serve", "-c", str(config))),
        ):
            program = Program.start(tmp_path / name, "citadel_gateway", *arguments)
            started.append(program)
            program.wait_until(lambda ready=ready: answers(ready))  # type: ignore[misc]
        yield running
    finally:
        for program in started:
            program.end()


def test_an_endpoint_is_taken_out_of_service_and_put_back(operated: Running) -> None:
    cordoned = run("cordon", operated.engine, "--url", operated.url)
    status = run("status", "--once", "--url", operated.url)
    drained = run("drain", operated.engine, "--url", operated.url, "--within", "5")
    uncordoned = run("uncordon", operated.engine, "--url", operated.url, "--model", "small")

    assert cordoned.exit_code == drained.exit_code == uncordoned.exit_code == 0
    assert cordoned.stdout == f"small  {operated.engine}  cordoned, 0 in flight\n"
    assert (status.exit_code, "cordoned" in status.stdout) == (1, True)
    assert drained.stdout == cordoned.stdout
    assert uncordoned.stdout == f"small  {operated.engine}  in service, 0 in flight\n"
    assert run("status", "--once", "--url", operated.url).exit_code == 0


def test_an_endpoint_is_added_and_removed(operated: Running) -> None:
    other = operated.engine.replace("127.0.0.1", "localhost")
    added = run("add", other, "--url", operated.url, "--model", "small", "--weight", "2")
    removed = run("remove", other, "--url", operated.url)
    again = run("remove", other, "--url", operated.url)

    assert (added.exit_code, removed.exit_code, again.exit_code) == (0, 0, 1)
    assert added.stdout == removed.stdout == f"small  {other}  in service, 0 in flight\n"
    assert "There is no endpoint" in again.stderr


def test_an_unknown_endpoint_fails_and_names_the_known_ones(operated: Running) -> None:
    result = run("cordon", "http://127.0.0.1:1", "--url", operated.url)

    assert result.exit_code == 1
    assert operated.engine in result.stderr


def test_a_drain_that_was_not_done_in_time_exits_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*_: object, **options: object) -> httpx.Response:
        assert options["json"] == {"endpoint": "http://a", "within": 2.0}
        each = {"model": "m", "endpoint": "http://a", "cordoned": True, "in_flight": 3}
        return httpx.Response(200, json={"drained": False, "endpoints": [each]})

    monkeypatch.setattr(httpx.Client, "request", busy)

    result = run("drain", "http://a", "--within", "2")

    assert result.exit_code == 1
    assert result.stdout == "m  http://a  cordoned, 3 in flight\n"


def test_a_key_that_is_no_admin_key_may_not(gateway: Running) -> None:
    result = run("cordon", gateway.engine, "--url", gateway.url, "--key", gateway.key)

    assert result.exit_code == 1
    assert "admin key" in result.stderr


# serve and sim


def test_serve_refuses_a_bad_configuration(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(BAD)

    result = run("serve", "-c", str(path))

    assert result.exit_code == 78
    assert "3 problems" in result.stderr


@pytest.mark.parametrize("command", ["serve", "sim"])
def test_a_taken_port_is_one_line_and_its_own_exit_code(command: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", free_ports(1)[0])) as sock:
        port = sock.getsockname()[1]
        config = tmp_path / "gateway.yaml"
        config.write_text(
            f"service: {{host: 127.0.0.1, port: {port}, workers: 1}}\n"
            "models: {m: {endpoint: 'http://127.0.0.1:1'}}\n"
        )
        arguments = {"serve": ("-c", str(config)), "sim": ("--port", str(port))}[command]
        program = Program.start(tmp_path / "output", "citadel_gateway", command, *arguments)
        try:
            assert program.process.wait(20) == 69
        finally:
            program.end()

    plain = [line for line in program.said().splitlines() if not line.startswith("{")]
    assert plain == [f"cannot listen on 127.0.0.1:{port}: it is in use"]


def test_sim_says_where_it_is_answers_there_and_leaves_on_ctrl_c(tmp_path: Path) -> None:
    program = Program.start(tmp_path / "output", "citadel_gateway", "sim", "--port", "0")
    try:
        program.wait_until(lambda: "listens on" in program.said())
        found = re.search(r"simulated mixtral-8x7b listens on (\S+);", program.said())
        assert found is not None
        models = httpx.get(f"{found[1]}/v1/models", trust_env=False).json()["data"]

        assert [model["id"] for model in models] == ["mixtral-8x7b"]
        assert program.stop() == 0
        assert "Traceback" not in program.said()
    finally:
        program.end()


@pytest.mark.parametrize(
    "arguments",
    [
        ("sim", "--port", "65536"),
        ("demo", "--port", "-1"),
        ("demo", "--prometheus-port", "x"),
        ("status", "--interval", "0"),
        ("route",),
        ("nonsense",),
    ],
)
def test_wrong_usage_exits_with_2(arguments: tuple[str, ...]) -> None:
    assert run(*arguments).exit_code == 2


def test_the_demo_cannot_have_one_port_for_two_listeners() -> None:
    result = run("demo", "--port", "9090")

    assert result.exit_code == 78
    assert "prometheus_port" in result.stderr


# help


@pytest.mark.parametrize("command", [None, *main.commands])
def test_help_explains_every_option(command: str | None) -> None:
    result = run(*([command] if command else []), "--help")

    assert result.exit_code == 0
    for parameter in (main.commands[command] if command else main).params:
        if isinstance(parameter, click.Option):
            assert parameter.opts[0] in result.stdout


def test_the_version_is_told() -> None:
    assert re.search(r"\d+\.\d+\.\d+", run("--version").stdout)


def test_check_remarks_on_what_is_hardly_meant_beside_the_configuration(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(
        "models: {m: {endpoint: 'http://127.0.0.1:1'}}\n"
        "service: {workers: 4}\nperformance: {memory_limit_gb: 0.5}\n"
    )

    result = run("check", "-c", str(path))

    assert result.exit_code == 0
    assert result.stderr.startswith("remark: performance.memory_limit_gb: leaves 0.125 GiB")
    assert "memory_limit_gb: 0.5" in result.stdout


def test_check_remarks_on_what_is_wrong_with_files_that_list_endpoints(tmp_path: Path) -> None:
    path, good, bad = (tmp_path / name for name in ("gateway.yaml", "good.json", "bad.json"))
    good.write_text('[{"url": "http://127.0.0.1:1"}]')
    bad.write_text('[{"url": "http://127.0.0.1:1", "weigth": 2}]')
    models = {
        name: {"endpoints_file": str(file)}
        for name, file in (("a", good), ("b", bad), ("c", tmp_path / "none.json"))
    }
    path.write_text(json.dumps({"models": models}))

    result = run("check", "-c", str(path))

    assert result.exit_code == 0
    wrong, missing = result.stderr.splitlines()
    assert wrong.startswith(f"remark: models.b.endpoints_file: {bad}: ")
    assert "weigth" in wrong
    assert missing.startswith("remark: models.c.endpoints_file: ")
    assert "cannot be read" in missing
