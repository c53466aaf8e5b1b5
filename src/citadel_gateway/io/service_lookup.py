"""Asking name servers for SRV records, which the operating system's resolver does not do."""

from __future__ import annotations

from collections.abc import Sequence

from citadel_gateway.io.resolver import Lasting, Lookup

_WITHIN = 5.0  # seconds for all servers and tries together
_SHORTEST, _LONGEST = 1.0, 3600.0  # seconds that an answer is good, whatever it says


def make_service_lookup(nameservers: Sequence[str] = (), port: int = 53) -> Lookup:
    """Records in presentation format: priority, weight, port, target.

    :param nameservers: addresses to ask instead of what ``/etc/resolv.conf`` says.
    """

    async def lookup(name: str) -> Lasting:
        # Few need it, and it takes some megabytes.
        import dns.asyncresolver
        import dns.exception

        try:
            resolver = dns.asyncresolver.Resolver(configure=not nameservers)
            if nameservers:
                resolver.nameservers, resolver.port = [*nameservers], port
            answer = await resolver.resolve(name, "SRV", lifetime=_WITHIN, search=True)
        except dns.exception.DNSException as exc:
            raise OSError(f"no SRV records of {name!r}: {exc}") from exc
        records = sorted(record.to_text() for record in answer)
        ttl = answer.rrset.ttl if answer.rrset is not None else 0
        return Lasting(records, min(max(ttl, _SHORTEST), _LONGEST))

    return lookup
