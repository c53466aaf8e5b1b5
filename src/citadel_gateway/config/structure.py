"""From plain YAML data to the frozen schema, with every problem at its dotted path."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, get_args, get_origin

import attrs
from cattrs import Converter
from cattrs.errors import AttributeValidationNote, ClassValidationError, IterableValidationNote
from cattrs.gen import make_dict_structure_fn

from citadel_gateway.config import values as v
from citadel_gateway.config.hooks import HOOKS, Hook, enum_hook, name_hook, secret_hook
from citadel_gateway.config.problems import InvalidConfig, Problem, Steps, kind_of, show, suggestion
from citadel_gateway.config.schema import EndpointConfig, GatewayConfigSchema

_ENDPOINTS: Any = tuple[EndpointConfig, ...]


def structure(raw: Mapping[str, object], environ: Mapping[str, str]) -> GatewayConfigSchema:
    """Raise :class:`InvalidConfig` with every wrong field; *environ* is where secrets are read."""
    try:
        return make_converter(environ).structure(raw, GatewayConfigSchema)
    except Exception as exc:  # whatever a hook raises is something wrong with its value
        raise InvalidConfig(_problems(exc, ())) from exc


def structure_endpoints(raw: object, environ: Mapping[str, str]) -> tuple[EndpointConfig, ...]:
    """The same for a list of endpoints that stands alone."""
    try:
        listed: tuple[EndpointConfig, ...] = make_converter(environ).structure(raw, _ENDPOINTS)
    except Exception as exc:  # as above
        raise InvalidConfig(_problems(exc, ())) from exc
    return listed


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
            raise TypeError(f"{kind_of(raw)} where a list should be")
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
            found = "an empty mapping" if isinstance(raw, Mapping) else kind_of(raw)
            raise ValueError(f"{found} where a mapping with at least one entry should be")
        entries = [(_key(key), key, item) for key, item in raw.items()]
        names, errors = _collect(((step, key) for step, key, _ in entries), name_hook, name_type)
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
            raise TypeError(f"{kind_of(raw)} where a mapping of options should be")
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
    for type_, hook in HOOKS.items():
        converter.register_structure_hook(type_, hook)
    converter.register_structure_hook(v.Secret, secret_hook(environ))
    converter.register_structure_hook_func(
        lambda type_: isinstance(type_, type) and issubclass(type_, enum.Enum), enum_hook
    )
    converter.register_structure_hook_factory(_is_a(tuple), _list_hook)
    converter.register_structure_hook_factory(_is_a(dict), _mapping_hook)
    converter.register_structure_hook_factory(attrs.has, _section_hook)
    return converter
