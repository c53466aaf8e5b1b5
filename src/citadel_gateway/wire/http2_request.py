"""Requests from HTTP/2's header lists, by the rules that hold for HTTP/1.1.

What the protocol itself forbids (names in upper case, ``Connection``, a missing ``:path``) has been
refused by whoever decoded the list.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from citadel_gateway.wire.headers import Fields, Headers
from citadel_gateway.wire.http1_request import MAX_HEADER_BYTES, MAX_HEADERS, MAX_TARGET
from citadel_gateway.wire.http1_rules import BadRequest, check_fields, check_target
from citadel_gateway.wire.incoming_request import IncomingRequest

LARGEST_LIST = MAX_TARGET + MAX_HEADER_BYTES + 32 * MAX_HEADERS
"""Bytes as SETTINGS_MAX_HEADER_LIST_SIZE counts them, 32 of them for each field."""

_METHOD = re.compile(rb"[A-Z]{1,32}\Z")


def read_request(pairs: Iterable[tuple[bytes, bytes]], *, complete: bool) -> IncomingRequest:
    """The request that *pairs* ask for; *complete* if no body follows.

    Raises :class:`BadRequest`, which concerns this request alone.
    """
    pseudo: dict[bytes, bytes] = {}
    headers: Headers = []
    size = 0
    for name, value in pairs:
        if name.startswith(b":"):
            pseudo[name] = value
        else:
            size += len(name) + len(value) + 4
            headers.append((name, value))
    method, target = pseudo[b":method"], pseudo.get(b":path", b"")
    try:
        if b":protocol" in pseudo:
            raise BadRequest(400, "WebSocket is not served here")
        if len(target) > MAX_TARGET:
            raise BadRequest(414, f"the request target is longer than {MAX_TARGET} bytes")
        if size > MAX_HEADER_BYTES or len(headers) > MAX_HEADERS:
            raise BadRequest(
                431, f"more than {MAX_HEADERS} headers, or more than {MAX_HEADER_BYTES} bytes"
            )
        if not _METHOD.match(method):
            raise BadRequest(400, "the method is no name of one")
        check_target(method, target)
        if (authority := pseudo.get(b":authority")) is not None:
            headers = [(b"host", authority), *(pair for pair in headers if pair[0] != b"host")]
        fields = Fields(headers)
        content_length, _ = check_fields(fields, "2")
    except BadRequest as refusal:
        refusal.to_head = method == b"HEAD"
        raise
    return IncomingRequest(
        method=method.decode("ascii"),
        target=target,
        version="2",
        fields=fields,
        keep_alive=True,
        has_body=not complete,
        content_length=content_length,
        complete=complete,
    )
