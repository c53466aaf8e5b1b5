"""Room for as many connections as the system lets one process have."""

from __future__ import annotations

import resource


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
