"""The user's folder for what can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/mergebench``, where it is set, else ``~/.cache/mergebench``.

    Raises
    ------
    RuntimeError
        If the user has no home.
    """
    home = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(home) if Path(home).is_absolute() else Path("~/.cache").expanduser()
    return root / "mergebench"
