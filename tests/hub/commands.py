"""The command, as somebody runs it who sees the stand-in for the Hub and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.helpers.forked import forked
from tests.helpers.running import MAIN, Ran, python
from tests.hub.server import TOKEN, Hub

Run = Callable[..., Ran]


#: What commands import, but for the Hub's client itself: it asks the environment where the Hub is.
_READY = """
import sys
import huggingface_hub.hf_api, rich.console
from pydantic import TypeAdapter
import mergebench.merge.engine, mergebench.merge.many.where, mergebench.merge.planning
import mergebench.ship.push, mergebench.ship.pull
from mergebench.cli.main import main

for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
    del sys.modules[name]
"""


def commander(hub: Hub, cwd: Path, home: Path, *, fresh: bool = False) -> Run:
    """A function that runs a command in a process of its own, which reads its environment anew.

    It is forked from one that has imported the command, but not the Hub's client, which decides by
    the environment as it is imported; or all is imported again where it is to be ``fresh``.

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

    act_on = python if fresh else forked(_READY)

    def act(*args: Any, token: str | None = TOKEN, **env: str) -> Ran:
        known = {} if token is None else {"HF_TOKEN": token}
        ran = act_on(MAIN, *args, cwd=cwd, env={**environment, **known, **env})
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
