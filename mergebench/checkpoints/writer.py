"""Outputs written tile by tile, in any order and by any number of threads, and then swapped in."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from mergebench.checkpoints.disk import create, disk_errors, holds, remove
from mergebench.checkpoints.open_files import OpenFiles
from mergebench.checkpoints.placed import Staged
from mergebench.checkpoints.placement import Layout, Place, PlannedFile
from mergebench.checkpoints.recorder import Recorder
from mergebench.checkpoints.side_files import check_side, content_of, write_side
from mergebench.checkpoints.spans import Spans
from mergebench.checkpoints.staging import Stage
from mergebench.checkpoints.together import together
from mergebench.core.errors import MergebenchError
from mergebench.core.tensor import Array


class Output:
    """A model being written; a context manager that leaves all of it or nothing.

    On entry the headers are written and the space is reserved, in a hidden place beside the
    destination. On a clean exit everything is synced to the disk and swapped in by one rename (of
    a folder as a whole, so no old shard remains); on any error, an interrupt included, the
    destination is as it was. Modes honour the umask. While one run writes an output, others are
    refused.

    With a key, what has been done outlives a killed run, an interrupt, a full disk and a read
    error: the next run with the same key finds it. Any other error deletes it, as without a key.

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
    key : str, optional
        Names everything that decides the bytes; equal keys mean equal bytes.
    lean : bool, default False
        Do not leave what is written in the page cache.
    direct : bool, default False
        Write past the page cache where the file system can.

    Attributes
    ----------
    stage : Stage
        Where it is being made.
    finished : mapping of tensor name to digest
        Tensors that an earlier run has finished; writing them again does nothing.
    settled : mapping of str to JSON value
        What an earlier run has measured.
    restarted : bool
        Whether the work of an earlier run was thrown away, as of another key or damaged.
    beside : mapping of name to digest
        xxh3-128 of every side file and of the index, as they were written.
    kept : bool
        Whether, after an error, there is something to go on from.
    """

    def __init__(
        self,
        destination: Path,
        layout: Layout,
        *,
        single_file: bool = False,
        side: Mapping[str, bytes | Path] | None = None,
        force: bool = False,
        key: str | None = None,
        lean: bool = False,
        direct: bool = False,
    ) -> None:
        self._files = OpenFiles(lean=lean, direct=direct)
        self.destination, self.layout = Path(destination), layout
        self._single = single_file
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
        self.finished: Mapping[str, str] = {}
        self.settled: Mapping[str, Any] = {}
        self.beside: dict[str, str] = {}
        self.restarted = self.kept = False
        self._alone = ExitStack()
        self.stage = Stage(self.destination, single_file=single_file, force=force, key=key)
        self._recorder: Recorder | None = None
        self._open = self._foreign = False
        self._spans = Spans()

    def __enter__(self) -> Self:
        """Reserve the space and write headers and side files, or find them.

        Raises
        ------
        ResourceError
            If the disk is too small.
        MergebenchError
            If the destination exists and may not be replaced, if another run is writing it, or
            if the system refuses.
        """
        self._alone.enter_context(together([self]))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._alone.__exit__(kind, error, trace)

    def enter(self) -> None:
        """Open the output; for :func:`together` and those who do the like."""
        stage = self.stage
        stage.open(self.layout.total_bytes, self._intact)
        self.restarted = stage.restarted
        if stage.past is not None:
            self.finished, self.settled = stage.past.finished, stage.past.settled
        self._open = True
        if stage.finished:
            return
        with self._disk_errors():
            if stage.past is None:
                for file in self.layout.files:
                    create(self._path(file), file.size, file.head)
            elif not self._single:
                # A manifest, or side files that the inputs no longer have.
                planned = {file.name for file in self.layout.files}
                for entry in stage.part.iterdir():
                    if entry.name not in planned:
                        remove(entry)
        for file in self.layout.files:
            self._files.open(file.name, self._path(file))
        if self.layout.index is not None:
            self._add(self.layout.index, self.layout.index_bytes())
        for name, content in self._side.items():
            self._add(name, content)
        if stage.journal is None:
            with self._disk_errors():
                stage.begin()
        if stage.journal is not None:
            self._recorder = Recorder(stage.journal, self._files.sync)

    def _path(self, file: PlannedFile) -> Path:
        return self.stage.part if self._single else self.stage.part / file.name

    def _intact(self, root: Path) -> bool:
        """Whether a file or folder has the planned sizes and headers."""
        return all(
            holds(root if self._single else root / file.name, file.size, file.head, file.late)
            for file in self.layout.files
        )

    def _disk_errors(self) -> AbstractContextManager[None]:
        return disk_errors(self.destination, self.layout.total_bytes)

    def write(self, name: str, byte_start: int, data: bytes | memoryview | Array) -> None:
        """Write bytes of a tensor; any thread, any order, also again.

        Those of a tensor that an earlier run has finished are there already, and stay.

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
        if place is None or not self._open:
            raise ValueError(f"{name!r} is no tensor of this output, or the output is not open")
        view = _bytes_of(data)
        stop = byte_start + len(view)
        if not 0 <= byte_start <= stop <= place.nbytes:
            raise ValueError(f"{name!r}: bytes {byte_start}:{stop} of {place.nbytes}")
        if name in self.finished or self.stage.finished:
            return
        with self._disk_errors():
            self._files.write(place.file, view, place.offset + byte_start)
            if self._recorder is not None:
                self._recorder.poll()
        self._spans.add(name, byte_start, stop)

    def finish(self, name: str, digest: str) -> None:
        """Note that a tensor has all its bytes, so that no later run need write it again.

        Parameters
        ----------
        name : str
        digest : str
            Given back by ``finished`` of a later run.

        Raises
        ------
        ResourceError, MergebenchError
            If what was noted before could not be brought to the disk.
        ValueError
            For an unknown tensor, or one that lacks bytes: a mistake of the caller.
        """
        place = self.layout.places.get(name)
        if place is None or not self._open:
            raise ValueError(f"{name!r} is no tensor of this output, or the output is not open")
        if missing := self._missing(name, place):
            raise ValueError(f"{name!r}: bytes {missing[0]}:{missing[1]} were never written")
        if self._recorder is not None and name not in self.finished:
            with self._disk_errors():
                self._recorder.finish(name, digest, place.file, place.nbytes)

    def take(self, name: str, digest: str) -> None:
        """Note a tensor that another process has written, and brought to the disk.

        Raises
        ------
        ResourceError, MergebenchError, ValueError
            As :meth:`finish`.
        """
        place = self.layout.places.get(name)
        if place is not None:
            self._spans.add(name, 0, place.nbytes)
            self._foreign = True
        self.finish(name, digest)

    def staged_at(self, root: Path) -> Staged:
        """Its files as they are in a place, for other processes that write to them.

        Raises
        ------
        OSError
            If one is missing.
        """
        files = [file.name for file in self.layout.files]
        return Staged.of(root, None if self._single else files)

    @property
    def waits(self) -> bool:
        """Whether writing waits for a disk."""
        return self._files.waits

    @property
    def staged(self) -> Staged:
        """The files of the open output."""
        stage = self.stage
        return self.staged_at(stage.place if stage.finished else stage.part)

    def settle(self, name: str, value: Any) -> None:
        """Note something measured, so that no later run need measure it again.

        Parameters
        ----------
        name : str
        value : JSON value
            Given back by ``settled`` of a later run.

        Raises
        ------
        ResourceError, MergebenchError
            If what was noted before could not be brought to the disk.
        """
        if self._recorder is not None:
            with self._disk_errors():
                self._recorder.settle(name, value)

    def add_side(self, name: str, content: bytes | Path) -> None:
        """Write one more side file, such as a manifest known only at the end.

        Raises
        ------
        ValueError
            For a name that leaves the folder or is taken: a mistake of the caller.
        MergebenchError
            If a file cannot be copied or written.
        """
        if self._single or not self._open:
            raise ValueError("side files need an open output that is a folder")
        self._check_side(name)
        if self.stage.finished:
            return
        self.record()
        self._add(name, content)

    def fill(self, text: str) -> None:
        """Write what the header of a single file leaves open until all data are known.

        Raises
        ------
        ResourceError
            If the disk is full.
        MergebenchError
            If the system cannot write.
        ValueError
            If the header leaves nothing of this length open: a mistake of the caller.
        """
        (file,) = self.layout.files
        start, stop = file.late
        data = text.encode()
        if not self._open or not self._single or len(data) != stop - start:
            raise ValueError(f"{len(data)} bytes for {stop - start} of the header of one open file")
        if not self.stage.finished:
            if self._foreign:
                self.record()
                # Others have written beside the header.
                self._files.renew(file.name)
            with self._disk_errors():
                self._files.fill(file.name, data, start)

    def _check_side(self, name: str) -> None:
        check_side(name, {file.name for file in self.layout.files} | {self.layout.index})

    def _add(self, name: str, content: bytes | Path) -> None:
        data = content_of(content)
        with self._disk_errors():
            self.beside[name] = write_side(self.stage.part / name, data)

    def _missing(self, name: str, place: Place) -> tuple[int, int] | None:
        if name in self.finished or self.stage.finished:
            return None
        return self._spans.first_gap(name, place.nbytes)

    def record(self) -> None:
        """Bring what has been noted to the disk."""
        if self._recorder is not None:
            with self._disk_errors():
                self._recorder.flush()

    def seal(self) -> None:
        """Check that nothing is missing and wait until all of it is on the disk."""
        for name, place in self.layout.places.items():
            if missing := self._missing(name, place):
                raise RuntimeError(f"{name!r}: bytes {missing[0]}:{missing[1]} were never written")
        with self._disk_errors():
            self._files.seal()
        self.record()
        self._close()
        self.stage.seal()

    def leave(self, *, resumable: bool) -> None:
        """Give up, keeping what a later run can use."""
        past, recorder = self.stage.past, self._recorder
        try:
            if resumable and recorder is not None and not recorder.broken:
                with suppress(Exception):
                    recorder.flush()
            earlier = past is not None and not past.empty
            self.kept = resumable and (earlier or (recorder is not None and recorder.recorded))
        finally:
            self._close()
            self.stage.leave(keep=self.kept)

    def _close(self) -> None:
        self._open = False
        if self._recorder is not None:
            self._recorder.close()
        self._files.close()


def _bytes_of(data: bytes | memoryview | Array) -> memoryview:
    if isinstance(data, np.ndarray):
        if not data.flags.c_contiguous:
            raise ValueError("data must be C-contiguous")
        # The buffer protocol knows neither bfloat16 nor float8.
        return data.reshape(-1).view(np.uint8).data
    return memoryview(data).cast("B")
