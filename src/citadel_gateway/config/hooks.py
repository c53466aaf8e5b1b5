"""How each type of value is read: nothing is coerced.

A quoted number is text, ``true`` is not 1, and NaN is not a number.
"""

from __future__ import annotations

import enum
import ipaddress
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from citadel_gateway.config import values as v
from citadel_gateway.config.problems import cut, show, suggestion
from citadel_gateway.config.store_url import parse_store_url

Hook = Callable[[Any, Any], Any]

_HOST = re.compile(r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*\.?|[0-9a-f]*:[0-9a-f:.]+")
_LONGEST_SOCKET = 107  # bytes, on Linux
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def _whole(words: str, low: int, high: float = math.inf) -> Hook:
    def hook(raw: Any, _: Any) -> int:
        if isinstance(raw, bool) or not isinstance(raw, int) or not low <= raw <= high:
            raise ValueError(f"{show(raw)} is not {words}")
        return raw

    return hook


def _real(words: str, fits: Callable[[float], bool]) -> Hook:
    def hook(raw: Any, _: Any) -> float:
        number = _finite(raw)
        if number is None or not fits(number):
            raise ValueError(f"{show(raw)} is not {words}")
        return number

    return hook


def _finite(raw: object) -> float | None:
    if isinstance(raw, bool) or not isinstance(raw, (int, float)):
        return None
    try:
        number = float(raw)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _duration(words: str, fits: Callable[[float], bool]) -> Hook:
    of_number = _real(words, fits)

    def hook(raw: Any, type_: Any) -> float:
        if not isinstance(raw, str):
            return float(of_number(raw, type_))
        written = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h)", raw)
        number = float(written[1]) * _UNITS[written[2]] if written else math.inf
        if not math.isfinite(number) or not fits(number):
            raise ValueError(f"{show(raw)} is not {words}")
        return number

    return hook


def _bool(raw: Any, _: Any) -> bool:
    if not isinstance(raw, bool):
        raise TypeError(f"{show(raw)} is not true or false")
    return raw


def _text(raw: Any, _: Any) -> str:
    if not isinstance(raw, str) or not raw or not raw.isprintable():
        raise ValueError(f"{show(raw)} is not a line of text")
    return raw


def name_hook(raw: Any, _: Any) -> str:
    if not isinstance(raw, str) or not re.fullmatch(r"\S{1,128}", raw) or not raw.isprintable():
        raise ValueError(f"{show(raw)} is not a name: 1 to 128 characters without white space")
    return raw


def _url(raw: Any, _: Any) -> str:
    if not isinstance(raw, str):
        raise TypeError(f"{show(raw)} is not a URL")
    is_socket = raw.startswith(("unix:", "http+unix://"))
    # First, as they may hold a credential that the later messages would repeat.
    if "@" in raw and not is_socket:
        raise ValueError("has an '@': credentials belong in api_key, not in the URL")
    if "?" in raw or "#" in raw:
        raise ValueError("has a query or a fragment, which a base address cannot have")
    if is_socket:
        return _unix_url(raw)
    try:
        parts = urlsplit(raw)
        host, port = parts.hostname or "", parts.port
        if "[" in parts.netloc or ":" in host:
            ipaddress.IPv6Address(host)
    except ValueError as exc:
        raise ValueError(f"{show(raw)} is not a URL: {exc}") from None
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"{show(raw)} does not begin with http://, https:// or unix:/")
    if not re.fullmatch(r"[\x21-\x7e]+", raw) or not _HOST.fullmatch(host):
        raise ValueError(f"{show(raw)} is not a URL: no valid host, or a stray character")
    if port == 0 or parts.netloc.endswith(":"):
        raise ValueError(f"{show(raw)} has no valid port")
    return f"{parts.scheme}://{parts.netloc.lower()}{parts.path.rstrip('/')}"


def _unix_url(raw: str) -> str:
    """``unix:/run/a.sock:/base``, also for ``http+unix://%2Frun%2Fa.sock/base``."""
    if raw.startswith("unix:"):
        path, colon, base = raw.removeprefix("unix:").partition(":")
    else:
        host, slash, base = raw.removeprefix("http+unix://").partition("/")
        path, colon, base = unquote(host), slash, slash + base
    if not re.fullmatch(r"(/[^/:]+)+", path) or not re.fullmatch(r"[!-~]+", path):
        raise ValueError(f"{show(raw)} has no absolute path of a socket, as in unix:/run/vllm.sock")
    if len(path) > _LONGEST_SOCKET:
        raise ValueError(f"the socket's path is longer than {_LONGEST_SOCKET} bytes")
    if colon and not re.fullmatch(r"/[!-~]*", base):
        raise ValueError(f"{show(raw)} has no path behind the socket, as in unix:/run/a.sock:/base")
    base = base.rstrip("/")
    return f"unix:{path}:{base}" if base else f"unix:{path}"


def _store_url(raw: Any, _: Any) -> str:
    if not isinstance(raw, str):
        raise TypeError(f"{show(raw)} is not a URL")
    try:
        parse_store_url(raw)
    except ValueError as exc:
        raise ValueError(f"{'' if '@' in raw else show(raw) + ' '}{exc}") from None
    return raw


