"""What an input is, in plain data: from its headers, and the factors of adapters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from math import isfinite, sqrt
from typing import Any

import numpy as np

from mergebench.adapters_zoo.adapter import AdapterSource, kind_of_adapter
from mergebench.adapters_zoo.dialects import dotted, kohya
from mergebench.adapters_zoo.packed_file import PackedFile
from mergebench.adapters_zoo.scattered import Scattered
from mergebench.adapters_zoo.targets import TARGETS, refusals, served_with
from mergebench.checkpoints.documents import is_file, read_object
from mergebench.core.delta import Delta, Dense, LowRank, Replacement, factors, tile
from mergebench.core.errors import MergebenchError
from mergebench.core.site import make_sites
from mergebench.core.tensor import Tensor, nbytes, size_of
from mergebench.manifest import MANIFEST, from_metadata
from mergebench.sources import Source, fingerprint

_PIECE = 1 << 20
#: Entries of a config that say how large an update is.
_STATED = ("r", "rank", "lora_alpha", "alpha", "use_rslora", "use_dora", "rank_pattern",
           "alpha_pattern", "target_modules", "modules_to_save", "bias")  # fmt: skip


def describe(source: Source) -> dict[str, Any]:
    """Kind, sizes, dtypes, blocks and provenance of an opened input.

    Returns
    -------
    dict
        JSON-able. ``kind`` is ``checkpoint``, ``adapter``, ``task vector`` or ``base+adapter``;
        sizes are in bytes, ``parameters`` counts entries.
    """
    data: dict[str, Any] = {"path": source.label, "kind": _kind(source)}
    if source.checkpoint is not None:
        data |= _of_tensors(source.checkpoint.tensors)
        config = source.checkpoint.config or {}
        named = config.get("architectures") or config.get("model_type")
        if named:
            listed = named if isinstance(named, list) else [named]
            data["architecture"] = ", ".join(map(str, listed))
        data["tied"] = dict(source.checkpoint.aliases)
        data["side_files"] = sorted(source.checkpoint.sides())
        data["notes"] = list(source.checkpoint.notes)
    if source.deltas is not None:
        data["update"] = _of_deltas(source)
    if source.packed is not None:
        data["packed"] = _of_packed(source.packed)
    if (made := _made_by(source)) and "recipe" in made:
        data["made_by"] = {key: made.get(key) for key in ("mergebench", "recipe")}
    data["files"] = [dict(each) for each in source.identity]
    data["fingerprint"] = source.fingerprint
    return data


def describe_unread(
    adapter: AdapterSource, files: Sequence[Mapping[str, Any]], lacking: MergebenchError
) -> dict[str, Any]:
    """What names, shapes and config of an adapter tell where its displacements are not known.

    Parameters
    ----------
    adapter : AdapterSource
    files : sequence of mappings
        Name and size of each.
    lacking : MergebenchError
        Why they are not.

    Raises
    ------
    FormatError
        If no kind accounts for its tensors.
    """
    config = adapter.config or {}
    kind = kind_of_adapter(adapter)
    parts = {name: kohya.parse(name) or dotted.parse(name) for name in adapter.tensors}
    ranks = Counter(
        # An embedding's A is (r, vocabulary) too.
        adapter.tensors[name].shape[0]
        for name, part in parts.items()
        if part is not None and part.role in ("A", "embedding_A")
    )
    update: dict[str, Any] = {
        "adapter": kind.name,
        "formula": kind.formula,
        "dialect": dialect(adapter.tensors),
    }
    if ranks:
        update["ranks"] = {str(rank): count for rank, count in sorted(ranks.items())}
    stated = {
        key: config[key] for key in _STATED if config.get(key) not in (None, {}, [], "none", 0)
    }
    update |= {"config": stated} if stated else {}
    update["servers"] = _servers(adapter, max(ranks, default=None))
    if base := config.get("base_model_name_or_path"):
        update["base"] = base
    return {
        "path": adapter.label,
        "kind": "adapter",
        "tensors": len(adapter.tensors),
        "dtypes": dict(Counter(tensor.dtype for tensor in adapter.tensors.values())),
        "update": update,
        "unknown": {
            "alpha": "α and the scale: the file states none; --lora-alpha gives one",
            "base": "the displacements: they depend on the base; --base names it",
        }[lacking.lacks],
        "files": [dict(each) for each in files],
        "fingerprint": fingerprint(adapter.tensors),
    }


def _kind(source: Source) -> str:
    if source.checkpoint is not None:
        return "checkpoint" if source.deltas is None else "base+adapter"
    assert source.deltas is not None
    return "task vector" if source.deltas.metadata.get("kind") == "delta" else "adapter"


def _made_by(source: Source) -> dict[str, Any] | None:
    """The manifest in the header of a single file, or beside the weights in a folder."""
    if source.checkpoint is not None and source.deltas is not None:
        return None
    about = source.checkpoint if source.checkpoint is not None else source.deltas
    assert about is not None
    found = from_metadata(about.metadata)
    folder = source.checkpoint.folder if source.checkpoint is not None else source.path
    if found is not None and "recipe" in found:
        return found
    if folder is None or not is_file(path := folder / MANIFEST):
        return None
    try:
        return read_object(path)
    except MergebenchError:
        return None


def _of_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    entries: Counter[str] = Counter()
    stored: Counter[str] = Counter()
    for tensor in tensors.values():
        entries[tensor.dtype] += size_of(tensor.shape)
        stored[tensor.dtype] += nbytes(tensor.dtype, tensor.shape)
    sites = make_sites({name: tensor.shape for name, tensor in tensors.items()})
    stacks: dict[str, int] = {}
    for site in sites.values():
        if site.block is not None:
            stacks[site.stack] = max(stacks.get(site.stack, 0), site.block + 1)
    return {
        "tensors": len(tensors),
        "parameters": sum(entries.values()),
        "bytes": sum(stored.values()),
        "dtypes": dict(entries),
        "blocks": stacks,
        "classes": dict(Counter(site.kind for site in sites.values())),
    }


def _of_deltas(source: Source) -> dict[str, Any]:
    assert source.deltas is not None
    ranks: Counter[int] = Counter()
    scales: set[float] = set()
    alphas: set[float] = set()
    kinds: Counter[str] = Counter()
    entries = stored = 0
    for delta in source.deltas.values():
        entries += size_of(delta.shape)
        if isinstance(delta, Dense) and isinstance(delta.values, Scattered):
            kinds["sparse"] += 1
            stored += delta.values.stored
        else:
            kinds[type(delta).__name__.lower()] += 1
        if isinstance(delta, LowRank):
            ranks[delta.rank] += 1
            scales.add(round(delta.scale, 8))
            alphas.add(round(alpha_of(source, delta), 6))
    data: dict[str, Any] = {
        "adapter": source.deltas.metadata.get("kind", ""),
        "dialect": "" if source.adapter is None else dialect(source.adapter.tensors),
        "modules": len(source.deltas),
        "displaced_parameters": entries,
        "deltas": dict(kinds),
    }
    if kinds["sparse"]:
        data["stored_entries"] = stored
    if ranks:
        data["ranks"] = {str(rank): count for rank, count in sorted(ranks.items())}
        data["alphas"] = sorted(alphas)
        data["scales"] = sorted(scales)
    norms = {name: norm_of(d) for name, d in source.deltas.items() if isinstance(d, LowRank)}
    if norms and len(norms) == len(source.deltas) and None not in norms.values():
        known = {name: norm for name, norm in norms.items() if norm is not None}
        largest = max(known, key=known.__getitem__)
        data["norm"] = _digits(sqrt(sum(norm * norm for norm in known.values())))
        data["largest_norm"] = {largest: _digits(known[largest])}
    if source.adapter is not None:
        data["servers"] = _servers(source.adapter, max(ranks, default=None))
    if base := source.config.get("base_model_name_or_path"):
        data["base"] = base
    return data


def _of_packed(packed: PackedFile) -> dict[str, Any]:
    """How a file was packed, and what that has cost."""
    made = packed.made
    said = {
        "scheme": made.get("scheme"),
        **(made["params"] if isinstance(made.get("params"), dict) else {}),
        "relative_error": made.get("relative_error"),
        "cosine": made.get("cosine"),
    }
    data: dict[str, Any] = {
        key: value
        for key, value in said.items()
        if isinstance(value, str | int | float) and not isinstance(value, bool)
    }
    data["bytes"] = packed.nbytes
    data["unpacked_bytes"] = packed.unpacked_nbytes
    data |= {f"entries in {codec}": entries for codec, entries in packed.codecs.items()}
    return data


def alpha_of(source: Source, delta: LowRank) -> float:
    """The α that gives a module its scale: ``scale · r``, or ``scale · √r`` if rank-stabilised."""
    return delta.scale * (sqrt(delta.rank) if source.config.get("use_rslora") else delta.rank)


def norm_of(delta: Delta) -> float | None:
    """The Frobenius norm of a displacement; None for new values, and where it is not finite.

    Factors are read and never multiplied out: ``‖B A‖² = Σ (BᵀB) ∘ (A Aᵀ)``.
    """
    if isinstance(delta, Replacement):
        return None
    wide = np.dtype(np.float64)
    if isinstance(delta, LowRank):
        left, right = factors(delta, wide)
        with np.errstate(over="ignore", invalid="ignore"):
            squares = float(((left.T @ left) * (right @ right.T)).sum())
    else:
        squares = 0.0
        size = size_of(delta.shape)
        for start in range(0, size, _PIECE):
            piece = tile(delta, start, min(start + _PIECE, size), wide)
            with np.errstate(over="ignore", invalid="ignore"):
                squares += float(np.vdot(piece, piece))
    return sqrt(max(squares, 0.0)) if isfinite(squares) else None


def _digits(value: float) -> float:
    return float(f"{value:.6g}")


def dialect(names: Collection[str]) -> str:
    """The program whose spelling the tensors of an adapter have; several are joined."""
    parts = [kohya.parse(name) or dotted.parse(name) for name in names]
    return dotted.dialect_of([part for part in parts if part is not None])


def _servers(adapter: AdapterSource, rank: int | None) -> dict[str, str]:
    """What each server would say to an adapter."""
    shapes = {name: tensor.shape for name, tensor in adapter.tensors.items()}
    said = {}
    for name, target in TARGETS.items():
        if target.serves:
            found = refusals(name, adapter.config, shapes, rank)
            said[name] = "; ".join(found) if found else served_with(name, rank)
    return said
