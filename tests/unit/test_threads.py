"""While matrices are decomposed LAPACK has one thread for each worker, which are many already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from mergebench.compute import decomposition
from tests.helpers.running import assert_done, call
from tests.helpers.scene import build_scene


@pytest.mark.parametrize(
    "command",
    [
        ("spectral", "ft1", "--only", "rotation", "--no-cache", "-j", "2"),
        ("edit", "deintrude", "ft1", "-o", "out", "--workers", "2"),
    ],
)
def test_lapack_has_one_thread(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every decomposition sees the limit, and afterwards all is as it was."""
    build_scene(tmp_path)
    seen: list[set[int]] = []
    original = decomposition.spectrum

    def watched(matrix: Any, scale: Any = None) -> Any:
        pools = (pool for pool in threadpool_info() if pool["user_api"] == "blas")
        seen.append({pool["num_threads"] for pool in pools})
        return original(matrix, scale)

    monkeypatch.setattr(decomposition, "spectrum", watched)
    with threadpool_limits(2):
        before = threadpool_info()
        assert_done(call(*command, "-b", "base", cwd=tmp_path))
        after = {pool["filepath"]: pool["num_threads"] for pool in threadpool_info()}
    assert len(seen) >= 8
    assert set().union(*seen) == {1}
    assert all(after[pool["filepath"]] == pool["num_threads"] for pool in before)
