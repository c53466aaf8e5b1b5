"""Keeping the garbage collector from stopping every stream at once.

A full collection looks at every object, and nothing else runs meanwhile.  What the program is made
of lives as long as the process, and of a request's objects nearly all go without the collector.
So the former are not looked at again, and full collections are rare: with four thousand open
streams one takes a quarter of a second.
"""

from __future__ import annotations

import gc

_YOUNG = 5000  # more objects made than dropped: look at those
_MIDDLE = 5  # of these collections: look at what has survived them
_FULL = 50  # of those: look at everything, if that has grown by a quarter


def keep_collections_short() -> None:
    """Take what lives now for permanent.  For when the process has started."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG, _MIDDLE, _FULL)
