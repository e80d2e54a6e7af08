"""Stored entries on their way to a device and back, beside the work on others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from mergebench.checkpoints.torch_files import DTYPES
from mergebench.core.delta import Delta, Dense, Difference, tile
from mergebench.core.tensor import Array, Tensor, nbytes
from mergebench.merge.device.choose import ON_DEVICE

_F32 = np.dtype(np.float32)
#: How torch names the dtypes that stored entries are read in.
STORED = {ours: getattr(torch, name) for name, ours in DTYPES.items() if ours in ON_DEVICE}


def origin_of(deltas: tuple[Delta | None, ...], base: Tensor | None) -> Tensor | None:
    """What all differences are taken from; the base where there are none.

    Raises
    ------
    LookupError
        If they are taken from several tensors, or one is stored in a way that is not read here.
    """
    found = base
    for delta in deltas:
        if isinstance(delta, Difference):
            if found is not None and delta.base is not found:
                raise LookupError("differences from several tensors")
            found = delta.base
    tensors = [found, *(_stored(delta) for delta in deltas)]
    if any(each is not None and each.dtype not in STORED for each in tensors):
        raise LookupError("stored in a way that is not read here")
    return found


def _stored(delta: Delta | None) -> Tensor | None:
    match delta:
        case Difference(finetuned, _):
            return finetuned
        case Dense(values):
            return values
    return None


class Lane:
    """What one worker needs for a tile: pinned room on the host, and a stream of its own.

    While a lane waits for copies, those of other workers compute.

    Parameters
    ----------
    device : str
        As torch spells it.
    deltas : tuple of Delta or None
        Per model.
    origin : Tensor or None
        What differences are taken from, and results are added to.
    size : int
        Entries of the largest tile.
    """

    def __init__(
        self, device: str, deltas: tuple[Delta | None, ...], origin: Tensor | None, size: int
    ) -> None:
        self.deltas, self.origin = deltas, origin
        self.device = torch.device(device)
        self.apart = self.device.type == "cuda"
        self._stream: Any = None
        if self.apart:
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._room = torch.empty(
            (len(deltas) + 1, -(-size * 4 // 8) * 8), dtype=torch.uint8, pin_memory=self.apart
        )
        self.stack: Any = None
        self.base: Any = None
        self.span = (0, 0)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Everything within goes to the stream of this lane."""
        if self._stream is None:
            yield
        else:
            with torch.cuda.stream(self._stream):
                yield

    def close(self, *, keep: bool = True) -> None:
        """Nothing is given back."""

    def read(self, start: int, stop: int) -> None:
        """Read entries ``start:stop``, bring them over, and form displacements there.

        ``stack`` is then (models, m) float32 and ``base`` (m,) float32 or ``None``.
        """
        with self.working(), torch.no_grad():
            self.base = None
            if self.origin is not None:
                self.base = self._brought(-1, self.origin, start, stop)
            rows = [self._row(place, start, stop) for place in range(len(self.deltas))]
            self.stack = torch.stack(rows)
            self.span = start, stop

    def _row(self, place: int, start: int, stop: int) -> Any:
        match self.deltas[place]:
            case None:
                return torch.zeros(stop - start, dtype=torch.float32, device=self.device)
            case Difference(finetuned, _):
                return self._brought(place, finetuned, start, stop) - self.base
            case Dense(values):
                return self._brought(place, values, start, stop)
            case delta:
                return self._over(place, tile(delta, start, stop, _F32), "F32")

    def _brought(self, place: int, tensor: Tensor, start: int, stop: int) -> Any:
        length = nbytes(tensor.dtype, (stop - start,))
        return self._over(
            place, tensor.read(start, stop, self._room[place].numpy()[:length]), tensor.dtype
        )

    def _over(self, place: int, entries: Array, dtype: str) -> Any:
        """Entries in float32 on the device, by way of the pinned room."""
        room = self._room[place][: entries.nbytes]
        if entries.ctypes.data != room.data_ptr():
            room.numpy()[:] = np.ascontiguousarray(entries).reshape(-1).view(np.uint8)
        there = room.to(self.device, non_blocking=True)
        return there.view(STORED[dtype]).to(torch.float32)

    @property
    def held(self) -> list[Any]:
        """Everything that was brought over."""
        return [self.stack] if self.base is None else [self.stack, self.base]

    def put(self, array: Any) -> Any:
        """An array of the host on the device; what is there already as it is."""
        return torch.from_numpy(array).to(self.device) if isinstance(array, np.ndarray) else array

    def wait(self) -> None:
        """Wait for everything that was asked of the device."""
        if self._stream is not None:
            self._stream.synchronize()

    def finite(self, *tensors: Any) -> bool:
        """Whether all entries of all tensors are; waits for them."""
        with self.working():
            found = [torch.isfinite(each.to(torch.float32)).all() for each in tensors]
            return bool(torch.stack(found).all()) if found else True

    def fetch(self, tensor: Any, out: Array) -> None:
        """Copy a tensor (m,) into an array of its dtype, waiting for it."""
        raw = tensor.contiguous().view(torch.uint8)
        with self.working():
            here = torch.empty(raw.shape, dtype=torch.uint8, pin_memory=self.apart)
            here.copy_(raw, non_blocking=True)
            self.wait()
        out.reshape(-1).view(np.uint8)[:] = here.numpy()
