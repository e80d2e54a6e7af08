"""What is packed of an input: updates, which may lose, and everything else, which may not."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mergebench.adapters_zoo.adapter import (
    CONFIG_KEY,
    AdapterSource,
    ReadOptions,
    is_saved_delta,
)
from mergebench.adapters_zoo.dialects import WHOLE, dotted, kohya
from mergebench.adapters_zoo.kinds.delta import delta_metadata
from mergebench.adapters_zoo.refusals import family_of
from mergebench.core.delta import Delta, Dense, LowRank, Replacement, reads, tile
from mergebench.core.errors import MismatchError
from mergebench.core.tensor import FLOATING, Array, Tensor, nbytes, size_of
from mergebench.manifest import DIGESTS
from mergebench.sources import Source

Read = Callable[[int, int], Array]
# Factors of these kinds may be exchanged for others with the same product.
_FACTORED = frozenset({"lora", "dora"})
_EXACT = ("alpha", "magnitude", "dora_scale", "scale_weight", "indices")


@dataclass(frozen=True, eq=False)
class Piece:
    """A tensor of the file that is unpacked to.

    Attributes
    ----------
    name : str
    shape : tuple of int
    dtype : str
        That it is unpacked to.
    read : callable
        ``(start, stop) ->`` entries of the flattened tensor, minus ``centre``, as float32 or
        float64; for an exact one in its dtype.
    exact : bool
        Whether it is stored as it is.
    centre : float
        What an entry is that changes nothing: 1 for what multiplies.
    displacement : bool
        Whether its entries are those of ΔW, rather than of a factor or a parameter of it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Read
    exact: bool = False
    centre: float = 0.0
    displacement: bool = False

    @property
    def size(self) -> int:
        """Number of entries."""
        return size_of(self.shape)


@dataclass(frozen=True, eq=False)
class Contents:
    """An input, taken apart.

    Attributes
    ----------
    label : str
    pieces : mapping of name to Piece
    pairs : mapping of module to (name of B, name of A)
        Factors whose product is all that they stand for.
    metadata : mapping of str to str
        Of the file that is unpacked to.
    nbytes : int
        Bytes that the input's tensors take; of full models those of the fine-tuned ones.
    notes : tuple of str
    deltas : mapping of tensor name to Delta
        The displacements themselves, to be compared with what was packed.
    factors : mapping of name to Tensor
        The factors of ``pairs`` as they were.
    scales : mapping of module to float
        What multiplies their products, where that differs between them.
    reopen : ReadOptions or None
        How the input was opened, for reading what was packed in the same way.
    """

    label: str
    pieces: Mapping[str, Piece]
    pairs: Mapping[str, tuple[str, str]]
    metadata: Mapping[str, str]
    nbytes: int
    notes: tuple[str, ...] = ()
    deltas: Mapping[str, Delta] = field(default_factory=dict)
    factors: Mapping[str, Tensor] = field(default_factory=dict)
    scales: Mapping[str, float] = field(default_factory=dict)
    reopen: ReadOptions | None = None


def exact_piece(name: str, tensor: Tensor) -> Piece:
    """A tensor that is stored as it is."""
    return Piece(name, tensor.shape, tensor.dtype, tensor.read, exact=True)


def _update(name: str, tensor: Tensor, centre: float = 0.0) -> Piece:
    wide = np.dtype(np.float64 if tensor.dtype == "F64" else np.float32)

    def read(start: int, stop: int) -> Array:
        entries = tensor.read(start, stop).astype(wide)
        return entries - wide.type(centre) if centre else entries

    # One plus a small number would be 1 in half precision.
    dtype = "F32" if centre and tensor.dtype != "F64" else tensor.dtype
    return Piece(name, tensor.shape, dtype, read, centre=centre)


def displacement_piece(name: str, delta: Delta, wide: np.dtype[Any]) -> Piece:
    """Entries of a displacement, read when they are needed."""

    def read(start: int, stop: int) -> Array:
        return tile(delta, start, stop, wide)

    dtype = "F64" if wide.itemsize == 8 else "F32"
    return Piece(name, delta.shape, dtype, read, displacement=True)


