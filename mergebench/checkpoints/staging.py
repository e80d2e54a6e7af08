"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path

from mergebench.checkpoints.descriptors import cannot
from mergebench.checkpoints.disk import check_space
from mergebench.checkpoints.sides import is_side, is_weights
from mergebench.core.errors import MergebenchError

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


def resolve(destination: Path, *, single_file: bool) -> Path:
    """The absolute place of an output: a link to a folder is followed, one to a file replaced."""
    if single_file:
        return destination.parent.resolve() / destination.name
    return destination.resolve()


def check_destination(destination: Path, *, single_file: bool, force: bool) -> None:
    """Refuse a destination that exists, unless it may be replaced; nothing is written.

    Parameters
    ----------
    destination : Path
        Where the output is to appear.
    single_file : bool
        Whether a file is to be written there, rather than a folder.
    force : bool
        Allow to replace a file, or a folder that is empty or holds a model or an adapter and
        nothing else.

    Raises
    ------
    MergebenchError
        If it may not be written there.
    """
    place = resolve(destination, single_file=single_file)
    if not os.path.lexists(place):
        return
    if single_file == (place.is_dir() and not place.is_symlink()):
        is_a, wanted = ("folder", "file") if single_file else ("file", "folder")
        raise MergebenchError(
            f"{destination}: is a {is_a}, and a {wanted} is to be written",
            fix="choose another name",
        )
    if not force:
        raise MergebenchError(
            f"{destination}: exists already", fix="choose another name, or pass --force"
        )
    try:
        foreign = None if single_file else find_foreign(place)
    except OSError as error:
        raise cannot("listed", destination, error) from error
    if foreign is not None:
        raise MergebenchError(
            f"{destination}: is not replaced, because it holds more than a model or an adapter",
            got=str(foreign),
            fix="move that away, or choose another name",
        )


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


@contextmanager
def stage(destination: Path, needed: int, *, single_file: bool, force: bool) -> Iterator[Path]:
    """A hidden place beside the destination, swapped in when the block ends without error.

    The block gets the path of the place: a folder that exists, or a file yet to be made. Missing
    parents are made, and taken away again if the block fails.

    Parameters
    ----------
    destination : Path
        Where the output is to appear.
    needed : int
        Bytes to be written.
    single_file, force : bool
        As in :func:`check_destination`.

    Raises
    ------
    ResourceError
        If the disk is too small.
    MergebenchError
        As :func:`check_destination`, and if the system refuses.
    """
    check_destination(destination, single_file=single_file, force=force)
    check_space(destination, needed)
    place = resolve(destination, single_file=single_file)
    missing = [parent for parent in place.parents if not parent.exists()]
    staged = _hidden(place)
    try:
        try:
            for parent in reversed(missing):
                parent.mkdir(exist_ok=True)
            if not single_file:
                staged.mkdir()
        except OSError as error:
            raise cannot("made", staged, error) from error
        yield staged
        sync_tree(staged)
        # Another process may have been as quick as this one.
        check_destination(destination, single_file=single_file, force=force)
        try:
            _swap_in(staged, place)
        except OSError as error:
            raise cannot("replaced", destination, error) from error
    except BaseException:
        _remove(staged)
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()
        raise
    for parent in (place.parent, *(above.parent for above in missing)):
        _sync(parent)


def _hidden(place: Path) -> Path:
    # Names have at most 255 bytes, and a character up to 4.
    return place.with_name(f".{place.name[:50]}.mergebench-{secrets.token_hex(4)}")


def _swap_in(staged: Path, place: Path) -> None:
    if staged.is_file() or not place.exists():
        staged.replace(place)
        return
    trash = staged
    if not _exchange(staged, place):
        trash = _hidden(place)
        try:
            place.rename(trash)
            staged.rename(place)
        except BaseException:
            if trash.exists() and not place.exists():
                trash.rename(place)
            raise
    try:
        shutil.rmtree(trash)
    except OSError as error:
        raise MergebenchError(
            f"{place}: is complete, but what it replaced is still there",
            got=f"{trash}: {error.strerror}",
            fix="delete that folder",
        ) from error
    except BaseException:
        _remove(trash)
        raise


def _exchange(left: Path, right: Path) -> bool:
    """Swap two paths in one step; False where the system or the disk cannot."""
    if not sys.platform.startswith("linux"):
        return False
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    done = function(
        _AT_FDCWD, os.fsencode(left), _AT_FDCWD, os.fsencode(right), ctypes.c_uint(_EXCHANGE)
    )
    return bool(done == 0)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def sync_tree(folder: Path) -> None:
    """Wait until the names in a folder and in those below are on the disk."""
    if folder.is_dir():
        for below, _, _ in os.walk(folder):
            _sync(Path(below))


def _sync(folder: Path) -> None:
    # Windows cannot open a folder, and some network disks cannot sync one.
    with suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
