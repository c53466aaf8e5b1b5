"""The demo as a newcomer meets it: every line of the task's validation section, against it."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import httpx
import pytest
from openai import OpenAI

MODELS = ["mixtral-8x7b", "hermes-2", "openchat-3.5", "phi-3-mini"]
CONFIG = Path(__file__).parents[2] / "config" / "demo.yaml"
PORTS = range(21400, 21500)

needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="no curl: run `make tools`")


@attrs.define(eq=False)
class Program:
    """A child process with a session of its own; what it says goes to a file."""

    process: subprocess.Popen[bytes]
    _output: Path

    @classmethod
    def start(cls, output: Path, *arguments: str) -> Program:
        with output.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip
        return cls(process, output)

    def said(self) -> str:
        return self._output.read_text()

    def wait_until(self, fact: Callable[[], bool], *, within: float = 20.0) -> None:
        """Until *fact* holds; fails when the program ends or the time is over."""
        deadline = time.monotonic() + within
        while not fact():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.02)

    def stop(self, *, within: float = 10.0) -> int:
        """What Ctrl-C does; returns the exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(within)

    def end(self) -> None:
        """At the end of a test, however it went."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def free_ports(count: int) -> list[int]:
    return [port for port in PORTS if not listens(port)][:count]


def listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


@attrs.frozen
class Demo:
    program: Program
    config: Path
    ports: list[int]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports[0]}"

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, trust_env=False)


def start_demo(directory: Path) -> Demo:
    ports = free_ports(6)
    text = CONFIG.read_text()
    for old, new in zip((8000, 9090, 11400, 11401, 11402, 11403), ports, strict=True):
        text = text.replace(str(old), str(new))
    config = directory / "demo.yaml"
    config.write_text(text)
    program = Program.start(
        directory / "output", "citadel_gateway", "demo", "--config", str(config)
    )
    demo = Demo(program, config, ports)
    try:
        program.wait_until(lambda: answers(f"{demo.url}/readyz") and "Ctrl-C" in program.said())
    except BaseException:
        program.end()
        raise
    return demo


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    demo = start_demo(tmp_path_factory.mktemp("demo"))
    yield demo
    demo.program.end()


def test_a_table_says_what_runs_where(demo: Demo) -> None:
    said = demo.program.said()

    for model, port in zip(MODELS, demo.ports[2:], strict=True):
        assert re.search(rf"{re.escape(model)} .*http://127\.0\.0\.1:{port} .*simulated", said)
    assert re.search(rf"gateway .*{demo.url} ", said)
    assert f"http://127.0.0.1:{demo.ports[1]}/metrics" in said


@needs_curl
def test_the_line_to_try_works_as_it_is_printed(demo: Demo) -> None:
    line = re.search(r"curl .*?\n\n", demo.program.said(), re.DOTALL)
    assert line is not None

    answer = json.loads(run_shell(line[0]))

    assert answer["choices"][0]["message"]["content"].startswith("[simulated ")


def test_health_is_healthy_with_all_four_models(demo: Demo) -> None:
    report = demo.get("/health").json()

    assert list(report) == ["status", "gateway", "models", "timestamp"]
    assert report["status"] == "healthy"
    assert report["gateway"] == "unified-api-gateway"
    assert report["models"] == MODELS


def test_the_model_list_has_all_four_with_their_capabilities(demo: Demo) -> None:
    cards = demo.get("/v1/models").json()["data"]

    assert [card["id"] for card in cards] == MODELS
    assert all("chat" in str(card["capabilities"]) for card in cards)


@needs_curl
def test_a_chat_without_a_model_is_answered_by_one_of_them(demo: Demo) -> None:
    answer = json.loads(
        run_shell(
            f"curl -X POST {demo.url}/v1/chat/completions "
            '-H "Content-Type: application/json" '
            """-d '{"messages": [{"role": "user", "content": "Test routing"}], "max_tokens": 50}'"""
        )
    )

    assert answer["model"] in MODELS
    assert answer["choices"][0]["message"]["content"]
    assert answer["usage"]["completion_tokens"] <= 50


@needs_curl
def test_ten_requests_at_once_are_spread_over_all_models(demo: Demo, tmp_path: Path) -> None:
    run_shell(
        f"""cd {tmp_path}
        for i in {{1..10}}; do
          curl -X POST {demo.url}/v1/chat/completions -o $i.json \
            -H "Content-Type: application/json" \
            -d '{{"messages": [{{"role": "user", "content": "Load test $i"}}], "max_tokens": 20}}' &
        done
        wait"""
    )
    found = [json.loads(path.read_text())["model"] for path in tmp_path.glob("*.json")]

    assert len(found) == 10
    assert set(found) == set(MODELS)


@pytest.mark.parametrize("listener", [0, 1], ids=["api", "prometheus"])
def test_both_listeners_have_the_gateways_own_metrics(demo: Demo, listener: int) -> None:
    url = f"http://127.0.0.1:{demo.ports[listener]}/metrics"
    lines = [
        line for line in httpx.get(url, trust_env=False).text.splitlines() if "gateway" in line
    ]

    for wanted in ("overhead_seconds", "endpoint_healthy", "breaker_state", "requests"):
        assert any(line.startswith(f"citadel_gateway_{wanted}") for line in lines), wanted


def test_the_status_names_every_model_and_its_endpoint(demo: Demo) -> None:
    models = demo.get("/models/status").json()["models"]

    assert list(models) == MODELS
    for (_, entry), port in zip(models.items(), demo.ports[2:], strict=True):
        assert entry["status"] == "available"
        assert [e["url"] for e in entry["endpoints"]] == [f"http://127.0.0.1:{port}"]
        assert [e["breaker"] for e in entry["endpoints"]] == ["closed"]


def test_the_tasks_health_lines_report_all_models(demo: Demo) -> None:
    report = run_python(
        demo,
        """
