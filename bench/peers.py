"""The gateways that are compared: how each is installed, configured and started.

Every one is a single process (nginx: one worker), forwards to the one engine, and is set up as
its own documentation says.  What is set beyond the addresses is in `NOTES`, with the reason.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

import attrs

from bench.load import request
from bench.processes import Process

KEY = "sk-cit-bench"
HOME = Path(os.environ.get("PEERS", ".peers")).absolute()


class Unavailable(Exception):
    """Cannot be installed or started here; says why."""


@attrs.frozen(kw_only=True)
class Place:
    """Where a gateway is to run."""

    folder: Path
    port: int
    metrics_port: int
    engine: int

    @property
    def upstream(self) -> str:
        return f"http://127.0.0.1:{self.engine}"

    def write(self, name: str, text: str) -> str:
        file = self.folder / name
        file.write_text(text)
        return str(file)


@attrs.frozen(kw_only=True)
class Launch:
    command: tuple[str, ...]
    config: str = ""  # the text of its configuration file
    env: Mapping[str, str] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True)
class Gateway:
    name: str
    requirement: str  # what pip is asked for; empty when it is not pip's
    install: Callable[[str], tuple[str, str]]  # -> (its program, its version)
    launch: Callable[[str, Place], Launch]
    note: str
    slow: bool = False  # saturates at the loads that the others share


CITADEL = """\
service: {{host: 127.0.0.1, port: {port}, workers: {workers}, max_connections: 10000}}
models:
  bench:
    max_concurrent: 10000
    endpoints:
{endpoints}
load_balancer: {{algorithm: {algorithm}, health_check_interval: {interval}}}
performance:
  rate_limit_rps: 1000000
  client_rate_limit_rps: 1000000
  max_concurrent_requests: 10000
monitoring: {{prometheus_port: {metrics}}}
security:
  api_keys: [{{id: bench, sha256: {sha256}}}]
"""


def citadel_config(
    place: Place,
    *,
    endpoints: int = 1,
    algorithm: str = "round_robin",
    interval: int = 30,
    workers: int = 1,
) -> str:
    """More than one endpoint: all are the one engine, under paths that it ignores."""
    urls = [place.upstream + (f"/e{i}" if endpoints > 1 else "") for i in range(endpoints)]
    return CITADEL.format(
        port=place.port,
        workers=workers,
        endpoints="\n".join(f'      - {{url: "{url}"}}' for url in urls),
        algorithm=algorithm,
        interval=interval,
        metrics=place.metrics_port,
        sha256=hashlib.sha256(KEY.encode()).hexdigest(),
    )


def launch_citadel(program: str, place: Place) -> Launch:
    config = citadel_config(place)
    file = place.write("citadel.yaml", config)
    command = (program, "-m", "citadel_gateway", "serve", "--config", file)
    return Launch(command=command, config=config)


NGINX = """\
daemon off;
worker_processes {workers};
worker_rlimit_nofile {descriptors};
pid {folder}/nginx.pid;
error_log /dev/null;
events {{ worker_connections {descriptors}; }}
http {{
  access_log {folder}/access.log;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  keepalive_requests 1000000000;
  upstream engine {{
    server 127.0.0.1:{engine};
    keepalive 256;
    keepalive_requests 1000000000;
  }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://engine;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
    }}
  }}
}}
"""


def launch_nginx(program: str, place: Place, workers: int = 1) -> Launch:
    config = NGINX.format(
        folder=place.folder, port=place.port, engine=place.engine, descriptors=16384,
        workers=workers,
    )  # fmt: skip
    file = place.write("nginx.conf", config)
    return Launch(command=(program, "-p", str(place.folder), "-c", file), config=config)


def _launch_router(program: str, place: Place, package: str, *options: str) -> Launch:
    """vllm-router was made from sglang-router, and is started like it."""
    return Launch(
        command=(
            program, "-m", f"{package}.launch_router", "--worker-urls", place.upstream,
            "--host", "127.0.0.1", "--port", str(place.port), "--policy", "round_robin",
            "--prometheus-port", str(place.metrics_port), *options,
        )
    )  # fmt: skip


def launch_sglang(program: str, place: Place) -> Launch:
    return _launch_router(program, place, "sglang_router", "--log-level", "warn", "--api-key", KEY)


def launch_vllm(program: str, place: Place) -> Launch:
    return _launch_router(program, place, "vllm_router", "--log-level", "warning")


LITELLM = """\
model_list:
  - model_name: bench
    litellm_params: {{model: openai/bench, api_base: "{upstream}/v1", api_key: none}}
general_settings: {{master_key: {key}}}
"""


def launch_litellm(program: str, place: Place) -> Launch:
    config = LITELLM.format(upstream=place.upstream, key=KEY)
    file = place.write("litellm.yaml", config)
    # The launcher beside the environment's Python: `python -m litellm` is something else.
    command = (
        str(Path(program).with_name("litellm")), "--config", file, "--host", "127.0.0.1",
        "--port", str(place.port), "--num_workers", "1", "--telemetry", "False",
    )  # fmt: skip
    return Launch(command=command, config=config, env={"LITELLM_LOCAL_MODEL_COST_MAP": "True"})


def ours(requirement: str) -> tuple[str, str]:
    return sys.executable, version(requirement)


def installed_by_the_system(program: str) -> tuple[str, str]:
    path = shutil.which(program) or shutil.which(program, path="/usr/sbin:/usr/local/sbin")
    if path is None:
        raise Unavailable(f"no {program} here; on Debian: apt-get install {program}")
    said = subprocess.run([path, "-v"], capture_output=True, text=True, check=False)
    found = re.search(r"[\d.]+\d", said.stderr + said.stdout)
    return path, found.group() if found else "unknown"


def in_its_own_environment(requirement: str) -> tuple[str, str]:
    """A virtual environment under `.peers/`, made if it is not there in this version."""
    name, _, wanted = requirement.partition("==")
    package = name.partition("[")[0]
    python = HOME / package / "bin" / "python"
    if _version_in(python, package) != wanted:
        print(f"installing {requirement} in {python.parent.parent.name}/", file=sys.stderr)
        try:
            venv.create(python.parent.parent, with_pip=True)
            subprocess.run(
                [python, "-m", "pip", "install", "--quiet", requirement],
                check=True, capture_output=True, text=True, timeout=600,
            )  # fmt: skip
        except subprocess.CalledProcessError as error:
            said = (error.stderr or error.stdout or "").strip().splitlines()
            raise Unavailable(f"not installed: {said[-1] if said else error}") from error
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Unavailable(f"not installed: {error}") from error
    return str(python), _version_in(python, package) or "unknown"


def _version_in(python: Path, package: str) -> str | None:
    code = f"from importlib.metadata import version; print(version({package!r}))"
    try:
        said = subprocess.run(
            [python, "-c", code], capture_output=True, text=True, check=True, cwd="/"
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return said.stdout.strip()


GATEWAYS = (
    Gateway(
        name="citadel",
        requirement="citadel-gateway",
        install=ours,
        launch=launch_citadel,
        note="Everything on: API key, two rate limits (never reached), breaker, health checks, "
        "metrics, access log. Limits on concurrency above the largest load.",
    ),
    Gateway(
        name="nginx",
        requirement="nginx",
        install=installed_by_the_system,
        launch=launch_nginx,
        note="One worker, a plain reverse proxy: no keys, no limits, no metrics; access log on. "
        "`proxy_buffering off`, or chunks are held back; `keepalive` to the engine, off by "
        "default; connections not closed after 1000 requests, as with the others.",
    ),
    Gateway(
        name="sglang-router",
        requirement="sglang-router==0.3.2",
        install=in_its_own_environment,
        launch=launch_sglang,
        note="Round robin instead of cache-aware, which is more work; `--api-key` is checked; "
        "breaker, health checks, metrics and retries as by default; log of warnings only.",
    ),
    Gateway(
        name="vllm-router",
        requirement="vllm-router==0.1.17",
        install=in_its_own_environment,
        launch=launch_vllm,
        note="As sglang-router, of which it is a fork; its `--api-key` is for the engine, so "
        "clients' keys are not checked.",
    ),
    Gateway(
        name="litellm",
        requirement="litellm[proxy]==1.108.7",
        install=in_its_own_environment,
        launch=launch_litellm,
        slow=True,
        note="One worker, no database; `master_key` is checked. Prices from its own package "
        "and no telemetry, so that nothing leaves the machine.",
    ),
)


def first_answer(port: int, process: Process, within: float = 90) -> float:
    """Seconds until a chat request gets a good answer; raises when none does."""
    began = time.monotonic()
    head, _, body = request(streamed=False, key=KEY).partition(b"\r\n\r\n")
    headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:])
    asked = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", data=body, headers=headers
    )
    problem = "no answer"
    while time.monotonic() - began < within:
        if process.poll() is not None:
            raise Unavailable(f"not started: ended with code {process.returncode}")
        try:
            with urllib.request.urlopen(asked, timeout=5) as answer:
                if b"word word" in answer.read():
                    return time.monotonic() - began
                problem = "an answer that is not the engine's"
        except (urllib.error.URLError, OSError) as error:
            problem = str(error)
        time.sleep(0.02)
    raise Unavailable(f"not started: {problem} after {within:.0f} s")
