"""How much memory the process has, may have, and need not keep."""

from __future__ import annotations

import ctypes
import os
import resource
from pathlib import Path

from citadel_gateway.policy.watermarks import Use

PROC = Path("/proc/self")
CGROUPS = Path("/sys/fs/cgroup")

_MOST = 2**16  # bytes of a file: the kernel gives all of it at once
_RECLAIMABLE = ("inactive_file", "active_file", "slab_reclaimable")


def _read(path: Path) -> bytes:
    """Without the layers of ``open``, which cost more than all the rest."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(descriptor, _MOST)
    finally:
        os.close(descriptor)


def resident(proc: Path = PROC) -> int:
    """The resident set in bytes; 0 where the system does not tell."""
    try:
        return int(_read(proc / "statm").split()[1]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return 0


def of_cgroups(proc: Path = PROC, cgroups: Path = CGROUPS) -> list[Use]:
    """The use of every control group above the process that has a limit (cgroup v2).

    What the kernel would drop before it kills anybody, such as cached files, does not count.
    """
    return [use for group in _groups(proc, cgroups) if (use := _use(group)) is not None]


def _groups(proc: Path, cgroups: Path) -> list[Path]:
    try:
        lines = _read(proc / "cgroup").decode().splitlines()
    except OSError:
        return []
    for line in lines:
        if line.startswith("0::/") and (name := line.removeprefix("0::/")):
            own = cgroups / name
            return [own, *(parent for parent in own.parents if parent.is_relative_to(cgroups))]
    return [cgroups]


def _use(group: Path) -> Use | None:
    try:
        limit = _read(group / "memory.max").strip()
        if not limit.isdigit():  # "max"
            return None
        used = int(_read(group / "memory.current"))
        for line in _read(group / "memory.stat").decode().splitlines():
            name, _, size = line.partition(" ")
            if name in _RECLAIMABLE:
                used -= int(size)
    except (OSError, ValueError):
        return None
    return Use(max(0, used), max(1, int(limit)))


def give_back() -> None:
    """Return freed memory to the system, where the C library keeps some and can be asked (glibc).

    It keeps what was freed in the middle of its heap, so that a burst of large bodies would look
    like use for ever after.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))
