"""The weighted mean of running statistics, as a tensor that is computed when it is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mergebench.checkpoints.ties import same_content
from mergebench.compute.rounding import round_to
from mergebench.core.errors import MergebenchError
from mergebench.core.tensor import Array, Tensor, size_of
from mergebench.sources import Applied

#: Why statistics are copied.
AVERAGED = "weighted mean of running statistics"
#: The same where every model has a result of its own.
OWN = "running statistics of each model itself"


@dataclass(frozen=True, eq=False)
class Mean:
    """A weighted mean of tensors, computed in float64 when read and rounded once.

    Attributes
    ----------
    tensors : tuple of Tensor
        Of one shape and any floating dtypes.
    shares : tuple of float
        One per tensor, adding up to 1.
    labels : tuple of str
        Whose they are, for messages.
    name, dtype : str
        Of the result.
    lenient : bool
        Whether an entry that is NaN or infinite in any tensor is NaN, rather than an error.
    """

    tensors: tuple[Tensor, ...]
    shares: tuple[float, ...]
    labels: tuple[str, ...]
    name: str
    dtype: str
    lenient: bool = False

    def of(self, label: str, tensor: Tensor) -> Mean:
        """The statistics of one model alone, stored as the mean is."""
        return replace(self, tensors=(tensor,), shares=(1.0,), labels=(label,))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensors."""
        return self.tensors[0].shape

    def read(self, start: int, stop: int, out: Array | None = None) -> Array:
        """Entries ``start:stop`` of the flattened mean.

        Raises
        ------
        MergebenchError
            If an entry is not finite, naming model and tensor.
        """
        rows = [tensor.read(start, stop).astype(np.float64) for tensor in self.tensors]
        finite = np.ones(stop - start, np.bool_)
        for row in rows:
            finite &= np.isfinite(row)
        if not finite.all() and not self.lenient:
            label, count = next(iter(self.nonfinite().items()))
            raise MergebenchError(
                f"{label}: tensor {self.name!r} has {count} entries of {size_of(self.shape)} that "
                "are NaN or infinite",
                fix="repair or replace that model, or pass these entries on with --allow-nonfinite",
            )
        rows = [np.where(finite, row, 0) for row in rows]
        # Moving from one towards the others leaves entries that are equal in all as they are.
        mean = rows[0].copy()
        for row, share in zip(rows[1:], self.shares[1:], strict=True):
            mean += (row - rows[0]) * share
        rounded = round_to(mean, self.dtype, self.name)
        rounded[~finite] = np.nan
        if out is None:
            return rounded
        target = out[: rounded.nbytes].view(rounded.dtype)
        target[:] = rounded
        return target

    def nonfinite(self) -> dict[str, int]:
        """How many entries are NaN or infinite, by label."""
        found: dict[str, int] = {}
        for label, tensor in zip(self.labels, self.tensors, strict=True):
            values = tensor.read(0, size_of(self.shape)).astype(np.float64)
            if count := int((~np.isfinite(values)).sum()):
                found[label] = found.get(label, 0) + count
        return found


def average(
    name: str,
    values: Sequence[tuple[str, float, Tensor]],
    base: Tensor | None,
    *,
    lenient: bool = False,
) -> tuple[Tensor, str]:
    """The mean of a statistic over models, and the reason for writing it.

    Parameters
    ----------
    name : str
    values : sequence of (label, weight, tensor)
        Models of negative weight do not take part: no statistics are those of an unlearned task.
    base : Tensor or None
        What is written if no weight is positive; without a base all models count alike then.
    """
    part = [each for each in values if each[1] > 0]
    if not part and base is not None:
        return base, "no weight is positive, the base's running statistics"
    part = part or [(label, 1.0, tensor) for label, _, tensor in values]
    tensors = [tensor for _, _, tensor in part]
    stored = [t.weight.dtype if isinstance(t, Applied) else t.dtype for t in tensors]
    dtype = stored[0] if base is None else base.dtype
    if base is None and len(set(stored)) > 1:
        dtype = "F64" if "F64" in stored else "F32"
    if tensors[0].dtype == dtype and all(same_content(tensors[0], each) for each in tensors):
        return tensors[0], "running statistics, equal in all"
    total = sum(weight for _, weight, _ in part)
    shares = tuple(weight / total for _, weight, _ in part)
    labels = tuple(label for label, _, _ in part)
    return Mean(tuple(tensors), shares, labels, name, dtype, lenient), AVERAGED
