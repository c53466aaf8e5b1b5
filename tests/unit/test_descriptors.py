from __future__ import annotations

import resource
from pathlib import Path

from citadel_gateway.io.descriptors import raise_limit, use


def test_the_soft_limit_is_raised_to_the_hard_one() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
    try:
        held = raise_limit()

        assert held == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        assert held in {hard, min(soft, 512)}
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_every_open_descriptor_counts(tmp_path: Path) -> None:
    before = use()
    files = [(tmp_path / str(n)).open("w") for n in range(20)]
    try:
        assert use().used == before.used + 20
        assert use().limit == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    finally:
        for file in files:
            file.close()
