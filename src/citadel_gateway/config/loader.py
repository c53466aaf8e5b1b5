"""Load and check a configuration: everything that is wrong with it, in one go."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from citadel_gateway.config.environment import overlay
from citadel_gateway.config.problems import InvalidConfig, Problem, Steps
from citadel_gateway.config.rules import cross_field_problems
from citadel_gateway.config.schema import GatewayConfigSchema
from citadel_gateway.config.structure import structure


class ConfigError(Exception):
    """Everything wrong with a configuration, one line per problem."""

    def __init__(self, source: str, problems: Iterable[str]) -> None:
        self.source = source
        self.problems = list(problems)
        count = len(self.problems)
        head = f"{source}: {count} problem{'s' if count != 1 else ''}"
        super().__init__("\n  ".join([head, *self.problems]))


def parse(
    raw: Mapping[str, object],
    *,
    source: str = "<dict>",
    environ: Mapping[str, str] | None = None,
) -> GatewayConfigSchema:
    """Check plain data.  Without *environ* it stands alone, whatever the process was given."""
    try:
        return _build(raw, environ or {})
    except InvalidConfig as exc:
        raise ConfigError(source, map(str, exc.problems)) from exc


def load_config(
    path: str | os.PathLike[str], *, environ: Mapping[str, str] | None = None
) -> GatewayConfigSchema:
    """Load a YAML file, with the process's environment variables laid over it."""
    source = os.fspath(path)
    environ = os.environ if environ is None else environ
    return load_text(read_text(source), source=source, environ=environ)


def load_text(text: str, *, source: str, environ: Mapping[str, str]) -> GatewayConfigSchema:
    """The same with the text of the file, which came from *source*."""
    raw = load_yaml(source, text)
    if raw is None:
        raise ConfigError(source, ["the file is empty; it needs at least a `models` section"])
    try:
        return _build(raw, environ)
    except InvalidConfig as exc:
        raise ConfigError(source, with_lines(exc.problems, text)) from exc


def _build(raw: object, environ: Mapping[str, str]) -> GatewayConfigSchema:
    if not isinstance(raw, Mapping):
        raise InvalidConfig([Problem((), "the configuration is not a mapping of sections")])
    laid = overlay(raw, environ)
    problems = list(laid.problems)
    try:
        config = structure(laid.raw, environ)
        problems += cross_field_problems(config)
    except InvalidConfig as exc:
        problems += exc.problems
        problems += _further_problems(laid.raw, exc.problems, environ)
    if problems:
        raise InvalidConfig(map(laid.rename, problems))
    return config


def _further_problems(
    raw: Mapping[str, object], known: Iterable[Problem], environ: Mapping[str, str]
) -> list[Problem]:
    """What else is wrong, as far as it can be told without the values that are wrong themselves."""
    wrong = [problem.path for problem in known]
    try:
        config = structure(_without(raw, (), set(wrong)), environ)
    except InvalidConfig:
        return []
    # A rule about what holds a wrong value may only complain that the value is missing now.
    return [
        problem
        for problem in cross_field_problems(config)
        if not any(path[: len(problem.path)] == problem.path for path in wrong)
    ]


def _without(value: Any, path: Steps, wrong: set[Steps]) -> Any:
    """*value* without what stands at the paths that are *wrong*."""
    if isinstance(value, Mapping):
        return {
            key: _without(item, (*path, str(key)), wrong)
            for key, item in value.items()
            if (*path, str(key)) not in wrong
        }
    if isinstance(value, list | tuple):
        return [
            _without(item, (*path, i), wrong)
            for i, item in enumerate(value)
            if (*path, i) not in wrong
        ]
    return value


def read_text(source: str) -> str:
    """The text of the file *source*.  Raises :class:`ConfigError`."""
    try:
        return Path(source).read_text(encoding="utf-8-sig")
    except OSError as exc:
        raise ConfigError(source, [f"cannot be read: {exc.strerror}"]) from exc
    except ValueError as exc:  # not UTF-8, or a null byte in the path
        raise ConfigError(source, [f"cannot be read as UTF-8 text: {exc}"]) from exc


def load_yaml(source: str, text: str) -> object:
    """Plain data, or ``None`` where there is nothing.  Raises :class:`ConfigError`."""
    try:
        # Pure Python, for one and the same parser everywhere; it refuses duplicate keys.
        raw: object = YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError, RecursionError) as exc:
        raise ConfigError(source, [_explain(exc)]) from exc
    return raw


def _explain(exc: Exception) -> str:
    match exc:
        case DuplicateKeyError():
            # ruamel's own sentence repeats both values, which may be secrets.
            found = re.match(r'found duplicate key "(.*?)"', exc.problem or "")
            what = f"duplicate key {found[1]!r}" if found else "duplicate key"
        case MarkedYAMLError():
            what = " ".join(filter(None, (exc.context, exc.problem)))
        case RecursionError():
            return "not valid YAML: nested too deeply"
        case _:
            return f"not valid YAML: {' '.join(str(exc).split())}"
    mark = exc.problem_mark
    return f"line {mark.line + 1}, column {mark.column + 1}: {what}" if mark else what


def with_lines(problems: Iterable[Problem], text: str) -> list[str]:
    """Add line numbers, which only the slower round-trip loader knows."""
    try:
        document = YAML(typ="rt").load(text)
    except (YAMLError, ValueError, RecursionError):
        document = None
    numbered = ((problem, _line(document, problem.path)) for problem in problems)
    return [f"{problem} (line {line})" if line else str(problem) for problem, line in numbered]


def _line(node: object, path: Steps) -> int | None:
    """The line of the deepest part of *path* that is in the file."""
    line = None
    for step in path:
        if isinstance(node, CommentedMap) and step in (node.lc.data or {}):
            line = node.lc.key(step)[0] + 1
        elif isinstance(node, CommentedSeq) and isinstance(step, int) and step < len(node):
            line = node.lc.item(step)[0] + 1
        else:
            break
        node = node[step]
    return line
