"""Outputs written tile by tile, in any order and by any number of threads, and then swapped in."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Self

import numpy as np

from mergebench.checkpoints.descriptors import WRITE, Handle, cannot
from mergebench.checkpoints.disk import create, disk_errors
from mergebench.checkpoints.placement import (
    PT,
    Layout,
    Place,
    TensorSpec,
    plan_layout,
)
from mergebench.checkpoints.sizes import parse_size
from mergebench.checkpoints.staging import check_destination, stage
from mergebench.core.errors import MergebenchError
from mergebench.core.tensor import Array

__all__ = [
    "PT",
    "Layout",
    "Output",
    "Place",
    "TensorSpec",
    "check_destination",
    "parse_size",
    "plan_layout",
]


class Output:
    """A model being written; a context manager that leaves all of it or nothing.

    On entry the headers are written and the space is reserved, in a hidden place beside the
    destination. On a clean exit everything is synced to the disk and swapped in by one rename (of
    a folder as a whole, so no old shard remains); on any error, an interrupt included, the hidden
    place is removed and the destination is as it was. Modes honour the umask.

    Parameters
    ----------
    destination : Path
        The file, or the folder.
    layout : Layout
        Must hold one file if ``single_file``.
    single_file : bool, default False
        Write a file named ``destination`` rather than a folder.
    side : mapping of str to bytes or Path
        Further files of the folder: relative name with ``/`` -> content, or a file to copy.
    force : bool, default False
        Replace what is there; a folder only if it holds nothing but a model or an adapter.
    """

    def __init__(
        self,
        destination: Path,
        layout: Layout,
        *,
        single_file: bool = False,
        side: Mapping[str, bytes | Path] | None = None,
        force: bool = False,
    ) -> None:
        self.destination, self.layout = Path(destination), layout
        self._single, self._force = single_file, force
        self._side = dict(side or {})
        if single_file and len(layout.files) > 1:
            raise MergebenchError(
                f"{destination}: several shards cannot be written into one file",
                got=f"{len(layout.files)} shards",
                fix="write to a folder, or do without a shard size",
            )
        if single_file and self._side:
            raise ValueError("a single file has no side files")
        for name in self._side:
            self._check_side(name)
        self._lock = threading.Lock()
        self._exit = ExitStack()
        self._handles: dict[str, Handle] = {}
        self._root = self.destination
        self._written: dict[str, list[list[int]]] = {}

    def __enter__(self) -> Self:
        """Reserve the space and write headers and side files.

        Raises
        ------
        ResourceError
            If the disk is too small.
        MergebenchError
            If the destination exists and may not be replaced, or the system refuses.
        """
        needed = self.layout.total_bytes
        with ExitStack() as stack:
            self._root = stack.enter_context(
                stage(self.destination, needed, single_file=self._single, force=self._force)
            )
            stack.callback(self._close)
            for file in self.layout.files:
                path = self._root if self._single else self._root / file.name
                with disk_errors(self.destination, needed):
                    create(path, file.size, file.head)
                self._handles[file.name] = Handle(path, WRITE)
            if self.layout.index is not None:
                self._add(self.layout.index, self.layout.index_bytes())
            for name, content in self._side.items():
                self._add(name, content)
            self._exit = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            try:
                self._finish()
            except BaseException as failure:
                self._exit.__exit__(type(failure), failure, failure.__traceback__)
                raise
        self._exit.__exit__(kind, error, trace)

    def write(self, name: str, byte_start: int, data: bytes | memoryview | Array) -> None:
        """Write bytes of a tensor; any thread, any order, also again.

        Parameters
        ----------
        name : str
            A tensor of the layout.
        byte_start : int
            First byte, counted from the start of the tensor.
        data : bytes, memoryview or array
            C-contiguous; an array of any dtype stands for its bytes.

        Raises
        ------
        ResourceError
            If the disk is full.
        MergebenchError
            If the system cannot write.
        ValueError
            For an unknown tensor or bytes beyond its end: a mistake of the caller.
        """
        place = self.layout.places.get(name)
        if place is None or place.file not in self._handles:
            raise ValueError(f"{name!r} is no tensor of this output, or the output is not open")
        view = _bytes_of(data)
        stop = byte_start + len(view)
        if not 0 <= byte_start <= stop <= place.nbytes:
            raise ValueError(f"{name!r}: bytes {byte_start}:{stop} of {place.nbytes}")
        with disk_errors(self.destination, self.layout.total_bytes):
            self._handles[place.file].write_at(view, place.offset + byte_start)
        with self._lock:
            spans = self._written.setdefault(name, [])
            if spans and spans[-1][1] == byte_start:
                spans[-1][1] = stop
            else:
                spans.append([byte_start, stop])

    def add_side(self, name: str, content: bytes | Path) -> None:
        """Write one more side file, such as a manifest known only at the end.

        Raises
        ------
        ValueError
            For a name that leaves the folder or is taken: a mistake of the caller.
        MergebenchError
            If a file cannot be copied or written.
        """
        if self._single or not self._handles:
            raise ValueError("side files need an open output that is a folder")
        self._check_side(name)
        self._add(name, content)

    def _check_side(self, name: str) -> None:
        path = PurePosixPath(name)
        taken = {file.name for file in self.layout.files} | {self.layout.index}
        if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in name:
            raise ValueError(f"side file {name!r} is not inside the folder")
        if name in taken:
            raise ValueError(f"side file {name!r} has the name of a weights file")

    def _add(self, name: str, content: bytes | Path) -> None:
        data = _content(content)
        path = self._root / name
        with disk_errors(self.destination, self.layout.total_bytes):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())

    def _finish(self) -> None:
        for name, place in self.layout.places.items():
            if missing := _first_gap(self._written.get(name, []), place.nbytes):
                raise RuntimeError(f"{name!r}: bytes {missing[0]}:{missing[1]} were never written")
        with disk_errors(self.destination, self.layout.total_bytes):
            for handle in self._handles.values():
                handle.sync()
        self._close()

    def _close(self) -> None:
        for handle in self._handles.values():
            handle.close()
        self._handles.clear()


def _content(source: bytes | Path) -> bytes:
    if isinstance(source, bytes):
        return source
    try:
        return source.read_bytes()
    except OSError as error:
        raise cannot("copied", source, error) from error


def _bytes_of(data: bytes | memoryview | Array) -> memoryview:
    if isinstance(data, np.ndarray):
        if not data.flags.c_contiguous:
            raise ValueError("data must be C-contiguous")
        # The buffer protocol knows neither bfloat16 nor float8.
        return data.reshape(-1).view(np.uint8).data
    return memoryview(data).cast("B")


def _first_gap(spans: list[list[int]], size: int) -> tuple[int, int] | None:
    position = 0
    for start, stop in sorted(spans):
        if start > position:
            return position, start
        position = max(position, stop)
    return None if position >= size else (position, size)
