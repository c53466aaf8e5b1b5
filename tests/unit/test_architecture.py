"""Imports run one way, decisions wait for nothing, and importing does nothing."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import citadel_gateway

SOURCE = Path(citadel_gateway.__file__).parent
LAYERS = {"errors": 0, "policy": 0, "wire": 0, "config": 1, "io": 2, "app": 3, "demo": 4, "cli": 4}
BESIDE = {("cli", "demo")}  # the command that starts the demonstration
NOT_PURE = {"anyio", "asyncio", "httpx", "logging", "quart", "quart_trio", "socket", "threading"}
NOT_PURE |= {"time", "trio", "hypercorn", "prometheus_client", "os", "subprocess"}
MODULES = sorted(SOURCE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Every module that the file imports, wherever in it, as an absolute name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            found |= {f"{module}.{a.name}" for a in node.names} if module == ROOT else {module}
    return found


ROOT = "citadel_gateway"


def part_of(name: str) -> str | None:
    """The part of the gateway that *name* belongs to, ``None`` for other packages."""
    root, _, rest = name.partition(".")
    return (rest.partition(".")[0] or "package") if root == ROOT else None


def own_part(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def parts_used(path: Path) -> set[str]:
    return {part for name in imports(path) if (part := part_of(name))} - {own_part(path)}


def modules_of(*parts: str) -> list[Path]:
    return [path for path in MODULES if own_part(path) in parts]


def name(path: Path) -> str:
    return str(path.relative_to(SOURCE))


def test_every_part_has_its_place() -> None:
    assert {own_part(path) for path in MODULES} == {*LAYERS, "sim", "__init__", "__main__"}


@pytest.mark.parametrize("path", modules_of(*LAYERS), ids=name)
def test_imports_run_one_way(path: Path) -> None:
    part = own_part(path)

    wrong = [
        used
        for used in parts_used(path)
        if not (
            LAYERS.get(used, 9) < LAYERS[part]
            or used == "errors"
            or (part, used) in BESIDE
            or (used == "sim" and part in {"demo", "cli"})
        )
    ]

    assert wrong == []


@pytest.mark.parametrize("path", modules_of("policy", "wire", "errors"), ids=name)
def test_decisions_and_parsers_neither_wait_nor_log_nor_look_at_the_clock(path: Path) -> None:
    assert {module.partition(".")[0] for module in imports(path)} & NOT_PURE == set()
    assert not any(
        isinstance(node, ast.AsyncFunctionDef | ast.Await | ast.Global)
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
    )


@pytest.mark.parametrize("path", modules_of("policy", "wire"), ids=name)
def test_policy_and_wire_do_not_know_each_other(path: Path) -> None:
    assert parts_used(path) <= {"errors"}


@pytest.mark.parametrize("path", modules_of("sim"), ids=name)
def test_simulated_engines_know_nothing_of_the_gateway_but_its_errors(path: Path) -> None:
    assert parts_used(path) <= {"errors"}


@pytest.mark.parametrize("path", modules_of("policy", "wire"), ids=name)
def test_modules_stay_small_and_begin_with_the_point(path: Path) -> None:
    text = path.read_text("utf-8")

    assert len(text.splitlines()) <= 260
    assert ast.get_docstring(ast.parse(text))


WATCH = """
import json, sys, threading
import trio  # it looks for libpthread by running ldconfig: its doing, not ours
seen = []
def hook(event, args):
    if event == "open" and isinstance(args[0], str) and isinstance(args[2], int):
        writes = args[2] & 3
        if not writes and "site-packages" not in args[0] and "citadel_gateway" in args[0]:
            if not args[0].endswith((".py", ".pyc")):
                seen.append(f"open {args[0]}")
        elif writes and "__pycache__" not in args[0] and args[0] != "/dev/null":
            seen.append(f"write {args[0]}")
    elif event in {"socket.bind", "socket.connect", "subprocess.Popen", "os.fork", "os.system"}:
        seen.append(event)
sys.addaudithook(hook)
import citadel_gateway
threads = [thread.name for thread in threading.enumerate()]
print(json.dumps({"seen": seen, "threads": threads}))
"""


def test_importing_the_package_starts_nothing_and_touches_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WATCH], check=True, capture_output=True, text=True, cwd=tmp_path
    )

    assert json.loads(done.stdout) == {"seen": [], "threads": ["MainThread"]}
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []
