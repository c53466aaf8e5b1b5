"""What can go wrong with a request, as the client is told it.

Every refusal is a :class:`GatewayError`.  ``code`` is what programs
match on; the constructor functions keep status, type and code together in one place.  Errors of
an engine that are passed on keep its own code, so ``code`` is no metric label.
"""

from __future__ import annotations

import math

import attrs
import orjson


@attrs.define(eq=False)
class GatewayError(Exception):
    """A request that will not be answered, and what to say about it.

    :param status: HTTP status for the client.
    :param kind: OpenAI's ``type``.
    :param code: OpenAI's ``code``.
    :param param: the field or header at fault.
    :param retry_after: seconds until the same request would be admitted.
    :param should_retry: ``False`` when the client had better not try again: it cannot help, or
        would have an engine do once more what it may have done already.
    :param close: the connection must not be used again.
    """

    message: str
    status: int
    kind: str
    code: str
    param: str | None = None
    retry_after: float | None = None
    should_retry: bool | None = None
    close: bool = False
    headers: tuple[tuple[bytes, bytes], ...] = ()

    def __str__(self) -> str:
        return self.message

    def body(self) -> bytes:
        return error_body(self.message, self.kind, self.code, self.param)

    def response(self) -> tuple[list[tuple[bytes, bytes]], bytes]:
        """Headers and body of an answer that says nothing but this error."""
        body = self.body()
        framing = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        return [*framing, *self.all_headers()], body

    def all_headers(self) -> list[tuple[bytes, bytes]]:
        """The headers that belong to the error, apart from content type and length."""
        found = list(self.headers)
        if self.retry_after is not None:
            # Rounded up, and never zero: clients take 0 for "no advice".
            whole = max(1, math.ceil(self.retry_after))
            found.append((b"retry-after", b"%d" % whole))
            found.append((b"retry-after-ms", b"%d" % max(1, math.ceil(self.retry_after * 1000))))
        if self.should_retry is not None:
            found.append((b"x-should-retry", b"true" if self.should_retry else b"false"))
        if self.close:
            found.append((b"connection", b"close"))
        return found


def error_body(message: str, kind: str, code: str | None, param: str | None = None) -> bytes:
    """OpenAI's error object as JSON; all four keys are always there."""
    error = {"message": message, "type": kind, "param": param, "code": code}
    return orjson.dumps({"error": error})


def invalid_request(
    message: str, *, param: str | None = None, code: str = "invalid_request", status: int = 400
) -> GatewayError:
    return GatewayError(message, status, "invalid_request_error", code, param)


def body_too_large(limit: int) -> GatewayError:
    return GatewayError(
        f"The request body is larger than {limit} bytes (performance.max_body_bytes).",
        413, "invalid_request_error", "request_too_large", close=True,
    )  # fmt: skip


def unknown_model(model: str, known: list[str]) -> GatewayError:
    names = ", ".join(known)
    return GatewayError(
        f"The model {model[:200]!r} does not exist. Available models: {names}.",
        404, "invalid_request_error", "model_not_found", "model",
    )  # fmt: skip


def not_found(path: str) -> GatewayError:
    return GatewayError(f"There is nothing at {path}.", 404, "invalid_request_error", "not_found")


def method_not_allowed(method: str, path: str, allowed: str) -> GatewayError:
    return GatewayError(
        f"{method} is not allowed at {path}; {allowed} is.",
        405, "invalid_request_error", "method_not_allowed",
        headers=((b"allow", allowed.encode("ascii")),),
    )  # fmt: skip


def unsupported_media_type(message: str, header: str = "content-type") -> GatewayError:
    return GatewayError(message, 415, "invalid_request_error", "unsupported_media_type", header)


def bad_http_request(message: str, *, status: int = 400) -> GatewayError:
    return GatewayError(message, status, "invalid_request_error", "bad_http_request", close=True)


def too_many_connections() -> GatewayError:
    return GatewayError(
        "The gateway has as many connections as it may hold (service.max_connections).",
        503, "server_overloaded", "too_many_connections", retry_after=1.0, close=True,
    )  # fmt: skip


def gateway_exhausted() -> GatewayError:
    return GatewayError(
        "The gateway has run out of sockets.", 503, "server_error", "gateway_exhausted",
        retry_after=1.0,
    )  # fmt: skip


