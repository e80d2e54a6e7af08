"""How much of a file the page cache holds, and places where it can be told to let go."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PAGE = mmap.PAGESIZE
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_LIBC.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]


def resident(path: Path) -> int:
    """Bytes of a file that are in memory, whoever has read them; counted in pages."""
    size = path.stat().st_size
    fd = os.open(path, os.O_RDONLY)
    try:
        place = _LIBC.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    finally:
        os.close(fd)
    pages = (ctypes.c_ubyte * -(-size // _PAGE))()
    failed = _LIBC.mincore(place, size, pages)
    _LIBC.munmap(place, size)
    assert failed == 0, ctypes.get_errno()
    # The lowest bit alone means something.
    return _PAGE * sum(page & 1 for page in bytes(pages))


def tells(path: Path) -> bool:
    """Whether the file system says what it would wait for; overlays of containers do not."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.preadv(fd, [bytearray(1)], 0, os.RWF_NOWAIT)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def forget(path: Path) -> None:
    """Bring a file to the disk, and take it out of memory as far as the system lets us."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


@contextmanager
def on_disk(folder: Path) -> Iterator[Path]:
    """A folder, or one beside the tests, as temporary ones may be in memory."""
    if _drops(folder):
        yield folder
        return
    other = Path(tempfile.mkdtemp(prefix=".page-cache-", dir=Path(__file__).parent))
    try:
        yield other
    finally:
        shutil.rmtree(other)


def _drops(folder: Path) -> bool:
    probe = folder / "probe"
    probe.write_bytes(bytes(1 << 20))
    forget(probe)
    try:
        return resident(probe) == 0
    finally:
        probe.unlink()
