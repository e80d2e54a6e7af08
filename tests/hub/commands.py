"""The command, as somebody runs it who sees the stand-in for the Hub and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.helpers.running import Ran, python
from tests.hub.server import TOKEN, Hub

Run = Callable[..., Ran]
_MAIN = "from mergebench.cli.main import main; main()"


def commander(hub: Hub, cwd: Path, home: Path) -> Run:
    """A function that runs a command in a process of its own, which reads its environment anew.

    Whatever it prints, the token is not among it.
    """
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home / "hf-home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "XDG_CACHE_HOME": str(home / "cache"),
        "XDG_DATA_HOME": str(home / "data"),
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }

    def act(*args: Any, token: str | None = TOKEN, **env: str) -> Ran:
        known = {} if token is None else {"HF_TOKEN": token}
        ran = python(_MAIN, *args, cwd=cwd, env={**environment, **known, **env})
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
