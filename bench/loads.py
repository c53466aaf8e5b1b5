"""What every gateway is put under, and how one load is driven.

Streams are paced so that their chunks come at 4000 a second in all, whether on 200 streams or on
4000: what differs is how many are open, not how busy everything is.  32 streams are the light
case.  The two large loads end in a hang-up of all clients, the others run to their end.  Gateways
marked slow would be saturated by that, and what a saturated process uses per chunk says little:
they get `SLOW` instead.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import attrs

from bench.peers import KEY


@attrs.frozen(kw_only=True)
class Load:
    """*over*, *window*, *slack* are seconds: opening, being watched, and to spare."""

    name: str
    connections: int
    seconds: float = 0.0  # of whole requests; 0 for streams
    pace: int = 0  # chunks a second of each stream
    over: float = 0.0
    window: float = 2.0
    slack: float = 1.5
    leave: bool = False  # clients hang up after the window; streams would go on for a minute

    @property
    def streamed(self) -> bool:
        return not self.seconds

    @property
    def chunks(self) -> int:
        spare = 60 if self.leave else self.slack
        return round(self.pace * (self.over + self.window + spare))

    @property
    def arguments(self) -> tuple[str, ...]:
        if not self.streamed:
            return ("whole", "--seconds", str(self.seconds))
        return (
            "streams", "--chunks", str(self.chunks), "--pace", str(self.pace),
            "--over", str(self.over), "--window", str(self.window),
            *(("--leave",) if self.leave else ()),
        )  # fmt: skip


LOADS = (
    Load(name="1 connection", connections=1, seconds=1.5),
    Load(name="16 connections", connections=16, seconds=1.5),
    Load(name="64 connections", connections=64, seconds=1.5),
    Load(name="32 streams", connections=32, pace=20, over=0.5),
    Load(name="200 streams", connections=200, pace=20, over=1.0),
    Load(name="1000 streams", connections=1000, pace=4, over=3.0, leave=True),
    Load(name="4000 streams", connections=4000, pace=1, over=8.0, window=3.0, leave=True),
)
SLOW: dict[str, Load | None] = {
    "32 streams": Load(name="32 streams", connections=32, pace=5, over=1.0),
    "200 streams": Load(name="200 streams", connections=200, pace=1, over=4.0, leave=True),
    "1000 streams": None,
    "4000 streams": None,
}


def load_for(load: Load, *, slow: bool) -> Load | None:
    """None: the gateway is spared this one."""
    return SLOW.get(load.name, load) if slow else load


def drive(load: Load, port: int, watch: int = 0, within: float = 40) -> dict[str, Any]:
    """The driver's report.  One that never ends, or breaks, is a report of everything failed."""
    command = [
        sys.executable, "-m", "bench.load", *load.arguments, "--port", str(port),
        "--connections", str(load.connections), "--key", KEY, "--watch", str(watch),
        "--within", str(within),
    ]  # fmt: skip
    try:
        said = subprocess.run(command, check=True, capture_output=True, timeout=within + 10)
    except subprocess.TimeoutExpired:
        return {
            "requests": 0,
            "failed": load.connections,
            "problem": f"the driver hangs after {within} s",
        }
    except subprocess.CalledProcessError as error:
        problem = error.stderr.decode().strip().splitlines()[-1:]
        return {"requests": 0, "failed": load.connections, "problem": "".join(problem)}
    report: dict[str, Any] = json.loads(said.stdout)
    return report