def of_adapter(source: Source) -> Contents:
    """The tensors of an adapter's file, or those of a saved task vector.

    Raises
    ------
    MismatchError
        If the file holds nothing but new values, which are no update.
    """
    adapter = source.adapter
    assert adapter is not None
    assert source.deltas is not None
    if is_saved_delta(adapter.metadata):
        return _of_saved(source, source.deltas)
    kind = source.deltas.metadata.get("kind", "")
    pairs = _pairs(adapter) if kind in _FACTORED else {}
    paired = {name for pair in pairs.values() for name in pair}
    pieces = {}
    for name, tensor in adapter.tensors.items():
        loses = name in paired if kind in _FACTORED else _may_lose(name, tensor)
        centre = 1.0 if kind == "ia3" else 0.0
        pieces[name] = _update(name, tensor, centre) if loses else exact_piece(name, tensor)
    check_updates(source.label, pieces)
    metadata = {key: value for key, value in adapter.metadata.items() if key != DIGESTS}
    if adapter.config is not None:
        metadata[CONFIG_KEY] = json.dumps(dict(adapter.config), sort_keys=True)
    notes = []
    if kind not in _FACTORED:
        notes.append(f"adapter kind {kind}: its parameters are packed as they are stored")
    stored = sum(nbytes(tensor.dtype, tensor.shape) for tensor in adapter.tensors.values())
    return Contents(
        source.label,
        pieces,
        pairs,
        metadata,
        stored,
        tuple(notes),
        dict(source.deltas),
        {name: adapter.tensors[name] for name in paired},
        _scales(adapter, pairs, source.deltas),
    )


def check_updates(label: str, pieces: Mapping[str, Piece]) -> None:
    """Refuse an input without anything that may lose."""
    if all(piece.exact for piece in pieces.values()):
        raise MismatchError(
            f"{label}: holds new values only, and weights themselves do not survive compression",
            fix="give a fine-tuned model with its --base, or an adapter",
        )


def _may_lose(name: str, tensor: Tensor) -> bool:
    part = kohya.parse(name) or dotted.parse(name)
    # Saved modules have names like these, without a family's own words in them.
    plain = part is None or part.role not in WHOLE or family_of(name) is not None
    known = not any(word in name for word in _EXACT)
    return plain and known and tensor.dtype in FLOATING and size_of(tensor.shape) > 1


def _pairs(adapter: AdapterSource) -> dict[str, tuple[str, str]]:
    found: dict[tuple[str, str], dict[str, str]] = {}
    for name, tensor in adapter.tensors.items():
        part = kohya.parse(name) or dotted.parse(name)
        if part is None or part.role not in ("A", "B", "embedding_A", "embedding_B"):
            continue
        if len(tensor.shape) >= 2 and tensor.dtype in FLOATING:
            key = (part.module, part.role.removesuffix("A").removesuffix("B"))
            found.setdefault(key, {})[part.role[-1]] = name
    return {
        f"{module}{role}": (pair["B"], pair["A"])
        for (module, role), pair in found.items()
        if len(pair) == 2
        and adapter.tensors[pair["A"]].shape[0] == adapter.tensors[pair["B"]].shape[1]
    }


def _scales(
    adapter: AdapterSource, pairs: Mapping[str, tuple[str, str]], deltas: Mapping[str, Delta]
) -> dict[str, float]:
    """What multiplies each product, found by the factor that a displacement is made of."""
    scale_of = {id(delta.B): delta.scale for delta in deltas.values() if isinstance(delta, LowRank)}
    return {
        module: scale_of.get(id(adapter.tensors[left]), 1.0) for module, (left, _) in pairs.items()
    }


def _of_saved(source: Source, deltas: Mapping[str, Delta]) -> Contents:
    assert source.adapter is not None
    about: dict[str, Any] = json.loads(source.adapter.metadata["mergebench"])
    pieces, stored = {}, 0
    for name, delta in deltas.items():
        for tensor in reads(delta):
            stored += nbytes(tensor.dtype, tensor.shape)
        if isinstance(delta, Replacement):
            pieces[name] = exact_piece(name, delta.values)
        else:
            double = isinstance(delta, Dense) and delta.values.dtype == "F64"
            wide = np.dtype(np.float64 if double else np.float32)
            pieces[name] = displacement_piece(name, delta, wide)
    check_updates(source.label, pieces)
    replaced = [name for name, piece in pieces.items() if piece.exact]
    base = about.get("base")
    metadata = delta_metadata(base if isinstance(base, dict) else None, replaced=replaced)
    return Contents(source.label, pieces, {}, metadata, stored, (), dict(deltas))
