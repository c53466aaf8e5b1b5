"""Which store a configuration means."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from citadel_gateway.config.schema import GatewayConfigSchema
from citadel_gateway.config.store_url import parse_store_url
from citadel_gateway.config.values import StoreKind
from citadel_gateway.io.store.base import Store


def make_store(
    config: GatewayConfigSchema, workers: int, environ: Mapping[str, str]
) -> Store | None:
    """For one of *workers* processes; ``None`` if it shares nothing with anybody.

    What a store is made of is only loaded for those who use it.  Raises ``OSError`` for TLS files.
    """
    wanted = config.store
    match wanted.kind:
        case StoreKind.REDIS if wanted.url is not None:
            from citadel_gateway.io.dial import make_tls_context
            from citadel_gateway.io.store.redis_address import RedisAddress
            from citadel_gateway.io.store.redis_store import RedisStore

            uses_tls = parse_store_url(wanted.url).uses_tls
            address = RedisAddress(
                url=wanted.url,
                username=wanted.username,
                password=wanted.password,
                sentinel_username=wanted.sentinel_username,
                sentinel_password=wanted.sentinel_password,
                tls=make_tls_context(wanted.tls) if uses_tls else None,
            )
            return RedisStore(address, wanted.prefix, wanted.timeout)
        case StoreKind.AUTO if workers == 1:
            return None
        case StoreKind.MEMORY:
            return None
        case _:
            from citadel_gateway.io.store.lmdb_store import LmdbStore

            folder = Path(wanted.path) if wanted.path else _usual_folder(config, environ)
            return LmdbStore(folder, wanted.timeout)


def _usual_folder(config: GatewayConfigSchema, environ: Mapping[str, str]) -> Path:
    """One for this gateway, where nothing outlives the machine's next start."""
    # Of workers on any free port, whoever has started them tells which gateway they are.
    port = config.service.port or f"of-{os.getppid()}"
    own = f"{config.service.name}-{port}".replace("/", "_")
    if given := environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]:
        return Path(given) / own
    if user := environ.get("XDG_RUNTIME_DIR"):
        return Path(user) / "citadel-gateway" / own
    memory = Path("/dev/shm")  # noqa: S108  # the folder in it is ours alone
    base = memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())
    return base / f"citadel-gateway-{os.getuid()}" / own
