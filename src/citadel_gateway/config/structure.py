"""From plain YAML data to the frozen schema, with every problem at its dotted path.

Nothing is coerced: a quoted number is text, ``true`` is not 1, and NaN is not a number.  Messages
never repeat what may hold a credential; what they do repeat is cut short.
"""

from __future__ import annotations

import enum
import ipaddress
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args, get_origin
from urllib.parse import urlsplit

import attrs
from cattrs import Converter
from cattrs.errors import AttributeValidationNote, ClassValidationError, IterableValidationNote
from cattrs.gen import make_dict_structure_fn

from citadel_gateway.config import values as v
from citadel_gateway.config.schema import GatewayConfigSchema

Hook = Callable[[Any, Any], Any]
Steps = tuple[str | int, ...]

_HOST = re.compile(r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*\.?|[0-9a-f]*:[0-9a-f:.]+")
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


@attrs.frozen
class Problem:
    """One line for the user; *path* has a string for each key and a number for each list item."""

    path: Steps
    message: str

    def __str__(self) -> str:
        dotted = ""
        for step in self.path:
            text = step if isinstance(step, str) and step.isprintable() else repr(step)
            dotted += f"[{step}]" if isinstance(step, int) else f".{_cut(text)}"
        return f"{dotted.removeprefix('.')}: {self.message}" if dotted else self.message


class InvalidConfig(Exception):
    """All problems of one configuration."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


def structure(raw: Mapping[str, object], environ: Mapping[str, str]) -> GatewayConfigSchema:
    """Raise :class:`InvalidConfig` with every wrong field; *environ* is where secrets are read."""
    try:
        return make_converter(environ).structure(raw, GatewayConfigSchema)
    except Exception as exc:  # whatever a hook raises is something wrong with its value
        raise InvalidConfig(_problems(exc, ())) from exc


def _problems(exc: BaseException, path: Steps) -> Iterator[Problem]:
    for note in getattr(exc, "__notes__", ()):
        if isinstance(note, AttributeValidationNote):
            path = (*path, note.name)
        elif isinstance(note, IterableValidationNote):
            path = (*path, note.index)
    if isinstance(exc, BaseExceptionGroup):
        for inner in exc.exceptions:
            yield from _problems(inner, path)
    else:
        yield Problem(path, "is required" if isinstance(exc, KeyError) else str(exc))


def suggestion(word: str, options: Iterable[str]) -> str:
    """``; did you mean 'x'?``, or nothing when no option is close."""
    by_folded = {option.casefold(): option for option in options}
    # difflib takes quadratic time; no option is anywhere near so long.
    close = get_close_matches(word[:100].casefold(), by_folded, n=1)
    return f"; did you mean {by_folded[close[0]]!r}?" if close else ""


def show(raw: object) -> str:
    """The value as a YAML user would recognise it; containers by kind only."""
    if raw is None or isinstance(raw, bool):
        return {None: "null", True: "true", False: "false"}[raw]
    if isinstance(raw, int) and raw.bit_length() > 64:
        return "a huge number"  # repr() refuses thousands of digits
    if isinstance(raw, (str, int, float)):
        return _cut(repr(raw))
    return _kind(raw)


def _cut(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


def _kind(raw: object) -> str:
    match raw:
        case None:
            return "null"
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case str():
            return "text"
        case Mapping():
            return "a mapping"
        case list() | tuple():
            return "a list"
    return f"a {type(raw).__name__}"


# --- Single values


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


def _name(raw: Any, _: Any) -> str:
    if not isinstance(raw, str) or not re.fullmatch(r"\S{1,128}", raw) or not raw.isprintable():
        raise ValueError(f"{show(raw)} is not a name: 1 to 128 characters without white space")
    return raw


def _url(raw: Any, _: Any) -> str:
    if not isinstance(raw, str):
        raise TypeError(f"{show(raw)} is not a URL")
    # First, as they may hold a credential that the later messages would repeat.
    if "@" in raw:
        raise ValueError("has an '@': credentials belong in api_key, not in the URL")
    if "?" in raw or "#" in raw:
        raise ValueError("has a query or a fragment, which a base address cannot have")
    try:
        parts = urlsplit(raw)
        host, port = parts.hostname or "", parts.port
        if "[" in parts.netloc or ":" in host:
            ipaddress.IPv6Address(host)
    except ValueError as exc:
        raise ValueError(f"{show(raw)} is not a URL: {exc}") from None
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"{show(raw)} does not begin with http:// or https://")
    if not re.fullmatch(r"\S+", raw) or not raw.isprintable() or not _HOST.fullmatch(host):
        raise ValueError(f"{show(raw)} is not a URL: no valid host, or a stray character")
    if port == 0 or parts.netloc.endswith(":"):
        raise ValueError(f"{show(raw)} has no valid port")
    return f"{parts.scheme}://{parts.netloc.lower()}{parts.path.rstrip('/')}"


def _url_path(raw: Any, _: Any) -> str:
    if not isinstance(raw, str) or not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", raw):
        raise ValueError(f"{show(raw)} is not a path like /health")
    return raw


def _origin(raw: Any, _: Any) -> str:
    pattern = r"[a-z][a-z0-9+.-]*://[a-z0-9.:\[\]_-]+"
    text = raw if isinstance(raw, str) else ""
    if text == "*" or re.fullmatch(pattern, text):
        return text
    # The commonest slips are a trailing slash and capitals; browsers send neither.
    bare = re.match(pattern, text.lower())
    hint = f"; did you mean {_cut(bare[0])!r}?" if bare else ""
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


def _enum(raw: Any, type_: type[enum.Enum]) -> enum.Enum:
    allowed = {str(member.value): member for member in type_}
    if not isinstance(raw, str) or raw not in allowed:
        hint = suggestion(raw, allowed) if isinstance(raw, str) else ""
        raise ValueError(f"{show(raw)} is not one of {', '.join(allowed)}{hint}")
    return allowed[raw]


def _secret(environ: Mapping[str, str]) -> Hook:
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


_HOOKS: dict[Any, Hook] = {
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
    v.UrlPath: _url_path,
    v.Name: _name,
    v.Sha256: _sha256,
    v.Network: _network,
    v.Origin: _origin,
}


# --- Containers


def _collect(
    items: Iterable[tuple[str | int, Any]], hook: Hook, type_: Any
) -> tuple[list[Any], list[Exception]]:
    """Structure every item, and keep every error with its place."""
    made: list[Any] = []
    errors: list[Exception] = []
    for step, item in items:
        try:
            made.append(hook(item, type_))
        except Exception as exc:
            errors.append(_at(exc, step))
    return made, errors


def _refuse(errors: list[Exception], type_: Any) -> None:
    if errors:
        raise ClassValidationError("wrong", errors, type_)


def _at(exc: Exception, step: str | int) -> Exception:
    if isinstance(step, int):
        exc.add_note(IterableValidationNote(f"item {step}", step, None))
    else:
        exc.add_note(AttributeValidationNote(f"key {step}", step, None))
    return exc


def _key(key: object) -> str:
    return key if isinstance(key, str) else show(key)


def _list_hook(type_: Any, converter: Converter) -> Hook:
    item_type = get_args(type_)[0]
    item_hook = converter.get_structure_hook(item_type)

    def hook(raw: Any, _: Any) -> tuple[Any, ...]:
        if not isinstance(raw, (list, tuple)):  # text would fall apart into characters
            raise TypeError(f"{_kind(raw)} where a list should be")
        made, errors = _collect(enumerate(raw), item_hook, item_type)
        _refuse(errors, type_)
        return tuple(made)

    return hook


def _mapping_hook(type_: Any, converter: Converter) -> Hook:
    """The models: a mapping with at least one entry."""
    name_type, item_type = get_args(type_)
    item_hook = converter.get_structure_hook(item_type)

    def hook(raw: Any, _: Any) -> dict[Any, Any]:
        if not isinstance(raw, Mapping) or not raw:
            found = "an empty mapping" if isinstance(raw, Mapping) else _kind(raw)
            raise ValueError(f"{found} where a mapping with at least one entry should be")
        entries = [(_key(key), key, item) for key, item in raw.items()]
        names, errors = _collect(((step, key) for step, key, _ in entries), _name, name_type)
        items, more = _collect(((step, item) for step, _, item in entries), item_hook, item_type)
        _refuse(errors + more, type_)
        return dict(zip(names, items, strict=True))

    return hook


def _section_hook(cls: Any, converter: Converter) -> Hook:
    """cattrs's own hook for the class, with our words for what does not fit its shape."""
    fields = attrs.fields(attrs.resolve_types(cls))
    inner = make_dict_structure_fn(cls, converter)
    known = {field.name for field in fields}
    # `api_keys:` with every line below it commented out is null in YAML, and means the default.
    nullable = {
        field.name
        for field in fields
        if field.default is not attrs.NOTHING
        and (attrs.has(field.type) or get_origin(field.type) is tuple)
    }

    def hook(raw: Any, _: Any) -> Any:
        if raw is None:
            raw = {}
        if not isinstance(raw, Mapping):
            raise TypeError(f"{_kind(raw)} where a mapping of options should be")
        errors: list[Exception] = [_unknown(key, known) for key in raw if key not in known]
        given = {
            key: value
            for key, value in raw.items()
            if key in known and not (value is None and key in nullable)
        }
        try:
            made = inner(given, cls)
        except ClassValidationError as group:
            errors.extend(group.exceptions)
        _refuse(errors, cls)
        return made

    return hook


def _unknown(key: object, known: Iterable[str]) -> Exception:
    name = _key(key)
    hint = suggestion(name, known) or f"; known here: {', '.join(sorted(known))}"
    return _at(ValueError(f"unknown option{hint}"), name)


def _is_a(origin: type) -> Callable[[Any], bool]:
    return lambda type_: get_origin(type_) is origin


def make_converter(environ: Mapping[str, str]) -> Converter:
    converter = Converter(detailed_validation=True)
    for type_, hook in _HOOKS.items():
        converter.register_structure_hook(type_, hook)
    converter.register_structure_hook(v.Secret, _secret(environ))
    converter.register_structure_hook_func(
        lambda type_: isinstance(type_, type) and issubclass(type_, enum.Enum), _enum
    )
    converter.register_structure_hook_factory(_is_a(tuple), _list_hook)
    converter.register_structure_hook_factory(_is_a(dict), _mapping_hook)
    converter.register_structure_hook_factory(attrs.has, _section_hook)
    return converter
