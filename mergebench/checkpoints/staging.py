"""Files and folders that appear whole or not at all, and work that outlives a killed run.

What must be on the disk, and in which order, for a power cut to do no harm:

1. the data of a tensor, then the line of the journal that calls it finished;
2. all data, then the side files, then the names in the staged folder;
3. the rename, which shows the output, then the folder it stands in;
4. only then is what was replaced deleted, and after it the journal and the lock.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from mergebench.checkpoints.descriptors import cannot
from mergebench.checkpoints.destination import Hidden, check_destination, inode, resolve
from mergebench.checkpoints.disk import check_space, remove, sync_folder, sync_tree, taken_bytes
from mergebench.checkpoints.journal import Head, Journal, Past, read_journal
from mergebench.checkpoints.locks import Lock, acquire
from mergebench.checkpoints.replacing import swap_in
from mergebench.core.errors import MergebenchError

_MARK = "[0-9a-f]{8}(-(part|journal|lock|trash))?"


class Stage:
    """A hidden place beside a destination, from which the output is swapped in.

    With a key it outlives a killed or interrupted run: a journal beside it says what has been
    done, and the next run with the same key goes on from there.

    The steps are called in this order: :meth:`open`; with a key :meth:`begin`, unless an earlier
    run has; :meth:`swap`; :meth:`forget`. At any point :meth:`leave` gives up instead.

    Parameters
    ----------
    destination : Path
        Where the output is to appear.
    single_file, force : bool
        As in :func:`check_destination`.
    key : str or None
        Names everything that decides the bytes.

    Attributes
    ----------
    part : Path
        Where to write: a folder that exists, or a file yet to be made.
    past : Past or None
        What an earlier run has done of this very output.
    finished : bool
        Whether the output is in its place.
    restarted : bool
        Whether earlier work was thrown away, as of another key or damaged.
    journal : Journal or None
    """

    def __init__(
        self, destination: Path, *, single_file: bool, force: bool, key: str | None
    ) -> None:
        self.destination = destination
        self.place = resolve(destination, single_file=single_file)
        self._single, self._force, self._key = single_file, force, key
        self._hidden = Hidden.beside(self.place)
        self._lock: Lock | None = None
        self._made: list[Path] = []
        self._trash: Path | None = None
        self._ours = False
        self.part = self._hidden.part
        self.past: Past | None = None
        self.journal: Journal | None = None
        self.finished = self.restarted = False

    def open(self, needed: int, intact: Callable[[Path], bool]) -> None:
        """Lock the destination and find what an earlier run has left, or start afresh.

        Missing parents are made.

        Parameters
        ----------
        needed : int
            Bytes to be written.
        intact : callable
            Whether a path holds the planned files, whatever their data.

        Raises
        ------
        ResourceError
            If the disk is too small.
        MergebenchError
            As :func:`check_destination`; if another run writes the same output; and if the
            system refuses.
        """
        self._check(self._key)
        self._make_parents()
        self._lock = acquire(self._hidden.lock, self.destination)
        try:
            if self._lock is None:
                # Without locks nobody knows whose the work under a common name is.
                self._hidden = Hidden.beside(self.place, f"{secrets.token_hex(4)}-")
                self.part, self._key = self._hidden.part, None
            else:
                self._mend()
                self._clean()
                self._find(intact)
            self._ours = True
            # What was found may have changed what stands there.
            if not self.finished:
                self._check()
                check_space(self.destination, needed, taken_bytes(self.part) if self.past else 0)
            if self.past is not None:
                self.journal = Journal.resume(self._hidden.journal, self.past)
            elif not self._single:
                self.part.mkdir()
        except OSError as error:
            raise cannot("made", self.part, error) from error

    def _check(self, key: str | None = None) -> None:
        check_destination(self.destination, single_file=self._single, force=self._force, key=key)

    def _make_parents(self) -> None:
        self._made = [parent for parent in self.place.parents if not parent.exists()]
        try:
            for parent in reversed(self._made):
                parent.mkdir(exist_ok=True)
                sync_folder(parent.parent)
        except OSError as error:
            raise cannot("made", self.part, error) from error

    def _clean(self) -> None:
        """Delete what runs without locks have left."""
        stem = self._hidden.part.name.removesuffix("part")
        pattern = re.compile(re.escape(stem) + _MARK)
        for entry in self.place.parent.iterdir():
            if pattern.fullmatch(entry.name):
                remove(entry)

    def _mend(self) -> None:
        """Undo a replacement that was cut short, or delete what it has replaced."""
        old, trash = self._hidden.old, self._hidden.trash
        remove(trash)
        if os.path.lexists(old):
            old.rename(trash if os.path.lexists(self.place) else self.place)
            remove(trash)

    def _find(self, intact: Callable[[Path], bool]) -> None:
        journal = self._hidden.journal
        past = read_journal(journal)
        part, place = inode(self.part), inode(self.place)
        if past is not None and past.head.key == self._key:
            if past.head.place == part and intact(self.part):
                self.past = past
                return
            if past.head.place == place and intact(self.place):
                self.past, self.finished = past, True
                remove(self.part)
                return
        if past is not None:
            self.restarted = not past.empty and past.head.place == part
        else:
            self.restarted = part >= 0 and os.path.lexists(journal)
        remove(journal)
        remove(self.part)
        remove(self._hidden.room)

    def standing(self) -> Path | None:
        """Where the work of a run with this key is, finished or not; ``None`` if there is none."""
        past = read_journal(self._hidden.journal)
        if past is None or self._key is None or past.head.key != self._key:
            return None
        here = (path for path in (self.part, self.place) if inode(path) == past.head.place)
        return next(here, None)

    @property
    def room(self) -> Path:
        """For what processes that make the output together leave for each other."""
        return self._hidden.room

    def join(self) -> Lock | None:
        """Hold the lock of the destination together with others that make the output.

        Returns
        -------
        Lock or None
            ``None`` where the disk knows no locks.

        Raises
        ------
        TakenError
            If a run has it alone.
        """
        return acquire(self._hidden.lock, self.destination, shared=True)

    def begin(self) -> None:
        """Start the journal of the files that are staged now.

        Raises
        ------
        OSError
        """
        number = inode(self.part)
        # Some file systems number nothing; there no run could tell whose work it finds.
        if self._key is None or number <= 0:
            return
        sync_tree(self.part)
        self.journal = Journal.start(self._hidden.journal, Head(self._key, number))
        sync_folder(self.place.parent)

    def seal(self) -> None:
        """Bring the names of what is staged to the disk, and see whether it may be shown.

        Raises
        ------
        MergebenchError
            As :func:`check_destination`: another program may have been as quick as this one.
        """
        if not self.finished:
            sync_tree(self.part)
            self._check()

    def swap(self) -> None:
        """Put what is staged and sealed into its place.

        Raises
        ------
        MergebenchError
            As :meth:`seal`, and if the system refuses.
        """
        if self.finished:
            return
        self._check()
        try:
            self._trash = swap_in(self.part, self.place, self._hidden.old, self._hidden.trash)
        except OSError as error:
            raise cannot("replaced", self.destination, error) from error
        self.finished = True
        # What was replaced is deleted only once its successor is sure to stay.
        sync_folder(self.place.parent)

    def forget(self) -> None:
        """Delete what was replaced, the journal and the lock.

        Raises
        ------
        MergebenchError
            If what was replaced cannot be deleted; the output is complete.
        """
        try:
            if self._trash is not None:
                self._delete(self._trash)
        finally:
            self._end(journal=True)

    def _delete(self, trash: Path) -> None:
        try:
            shutil.rmtree(trash)
        except OSError as error:
            raise MergebenchError(
                f"{self.place}: is complete, but what it replaced is still there",
                got=f"{trash}: {error.strerror}",
                fix="delete that folder",
            ) from error
        except BaseException:
            remove(trash)
            raise

    def leave(self, *, keep: bool) -> None:
        """Give up.

        Parameters
        ----------
        keep : bool
            Leave what is staged, and the journal, for the next run; otherwise nothing remains,
            not even the parents made here.
        """
        try:
            if self._trash is not None:
                remove(self._trash)
            if self._ours:
                with suppress(OSError):
                    self._mend()
            if self._ours and not keep and not self.finished:
                remove(self.part)
        finally:
            self._end(journal=self._ours and not keep)
        if not keep:
            for parent in self._made:
                with suppress(OSError):
                    parent.rmdir()

    def _end(self, *, journal: bool) -> None:
        try:
            if self.journal is not None:
                self.journal.close()
            if journal:
                remove(self._hidden.journal)
                remove(self._hidden.room)
        finally:
            if self._lock is not None:
                self._lock.release()
