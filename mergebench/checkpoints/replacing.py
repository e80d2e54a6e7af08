"""Folders that stand where an output is to appear: which may go, and how they are replaced."""

from __future__ import annotations

import ctypes
import os
import sys
from fnmatch import fnmatchcase
from pathlib import Path

from mergebench.checkpoints.sides import is_side, is_weights

#: What people and tools put beside weights, so that a folder of it may be replaced.
_KNOWN = (
    "*.safetensors.index*.json",
    "*.bin.index*.json",
    "adapter_config.json",
    "model_index.json",
    "quantize_config.json",
    "trainer_state.json",
    "*_results.json",
    "mergebench*.*",
    "recipe.*",
    "manifest.json",
    "mergekit_config.y*ml",
    "README.md",
    "*.jinja",
    ".gitattributes",
    ".DS_Store",
)
_EXCHANGE = 2
_AT_FDCWD = -100


def find_foreign(folder: Path) -> Path | None:
    """Why a folder is no model or adapter: the first file that neither has.

    ``None`` for a model, an adapter and an empty folder. Without any weights every file counts,
    since a README or a config alone may belong to anything.
    """
    if (unknown := _first_unknown(folder)) is not None:
        return unknown
    # A model inside a folder is not that folder's model: a shelf of models is never replaced. The
    # parts of a diffusers pipeline are listed in its index.
    pipeline = (folder / "model_index.json").exists()
    for below in [] if pipeline else sorted(folder.glob("*/**/*")):
        if is_weights(below.name) or below.name == "adapter_config.json":
            return below
    files = [below for below in sorted(folder.rglob("*")) if not below.is_dir()]
    return None if any(is_weights(file.name) for file in files) else next(iter(files), None)


def _first_unknown(folder: Path) -> Path | None:
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            if (unknown := _first_unknown(entry)) is not None:
                return unknown
        elif not (
            is_weights(entry.name)
            or is_side(entry.name)
            or any(fnmatchcase(entry.name, pattern) for pattern in _KNOWN)
        ):
            return entry
    return None


def swap_in(staged: Path, place: Path, old: Path, trash: Path) -> Path | None:
    """Put a staged file or folder into its place.

    Parameters
    ----------
    staged, place : Path
    old, trash : Path
        Free names for a folder that is replaced, where the system cannot exchange two in one
        step: until its successor stands, and after.

    Returns
    -------
    Path or None
        Where the folder that was replaced is now, to be deleted.

    Raises
    ------
    OSError
        Nothing has changed.
    """
    if staged.is_file() or not place.exists():
        staged.replace(place)
        return None
    if _exchange(staged, place):
        return staged
    try:
        place.rename(old)
        staged.rename(place)
    except BaseException:
        if old.exists() and not place.exists():
            old.rename(place)
        raise
    # A folder that is half deleted must not come back.
    old.rename(trash)
    return trash


def can_exchange(folder: Path) -> bool:
    """Whether two folders in a folder can be swapped in one step; both are left behind.

    Raises
    ------
    OSError
    """
    left, right = folder / "left", folder / "right"
    left.mkdir()
    right.mkdir()
    return _exchange(left, right)


def _exchange(left: Path, right: Path) -> bool:
    """Swap two paths in one step; False where the system or the disk cannot."""
    folder: tuple[int, ...] = ()
    if sys.platform.startswith("linux"):
        name, folder = "renameat2", (_AT_FDCWD,)
    elif sys.platform == "darwin":
        name = "renamex_np"
    else:
        return False
    function = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if function is None:
        return False
    paths = (*folder, os.fsencode(left), *folder, os.fsencode(right))
    # The flag for an exchange has the same value on both.
    return bool(function(*paths, ctypes.c_uint(_EXCHANGE)) == 0)
