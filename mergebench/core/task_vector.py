"""A task vector: a lazy mapping from tensor names to displacements."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from mergebench.core.delta import Delta


@dataclass(frozen=True, eq=False)
class TaskVector(Mapping[str, Delta]):
    """What one fine-tuning added, tensor by tensor, not yet read.

    Attributes
    ----------
    label : str
        How messages call it: the path, or a name given by the caller.
    deltas : mapping of tensor name to Delta
    fingerprint : str
        Identifies the content, whatever the path; decides the order of equal inputs.
    metadata : mapping of str to str
        What the file said about itself (adapter config, base identity).
    notes : tuple of str
        What is unusual without being wrong.
    """

    label: str
    deltas: Mapping[str, Delta]
    fingerprint: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Delta:
        return self.deltas[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.deltas)

    def __len__(self) -> int:
        return len(self.deltas)
