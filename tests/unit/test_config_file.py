"""A changed file is noticed, however it was changed, and never while it is half written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from citadel_gateway.config.loader import ConfigError
from citadel_gateway.io.config_file import ConfigFile

TEXT = "models: {m: {endpoint: 'http://127.0.0.1:1'}}\n"
OTHER = "models: {m: {endpoint: 'http://127.0.0.1:2'}}\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "gateway.yaml"
    path.write_text(TEXT)
    return path


@pytest.fixture
def file(path: Path) -> ConfigFile:
    file = ConfigFile(str(path))
    file.load()
    return file


def in_place(path: Path) -> None:
    path.write_text(OTHER)
    os.utime(path, ns=(1, 1))  # clocks of file systems are coarse


def by_rename(path: Path) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_text(OTHER)
    before = path.stat()
    fresh.replace(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def looks(file: ConfigFile, count: int) -> list[bool]:
    return [file.has_changed() for _ in range(count)]


@pytest.mark.parametrize("change", [in_place, by_rename])
def test_a_change_counts_once_it_has_lasted(
    change: Callable[[Path], None], file: ConfigFile, path: Path
) -> None:
    before = looks(file, 3)
    change(path)
    after = looks(file, 2)
    config = file.load()

    assert (before, after) == ([False] * 3, [False, True])
    assert [str(e.url) for m in config.models.values() for e in m.all_endpoints()] == [
        "http://127.0.0.1:2"
    ]
    assert looks(file, 3) == [False] * 3


def test_a_link_that_is_turned_elsewhere_is_a_change(tmp_path: Path) -> None:
    for name, text in (("one", TEXT), ("two", OTHER)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "gateway.yaml").write_text(text)
    current = tmp_path / "current"
    current.symlink_to("one")
    file = ConfigFile(str(current / "gateway.yaml"))
    file.load()
    looks(file, 2)
    (tmp_path / "next").symlink_to("two")
    (tmp_path / "next").replace(current)

    assert looks(file, 2) == [False, True]


def test_a_file_that_is_being_written_is_let_be(file: ConfigFile, path: Path) -> None:
    looks(file, 2)
    seen = []
    for size in range(1, 5):
        path.write_text(OTHER[: 10 * size])
        seen += looks(file, 1)

    assert seen == [False] * 4


def test_a_file_that_has_gone_is_no_change_until_another_is_there(
    file: ConfigFile, path: Path
) -> None:
    path.unlink()
    gone = looks(file, 3)
    path.write_text(OTHER)

    assert (gone, looks(file, 2)) == ([False] * 3, [False, True])


def test_a_bad_file_is_refused_once(file: ConfigFile, path: Path) -> None:
    before = file.digest
    path.write_text("models: {m: {endpoint: nonsense}}\n")
    changed = looks(file, 2)
    with pytest.raises(ConfigError, match=r"models\.m\.endpoint"):
        file.load()

    assert changed == [False, True]
    assert looks(file, 3) == [False] * 3
    assert file.digest != before


def test_certificates_that_are_renewed_are_a_change(tmp_path: Path, path: Path) -> None:
    import trustme

    authority = trustme.CA()
    ca = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(ca)
    path.write_text(f"models: {{m: {{endpoint: 'https://h:1', tls: {{ca_file: {ca}}}}}}}\n")
    file = ConfigFile(str(path))
    file.load()
    before = looks(file, 2)
    trustme.CA().cert_pem.write_to_path(ca)
    os.utime(ca, ns=(1, 1))

    assert (before, looks(file, 2)) == ([False] * 2, [False, True])
