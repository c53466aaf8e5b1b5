"""Starting the programs of a measurement, and what the kernel says about them: CPU and memory.

A program here is a process with everything below it.  Numbers are summed over that tree, so that
a launcher, a worker and their threads count as the one gateway that they are.
"""

from __future__ import annotations

import os
import platform
import resource
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Process = subprocess.Popen[bytes]


def free_ports(count: int, first: int = 21000) -> list[int]:
    """Below the range that the kernel takes ports of outgoing connections from."""
    found: list[int] = []
    for port in range(first, 32000):
        if len(found) == count:
            break
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            found.append(port)
    return found


def tree(root: int) -> list[int]:
    """*root* and every process below it."""
    found = [root]
    for children in Path(f"/proc/{root}/task").glob("*/children"):
        for child in _text(children).split():
            found += tree(int(child))
    return found


def cpu_seconds(root: int) -> float:
    """CPU time of every living thread of the tree, to the nanosecond, kernel time included."""
    return _scheduled(root, 0)


def starved_seconds(root: int) -> float:
    """For how long they could have run, and others had the CPUs."""
    return _scheduled(root, 1)


def _scheduled(root: int, field: int) -> float:
    return (
        sum(
            int((_text(file) or "0 0").split()[field])
            for pid in tree(root)
            for file in Path(f"/proc/{pid}/task").glob("*/schedstat")
        )
        / 1e9
    )


def resident_mb(root: int) -> float:
    return round(sum(_status_mb(pid, "VmRSS") for pid in tree(root)), 2)


def peak_mb(pid: int) -> float:
    return round(_status_mb(pid, "VmHWM"), 2)


def _status_mb(pid: int, key: str) -> float:
    for line in _text(Path(f"/proc/{pid}/status")).splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    return 0.0


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except (FileNotFoundError, ProcessLookupError):  # it ended while we looked
        return ""


@contextmanager
def running(
    command: Sequence[str], *, env: Mapping[str, str] | None = None, log: Path | None = None
) -> Iterator[Process]:
    """Blocks on exit until the program has ended, ten seconds at most, then kills its group."""
    with (log or Path(os.devnull)).open("wb") as sink:
        process = subprocess.Popen(
            command,
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            start_new_session=True,  # a group of its own, so that nothing of it is left behind
        )
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(10)


def wait_until_quiet(
    root: int, *, every: float = 0.2, share: float = 0.05, within: float = 15
) -> None:
    """Until it uses hardly any CPU: what it did on its own account is over."""
    end = time.monotonic() + within
    before = cpu_seconds(root)
    while time.monotonic() < end:
        time.sleep(every)
        now = cpu_seconds(root)
        if now - before < every * share:
            return
        before = now


def machine() -> dict[str, Any]:
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "descriptors": resource.getrlimit(resource.RLIMIT_NOFILE)[1],
    }


@contextmanager
def beside(work: Callable[[], None], over: threading.Event) -> Iterator[None]:
    """*work* goes on in a thread meanwhile, and ends when *over* is set."""
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
