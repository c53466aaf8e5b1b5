"""What is shipped for the service manager and for Prometheus is accepted by their own tools."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

from citadel_gateway.config.loader import load_config
from citadel_gateway.config.schema import ServiceConfig
from citadel_gateway.io.listening import API
from citadel_gateway.io.record import Outcome

DEPLOY = Path(__file__).parents[2] / "deploy"
UNIT = DEPLOY / "systemd" / "citadel-llm@.service"
SOCKET = DEPLOY / "systemd" / "citadel-llm@.socket"
PROMETHEUS = DEPLOY / "prometheus"

INSTANCE = "unified-api-gateway"
"""What the task's commands start: ``citadel-llm@unified-api-gateway.service``."""

WORST_SCORE = 1.5
"""Of systemd's 0 (locked up) to 10 (unsafe); a unit without hardening scores about 9.5."""


def run(program: str, *args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not installed (`make tools` installs it)")
    return subprocess.run(
        [found, *args], cwd=cwd, text=True, capture_output=True, timeout=60, check=False
    )


def said(result: subprocess.CompletedProcess[str]) -> str:
    return result.stdout + result.stderr


def settings() -> dict[str, list[str]]:
    """The unit's assignments for the task's instance; a list, since keys may be repeated."""
    found = defaultdict(list)
    for line in UNIT.read_text().splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found[key].append(value.replace("%i", INSTANCE))
    return dict(found)


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit under its instance's name, with a program that exists on every machine.

    ``verify`` insists on an executable, and the gateway is not in /opt/citadel here.
    """
    text, replaced = re.subn(r"(?m)^ExecStart=\S+", "ExecStart=/bin/true", UNIT.read_text())
    assert replaced == 1
    path = tmp_path / f"citadel-llm@{INSTANCE}.service"
    path.write_text(text)
    return path


def test_systemd_finds_nothing_to_say_about_the_unit(unit: Path) -> None:
    result = run("systemd-analyze", "verify", "--man=no", str(unit))

    # Unknown keys and bad values are only warned about, with status 0.
    assert (result.returncode, said(result)) == (0, "")


@pytest.mark.parametrize("key", ["", "FileDescriptorName"])
def test_systemd_finds_nothing_to_say_about_the_socket(key: str, unit: Path) -> None:
    socket = unit.with_suffix(".socket")
    socket.write_text(
        SOCKET.read_text().replace(key, "FileDescriptorNme") if key else SOCKET.read_text()
    )

    result = run("systemd-analyze", "verify", "--man=no", str(unit), str(socket))

    assert ("FileDescriptorNme" in said(result)) if key else (said(result) == "")


def test_the_socket_is_the_one_of_the_shipped_configuration() -> None:
    text = SOCKET.read_text()
    service = load_config(DEPLOY.parent / "config" / "gateway.yaml", environ={}).service

    assert f"\nListenStream={service.host}:{service.port}\n" in text
    assert f"\nFileDescriptorName={API}\n" in text


def test_a_reload_is_a_hang_up() -> None:
    assert settings()["ExecReload"] == ["/bin/kill -HUP $MAINPID"]


def test_verification_would_notice_a_misspelt_key(unit: Path) -> None:
    unit.write_text(unit.read_text().replace("WatchdogSec=", "WatchDogSeconds="))

    assert "WatchDogSeconds" in said(run("systemd-analyze", "verify", "--man=no", str(unit)))


def test_the_unit_is_locked_down(unit: Path) -> None:
    limit = f"--threshold={round(WORST_SCORE * 10)}"

    result = run("systemd-analyze", "security", "--offline=yes", "--no-pager", limit, str(unit))

    score = re.search(r"exposure level for \S+: ([\d.]+)", result.stdout)
    assert score is not None, said(result)
    assert float(score[1]) <= WORST_SCORE, result.stdout
    assert result.returncode == 0


def test_the_unit_has_the_paths_of_the_task() -> None:
    unit = settings()

    assert unit["ExecStart"] == [
        "/opt/citadel/env/bin/citadel-gateway serve "
        "--config /opt/citadel/config/services/unified-api-gateway.yaml"
    ]
    assert unit["EnvironmentFile"] == ["-/opt/citadel/config/unified-api-gateway.env"]
    # Below /var/log.
    assert unit["LogsDirectory"] == ["citadel-llm/unified-api-gateway"]


def test_the_unit_allots_two_gigabytes_and_four_cores() -> None:
    unit = settings()

    assert unit["MemoryMax"] == ["2G"]
    assert unit["CPUQuota"] == ["400%"]
    assert unit["MemoryHigh"] == ["1900M"]  # slowed down before it is killed at 2048


def test_the_gateway_sheds_before_the_unit_slows_it_down_or_ends_it() -> None:
    unit, config = settings(), load_config(DEPLOY.parent / "config" / "gateway.yaml", environ={})
    mib = config.performance.memory_limit_gb * 1024

    assert mib == 1024 * int(unit["MemoryMax"][0].removesuffix("G"))
    assert 0.9 * mib < int(unit["MemoryHigh"][0].removesuffix("M"))
    # With an endpoint's connection for each client's, below the first mark.
    assert 2 * config.service.max_connections < 0.8 * int(unit["LimitNOFILE"][0])


def test_the_unit_waits_for_the_drain_and_a_little_longer() -> None:
    service = ServiceConfig()

    [stop_within] = settings()["TimeoutStopSec"]
    assert float(stop_within) >= service.lame_duck + service.drain_timeout + 15


def test_a_bad_configuration_is_not_tried_again() -> None:
    unit = settings()

    assert unit["Restart"] == ["on-failure"]
    assert unit["RestartPreventExitStatus"] == ["78"]


@pytest.mark.parametrize(
    "command",
    [
        ("check", "config", "prometheus.yml"),
        ("check", "rules", "alerts.yml"),
        ("test", "rules", "alerts_test.yml"),
    ],
    ids=" ".join,
)
def test_promtool_accepts(command: tuple[str, ...]) -> None:
    result = run("promtool", *command, cwd=PROMETHEUS)

    assert result.returncode == 0, said(result)
    assert "SUCCESS" in said(result)


def test_every_alert_is_tested() -> None:
    alerts = re.findall(r"- alert: (\w+)", (PROMETHEUS / "alerts.yml").read_text())
    tests = (PROMETHEUS / "alerts_test.yml").read_text()

    fired = set(re.findall(r"alertname: (\w+)\n\s+exp_alerts:\n\s+- exp_labels", tests))
    assert fired == set(alerts)


def test_alerts_count_our_failures_and_not_the_callers() -> None:
    lists = re.findall(r'outcome=~"([^"]+)"', (PROMETHEUS / "alerts.yml").read_text())
    ours = {
        Outcome.QUEUE_FULL,
        Outcome.QUEUE_TIMEOUT,
        Outcome.OVERLOADED,
        Outcome.NO_BACKEND,
        Outcome.UPSTREAM_ERROR,
        Outcome.TIMEOUT,
        Outcome.STREAM_BROKEN,
        Outcome.INTERNAL_ERROR,
    }

    assert len(lists) == 4
    assert len(set(lists)) == 1
    assert {o for o in Outcome if re.fullmatch(lists[0], o.value)} == ours


def test_prometheus_scrapes_the_metrics_listener_from_another_address() -> None:
    text = (PROMETHEUS / "prometheus.yml").read_text()

    assert (
        'job_name: citadel-gateway\n    static_configs:\n      - targets: ["127.0.0.1:9090"]'
        in text
    )
    assert "--web.listen-address=127.0.0.1:9099" in text
