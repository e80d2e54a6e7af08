"""The installed version of mergebench."""

from __future__ import annotations

from functools import cache
from importlib.metadata import version


@cache
def own_version() -> str:
    """The version as installed: reading it takes as long as planning a small merge."""
    return version("mergebench")
