"""Weights on the Hub read where they are: headers and spans by range requests, nothing kept."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mergebench.checkpoints.background import Background
from mergebench.checkpoints.hub import HubRef
from mergebench.checkpoints.hub_client import client, endpoint, explained, patiently
from mergebench.checkpoints.hub_files import RemoteFile
from mergebench.checkpoints.reader import SafetensorsFile, read_safetensors
from mergebench.core.errors import FormatError
from mergebench.core.tensor import nbytes

#: Bytes asked for where somebody looks at a spot, and where somebody reads on.
SPOT, AHEAD = 1 << 14, 1 << 23
#: Bytes kept of what was asked for, over all files of the process.
KEPT = 1 << 26
_EXPIRED = (401, 403, 404, 410)


class _Blocks:
    """What was read last: spans of files by the file and the byte at which they begin."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._lock = threading.Lock()
        self._found: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._size = 0

    def get(self, owner: str, offset: int) -> tuple[int, bytes] | None:
        """The block that has a byte."""
        with self._lock:
            for (of, start), data in reversed(self._found.items()):
                if of == owner and start <= offset < start + len(data):
                    self._found.move_to_end((of, start))
                    return start, data
        return None

    def put(self, owner: str, start: int, data: bytes) -> None:
        with self._lock:
            old = self._found.pop((owner, start), b"")
            self._found[owner, start] = data
            self._size += len(data) - len(old)
            while self._size > self.capacity and len(self._found) > 1:
                self._size -= len(self._found.popitem(last=False)[1])

    def until(self, owner: str, start: int, stop: int) -> int:
        """Where a block longer than a spot begins behind ``start``, or else ``stop``.

        Around spots a request goes on: another one would take longer than they do.
        """
        with self._lock:
            found = ((s, len(data)) for (of, s), data in self._found.items() if of == owner)
            return min((s for s, n in found if start < s < stop and n > SPOT), default=stop)

    def drop(self, owner: str, start: int, stop: int) -> None:
        """Forget the blocks that lie inside a span."""
        with self._lock:
            for key in [
                (of, at)
                for (of, at), data in self._found.items()
                if of == owner and start <= at and at + len(data) <= stop
            ]:
                self._size -= len(self._found.pop(key))

    def ends_at(self, owner: str, offset: int) -> bool:
        """Whether a block ends where somebody begins to read."""
        with self._lock:
            return any(of == owner and s + len(d) == offset for (of, s), d in self._found.items())


_BLOCKS = _Blocks(KEPT)
_FETCHING = Background(4, "mergebench-ahead")


