"""What the machine has, as Linux and the control group of a container say it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergebench.checkpoints import page_cache
from mergebench.compute import machine


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose files stand for those of the system, by their last names."""
    monkeypatch.setattr(machine, "Path", lambda text: tmp_path / Path(text).name)
    return tmp_path


def test_nothing_is_known_without_the_files(system: Path) -> None:
    """As on systems that have none of them."""
    assert list(system.iterdir()) == []
    assert machine.free_memory() is None
    assert machine.memory_limit() is None
    assert machine.core_quota() is None
    assert page_cache.available() is None


@pytest.mark.parametrize(
    ("limit", "bytes_of_it", "left"),
    [("max", None, 3 << 20), ("1000", 1000, 1000), ("9000000", 9_000_000, 3 << 20)],
)
def test_memory_of_a_container(
    system: Path, limit: str, bytes_of_it: int | None, left: int
) -> None:
    """What is free, at most what its group grants."""
    (system / "meminfo").write_text("MemTotal:     9999 kB\nMemAvailable:     3072 kB\n")
    (system / "memory.max").write_text(f"{limit}\n")

    assert machine.free_memory() == 3 << 20
    assert machine.memory_limit() == bytes_of_it
    assert page_cache.available() == left


def test_cores_of_a_container(system: Path) -> None:
    """A share of the period, or no limit."""
    (system / "cpu.max").write_text("150000 100000\n")
    assert machine.core_quota() == 1.5
    (system / "cpu.max").write_text("max 100000\n")
    assert machine.core_quota() is None
    assert machine.cores() >= 1
    assert (machine.memory() or 1) > 0
