"""What the system tells about memory is read as it is written."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from citadel_gateway.io import memory
from citadel_gateway.policy.watermarks import Use

MIB = 2**20


def make_group(root: Path, name: str, *, limit: str, used: int, cached: int = 0) -> None:
    group = root / name
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.max").write_text(f"{limit}\n")
    (group / "memory.current").write_text(f"{used}\n")
    stat = f"anon 1\nfile {cached}\ninactive_file {cached}\nactive_file 0\nslab_reclaimable 0\n"
    (group / "memory.stat").write_text(stat)


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    folder = tmp_path / "proc"
    folder.mkdir()
    (folder / "cgroup").write_text("0::/system.slice/citadel.service\n")
    return folder


def test_the_resident_set_is_the_second_number_in_pages(tmp_path: Path) -> None:
    (tmp_path / "statm").write_text("5000 1200 300 1 0 700 0\n")

    assert memory.resident(tmp_path) == 1200 * resource.getpagesize()


def test_this_process_has_some_memory() -> None:
    assert memory.resident() > MIB


def test_where_nothing_is_told_nothing_is_used(tmp_path: Path) -> None:
    assert memory.resident(tmp_path) == 0
    assert memory.of_cgroups(tmp_path, tmp_path) == []


def test_every_group_above_that_has_a_limit_counts(proc: Path, tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    make_group(root, "system.slice", limit=str(300 * MIB), used=290 * MIB)
    own = "system.slice/citadel.service"
    make_group(root, own, limit=str(200 * MIB), used=100 * MIB)

    found = memory.of_cgroups(proc, root)

    assert found == [Use(100 * MIB, 200 * MIB), Use(290 * MIB, 300 * MIB)]


def test_a_group_without_a_limit_has_none(proc: Path, tmp_path: Path) -> None:
    make_group(tmp_path, "system.slice/citadel.service", limit="max", used=100)

    assert memory.of_cgroups(proc, tmp_path) == []


def test_cached_files_are_not_used_memory(proc: Path, tmp_path: Path) -> None:
    own = "system.slice/citadel.service"
    make_group(tmp_path, own, limit=str(200 * MIB), used=190 * MIB, cached=150 * MIB)

    assert memory.of_cgroups(proc, tmp_path) == [Use(40 * MIB, 200 * MIB)]


def test_in_a_container_the_group_is_the_root(tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text("0::/\n")
    make_group(tmp_path, ".", limit="1000", used=10)

    assert memory.of_cgroups(tmp_path, tmp_path) == [Use(10, 1000)]


def test_memory_can_be_given_back_at_any_time() -> None:
    memory.give_back()
