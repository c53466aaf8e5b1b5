"""What it means when an endpoint does not answer: for the client, for a retry, for the breaker.

The one place where exceptions, statuses and clocks are told apart.
"""

from __future__ import annotations

import ssl

import attrs

from citadel_gateway.errors import (
    GatewayError,
    gateway_exhausted,
    timed_out,
    upstream_credentials_exhausted,
    upstream_failed,
)
from citadel_gateway.io.dial import is_our_own_lack
from citadel_gateway.policy.circuit_breaker import Verdict
from citadel_gateway.policy.retry import Judgement, Retry, judge_status
from citadel_gateway.wire.headers import Headers, first
from citadel_gateway.wire.http1_response import CutShort
from citadel_gateway.wire.openai_answer import EngineError, parse_error
from citadel_gateway.wire.retry_after import parse_retry_after
from citadel_gateway.wire.seam import Diverged


@attrs.define(eq=False)
class UpstreamFailure(Exception):
    """An endpoint did not answer as it should.

    :param error: what to tell the client if nobody else answers.
    :param judgement: whether to ask elsewhere, and what it says about the endpoint.
    :param cool_down: seconds the endpoint asked to be left alone.
    :param committed: bytes of this answer have reached the client.
    :param clock: the one that has struck, if that is what was wrong.
    :param stale: the upstream hung up on an idle connection, most likely, just as it was used.
    """

    error: GatewayError
    judgement: Judgement
    cool_down: float | None = None
    committed: bool = False
    stale: bool = False
    clock: str | None = None

    def __str__(self) -> str:
        return self.error.message


_CONNECTION = "upstream_connection_error"
_PROTOCOL = "upstream_protocol_error"


def from_exception(exc: Exception, *, sent: bool) -> UpstreamFailure:
    """*sent*: some of the request was, so it may have been executed."""
    judgement = Judgement(Retry.AMBIGUOUS if sent else Retry.SAFE, Verdict.BAD)
    match exc:
        case EngineError():
            judgement = judge_status(exc.status, has_retry_after=False)
            return UpstreamFailure(_client_error(exc.status, exc, None), judgement)
        case Diverged():
            judgement = Judgement(Retry.NEVER, Verdict.NO_OPINION)
            return UpstreamFailure(upstream_failed(str(exc), _PROTOCOL, executed=True), judgement)
        case ssl.SSLError():
            error = upstream_failed(f"TLS failed: {exc}", _CONNECTION, executed=sent)
            return UpstreamFailure(error, judgement)
        case OSError() if is_our_own_lack(exc):
            judgement = Judgement(Retry.NEVER, Verdict.NO_OPINION)
            return UpstreamFailure(gateway_exhausted(), judgement)
        case OSError() if not sent:
            error = upstream_failed(f"cannot connect: {exc}", _CONNECTION, executed=False)
            return UpstreamFailure(error, judgement)
        case OSError() | CutShort():
            error = upstream_failed(str(exc), _CONNECTION, executed=sent)
            return UpstreamFailure(error, judgement)
        case _:
            error = upstream_failed(str(exc), _PROTOCOL, executed=sent)
            return UpstreamFailure(error, judgement)


def from_status(status: int, headers: Headers, body: bytes) -> UpstreamFailure:
    """*status* is none that carries an answer."""
    if status < 400:
        code = "upstream_redirect" if 300 <= status < 400 else _PROTOCOL
        error = upstream_failed(f"the upstream answered with status {status}", code, executed=True)
        return UpstreamFailure(error, Judgement(Retry.AMBIGUOUS, Verdict.BAD))
    wait = first(headers, b"retry-after")
    cool_down = parse_retry_after(wait)
    judgement = judge_status(status, has_retry_after=wait is not None)
    error = _client_error(status, parse_error(status, body), cool_down)
    return UpstreamFailure(error, judgement, cool_down if status in {429, 503} else None)


def from_clock(
    clock: str, allowed: float, *, sent: bool, final: bool, shortened: bool
) -> UpstreamFailure:
    """*clock* has struck after *allowed* seconds.

    :param final: it was the request's own deadline, so there is no time to ask elsewhere.
    :param shortened: the client had chosen that deadline.
    """
    verdict = Verdict.NO_OPINION if final and shortened else Verdict.BAD
    retry = Retry.AMBIGUOUS if sent else Retry.SAFE
    return UpstreamFailure(
        timed_out(clock, allowed, executed=sent),
        Judgement(Retry.NEVER if final else retry, verdict),
        clock=clock,
    )


def _client_error(status: int, error: EngineError, retry_after: float | None) -> GatewayError:
    """What the client is told when an engine refused and nobody else answers."""
    if status in {401, 403}:
        return upstream_credentials_exhausted()
    overloaded = status in {429, 503}
    return GatewayError(
        error.message,
        status,
        error.kind,
        error.code or ("upstream_overloaded" if overloaded else f"upstream_{status}"),
        error.param,
        retry_after=(retry_after or 1.0) if overloaded else None,
        should_retry=False if status >= 500 and not overloaded else None,
    )
