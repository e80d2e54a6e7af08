"""What a merge gives now beside what it gave then."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np

from mergebench.checkpoints.reader import FileTensor
from mergebench.compute.backend import lapack
from mergebench.compute.spectra import TOLERANCE
from mergebench.core.tensor import DTYPES, Array, nbytes
from mergebench.merge.made import Finding


@dataclass(eq=False)
class Comparison:
    """A sink that compares what it is given with what is stored.

    Attributes
    ----------
    held : mapping of name to (file, tensor)
        What is stored.
    tolerances : mapping of name to float
        Tensors of which LAPACK decides the last digits: how far another one may be, relative to the
        largest entry.
    pairs : sequence of (A, B)
        Truncated factors, whose product is what another LAPACK gives as well.
    spans : mapping of name to (first, last, count)
        Entries that differ.
    """

    held: Mapping[str, tuple[str, FileTensor]]
    tolerances: Mapping[str, float] = field(default_factory=dict)
    pairs: Sequence[tuple[str, str]] = ()
    spans: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    misshapen: dict[str, str] = field(default_factory=dict)
    _far: dict[str, tuple[float, float]] = field(default_factory=dict)
    _given: dict[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._factors = {name for pair in self.pairs for name in pair if name in self.held}

    def write(self, name: str, byte_start: int, data: Array) -> None:
        """Compare entries of a tensor from byte ``byte_start`` on."""
        if name not in self.held or name in self.misshapen:
            return
        tensor = self.held[name][1]
        dtype = DTYPES[tensor.dtype]
        given = np.ascontiguousarray(data).reshape(-1)
        start = byte_start // dtype.itemsize
        fits = (start + given.size) * dtype.itemsize <= nbytes(tensor.dtype, tensor.shape)
        if given.dtype != dtype or not fits:
            self.misshapen[name] = f"{given.dtype}"
            return
        stored = tensor.read(start, start + given.size)
        one, two = (each.view(np.uint8).reshape(given.size, -1) for each in (given, stored))
        wrong = np.flatnonzero((one != two).any(axis=1))
        if wrong.size:
            first, last, many = self.spans.get(name, (start + int(wrong[0]), 0, 0))
            last = start + int(wrong[-1]) + 1
            self.spans[name] = first, last, many + int(wrong.size)
        if name in self._factors:
            self._given.setdefault(name, np.zeros(tensor.shape, dtype)).reshape(-1)[
                start : start + given.size
            ] = given
        elif name in self.tolerances and given.size:
            far, largest = self._far.get(name, (0.0, 0.0))
            wide = stored.astype(np.float64)
            apart = np.abs(given.astype(np.float64) - wide).max()
            self._far[name] = max(far, float(apart)), max(largest, float(np.abs(wide).max()))

    def finish(self, name: str) -> None:
        """Nothing is left to do."""

    def near(self) -> dict[str, float]:
        """Tensors that differ, by no more than another LAPACK may; how far, as a share."""
        found: dict[str, float] = {}
        for name in self.spans.keys() & self._far.keys():
            far, largest = self._far[name]
            if far <= (self.tolerances[name] + self._step(name)) * largest:
                found[name] = far / largest
        for pair in self.pairs:
            changed = self.spans.keys() & set(pair)
            if changed and self._given.keys() >= set(pair):
                far = self._apart(*pair)
                if far <= TOLERANCE + 2 * self._step(pair[0]):
                    found |= dict.fromkeys(changed, far)
        return found

    def _step(self, name: str) -> float:
        """One step of a tensor's dtype, by which a rounding may differ."""
        about = ml_dtypes.finfo(DTYPES[self.held[name][1].dtype])  # type: ignore[no-untyped-call]
        return float(about.eps)

    def _apart(self, *pair: str) -> float:
        """``‖B A - B' A'‖ / ‖B' A'‖``, by way of the small sides."""
        one, two = (self._given[name].astype(np.float64) for name in pair)
        stored = (self.held[name][1] for name in pair)
        was_one, was_two = (
            each.read(0, int(np.prod(each.shape))).reshape(each.shape).astype(np.float64)
            for each in stored
        )
        down = np.vstack([each.reshape(each.shape[0], -1) for each in (one, was_one)])
        up = [each.reshape(each.shape[0], -1) for each in (two, was_two)]
        # The difference is one product of factors that stand beside each other.
        _, right = np.linalg.qr(down.T)
        _, left = np.linalg.qr(np.hstack([up[0], -up[1]]))
        rank = was_one.shape[0]
        total = np.linalg.norm(left[:, rank:] @ right[:, rank:].T)
        return float(np.linalg.norm(left @ right.T) / total) if total else np.inf

    def notes(self, intact: Collection[str]) -> tuple[str, ...]:
        """What is within the tolerance, of tensors that are as they were written."""
        found = {name: far for name, far in self.near().items() if name in intact}
        if not found:
            return ()
        said = (
            f"{len(found)} tensors differ by at most {max(found.values()):.2g} of what was "
            f"written, as decompositions by another LAPACK may ({TOLERANCE:g} and a rounding); "
            f"here it is {lapack()}"
        )
        return (said,)

    def findings(self, intact: Collection[str]) -> list[Finding]:
        """One finding for each tensor that differs, by more or by damage."""
        near = self.near()
        found = []
        for name, given in self.misshapen.items():
            what = f"the recipe gives {given} of another shape or dtype"
            found.append(Finding("replay", what, self.held[name][0], name))
        for name, (first, last, many) in self.spans.items():
            if name in near and name in intact:
                continue
            file, tensor = self.held[name]
            size = DTYPES[tensor.dtype].itemsize
            what = f"{many} entries differ from what the recipe gives"
            if name in self._factors or name in self.tolerances:
                what += (
                    ", by less than another LAPACK may, but they are not as they were written"
                    if name in near
                    else ", by more than another LAPACK may"
                )
            start, stop = tensor.offset + first * size, tensor.offset + last * size
            found.append(Finding("replay", what, file, name, start, stop))
        return found