def workers_unavailable() -> GatewayError:
    return GatewayError(
        "The supervisor of this gateway's workers does not answer, so nothing can be said or done "
        "for all of them.",
        503, "server_error", "workers_unavailable", retry_after=1.0,
    )  # fmt: skip


def unauthorized(message: str) -> GatewayError:
    return GatewayError(
        message, 401, "invalid_request_error", "invalid_api_key",
        headers=((b"www-authenticate", b"Bearer"),),
    )  # fmt: skip


def model_not_allowed(model: str) -> GatewayError:
    return GatewayError(
        f"This key may not use the model {model!r}.",
        403, "permission_error", "model_not_allowed", "model",
    )  # fmt: skip


def admin_required(message: str) -> GatewayError:
    return GatewayError(message, 403, "permission_error", "admin_required")


def unknown_endpoint(url: str, known: list[str], model: str | None = None) -> GatewayError:
    of = "" if model is None else f" of {model[:200]!r}"
    return GatewayError(
        f"There is no endpoint {url[:200]!r}{of}. Endpoints: {', '.join(known)}.",
        404, "invalid_request_error", "endpoint_not_found", "endpoint",
    )  # fmt: skip


def rate_limited(message: str, retry_after: float) -> GatewayError:
    return GatewayError(message, 429, "requests", "rate_limit_exceeded", retry_after=retry_after)


def queue_full(model: str, retry_after: float) -> GatewayError:
    return GatewayError(
        f"Too many requests are waiting for {model!r}.",
        503, "server_overloaded", "queue_full", retry_after=retry_after,
    )  # fmt: skip


def queue_timeout(model: str, waited: float, retry_after: float) -> GatewayError:
    return GatewayError(
        f"No slot for {model!r} became free within {waited:g} s.",
        503, "server_overloaded", "queue_timeout", retry_after=retry_after,
    )  # fmt: skip


def queue_too_long(model: str, wait: float, retry_after: float) -> GatewayError:
    """Refused at once: it would have waited in vain."""
    return GatewayError(
        f"A slot for {model!r} would become free in about {wait:.1f} s, later than the request "
        "can wait.",
        503, "server_overloaded", "queue_timeout", retry_after=retry_after,
    )  # fmt: skip


def overloaded(retry_after: float) -> GatewayError:
    return GatewayError(
        "The gateway is short of memory or connections.",
        503, "server_overloaded", "overloaded", retry_after=retry_after,
    )  # fmt: skip


def no_healthy_backend(model: str, retry_after: float) -> GatewayError:
    return GatewayError(
        f"No endpoint of {model!r} is available.",
        503, "server_error", "no_healthy_backend", retry_after=retry_after,
    )  # fmt: skip


def all_cordoned(model: str, retry_after: float) -> GatewayError:
    return GatewayError(
        f"Every endpoint of {model!r} has been taken out of service for now.",
        503, "server_error", "no_healthy_backend", retry_after=retry_after,
    )  # fmt: skip


def draining() -> GatewayError:
    return GatewayError(
        "The gateway is shutting down.", 503, "server_error", "draining",
        retry_after=1.0, close=True,
    )  # fmt: skip


def timed_out(clock: str, after: float, *, executed: bool) -> GatewayError:
    """*clock* is one of connect, headers, first_token, idle, total.

    :param executed: the upstream may have worked on it.
    """
    return GatewayError(
        f"The upstream took too long: {clock} clock, {after:g} s.",
        504, "server_error", f"timeout_{clock}", should_retry=_advice(executed),
    )  # fmt: skip


def upstream_failed(message: str, code: str, *, executed: bool) -> GatewayError:
    return GatewayError(message, 502, "server_error", code, should_retry=_advice(executed))


def upstream_credentials_exhausted() -> GatewayError:
    return GatewayError(
        "The upstream does not accept the gateway's credentials.",
        502, "server_error", "upstream_credentials_exhausted", should_retry=False,
    )  # fmt: skip


def internal_error(*, executed: bool = False) -> GatewayError:
    return GatewayError(
        "The gateway failed while handling the request.",
        500, "server_error", "internal_error", should_retry=_advice(executed),
    )  # fmt: skip


def _advice(executed: bool) -> bool | None:
    """Clients try again by themselves, and an answer may have been made already."""
    return False if executed else None
