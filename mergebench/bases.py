"""Bases for adapters that are to be trained apart and added up (arXiv:2312.02432).

Every adapter gets a slice of one orthogonal basis per input width as its down-projection, which
training leaves alone; slices of different slots are orthogonal, so that no adapter answers what
another one was trained on.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mergebench.adapters_zoo.adapter import ReadOptions
from mergebench.adapters_zoo.pack import Factor, PackedLayout, pack_lora
from mergebench.checkpoints.destination import check_destination, staged_bytes
from mergebench.checkpoints.disk import check_space
from mergebench.checkpoints.placement import PT, Layout, TensorSpec, plan_layout
from mergebench.checkpoints.together import together
from mergebench.checkpoints.writer import Output
from mergebench.compute.basis import (
    basis_columns,
    column_blocks,
    disjoint_probability,
    drawn_columns,
    expected_shared,
    slot_columns,
    slots,
)
from mergebench.compute.rounding import round_to
from mergebench.core.errors import MismatchError, ParameterError, did_you_mean
from mergebench.core.selector import Selector
from mergebench.core.site import Site, conv1d_names, key_of, make_sites
from mergebench.core.tensor import DTYPES as STORED
from mergebench.sources import Source
from mergebench.sources.opening import open_source

#: Metadata entry that says which basis, and which columns of it, a file holds.
KEY = "mergebench_basis"
_DTYPES = {"f64": "F64", "f32": "F32", "bf16": "BF16", "f16": "F16"}
_SEEDS = 1 << 32
_WIDEST = 1 << 20


@dataclass(frozen=True, eq=False)
class BasisPlan:
    """A file of bases, or an adapter on a slice of them, that only waits to be written.

    Attributes
    ----------
    out : Path
    form : bases, slices or adapter
        Whole bases or slices of them, by width; or an adapter ready for training.
    rank, seed : int
    columns : mapping of width to columns
        Which columns of each basis.
    modules : mapping of width to int
        How many weights of the model have that input width; empty without a model.
    about : mapping
        What is stored in the metadata.
    """

    out: Path
    form: str
    rank: int
    seed: int
    columns: Mapping[int, Sequence[int]]
    modules: Mapping[int, int]
    about: Mapping[str, Any]
    layout: Layout
    widths: Mapping[str, int]
    zeros: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return {
            "path": str(self.out),
            "form": self.form,
            "bytes": self.layout.total_bytes,
            **self.about,
            "widths": [
                {
                    "width": width,
                    "modules": self.modules.get(width),
                    "slots": slots(width, self.rank),
                    "expected_shared": expected_shared(width, self.rank),
                    "disjoint_probability": disjoint_probability(width, self.rank),
                }
                for width in self.columns
            ],
        }


def plan_basis(
    out: str | Path,
    *,
    rank: int,
    model: str | None = None,
    widths: Sequence[int] = (),
    seed: int = 0,
    slot: int | None = None,
    draw: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    dtype: str = "f32",
) -> BasisPlan:
    """Decide what a file of bases, or an adapter on a slice of them, holds; nothing is written.

    Parameters
    ----------
    out : path
        A ``.safetensors`` file, or a folder for a PEFT adapter with up-projections of zero.
    rank : int >= 1
        r, of every adapter.
    model : str, optional
        A checkpoint, whose linear weights (no embeddings, no head) say which widths there are.
    widths : sequence of int
        Input widths, instead of a model.
    seed : int in [0, 2^32)
        Names the bases; all adapters that are to be added up need the same.
    slot : int, optional
        Slot k has columns k·r to (k + 1)·r - 1, so that different slots share none.
    draw : str, optional
        Instead of a slot: r random columns by this name, as in the paper, which may collide.
        Without either, whole bases are written.
    include, exclude : sequence of str
        Selectors among the model's linear weights.
    dtype : f32, f64, bf16 or f16, default f32

    Raises
    ------
    ParameterError
        For a value out of bounds, options that exclude each other, or a slot that some width does
        not have.
    MergebenchError
        If the model cannot be opened or has no such weight.
    """
    place = Path(out).expanduser()
    single = place.suffix == ".safetensors"
    _check(rank, seed, slot, draw, dtype, widths)
    if (model is None) == (not widths):
        raise ParameterError("make-basis: needs a model or widths, one of them", fix="give --width")
    source = None if model is None else _opened(model)
    sites = {} if source is None else _weights(source, include, exclude)
    if source is None and (include or exclude):
        raise ParameterError("include and exclude select weights of a model", fix="give the model")
    if not single and (source is None or (slot is None and draw is None)):
        raise ParameterError(
            f"{out}: an adapter is for a model and one slot",
            fix="give a model and --slot, or name a .safetensors file for bases alone",
        )
    counts = Counter(map(_width, sites.values()))
    found = {width: _columns(width, rank, seed, slot, draw) for width in sorted(counts or widths)}
    about: dict[str, Any] = {"version": 1, "rank": rank, "seed": seed, "slot": slot, "draw": draw}
    common: dict[str, Any] = {
        "out": place, "rank": rank, "seed": seed, "columns": found, "modules": counts,
        "about": about,
    }  # fmt: skip
    stored = _DTYPES[dtype]
    extra = {KEY: json.dumps(about, sort_keys=True)}
    if single:
        names = {f"basis.{width}": width for width in found}
        specs = [TensorSpec(n, stored, (len(found[w]), w)) for n, w in names.items()]
        layout = plan_layout(specs, "basis", None, metadata={**PT, **extra})
        whole = slot is None and draw is None
        form = "bases" if whole else "slices"
        return BasisPlan(form=form, layout=layout, widths=names, **common)
    assert source is not None
    packed = _packed(source, sites, rank, stored)
    specs = [TensorSpec(each.name, each.dtype, each.shape) for each in packed.tensors]
    down = {e.name: _width(sites[e.source]) for e in packed.tensors if e.role == "A"}
    return BasisPlan(
        form="adapter",
        layout=plan_layout(specs, "adapter_model", None, metadata={**packed.metadata, **extra}),
        widths=down,
        zeros=tuple(each.name for each in packed.tensors if each.role == "B"),
        config={**packed.config, "inference_mode": False},
        **common,
    )


def write_basis(plan: BasisPlan, *, force: bool = False) -> None:
    """Write what was planned, whole or not at all.

    Raises
    ------
    MergebenchError
        If the place is taken and ``force`` is not given, or the disk is full.
    """
    single = plan.form != "adapter"
    check_destination(plan.out, single_file=single, force=force)
    check_space(plan.out, plan.layout.total_bytes, staged_bytes(plan.out, single_file=single))
    text = json.dumps(dict(plan.config), indent=2) + "\n"
    side = {"adapter_config.json": text.encode()} if plan.config else {}
    output = Output(plan.out, plan.layout, single_file=single, side=side, force=force)
    with together([output]):
        for width, columns in plan.columns.items():
            names = [name for name, own in plan.widths.items() if own == width]
            start = 0
            for block in column_blocks(width, columns):
                rows = np.ascontiguousarray(basis_columns(width, plan.seed, block).T)
                for name in names:
                    spec = plan.layout.places[name].spec
                    data = round_to(rows, spec.dtype, name)
                    output.write(name, start * width * data.itemsize, data)
                start += len(block)
        for name in plan.zeros:
            spec = plan.layout.places[name].spec
            output.write(name, 0, np.zeros(spec.shape, STORED[spec.dtype]))


def _check(
    rank: int, seed: int, slot: int | None, draw: str | None, dtype: str, widths: Sequence[int]
) -> None:
    if dtype not in _DTYPES:
        raise ParameterError(f"--dtype: {dtype!r}", fix=did_you_mean(dtype, _DTYPES))
    for what, value, low, high in (
        ("rank", rank, 1, _WIDEST),
        ("seed", seed, 0, _SEEDS - 1),
        *(("width", width, 1, _WIDEST) for width in widths),
    ):
        if not low <= value <= high:
            raise ParameterError(
                f"make-basis: `{what}`", got=str(value), expected=f"{low} to {high}"
            )
    if slot is not None and draw is not None:
        raise ParameterError("make-basis: a slot and a draw", fix="give one of them")


def _opened(model: str) -> Source:
    source = open_source(model, ReadOptions())
    if source.checkpoint is None or source.deltas is not None:
        raise MismatchError(
            f"{model}: adapters are trained on a checkpoint", got="an adapter", fix="give its base"
        )
    return source


def _weights(source: Source, include: Sequence[str], exclude: Sequence[str]) -> dict[str, Site]:
    """Linear weights of a model that the selectors leave."""
    assert source.checkpoint is not None
    own = source.checkpoint
    shapes = {name: tuple(tensor.shape) for name, tensor in own.tensors.items()}
    flipped = conv1d_names(shapes, (own.config or {}).get("model_type"))
    sites = {
        name: site
        for name, site in make_sites(shapes, transposed=flipped).items()
        if site.kind == "linear" and site.size and name.endswith(".weight")
    }
    wanted, unwanted = [Selector(text) for text in include], [Selector(text) for text in exclude]
    for option, each in [*(("include", s) for s in wanted), *(("exclude", s) for s in unwanted)]:
        if not any(each.matches(site) for site in sites.values()):
            raise ParameterError(
                f"{option}: {each} matches no linear weight of {source.label}",
                fix="`mergebench inspect --tensors` lists the names",
            )
    chosen = {
        name: site
        for name, site in sites.items()
        if (not wanted or any(each.matches(site) for each in wanted))
        and not any(each.matches(site) for each in unwanted)
    }
    if not chosen:
        raise MismatchError(
            f"{source.label}: no linear weight for an adapter",
            got=f"{len(sites)} linear weights, all excluded" if sites else "none in the model",
        )
    return chosen


def _width(site: Site) -> int:
    return site.shape[0] if site.transposed else site.shape[1]


def _columns(width: int, rank: int, seed: int, slot: int | None, draw: str | None) -> Sequence[int]:
    count = slots(width, rank)
    if count < 1:
        raise ParameterError(
            f"make-basis: rank {rank} exceeds width {width}", fix="give a smaller --rank"
        )
    if slot is not None and not 0 <= slot < count:
        raise ParameterError(
            f"make-basis: `slot` of rank {rank} at width {width}",
            got=str(slot),
            expected=f"0 to {count - 1}",
            fix="take a free slot, a smaller --rank, or leave the narrow weights out (--exclude)",
        )
    if slot is not None:
        return slot_columns(rank, slot)
    return range(width) if draw is None else drawn_columns(width, rank, seed, key_of(draw))


def _packed(source: Source, sites: Mapping[str, Site], rank: int, dtype: str) -> PackedLayout:
    assert source.checkpoint is not None
    for name, site in sites.items():
        if rank > min(site.shape):
            raise ParameterError(
                f"make-basis: rank {rank} exceeds a side of {name}",
                got=str(site.shape),
                fix="give a smaller --rank, or leave the weight out (--exclude)",
            )
    return pack_lora(
        {name: Factor(rank, site.shape, site.transposed, dtype) for name, site in sites.items()},
        dialect="peft",
        base_name=source.label,
        replacements={},
        known_names=source.checkpoint.tensors,
    )