from hxp_enterprise_llm.services.gateway.unified_api_gateway.service import UnifiedAPIGatewayService
gateway = UnifiedAPIGatewayService(config)
print(gateway.get_health_status())
""",
    )

    assert report["status"] == "healthy"
    assert report["models"] == MODELS


def test_the_tasks_load_balancer_lines_list_all_models(demo: Demo) -> None:
    available = run_python(
        demo,
        """
from hxp_enterprise_llm.services.load_balancer import LoadBalancer
lb = LoadBalancer(config)
print(lb.get_available_models())
""",
    )

    assert available == MODELS


def test_embeddings_come_through_the_openai_client(demo: Demo) -> None:
    with OpenAI(base_url=f"{demo.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.embeddings.create(model="hermes-2", input=["one", "two", "one"])

    one, two, again = (each.embedding for each in answer.data)
    assert one == again != two
    assert all(isinstance(number, float) for number in one)
    assert answer.usage.prompt_tokens > 0


def test_ctrl_c_ends_everything_and_leaves_nothing_behind(tmp_path: Path) -> None:
    demo = start_demo(tmp_path)
    try:
        assert demo.program.stop() == 0

        assert "Traceback" not in demo.program.said()
        assert not [port for port in demo.ports if listens(port)]
        with pytest.raises(ProcessLookupError):
            os.killpg(demo.program.process.pid, 0)
    finally:
        demo.program.end()


def test_a_taken_port_is_named_and_the_way_out_too(demo: Demo, tmp_path: Path) -> None:
    program = Program.start(
        tmp_path / "output", "citadel_gateway", "demo", "--config", str(demo.config)
    )
    try:
        assert program.process.wait(20) == 69
    finally:
        program.end()

    said = program.said()
    named = re.match(r"cannot listen on 127\.0\.0\.1:(\d+): it is in use\n", said)
    assert named is not None
    assert int(named[1]) in demo.ports[2:]
    assert "--port" in said
    assert "--config" in said


def run_shell(script: str) -> str:
    done = subprocess.run(
        ["bash", "-c", script], check=True, capture_output=True, text=True, timeout=30
    )
    return done.stdout


def run_python(demo: Demo, lines: str) -> Any:
    """The task's own lines, as they are written there, after one that makes their `config`."""
    first = f"import citadel_gateway; config = citadel_gateway.load_config({str(demo.config)!r})"
    done = subprocess.run(
        [sys.executable, "-c", first + lines],
        check=True, capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    return ast.literal_eval(done.stdout)
