"""Several task vectors in one file: a shared one, and a mask and a scale for each task."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from mergebench.adapters_zoo.adapter import (
    FILE_KEY,
    KINDS,
    AdapterSource,
    Kind,
    ReadOptions,
    parse_object,
    saved_kind,
)
from mergebench.adapters_zoo.factors import put
from mergebench.adapters_zoo.masked import masked
from mergebench.adapters_zoo.resolve import BaseNames
from mergebench.core.delta import Delta, Dense
from mergebench.core.errors import FormatError, MismatchError, ParameterError, did_you_mean

VERSION = 1
UNIFIED, MASKS = ".unified", ".masks"


@dataclass(frozen=True)
class _About:
    """What the metadata say."""

    tasks: tuple[str, ...]
    scales: tuple[float, ...]
    lam: float
    names: tuple[str, ...]


def tasks_metadata(
    tasks: Sequence[str],
    scales: Sequence[float],
    lam: float,
    names: Collection[str],
    base_identity: Mapping[str, Any] | None,
) -> dict[str, str]:
    """``__metadata__`` of a file of masked task vectors.

    Parameters
    ----------
    tasks : sequence of str
        Their names, in the order of the rows of the masks.
    scales : sequence of float
        What multiplies each task's entries first.
    lam : float
        What multiplies all of them then.
    names : collection of str
        Tensors that are stored.
    base_identity : mapping or None
        What identifies the base: anything JSON can hold.
    """
    about = {
        "kind": "tasks",
        "version": VERSION,
        "base": None if base_identity is None else dict(base_identity),
        "tasks": list(tasks),
        "scales": [float(each) for each in scales],
        "lam": float(lam),
        "tensors": sorted(names),
    }
    return {"format": "pt", FILE_KEY: json.dumps(about, sort_keys=True)}


def _detect(source: AdapterSource) -> frozenset[str]:
    return frozenset(source.tensors) if saved_kind(source.metadata) == "tasks" else frozenset()


def _names(source: AdapterSource, about: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = about.get(key)
    fits = isinstance(value, list) and all(isinstance(each, str) for each in value)
    if not isinstance(value, list) or not fits or len(set(value)) < len(value):
        raise FormatError(f"{source.label}: `{key}` in its metadata", expected="different names")
    return tuple(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _about(source: AdapterSource) -> _About:
    """What a file says of itself; every tensor is accounted for."""
    about = parse_object(source.label, FILE_KEY, source.metadata[FILE_KEY])
    if about.get("version") != VERSION:
        raise FormatError(
            f"{source.label}: masked task vectors of an unknown version",
            got=repr(about.get("version")),
            expected=str(VERSION),
            fix="open it with the mergebench that wrote it, or a newer one",
        )
    tasks, names = (_names(source, about, key) for key in ("tasks", "tensors"))
    scales, lam = about.get("scales"), about.get("lam")
    fits = isinstance(scales, list) and len(scales) == len(tasks) > 0
    if not isinstance(scales, list) or not fits or not all(map(_is_number, [*scales, lam])):
        raise FormatError(
            f"{source.label}: `scales` and `lam` in its metadata",
            expected="a finite number for each task, and one for all",
        )
    named = {name + end for name in names for end in (UNIFIED, MASKS)}
    if odd := sorted(named ^ set(source.tensors)):
        what = "is not stored" if odd[0] in named else "is in no list of its metadata"
        raise FormatError(f"{source.label}: {odd[0]} {what}")
    return _About(tasks, tuple(map(float, scales)), float(about["lam"]), names)


def _chosen(source: AdapterSource, tasks: Sequence[str], task: str | None) -> int:
    """The row of the task that is asked for."""
    if task is None and len(tasks) > 1:
        raise ParameterError(
            f"{source.label}: holds several task vectors, and none is named",
            got=", ".join(tasks)[:200],
            fix=f"write {source.label}#{tasks[0]}",
        )
    if task is not None and task not in tasks:
        raise ParameterError(
            f"{source.label}: holds no task {task!r}",
            expected="one of " + ", ".join(tasks)[:200],
            fix=did_you_mean(task, tasks),
        )
    return 0 if task is None else tasks.index(task)


def _read(source: AdapterSource, options: ReadOptions) -> dict[str, Delta]:
    about = _about(source)
    row = _chosen(source, about.tasks, options.task)
    factors = tuple(each for each in (about.scales[row], about.lam) if each != 1)
    names = None if options.base_shapes is None else BaseNames(options.base_shapes)
    deltas: dict[str, Delta] = {}
    for name in about.names:
        tensor = masked(
            f"{source.label}: {name}", source.tensors[name + UNIFIED],
            source.tensors[name + MASKS], len(about.tasks), row, factors,
        )  # fmt: skip
        target = name
        if names is not None:
            target = names.unique(source.label, name, name, names.dotted(name))
            if names.shapes[target] != tensor.shape:
                raise MismatchError(
                    f"{source.label}: {name} has another shape than the base's",
                    got=str(tensor.shape),
                    expected=str(names.shapes[target]),
                    fix="check that --base is the model that it was taken from",
                )
        put(source.label, deltas, target, name, Dense(tensor))
    return deltas


KINDS.add(
    "tasks",
    Kind(
        name="tasks",
        formula="ΔW = λ · scale_t · mask_t ⊙ unified, for one task t of several",
        detect=_detect,
        read=_read,
        notes="EMR-Merging (arXiv:2405.17461) and TALL masks (arXiv:2405.07813) in one file, from "
        "`mergebench edit pack-tasks`; FILE#TASK names the one that is meant.",
    ),
)
