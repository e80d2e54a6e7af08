"""The stand-in for the Hub, and the command as a user of it runs it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.scene import Scene, build_scene
from tests.hub.commands import Run, commander
from tests.hub.server import Hub, running


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A Hub without repositories."""
    with running() as found:
        yield found


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    """Models and adapters in a folder of their own."""
    return build_scene(tmp_path / "here")


@pytest.fixture
def run(hub: Hub, scene: Scene, tmp_path: Path) -> Run:
    """Run a command that sees this Hub only."""
    return commander(hub, scene.path, tmp_path)
