"""What was collected of models with data: statistics files, opened, checked and cut into tiles.

A statistics file is a safetensors file with one tensor for every tensor of a model that there is
something to say of, under its name, and what it is in ``__metadata__`` under
:data:`KEY`. `docs/fit.md` describes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mergebench.checkpoints.reader import open_safetensors
from mergebench.core.errors import FormatError, MergebenchError, MismatchError, ParameterError
from mergebench.core.plain import parse_json
from mergebench.core.tensor import FLOATING, Array, ArrayTensor, Tensor, size_of
from mergebench.merge.chains import collects_of
from mergebench.merge.op import Op
from mergebench.sources import STATISTICS, Source, fingerprint

#: Where a file says what it is, and the version of what is said there.
KEY, VERSION = STATISTICS, 1
#: What can be collected.
KINDS: Mapping[str, str] = {
    "fisher": "squared gradients of log-likelihoods, one per entry",
    "gram": "XᵀX of the inputs of linear layers, per token",
    "gram_pp": "XᵀX of the inputs that come through merged blocks, per token",
}


@dataclass(frozen=True, eq=False)
class Collected:
    """The statistics of one model: headers are known, no tensor has been read.

    Attributes
    ----------
    kind : str
        A key of :data:`KINDS`; empty for arrays in memory, which are taken as what is needed.
    about : mapping
        What the file says of itself.
    tensors : mapping of tensor name to Tensor
    source : Source
        Its label, fingerprint and files.
    """

    kind: str
    about: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    source: Source

    @property
    def label(self) -> str:
        """The path as it was written."""
        return self.source.label

    @property
    def model(self) -> str:
        """The fingerprint of the model that it is about; empty if it does not say."""
        said = self.about.get("model")
        return str(said.get("fingerprint", "")) if isinstance(said, Mapping) else ""


def metadata(about: Mapping[str, Any]) -> dict[str, str]:
    """``__metadata__`` of a statistics file."""
    return {KEY: json.dumps({"version": VERSION, **about}, sort_keys=True)}


def open_collected(reference: str) -> Collected:
    """Open a statistics file; its header is read and checked, no more.

    Raises
    ------
    MergebenchError
        If it is none, of a version or kind that is not known, or damaged.
    """
    path = Path(reference).expanduser()
    if not path.exists():
        raise MergebenchError(
            f"{reference}: no such statistics file", fix="make it with `mergebench fit statistics`"
        )
    file = open_safetensors(path)
    if KEY not in file.metadata:
        raise FormatError(
            f"{reference}: is no statistics file", fix="make one with `mergebench fit statistics`"
        )
    try:
        about = parse_json(file.metadata[KEY])
    except ValueError as error:
        raise FormatError(f"{reference}: {KEY} is no JSON", got=str(error)) from None
    if not isinstance(about, dict) or about.get("version") != VERSION:
        said = about.get("version") if isinstance(about, dict) else about
        raise FormatError(f"{reference}: version", got=repr(said)[:100], expected=str(VERSION))
    kind = about.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise FormatError(
            f"{reference}: kind", got=repr(kind)[:100], expected="one of " + ", ".join(KINDS)
        )
    if odd := [name for name, each in file.tensors.items() if each.dtype not in FLOATING]:
        raise FormatError(f"{reference}: {odd[0]} is no floating-point tensor")
    identity = {
        "name": path.name, "size": file.size, "mtime_ns": file.mtime_ns, "header": file.header_hash,
    }  # fmt: skip
    mark = fingerprint(file.tensors)
    source = Source(reference, None, None, mark, identity=(identity,), path=path)
    return Collected(kind, about, file.tensors, source)


def collected_of_arrays(label: str, arrays: Mapping[str, Any]) -> Collected:
    """Statistics in memory, of the kind that a method needs."""
    tensors = {name: ArrayTensor(np.asarray(array)) for name, array in arrays.items()}
    return Collected("", {}, tensors, Source(label, None, None, fingerprint(tensors)))


def named(file: Collected) -> dict[str, Any]:
    """What the manifest of an output says of statistics; times are left out."""
    files = [{key: one[key] for key in ("size", "header")} for one in file.source.identity]
    return {
        "path": file.label,
        "kind": file.kind,
        "fingerprint": file.source.fingerprint,
        **(files[0] if files else {}),
    }


@dataclass(frozen=True, eq=False)
class Slices:
    """What was collected of one tensor, model by model.

    Attributes
    ----------
    tensors : tuple of Tensor
    labels : tuple of str
    entries : bool
        Whether tiles get what belongs to their entries, or all of it.
    signed : bool
        Whether numbers below zero are sound.
    """

    name: str
    tensors: tuple[Tensor, ...]
    labels: tuple[str, ...]
    entries: bool
    signed: bool = field(default=False)

    def read(self, start: int, stop: int) -> Array:
        """Of entries ``start:stop``, (n, stop - start), or of the whole tensor, (n, …); float64.

        Raises
        ------
        MergebenchError
            For NaN, infinity and numbers that squares cannot be, naming file and tensor.
        """
        found = []
        for tensor, label in zip(self.tensors, self.labels, strict=True):
            begin, end = (start, stop) if self.entries else (0, size_of(tensor.shape))
            values = tensor.read(begin, end).astype(np.float64)
            if not self.entries:
                values = values.reshape(tensor.shape)
            bad = ~np.isfinite(values)
            if not self.signed or values.ndim == 1:
                bad |= values < 0
            elif values.ndim == 2:
                bad |= np.diag(np.diag(values) < 0)
            if bad.any():
                raise MergebenchError(
                    f"{label}: {int(bad.sum())} numbers of {self.name!r} are no squares",
                    got=f"{values[bad][0]:g}",
                    expected="finite numbers, not below zero",
                    fix="collect the statistics again",
                )
            found.append(values)
        return np.stack(found)


def slices_of(
    name: str, wanted: Op, files: Sequence[Collected], shapes: tuple[tuple[int, ...], ...]
) -> Slices | None:
    """What all files have of a tensor; ``None`` where none of them has anything.

    Parameters
    ----------
    name : str
    wanted : Op
        Which needs it.
    files : sequence of Collected
        Of all models.
    shapes : tuple of shapes
        That it may have, none if the op has no use for it.

    Raises
    ------
    MismatchError
        If only some files have it, or one has another shape.
    """
    held = [file.tensors.get(name) for file in files]
    needs = wanted.collects
    assert needs is not None
    if not shapes or all(each is None for each in held):
        return None
    found: list[Tensor] = []
    for file, tensor in zip(files, held, strict=True):
        if tensor is None:
            other = next(f.label for f, t in zip(files, held, strict=True) if t is not None)
            raise MismatchError(
                f"{file.label}: has nothing for {name!r}, which {other} has",
                fix="collect the statistics of all models in one way",
            )
        if tuple(tensor.shape) not in shapes or (found and tensor.shape != found[0].shape):
            raise MismatchError(
                f"{file.label}: {name!r} has shape {list(tensor.shape)}",
                expected=" or ".join(str(list(each)) for each in shapes),
                fix="give the statistics of these models",
            )
        found.append(tensor)
    labels = tuple(file.label for file in files)
    return Slices(name, tuple(found), labels, needs.entries, signed=not needs.entries)


def check_kind(file: Collected, wanted: str, asked: str) -> None:
    """Refuse statistics of another kind than a method needs.

    Raises
    ------
    MismatchError
    """
    if file.kind not in ("", wanted):
        raise MismatchError(
            f"{file.label}: holds {file.kind} ({KINDS[file.kind]}), and {asked} needs {wanted}",
            fix=f"collect it: mergebench fit statistics … --kind {wanted}",
        )


def check_model(file: Collected, model: Source) -> None:
    """Refuse statistics of another model.

    Raises
    ------
    MismatchError
    """
    if file.model and file.model != model.fingerprint:
        said = file.about.get("model", {}).get("path", "another model")
        raise MismatchError(
            f"{file.label}: is about {said}, whose content is not that of {model.label}",
            fix="give the files in the order of the models or as MODEL=FILE, or collect again",
        )


def check_together(file: Collected, models: Sequence[Source], weights: Any, op: Op) -> None:
    """Refuse statistics that hold for other models, weights or parameters together.

    Raises
    ------
    MismatchError
    """
    said = file.about.get("merge")
    if not isinstance(said, Mapping):
        return
    now = {
        "models": sorted([each.fingerprint, repr(weight)] for each, weight in
                         zip(models, weights, strict=True)),
        "params": {key: value for key, value in op.params if key != "kind"},
    }  # fmt: skip
    for what, value in now.items():
        if said.get(what) != value:
            shown = "" if what == "models" else f" {said.get(what)}"
            raise MismatchError(
                f"{file.label}: its inputs came through blocks merged with other {what}{shown}",
                fix="collect it for this merge: mergebench fit statistics … --kind gram_pp",
            )


def open_all(
    given: Sequence[str | None], ready: Sequence[Collected | None] | None
) -> list[Collected | None]:
    """The statistics of every model of a recipe, ``None`` where none are named."""
    held = ready or [None] * len(given)
    return [
        each or (None if path is None else open_collected(path))
        for each, path in zip(held, given, strict=True)
    ]


def needed_kind(ops: Sequence[Op], chains: Sequence[Sequence[Op]]) -> Op | None:
    """The op that needs statistics, if one does; of two kinds in one merge the second is refused.

    Raises
    ------
    ParameterError
    """
    asking = [each for chain in (ops, *chains) for each in chain if each.collects is not None]
    kinds = {each.collects.kind for each in asking if each.collects is not None}
    if len(kinds) > 1:
        raise ParameterError(
            "one merge takes statistics of one kind", got=", ".join(sorted(kinds)),
            fix="merge the parts one after the other",
        )  # fmt: skip
    return asking[0] if asking else None


__all__ = [
    "KEY", "KINDS", "VERSION", "Collected", "Slices", "check_kind", "check_model",
    "check_together", "collected_of_arrays", "collects_of", "metadata", "named", "needed_kind",
    "open_all", "open_collected", "slices_of",
]  # fmt: skip
