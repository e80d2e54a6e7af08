"""Compiled code is kept while it holds, and a cache that cannot be used is no reason to stop."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest

from mergebench.compute.jit import float_kernel

CODE = """
from mergebench.compute.jit import kernel

@kernel
def twice(number):
    return number + number
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(folder))
    # numba reads its environment again when that has changed since it last did.
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(folder))
    return folder


def loaded(file: Path) -> Any:
    """The function of a module that is imported anew, as in another process."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.twice  # type: ignore[attr-defined]


def assert_works(file: Path, *, kept: bool) -> None:
    """It gives the right result, from the cache or compiled."""
    function = loaded(file)
    assert function(21) == 42
    assert bool(function.stats.cache_hits) == kept


def test_code_is_kept_until_a_file_beside_it_changes(tmp_path: Path, cache: Path) -> None:
    """Kernels call others of their folder, which numba alone would not look at."""
    (tmp_path / "code").mkdir()
    file, other = tmp_path / "code" / "one.py", tmp_path / "code" / "two.py"
    file.write_text(CODE)
    other.write_text("")
    assert_works(file, kept=False)
    assert_works(file, kept=True)
    other.write_text("# changed")
    assert_works(file, kept=False)
    assert_works(file, kept=True)


def test_damaged_caches_are_compiled_anew(tmp_path: Path, cache: Path) -> None:
    """Files that were cut or overwritten, of the index and of the code."""
    (tmp_path / "code").mkdir()
    file = tmp_path / "code" / "one.py"
    file.write_text(CODE)
    assert_works(file, kept=False)
    for kept in (*cache.rglob("*.nbi"), *cache.rglob("*.nbc")):
        for damage in (b"", b"garbage", kept.read_bytes()[:40]):
            kept.write_bytes(damage)
            assert loaded(file)(21) == 42


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a full disk: the function is compiled, and nothing is said."""
    (tmp_path / "code").mkdir()
    file = tmp_path / "code" / "one.py"
    file.write_text(CODE)

    def full(*given: Any, **named: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert_works(file, kept=False)
    assert_works(file, kept=False)


def test_division_by_zero_is_numpys() -> None:
    """Infinite, or no number, and no error that a loop would have to look out for."""

    def quotient(one: Any, other: Any) -> Any:
        return one / other

    divided = float_kernel(quotient)
    assert divided(np.float32(1), np.float32(0)) == np.inf
    assert np.isnan(divided(np.float32(0), np.float32(0)))
