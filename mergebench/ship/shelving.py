"""An adapter, wherever it is, put on a shelf."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mergebench.adapters_zoo.adapter import ReadOptions
from mergebench.checkpoints.containers import SHELVED
from mergebench.checkpoints.documents import read_bounded
from mergebench.checkpoints.shelved import ENTRIES
from mergebench.checkpoints.sides import is_weights
from mergebench.core.errors import MergebenchError, MismatchError
from mergebench.ship.packing import packing
from mergebench.ship.planned import manifest_of, verified
from mergebench.ship.shelf import Entry, Progress, check_name, entry, name_for
from mergebench.ship.shelf_changes import locked, mend, place_entry, refuse_taken, store
from mergebench.sources import Source
from mergebench.sources.opening import open_source

#: Largest file beside the weights that is kept.
_LARGEST = 1 << 26


def add(
    shelf: Path,
    reference: str,
    name: str | None = None,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> tuple[Entry, list[str]]:
    """Put an adapter or a task vector on a shelf.

    Parameters
    ----------
    shelf : Path
        Made if missing.
    reference : str
        A folder, a safetensors file, or ``hf://org/name``.
    name : str, optional
        By default the last part of the reference.
    force : bool, default False
        Replace an entry of this name.
    progress : callable, optional

    Returns
    -------
    Entry
    list of str
        Notes.

    Raises
    ------
    MergebenchError
        If it is no adapter, if it is not what its manifest says, or if the name is taken.
    """
    name = check_name(name or name_for(reference))
    # A file that does not state its alpha may lie on a shelf; who reads it has to know.
    source = open_source(reference, ReadOptions(lora_alpha=1.0))
    path = _path_of(source)
    notes: list[str] = []
    made = manifest_of(path)
    if made is not None:
        verified(path, "put on the shelf", notes, progress)
    weights, beside = _files(path, notes)
    refuse_taken(shelf / ENTRIES / name, force=force)
    with locked(shelf):
        mend(shelf)
        refuse_taken(shelf / ENTRIES / name, force=force)
        files = {
            f"{each.name}{SHELVED}": store(shelf, each, progress).to_bytes() for each in weights
        }
        files |= {each.name: read_bounded(each, _LARGEST) for each in beside}
        place_entry(shelf, name, files, _about(source, path), force=force)
    return entry(shelf, name), notes


def _path_of(source: Source) -> Path:
    if source.checkpoint is not None or source.path is None:
        raise MismatchError(
            f"{source.label}: is a model, and a shelf is for adapters",
            fix="add an adapter or a saved task vector",
        )
    if SHELVED in source.path.suffixes or source.identity[0]["name"].endswith(SHELVED):
        raise MismatchError(
            f"{source.label}: is on a shelf", fix="`mergebench zoo export` it first"
        )
    if not source.identity[0]["name"].endswith(".safetensors"):
        raise MismatchError(
            f"{source.label}: is a pickle, which a shelf does not keep",
            got=source.identity[0]["name"],
            fix=f"write it as safetensors: mergebench merge {source.label} -o converted",
        )
    return source.path


def _files(path: Path, notes: list[str]) -> tuple[list[Path], list[Path]]:
    """Weights, and files beside them."""
    if not path.is_dir():
        return [path], []
    weights, beside = [], []
    for each in sorted(path.iterdir()):
        if each.name.startswith(".") or not each.is_file():
            kept = False
        elif each.name.endswith(".safetensors"):
            weights.append(each)
            kept = True
        else:
            kept = not is_weights(each.name) and each.stat().st_size <= _LARGEST
            beside += [each] if kept else []
        if not kept:
            notes.append(f"{each.name} is not put on the shelf")
    if not weights:
        raise MergebenchError(f"{path}: holds no safetensors file")
    return weights, beside


def _about(source: Source, path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"source": source.label}
    if commits := list(source.revisions.values()):
        found["commit"] = commits[0]
    if base := source.config.get("base_model_name_or_path"):
        found["base"] = base
    if source.deltas is not None and (kind := source.deltas.metadata.get("kind")):
        found["kind"] = kind
    if (packed := packing(path)) is not None:
        beside = sum(each.stat().st_size for each in _files(path, [])[1])
        found["uncompressed"] = packed.before + beside
    return found
