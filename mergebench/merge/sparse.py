"""Extracting the entries in which a fine-tune has moved most, as a sparse difference."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import floor
from pathlib import Path

import numpy as np

from mergebench.adapters_zoo.kinds.sparse import INDICES, VALUES, sparse_metadata
from mergebench.checkpoints.containers import SFT
from mergebench.checkpoints.descriptors import cannot
from mergebench.checkpoints.destination import check_destination
from mergebench.checkpoints.layout import Checkpoint
from mergebench.checkpoints.placement import TensorSpec, plan_layout
from mergebench.checkpoints.sft import sft_bytes
from mergebench.checkpoints.writer import Output
from mergebench.core.errors import MergebenchError, MismatchError, ParameterError, ResourceError
from mergebench.core.selector import Selector
from mergebench.core.site import make_sites
from mergebench.core.tensor import FLOATING, Array, dtype_name, read_all
from mergebench.merge.engine import Progress, execute_into
from mergebench.merge.limits import DEFAULT_MEMORY
from mergebench.merge.plan import Plan
from mergebench.merge.planning import make_plan
from mergebench.recipe import ModelRef, Recipe
from mergebench.sources.opening import load

FORMATS = ("safetensors", "sft")
# Of an entry: its place, its value, and both once more while they are put together.
_BYTES = 32
_I32 = 2**31


@dataclass(frozen=True, eq=False)
class Sparse:
    """A sparse difference.

    Attributes
    ----------
    diffs : mapping of tensor name to (shape, places, values)
        Rising row-major places (int64), float32 or float64 values, none of them zero.
    whole : mapping of tensor name to array
        New values of tensors that are stored in full.
    base : mapping
        Identity of the base.
    entries : int
        How many entries were looked at.
    notes : tuple of str
    """

    diffs: Mapping[str, tuple[tuple[int, ...], Array, Array]]
    whole: Mapping[str, Array]
    base: Mapping[str, str]
    entries: int
    notes: tuple[str, ...] = ()

    @property
    def stored(self) -> int:
        """How many entries differ."""
        return sum(places.size for _, places, _ in self.diffs.values())


@dataclass(eq=False)
class _Nonzero:
    """A sink that keeps places and values of what is not zero."""

    found: dict[str, list[tuple[Array, Array]]] = field(default_factory=dict)

    def write(self, name: str, byte_start: int, data: Array) -> None:
        """Take entries of a tensor."""
        places = np.flatnonzero(data)
        if places.size:
            start = byte_start // data.itemsize
            self.found.setdefault(name, []).append((places + start, data[places]))

    def finish(self, name: str) -> None:
        """Nothing is left to do."""


def extract_sparse(
    model: str,
    base: str,
    *,
    density: float | None = None,
    count: int | None = None,
    scope: str = "model",
    whole: Sequence[str] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    allow_base_mismatch: bool = False,
    memory: int = DEFAULT_MEMORY,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Sparse:
    """The largest entries of ``model - base``.

    Parameters
    ----------
    model, base : str
        References, as of merges.
    density : float in (0, 1], optional
        Share of the entries that is kept, ⌊density · d⌋ of d.
    count : int >= 1, optional
        How many are kept instead, over the whole model.
    scope : model or tensor, default model
        Whether the largest entries are those of the model, or of each tensor.
    whole : sequence of str
        Selectors of tensors of the model that are stored in full, as new values: heads.
    include, exclude : sequence of str
        Selectors of what takes part.
    allow_base_mismatch : bool
    memory : int, bytes
    workers : int, optional
    progress : callable, optional

    Raises
    ------
    MergebenchError
        For anything the user can fix.
    """
    if (density is None) == (count is None):
        raise ParameterError("extract-sparse: give either a density or a count")
    if count is not None and (count < 1 or scope != "model"):
        raise ParameterError(
            "extract-sparse: a count is of the whole model, and at least 1", got=str(count)
        )
    recipe = Recipe(
        models=(ModelRef(model),),
        base=base,
        method="magnitude_prune",
        params={"density": 1.0 if density is None else density, "scope": scope},
        form="delta",
        dtype="f32",
        include=tuple(include),
        exclude=(*exclude, *whole),
        on_mismatch="error",
        allow_base_mismatch=allow_base_mismatch,
    )
    plan = make_plan(recipe, memory=memory, workers=workers)
    kept = whole_values(model, whole)
    check_extra(model, plan, kept, exclude)
    if count is not None:
        if count > plan.entries:
            raise ParameterError(
                "extract-sparse: count", got=str(count), expected=f"at most {plan.entries}"
            )
        # Half an entry more than the count, so that no rounding takes one away.
        share = min((count + 0.5) / plan.entries, 1.0)
        recipe = replace(recipe, params={"density": share, "scope": scope})
        plan = make_plan(recipe, memory=memory, workers=workers)
    stored = count or floor((density or 1.0) * plan.entries)
    if stored * _BYTES > memory:
        raise ResourceError(
            f"extract-sparse: {stored} entries and their places are held in memory",
            got=f"--memory {memory >> 20}MiB",
            expected=f"{stored * _BYTES + (1 << 20) - 1 >> 20}MiB",
            fix="keep fewer, or give more memory",
        )
    sink = _Nonzero()
    execute_into(plan, [sink], progress)
    shapes = {name: item.site.shape for name, item in plan.aligned.items.items()}
    diffs = {}
    for name, parts in sink.found.items():
        if name in shapes:
            places = np.concatenate([places for places, _ in parts])
            values = np.concatenate([values for _, values in parts])
            diffs[name] = (shapes[name], places.astype(np.int64), values)
    assert plan.base is not None
    identity = {"fingerprint": plan.base.fingerprint, "path": plan.base.label}
    return Sparse(diffs, kept, identity, plan.entries, plan.notes)


def _selected(own: Checkpoint, selectors: Sequence[str]) -> list[str]:
    """Names of the tensors of a checkpoint that any of the selectors means."""
    sites = make_sites({name: tensor.shape for name, tensor in own.tensors.items()})
    chosen = [Selector(text) for text in selectors]
    return [name for name, site in sites.items() if any(each.matches(site) for each in chosen)]


def whole_values(model: str, selectors: Sequence[str]) -> dict[str, Array]:
    """Values of the tensors that are stored in full."""
    if not selectors:
        return {}
    own = load(model)
    if not isinstance(own, Checkpoint):
        raise MismatchError(
            f"{model}: only tensors of a checkpoint are stored in full", got="an adapter"
        )
    return {name: _values(own, name) for name in _selected(own, selectors)}


def check_extra(model: str, plan: Plan, kept: Mapping[str, Array], exclude: Sequence[str]) -> None:
    """Refuse tensors that the base lacks and that nothing says what to do with."""
    own = plan.models[0].checkpoint
    assert plan.base is not None
    assert plan.base.checkpoint is not None
    if own is None:
        return
    settled = {*plan.base.checkpoint.tensors, *kept, *_selected(own, exclude)}
    extra = [
        name
        for name, tensor in own.tensors.items()
        if name not in settled and tensor.dtype in FLOATING
    ]
    if extra:
        raise MismatchError(
            f"{model}: {extra[0]} is not in the base"
            + (f", nor {len(extra) - 1} others" if len(extra) > 1 else ""),
            fix="store it in full with --whole, or leave it out with --exclude",
        )


def _values(own: Checkpoint, name: str) -> Array:
    tensor = own.tensors[name]
    if tensor.dtype not in FLOATING:
        raise MismatchError(f"{own.label}: {name} is no floating-point tensor", got=tensor.dtype)
    return np.asarray(read_all(tensor), np.float64 if tensor.dtype == "F64" else np.float32)


def check_place(out: Path, form: str, *, force: bool = False, inputs: Sequence[str] = ()) -> None:
    """Refuse a place that cannot be written to or holds an input, or a format that is none.

    Raises
    ------
    MergebenchError
    """
    if form not in FORMATS:
        raise ParameterError(f"format: {form!r}", expected="one of " + ", ".join(FORMATS))
    for each in inputs:
        place, taken = out.resolve(), Path(each).expanduser().resolve()
        if place == taken or (taken.is_dir() and taken in place.parents):
            raise MergebenchError(
                f"{out}: would replace or lie inside the input {each}", fix="choose another name"
            )
    if form == "sft":
        if out.exists() and not out.is_dir():
            raise MergebenchError(f"{out}: is a file", fix=f"name a folder, which {SFT} goes into")
        if os.path.lexists(out / SFT) and not force:
            raise MergebenchError(f"{out / SFT}: exists already", fix="pass --force")
        return
    if out.suffix != ".safetensors":
        raise ParameterError(
            f"{out}: a sparse difference is one file", fix="name it .safetensors with -o"
        )
    check_destination(out, single_file=True, force=force)


def write_sparse(made: Sparse, out: Path, form: str = "safetensors", *, force: bool = False) -> int:
    """Write a sparse difference; the bytes of the file.

    Parameters
    ----------
    made : Sparse
    out : Path
        A ``.safetensors`` file, or with ``sft`` the folder of a ``pytorch_diff.bin``.
    form : safetensors or sft
    force : bool
        Replace what is there.

    Raises
    ------
    MergebenchError
        If it may not be written there, or the system refuses; then nothing is.
    """
    check_place(out, form, force=force)
    if form == "sft":
        return _replace(out / SFT, sft_bytes(made.diffs, made.whole))
    arrays: dict[str, Array] = {}
    for name, (shape, places, values) in made.diffs.items():
        narrow = int(np.prod(shape, dtype=np.int64)) <= _I32
        arrays[name + INDICES] = places.astype(np.int32) if narrow else places
        arrays[name + VALUES] = values
    arrays |= made.whole
    specs = [TensorSpec(n, dtype_name(each.dtype), each.shape) for n, each in arrays.items()]
    shapes = {name: shape for name, (shape, _, _) in made.diffs.items()}
    metadata = sparse_metadata(shapes, made.base, replaced=list(made.whole))
    layout = plan_layout(specs, "sparse", None, metadata=metadata)
    with Output(out, layout, single_file=True, force=force) as output:
        for name, array in arrays.items():
            output.write(name, 0, array)
            output.finish(name, "")
    return out.stat().st_size


def _replace(place: Path, content: bytes) -> int:
    """Write a file as a whole or not at all."""
    hidden: str | None = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        number, hidden = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=place.parent)
        with os.fdopen(number, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        Path(hidden).chmod(0o666 & ~mask)
        Path(hidden).replace(place)
    except OSError as error:
        raise cannot("written", place, error) from error
    finally:
        if hidden is not None:
            Path(hidden).unlink(missing_ok=True)
    return len(content)
