"""A folder with one of everything."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.scene import Scene, build_scene


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    """Checkpoints, adapters and task vectors in a fresh folder, with empty cache and shelf."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path.with_name(f"{tmp_path.name}-cache")))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path.with_name(f"{tmp_path.name}-data")))
    return build_scene(tmp_path)
