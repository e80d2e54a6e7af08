"""A folder on a shared disk in which processes leave results for each other."""

from __future__ import annotations

import errno
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

from mergebench.checkpoints.descriptors import cannot
from mergebench.merge.many.codec import pack, unpack

#: What a file system answers that has no second names.
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK)


class Board:
    """Results by name; each appears whole, and the first one stays.

    No file is ever written by two processes, so nothing here needs a lock. What a power cut has
    torn is known by its digest and made again, so nothing here is synced.

    Parameters
    ----------
    folder : Path
        Made with its parents if it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot("made", folder, error) from error

    def put(self, name: str, value: Any) -> None:
        """Leave a result for others to see; if there is one already, that stays.

        Raises
        ------
        TypeError
            For what cannot be kept.
        MergebenchError
            If the system refuses.
        """
        data = pack(value)
        path = self.folder / name
        made = self.folder / f"{name}.{secrets.token_hex(4)}"
        try:
            with made.open("xb") as file:
                file.write(data)
            try:
                os.link(made, path)
            except FileExistsError:
                return
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                # Without links the last one stays; all are equal where arithmetic is.
                made.replace(path)
        except OSError as error:
            raise cannot("written", path, error) from error
        finally:
            with suppress(OSError):
                made.unlink()

    def has(self, name: str) -> bool:
        """Whether there is a result."""
        return (self.folder / name).exists()

    def names(self) -> frozenset[str]:
        """Of all results, and some more names.

        Listing a folder makes network disks look again; asking for a name may be answered, for a
        minute, by what was not there a minute ago.

        Raises
        ------
        MergebenchError
            If the folder has gone.
        """
        try:
            return frozenset(path.name for path in self.folder.iterdir())
        except OSError as error:
            raise cannot("listed", self.folder, error) from error

    def get(self, name: str) -> Any:
        """The result of a name that :meth:`has` one.

        Raises
        ------
        MergebenchError
            If it cannot be read.
        FileNotFoundError
            If it is damaged; it is deleted then.
        """
        path = self.folder / name
        try:
            return unpack(path.read_bytes())
        except OSError as error:
            raise cannot("read", path, error) from error
        except ValueError:
            with suppress(OSError):
                path.unlink()
            raise FileNotFoundError(path) from None
