"""The stand-in for the Hub, and the command as a user of it runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.running import Ran, python
from tests.helpers.scene import Scene, build_scene
from tests.hub.server import TOKEN, Hub, running

Run = Callable[..., Ran]
_MAIN = "import sys; from mergebench.cli.main import main; main()"


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
    """Run a command in a process of its own: the client looks at its environment once."""
    (tmp_path / "home").mkdir()

    def act(*args: Any, token: str | None = TOKEN, **env: str) -> Ran:
        given = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "XDG_CACHE_HOME": str(tmp_path / "cache"),
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
            **({} if token is None else {"HF_TOKEN": token}),
            **env,
        }
        ran = python(_MAIN, *args, cwd=scene.path, env=given)
        assert TOKEN not in ran.out + ran.err
        return ran

    return act


def files_of(folder: Path) -> dict[str, bytes]:
    """The files below a folder, by their names there."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
