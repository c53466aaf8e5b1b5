"""Room for as many connections as the system lets one process have, and how much is taken."""

from __future__ import annotations

import math
import resource
from pathlib import Path

from citadel_gateway.policy.watermarks import Use

_OPEN = Path("/proc/self/fd")


def raise_limit() -> int:
    """Raise the soft limit on open descriptors to the hard one; returns what holds now.

    The soft one is low for the sake of programs that use ``select``, which this one does not.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):  # an unlimited one may be above what the kernel allows
        return soft
    return hard


def use() -> Use:
    """How many descriptors this process has open, of those that it may."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Use(_count(), math.inf if limit == resource.RLIM_INFINITY else limit)


def _count() -> int:
    """0 where the system does not tell."""
    try:
        # Since Linux 6.2 the directory's size is their number; to list thousands takes a while.
        return _OPEN.stat().st_size or sum(1 for _ in _OPEN.iterdir())
    except OSError:
        return 0