class RemoteHandle:
    """A file of one commit, read by position like a :class:`~.descriptors.Handle`.

    Safe under threads. Small reads bring a block, which is longer where they follow each other, and
    ends where a tensor does. Threads that ask for the same bytes wait for one request.

    Parameters
    ----------
    ref : HubRef
        Named in messages.
    commit : str
    file : RemoteFile
    """

    far = True

    def __init__(self, ref: HubRef, commit: str, file: RemoteFile) -> None:
        self.ref, self.commit, self.file = ref, commit, file
        self.path = Path(f"{ref.repo}@{commit[:12]}") / file.name
        # Not the identity of this object, which another one may have after it.
        self._key = f"{endpoint()}/{ref.repo}@{commit}/{file.name}"
        self._lock, self._asking = threading.Lock(), threading.Lock()
        self._edges: list[int] = []
        self._address: str | None = None

    def read_at(self, view: memoryview, offset: int) -> int:
        """Fill a byte view from ``offset`` on; the bytes read, fewer only at the end of the file.

        Raises
        ------
        MergebenchError
            If the Hub refuses, or gives something else.
        """
        stop = min(offset + len(view), self.file.size)
        at = offset
        while at < stop:
            start, data = _BLOCKS.get(self._key, at) or self._fetched(at, stop)
            piece = data[at - start : min(stop - start, len(data))]
            view[at - offset : at - offset + len(piece)] = piece
            at += len(piece)
        return max(stop - offset, 0)

    def read_runs(self, view: memoryview, runs: Iterable[tuple[int, int]]) -> int:
        """Fill a byte view from runs ``(offset, length)``, as :meth:`read_at` does from one."""
        done = 0
        for start, length in runs:
            got = self.read_at(view[done : done + length], start)
            done += got
            if got < length:
                break
        return done

    def stop_at(self, edges: Sequence[int]) -> None:
        """Where tensors end, sorted: what follows may never be needed."""
        self._edges = list(edges)

    def _fetched(self, start: int, stop: int) -> tuple[int, bytes]:
        with self._asking:
            if (found := _BLOCKS.get(self._key, start)) is not None:
                return found
            # Who begins at a tensor may look at its first entries only.
            known = bisect_left(self._edges, start)
            inside = known < len(self._edges) and self._edges[known] != start
            ahead = inside and _BLOCKS.ends_at(self._key, start)
            end = min(max(stop, start + (AHEAD if ahead else SPOT)), start + AHEAD, self.file.size)
            at = bisect_left(self._edges, min(stop, end))
            if at < len(self._edges):
                end = min(end, self._edges[at])
            data = self._ask(start, _BLOCKS.until(self._key, start, end))
            _BLOCKS.put(self._key, start, data)
            return start, data

    def advise(self, offset: int, length: int, advice: str) -> None:
        """Begin to bring a span (``"willneed"``), or forget it (``"dontneed"``).

        Only a bounded number of bytes is kept: what is asked for too early is brought twice.
        """
        stop = min(offset + length, self.file.size)
        if advice == "dontneed":
            _BLOCKS.drop(self._key, offset, stop)
        elif offset < stop:
            _FETCHING.run(lambda: self._bring(offset, stop))

    def _bring(self, start: int, stop: int) -> None:
        # Whoever reads it asks again, and hears what is wrong.
        with suppress(Exception):
            at = start
            while at < stop:
                begin, data = _BLOCKS.get(self._key, at) or self._fetched(at, stop)
                at = begin + len(data)

    def _ask(self, start: int, stop: int) -> bytes:
        with explained(f"{self.ref}: {self.file.name}", repo=self.ref.repo):
            answer = patiently(lambda: self._get(start, stop))
        data = bytes(answer.content)
        if answer.status_code != 206 or len(data) != stop - start:
            raise FormatError(
                f"{self.ref}: bytes {start} to {stop} of {self.file.name} did not come",
                got=f"status {answer.status_code} and {len(data)} bytes",
                fix="download it instead: --cache keep",
            )
        return data

    def _get(self, start: int, stop: int) -> Any:
        utils: Any = import_module("huggingface_hub.utils")
        for again in (False, True):
            address, headers = self._where(renew=again)
            headers |= {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
            answer = utils.get_session().get(address, headers=headers, timeout=60.0)
            # Signed addresses of the storage expire.
            if answer.status_code not in _EXPIRED:
                break
        utils.hf_raise_for_status(answer)
        return answer

    def _where(self, *, renew: bool) -> tuple[str, dict[str, str]]:
        """The address of the bytes, and what has to go with it: a token to the Hub alone."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        utils: Any = import_module("huggingface_hub.utils")
        with self._lock:
            if self._address is None or renew:
                url = hf_hub_url(self.ref.repo, self.file.name, revision=self.commit)
                self._address = str(get_hf_file_metadata(url).location)
            own = urlsplit(self._address)[:2] == urlsplit(endpoint())[:2]
            return self._address, dict(utils.build_hf_headers()) if own else {}


def open_remote(ref: HubRef, commit: str, file: RemoteFile) -> SafetensorsFile:
    """Open a safetensors file on the Hub; its header is read.

    Raises
    ------
    FormatError
        If it is none.
    MergebenchError
        If the Hub refuses.
    """
    client()
    handle = RemoteHandle(ref, commit, file)
    opened = read_safetensors(handle.path, handle, file.size, 0)
    ends = (t.offset + nbytes(t.dtype, t.shape) for t in opened.tensors.values())
    handle.stop_at(sorted(ends))
    return opened