def _key_prefix(raw: Any, _: Any) -> str:
    if not isinstance(raw, str) or not re.fullmatch(r"[A-Za-z0-9._:-]{1,64}", raw):
        raise ValueError(f"{show(raw)} is not 1 to 64 letters, digits, '.', '_', ':' or '-'")
    return raw


def _url_path(raw: Any, _: Any) -> str:
    if not isinstance(raw, str) or not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", raw):
        raise ValueError(f"{show(raw)} is not a path like /health")
    return raw


def _header_name(raw: Any, _: Any) -> str:
    name = raw.lower() if isinstance(raw, str) else ""
    if not re.fullmatch(r"x-[a-z0-9-]{1,62}", name):
        raise ValueError(f"{show(raw)} is not the name of a header that begins with X-")
    if name == "x-request-id" or name.startswith("x-citadel-"):
        raise ValueError(f"{show(raw)} means something else to the gateway")
    return name


def _origin(raw: Any, _: Any) -> str:
    pattern = r"[a-z][a-z0-9+.-]*://[a-z0-9.:\[\]_-]+"
    text = raw if isinstance(raw, str) else ""
    if text == "*" or re.fullmatch(pattern, text):
        return text
    # The commonest slips are a trailing slash and capitals; browsers send neither.
    bare = re.match(pattern, text.lower())
    hint = f"; did you mean {cut(bare[0])!r}?" if bare else ""
    raise ValueError(f"{show(raw)} is not an origin like https://chat.example.org, or '*'{hint}")


def _network(raw: Any, _: Any) -> str:
    if isinstance(raw, str):  # ip_network() takes integers, too
        try:
            return str(ipaddress.ip_network(raw))
        except ValueError as exc:
            raise ValueError(f"{show(raw)} is not a network like 10.0.0.0/8: {exc}") from None
    raise ValueError(f"{show(raw)} is not a network like 10.0.0.0/8")


def _sha256(raw: Any, _: Any) -> str:
    # The value is not repeated: somebody may have written the key itself.
    if not isinstance(raw, str) or not re.fullmatch(r"[0-9a-f]{64}", raw):
        raise ValueError("is not 64 lower-case hexadecimal digits; `keygen` makes the hash")
    return raw


def enum_hook(raw: Any, type_: type[enum.Enum]) -> enum.Enum:
    allowed = {str(member.value): member for member in type_}
    if not isinstance(raw, str) or raw not in allowed:
        hint = suggestion(raw, allowed) if isinstance(raw, str) else ""
        raise ValueError(f"{show(raw)} is not one of {', '.join(allowed)}{hint}")
    return allowed[raw]


def secret_hook(environ: Mapping[str, str]) -> Hook:
    def hook(raw: Any, _: Any) -> str:
        if not isinstance(raw, str):
            raise TypeError("is not text; write the secret in quotes, or env:NAME or file:PATH")
        where, value = "the secret", raw
        if raw.startswith("env:"):
            where = f"environment variable {raw[4:]!r}"
            if (value := environ.get(raw[4:], "")) == "":
                raise ValueError(f"{where} is not set")
        elif raw.startswith("file:"):
            where = f"file {raw[5:]!r}"
            value = _first_line(raw[5:])
        if not re.fullmatch(r"[!-~]+", value):  # it goes into a header
            raise ValueError(f"{where} is empty or has a character that no header can carry")
        return value

    return hook


def _first_line(path: str) -> str:
    try:
        with Path(path).open(encoding="utf-8") as file:
            return file.readline(8192).strip()
    except OSError as exc:
        raise ValueError(f"cannot read file {path!r}: {exc.strerror}") from None
    except ValueError:  # a null byte in the path, or not UTF-8
        raise ValueError(f"cannot read file {path!r} as text") from None


HOOKS: dict[Any, Hook] = {
    bool: _bool,
    str: _text,
    v.Seconds: _duration(
        "a duration above zero, like 2.5, 250ms, 30s, 5m or 1h", lambda number: number > 0
    ),
    v.Grace: _duration(
        "a duration of zero or more, like 0, 2.5, 250ms, 30s, 5m or 1h", lambda number: number >= 0
    ),
    v.Port: _whole("a port (0 to 65535)", 0, 65535),
    v.Count: _whole("a whole number of at least 1", 1),
    v.Room: _whole("a whole number of at least 0", 0),
    v.Weight: _real("a number above zero", lambda number: number > 0),
    v.Rate: _real("a number above zero", lambda number: number > 0),
    v.Cost: _real("a number of at least zero", lambda number: number >= 0),
    v.Ratio: _real("a number from 0 to 1", lambda number: 0 <= number <= 1),
    v.Url: _url,
    v.StoreUrl: _store_url,
    v.KeyPrefix: _key_prefix,
    v.UrlPath: _url_path,
    v.HeaderName: _header_name,
    v.Name: name_hook,
    v.Sha256: _sha256,
    v.Network: _network,
    v.Origin: _origin,
}
