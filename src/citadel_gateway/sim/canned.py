"""The answers that faults give in place of the engine's own."""

from __future__ import annotations

import math

import attrs
import orjson

from citadel_gateway.sim.faults import Fault, FaultKind

JSON = b"application/json"


@attrs.frozen(kw_only=True)
class Canned:
    """An answer as bytes.

    :param promised: the content-length; more than there is for a body that will be cut.
    """

    status: int
    content_type: bytes = JSON
    headers: tuple[tuple[bytes, bytes], ...] = ()
    body: bytes = b""
    promised: int

    @property
    def is_short(self) -> bool:
        return self.promised > len(self.body)


def canned(fault: Fault) -> Canned:
    """What a fault of a kind in ``CANNED`` answers."""
    wait = ((b"retry-after", b"%d" % max(1, math.ceil(fault.retry_after))),)
    match fault.kind:
        case FaultKind.VLLM_ERROR:
            return _whole(fault.status, _old_vllm_error(fault.status))
        case FaultKind.RATE_LIMIT:
            return _error(429, "Simulated rate limit.", "rate_limit_exceeded", wait)
        case FaultKind.OVERLOADED:
            return _error(503, "The simulated engine is overloaded.", "overloaded", wait)
        case FaultKind.LOADING:
            return _error(503, "Loading model", "loading")
        case FaultKind.HTML:
            page = b"<!doctype html><title>Simulated</title><p>It works!</p>"
            return _whole(200, page, content_type=b"text/html; charset=utf-8")
        case FaultKind.NOT_JSON:
            return _whole(200, b"this is not JSON {")
        case FaultKind.EMPTY:
            return _whole(200, b"")
        case FaultKind.REDIRECT:
            return _whole(307, b"", headers=((b"location", b"http://elsewhere.invalid/"),))
        case FaultKind.HALF_BODY:
            half = b'{"id":"chatcmpl-simulated","object":"chat.completion","choices":['
            return Canned(status=200, body=half, promised=2 * len(half))
        case _:
            return _error(fault.status, "Simulated failure.", "simulated_fault")


def _whole(
    status: int,
    body: bytes,
    *,
    content_type: bytes = JSON,
    headers: tuple[tuple[bytes, bytes], ...] = (),
) -> Canned:
    return Canned(
        status=status,
        content_type=content_type,
        headers=headers,
        body=body,
        promised=len(body),
    )


def _error(
    status: int, message: str, code: str, headers: tuple[tuple[bytes, bytes], ...] = ()
) -> Canned:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    error = {"message": message, "type": kind, "param": None, "code": code}
    body = {"error": error, "system_fingerprint": "simulated"}
    return _whole(status, orjson.dumps(body), headers=headers)


def _old_vllm_error(status: int) -> bytes:
    return orjson.dumps(
        {
            "object": "error",
            "message": "Simulated failure.",
            "type": "InternalServerError" if status >= 500 else "BadRequestError",
            "param": None,
            "code": status,
            "system_fingerprint": "simulated",
        }
    )
