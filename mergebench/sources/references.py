"""References to inputs as users write them, looked at before anything is opened."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergebench.checkpoints.hub import cached, is_hub, parse_hub
from mergebench.checkpoints.stacking import parse_slices
from mergebench.core.errors import ParameterError
from mergebench.core.schedule import parse_schedule


def split_weight(text: str) -> tuple[str, Any]:
    """``path:0.3`` into path and weight; a path that exists as written wins.

    The weight may be a gradient over depth, such as ``path:0..1``.
    """
    head, colon, tail = text.rpartition(":")
    if not colon or exists(Path(text)):
        return text, 1.0
    try:
        if ".." in tail and "/" not in tail:
            return head, parse_schedule(tail, "weight")
        return head, float(tail)
    except (ValueError, ParameterError):
        return text, 1.0


def exists(path: Path) -> bool:
    """Whether something is there; false for what no path can be."""
    try:
        return path.exists()
    except (OSError, ValueError):
        # A name that no file system can hold.
        return False


def is_here(reference: str, revisions: Mapping[str, str]) -> bool:
    """Whether an input can be opened without asking the Hub.

    Parameters
    ----------
    reference : str
    revisions : mapping of str to str
        The commits of references to the Hub.
    """
    if exists(Path(reference).expanduser()):
        return True
    if slices := parse_slices(reference):
        return all(is_here(each.path, revisions) for each in slices)
    left, plus, right = reference.rpartition("+")
    if plus and is_here(left, revisions):
        return is_here(right, revisions)
    if not is_hub(reference):
        return False
    return cached(parse_hub(reference), revisions.get(reference)) is not None


def paths_of(label: str) -> tuple[Path, ...]:
    """Every path that a reference names."""
    parts = [each.path for each in parse_slices(label)]
    whole = [part for name in (label, *parts) for part in (name, *name.split("+"))]
    names = [part for name in whole for part in dict.fromkeys((name, name.rpartition("#")[0]))]
    names = [name for name in names if name]
    return tuple(Path(name).expanduser() for name in names)
