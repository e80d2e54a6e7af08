"""Having the compiled pass ready when it is needed, and doing without it.

Compiling takes seconds, once on a machine: what comes of it is kept beside the code or in the
user's cache. It is begun in a thread of its own while headers are read.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import numpy as np

from mergebench.compute.objects import WORTHWHILE, Entry
from mergebench.compute.spare import Spare
from mergebench.core.delta import Dense
from mergebench.core.errors import ParameterError
from mergebench.core.site import Site
from mergebench.core.tensor import ArrayTensor
from mergebench.merge.kernels.program import program
from mergebench.merge.kernels.running import Buffers, Kernels, Looking
from mergebench.merge.kernels.stages import Add, RowWindow
from mergebench.merge.kernels.stored import stored

#: Whether kernels are used: auto, for merges of some size; on, for all; off, for none.
VARIABLE = "MERGEBENCH_KERNELS"
CHOICES = ("auto", "on", "off")
_PASSES = [Entry(f"mergebench.merge.kernels.{name}", name) for name in Kernels._fields]
#: Seconds of waiting after which it is said what for.
_PATIENCE = 3.0


def choice() -> str:
    """What the environment asks for.

    Raises
    ------
    ParameterError
    """
    found = os.environ.get(VARIABLE, "auto") or "auto"
    if found not in CHOICES:
        raise ParameterError(VARIABLE, got=repr(found), expected="auto, on or off")
    return found


def wanted(entries: int) -> bool:
    """Whether a merge that looks at so many entries is to use kernels."""
    asked = choice()
    # Stored entries and random numbers are taken apart from their lower end.
    return sys.byteorder == "little" and (
        asked == "on" or (asked == "auto" and entries >= WORTHWHILE)
    )


class _Compiling(threading.Thread):
    """Imports the compiled passes, and runs them once so that they are there."""

    def __init__(self, rows: bool) -> None:
        super().__init__(name="mergebench-kernels", daemon=True)
        self.rows = rows
        self.found: Kernels | None = None
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self.found = _compiled(self.rows)
        except Exception as error:
            self.error = error


def _compiled(rows: bool) -> Kernels:
    site, found = Site("", (2,)), Kernels(*_PASSES)
    source = stored(site, [Dense(ArrayTensor(np.ones(2, np.float32)))], None)
    assert source is not None
    first = (RowWindow((0,), (1,), (False,)),) if rows else ()
    steps, left = program((*first, Add()), 1, site), 1 if rows else 2
    room = Buffers(source, 2, [steps], Spare(0))
    room.read(0, 2)
    out = np.empty(2, np.float32)
    right = room.merge(found, steps, "F32", out) and out.sum() == left
    if not right or Looking(room, found, steps).ballot("mass", ()) != left:
        raise RuntimeError("compiled code gives wrong results")
    return found


@cache
def _begun(rows: bool) -> _Compiling:
    thread = _Compiling(rows)
    thread.start()
    return thread


def foresee(paths: Iterable[str], rows: bool) -> None:
    """Import and compile in the background, if a merge of these inputs will want it.

    Parameters
    ----------
    paths : iterable of str
        As users give them; what is not on this machine counts for nothing.
    rows : bool
        Whether stages of rows are wanted.
    """
    if choice() != "off" and sum(map(_bytes, paths)) >= 2 * WORTHWHILE:
        _begun(rows)


def _bytes(path: str) -> int:
    """Bytes of a file, or of what lies in a folder."""
    place = Path(path).expanduser()
    try:
        files = place.iterdir() if place.is_dir() else (place,)
        return sum(each.stat().st_size for each in files)
    except (OSError, ValueError, RuntimeError):
        return 0


def kernels(note: Callable[[str], None] | None = None, rows: bool = False) -> Kernels | None:
    """The compiled pass; ``None`` where it cannot be had.

    Parameters
    ----------
    note : callable, optional
        Called with a sentence if it takes long, or fails.
    rows : bool, default False
        With stages of rows, which are compiled apart from the others.
    """
    thread = _begun(rows)
    thread.join(_PATIENCE)
    if thread.is_alive():
        if note is not None:
            note("kernels are compiled for this machine, which is kept for later runs")
        thread.join()
    if thread.error is not None and note is not None:
        note(f"kernels cannot be compiled, so this takes longer: {thread.error}"[:300])
    return thread.found
