"""A folder with one of everything."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.scene import Scene, build_scene


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    """Checkpoints, adapters and task vectors in a fresh folder."""
    return build_scene(tmp_path)
