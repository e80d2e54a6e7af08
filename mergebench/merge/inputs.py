"""The inputs that a manifest names: where they are now, and whether they are still the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergebench.adapters_zoo.adapter import ReadOptions
from mergebench.checkpoints.stacking import parse_slices
from mergebench.core.errors import MergebenchError
from mergebench.merge.collected import named, open_collected
from mergebench.merge.made import Finding, Made
from mergebench.sources import Source
from mergebench.sources.opening import open_source, with_base
from mergebench.sources.references import is_here

_HASHES = ("header_hash", "header")


def find_input(label: str, folder: Path | None) -> str:
    """Where an input lies now: in ``folder``, under its recorded path or its last part; else there.

    Parameters
    ----------
    label : str
        As recorded: a path, ``base+adapter``, or blocks of models.
    folder : Path or None
    """
    if folder is None:
        return label
    if (place := folder / label).exists():
        return str(place)
    if slices := parse_slices(label):
        return ",".join(str(replace(each, path=find_input(each.path, folder))) for each in slices)
    left, plus, right = label.rpartition("+")
    if plus:
        pair = f"{find_input(left, folder)}+{find_input(right, folder)}"
        return pair if is_here(pair, {}) else label
    place = folder / Path(label).name
    return str(place) if place.exists() else label


def check_input(
    about: Mapping[str, Any], made: Made, folder: Path | None, base: Source | None
) -> tuple[Source, list[str], bool]:
    """Open an input that a manifest names.

    Returns
    -------
    Source
    list of str
        What has changed; empty if nothing has.
    bool
        Whether a modification time has.

    Raises
    ------
    MergebenchError
        If it is gone, or not readable.
    """
    recipe = made.manifest["recipe"]
    options = ReadOptions(
        lora_alpha=recipe.get("lora_alpha"),
        ignore_saved_base=bool(recipe.get("ignore_saved_base", False)),
        part=recipe.get("part"),
        revisions=_revisions(made),
    )
    if base is not None and base.checkpoint is not None:
        options = with_base(options, base.checkpoint)
    place = find_input(about["path"], folder)
    if "hf://" not in place and not is_here(place, {}):
        raise MergebenchError(
            f"{about['path']}: the input is not there any more",
            fix="give --inputs with the folder that holds it",
        )
    source = open_source(place, options)
    changed, touched = _changes(about, source)
    return source, changed + _of_statistics(about, folder), touched


def _of_statistics(about: Mapping[str, Any], folder: Path | None) -> list[str]:
    """What differs in what was collected of a model."""
    said = about.get("statistics")
    if not isinstance(said, Mapping):
        return []
    file = open_collected(find_input(str(said["path"]), folder))
    now = named(file)
    return [f"{key} of its statistics" for key in ("fingerprint", "header", "size")
            if said.get(key) != now.get(key)]  # fmt: skip


def _revisions(made: Made) -> dict[str, str]:
    """The commits of references to the Hub, as recorded."""
    found = made.manifest["recipe"].get("revisions", {})
    return dict(found) if isinstance(found, dict) else {}


def check_inputs(made: Made, folder: Path | None) -> tuple[list[Finding], list[str]]:
    """Whether the inputs are what they were; those that are gone are noted.

    Headers and samples of every tensor are read.
    """
    findings: list[Finding] = []
    notes: list[str] = []
    base: Source | None = None
    for about in made.manifest.get("inputs", ()):
        label = about["path"]
        place = find_input(label, folder)
        if not is_here(place, _revisions(made)):
            gone = "is not in the Hub's cache" if "hf://" in place else "is not there any more"
            notes.append(f"input {label} {gone}")
            continue
        shown = label if place == label else f"{label} (now {place})"
        try:
            source, changed, touched = check_input(about, made, folder, base)
        except MergebenchError as error:
            findings.append(Finding("input", f"cannot be opened: {error}", shown))
            continue
        if about.get("role") == "base":
            base = source
        if changed:
            what = f"is not the input that was merged: {', '.join(changed)} changed"
            findings.append(Finding("input", what, shown))
        elif touched:
            notes.append(f"input {shown} has another modification time and the same content")
    return findings, notes


def _changes(about: Mapping[str, Any], source: Source) -> tuple[list[str], bool]:
    """What differs, and whether a time does."""
    changed: list[str] = []
    touched = False
    if about.get("fingerprint") != source.fingerprint:
        changed.append("values")
    then: list[Mapping[str, Any]] = about.get("files") or []
    now = {each["name"]: each for each in source.identity}
    for file in then:
        here = now.get(file.get("name", ""))
        if here is None:
            # Other shards of equal content are the same input.
            continue
        if file.get("size") != here["size"]:
            changed.append(f"size of {here['name']}")
        if any(file.get(key) != here.get(key) for key in _HASHES):
            changed.append(f"header of {here['name']}")
        touched |= file.get("mtime_ns") != here["mtime_ns"]
    return changed, touched
