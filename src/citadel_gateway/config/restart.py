"""What cannot change while the gateway runs."""

from __future__ import annotations

import attrs

from citadel_gateway.config.schema import GatewayConfigSchema
from citadel_gateway.config.values import Count

_FIXED = (
    ("service", "host"),
    ("service", "port"),
    ("monitoring", "prometheus_host"),
    ("monitoring", "prometheus_port"),
)
_TLS = ("tls_certfile", "tls_keyfile")


def keep_what_is_fixed(
    running: GatewayConfigSchema, wanted: GatewayConfigSchema
) -> tuple[GatewayConfigSchema, list[str]]:
    """*wanted* as far as it can be had without a restart, and what that leaves out.

    Another certificate can be had; TLS instead of none, or none instead of TLS, cannot.
    """
    kept: list[str] = []
    for section, name in _FIXED:
        before, after = (getattr(getattr(c, section), name) for c in (running, wanted))
        if before != after:
            said = "null" if after is None else after
            kept.append(f"{section}.{name} stays {before} until a restart; the file says {said}")
            part = attrs.evolve(getattr(wanted, section), **{name: before})
            wanted = attrs.evolve(wanted, **{section: part})
    if running.store != wanted.store:
        kept.append("store stays as it is until a restart")
        wanted = attrs.evolve(wanted, store=running.store)
    if running.workers != wanted.workers:
        kept.append(
            f"service.workers stays {running.workers} until a restart; "
            f"the file says {wanted.workers}"
        )
        workers = Count(running.workers)
        wanted = attrs.evolve(wanted, service=attrs.evolve(wanted.service, workers=workers))
    if (running.service.tls_certfile is None) != (wanted.service.tls_certfile is None):
        state = "off" if running.service.tls_certfile is None else "on"
        kept.append(f"service.tls_certfile: TLS stays {state} until a restart")
        files = {name: getattr(running.service, name) for name in _TLS}
        wanted = attrs.evolve(wanted, service=attrs.evolve(wanted.service, **files))
    return wanted, kept
