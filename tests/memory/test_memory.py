"""Merges of 2 GB stay within ``--memory``, or are refused with the number they need."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.files import BF16, header, listing, write
from tests.helpers.running import assert_done, assert_refused, call
from tests.memory.conftest import SHAPES
from tests.memory.measure import MIB, assert_within, measure

LIMIT = 256 * MIB
FILES = ("ft1.safetensors", "ft2.safetensors", "-b", "base.safetensors")


@pytest.mark.parametrize("scope", ["row", "tensor", "model"])
def test_ties_stays_within_its_memory(models: Path, scope: str) -> None:
    """One tensor alone exceeds the limit, and still no scope of TIES does."""
    out = models / f"{scope}.safetensors"
    arguments = ("merge", *FILES, "-m", "ties", "-p", f"scope={scope}", "-o", out)

    # The models are noise, and have nothing to do with each other.
    measured = measure([*arguments, "--memory", "256MiB", "--allow-base-mismatch"], models)

    assert_within(measured, LIMIT)
    entries, start = header(out)
    sizes = {name: tuple(entries[name]["shape"]) for name in SHAPES}
    assert sizes == SHAPES
    assert out.stat().st_size == start + sum(
        2 * rows * columns for rows, columns in SHAPES.values()
    )
    assert max(2 * rows * columns for rows, columns in SHAPES.values()) > LIMIT
    out.unlink()


@pytest.fixture
def vectors(tmp_path: Path) -> Path:
    """Models that are one long vector: a single row, which row-wise work may not cut."""
    random = np.random.default_rng(0)
    for name in ("base", "ft1", "ft2"):
        vector = random.standard_normal(6_000_000, np.float32).astype(BF16)
        write(tmp_path / f"{name}.safetensors", {"long.bias": vector})
    return tmp_path


def test_too_little_memory_is_refused_with_the_number(vectors: Path) -> None:
    """The plan says how much is needed, before any work; with that much the merge works."""
    merge = ("merge", *FILES, "-m", "ties", "-p", "scope=row", "-o", "out.safetensors")
    before = listing(vectors)

    refused = call(*merge, "--memory", "64MiB", cwd=vectors)

    assert_refused(refused, "needs at least", "--memory 64 MiB", "row of 'long.bias'")
    assert listing(vectors) == before
    found = re.search(r"give --memory (\d+)MiB", refused.err)
    assert found is not None
    needed = int(found[1])
    plan = ("plan", *merge[1:], "--memory", f"{needed}MiB", "--json")
    least = assert_done(call(*plan, cwd=vectors)).json["least_memory"]
    assert needed == -(-least // MIB)
    assert_refused(call(*merge, "--memory", f"{needed - 1}MiB", cwd=vectors), f"{needed}MiB")
    assert_within(measure([*merge, "--memory", f"{needed}MiB"], vectors), needed * MIB)
    assert "out.safetensors" in listing(vectors)


def test_smaller_pieces_need_less(vectors: Path) -> None:
    """The same models over the whole tensor fit into what the row could not."""
    merge = ("merge", *FILES, "-m", "ties", "-p", "scope=tensor", "-o", "out.safetensors")

    assert_within(measure([*merge, "--memory", "96MiB"], vectors), 96 * MIB)
