"""Files of ``torch.save``, and what is common to tests of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergebench.checkpoints.containers import open_weights
from mergebench.checkpoints.torch_files import DTYPES as TORCH_DTYPES
from mergebench.core.errors import MergebenchError
from mergebench.core.tensor import DTYPES, Array

# Python that tells how much of the process is neither a file nor shared.
ANONYMOUS = """
import sys
from pathlib import Path
import psutil

def anonymous():
    status = Path("/proc/self/status")
    if not status.exists():
        return psutil.Process().memory_full_info().uss
    return int(status.read_text().partition("RssAnon:")[2].split()[0]) * 1024

"""
FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def dump(path: Path, value: Any, *, zipped: bool = True, **options: Any) -> Path:
    """Write with ``torch.save``, in the format of today or in that before torch 1.6."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path, _use_new_zipfile_serialization=zipped, **options)
    return path


def as_torch(array: Array) -> torch.Tensor:
    """The same bytes as a torch tensor of the same dtype and shape."""
    names = {ours: theirs for theirs, ours in TORCH_DTYPES.items()}
    name = next(name for name, dtype in DTYPES.items() if dtype == array.dtype)
    target = torch.empty(array.shape, dtype=getattr(torch, names[name]))
    bits = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}[array.itemsize]
    plain = torch.from_numpy(array.view(bits).copy())
    target.view(plain.dtype).copy_(plain)
    return target


def state(*names: str) -> dict[str, torch.Tensor]:
    """A matrix for every name, all different."""
    return {name: torch.arange(6.0).reshape(2, 3) + 10 * at for at, name in enumerate(names)}


def assert_refused(path: Path, *words: str, open_it: Callable[[Path], Any] = open_weights) -> None:
    """Refused in one message that names the file, holds the words, and says what to do."""
    with pytest.raises(MergebenchError) as caught:
        open_it(path)
    for word in (str(path), *words):
        assert word in str(caught.value), (word, str(caught.value))
    assert caught.value.fix


class Attack:
    """Unpickled without care, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)
