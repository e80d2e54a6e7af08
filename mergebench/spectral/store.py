"""Decompositions of base matrices kept on disk, by content, within a bound.

What is kept is found again by any later run, of any adapter, over any copy of the base.
"""

from __future__ import annotations

import os
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from mergebench.compute.decomposition import Decomposition
from mergebench.core.tensor import Array

#: Part of every key: what was kept by an earlier way of decomposing is not found.
_FORMAT = "1"
_SUFFIX = ".svd.npz"
#: Temporary files this old belong to processes that were killed.
_STALE = 24 * 3600.0
DEFAULT_SIZE = 8 << 30


def key_of(stored: Array, transposed: bool) -> str:
    """32 hex digits of a tensor's dtype, shape and every byte, and of how it is oriented."""
    digest = xxhash.xxh3_128()
    digest.update(f"{_FORMAT}\0{stored.dtype}\0{stored.shape}\0{transposed}\0".encode())
    digest.update(np.ascontiguousarray(stored).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


@dataclass(eq=False)
class Store:
    """A folder of decompositions.

    Attributes
    ----------
    folder : Path
        Files lie in ``spectra`` below it.
    limit : int
        Most bytes of all files together. What was used least recently goes first, but nothing that
        this run has used: a base larger than the bound keeps the part that fits.
    hits, misses : int
        Since it was opened.
    problem : str
        Why nothing can be kept, if nothing can.
    """

    folder: Path
    limit: int = DEFAULT_SIZE
    hits: int = 0
    misses: int = 0
    problem: str = ""
    _since: float = field(default_factory=time.time, repr=False)

    @property
    def place(self) -> Path:
        """Where the files lie."""
        return self.folder / "spectra"

    def get(self, key: str) -> Decomposition | None:
        """What is kept under a key; ``None`` if nothing is, or if it is damaged."""
        path = self.place / f"{key}{_SUFFIX}"
        try:
            # What numpy opens itself stays open if it is no archive.
            with path.open("rb") as file, np.load(file, allow_pickle=False) as held:
                found = Decomposition(held["U"], held["S"], held["Vt"])
            sound = _sound(found)
        except FileNotFoundError:
            sound = False
        except Exception:
            # Whatever a damaged archive makes zipfile and numpy raise.
            sound = False
            with suppress(OSError):
                path.unlink()
        if not sound:
            self.misses += 1
            return None
        self.hits += 1
        with suppress(OSError):
            os.utime(path)
        return found

    def put(self, key: str, found: Decomposition) -> None:
        """Keep a decomposition, if it fits; a folder that cannot be written to is a problem."""
        needed = found.U.nbytes + found.S.nbytes + found.Vt.nbytes + 4096
        if self.problem or needed > self.limit:
            return
        try:
            self.place.mkdir(parents=True, exist_ok=True)
            if not self._make_room(needed):
                return
            handle, name = tempfile.mkstemp(dir=self.place, suffix=".tmp")
            try:
                with os.fdopen(handle, "wb") as file:
                    np.savez(file, U=found.U, S=found.S, Vt=found.Vt)
                Path(name).replace(self.place / f"{key}{_SUFFIX}")
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
        except OSError as error:
            self.problem = f"{self.place}: {error.strerror}"

    def _make_room(self, needed: int) -> bool:
        files: list[tuple[float, int, Path]] = []
        for entry in self.place.iterdir():
            with suppress(OSError):
                about = entry.stat()
                if entry.suffix == ".tmp":
                    if about.st_mtime < time.time() - _STALE:
                        entry.unlink()
                elif entry.name.endswith(_SUFFIX):
                    files.append((about.st_mtime, about.st_size, entry))
        total = sum(size for _, size, _ in files)
        for used, size, path in sorted(files, key=lambda each: each[0]):
            if total + needed <= self.limit or used >= self._since:
                break
            with suppress(OSError):
                path.unlink()
                total -= size
        return total + needed <= self.limit


def _sound(found: Decomposition) -> bool:
    shapes: tuple[Any, ...] = (found.U.shape, found.S.shape, found.Vt.shape)
    if tuple(map(len, shapes)) != (2, 1, 2):
        return False
    count = found.S.shape[0]
    fits = found.U.shape[1] == count and found.Vt.shape[0] == count
    return fits and all(
        bool(np.isfinite(each).all()) and each.dtype.kind == "f"
        for each in (found.U, found.S, found.Vt)
    )
