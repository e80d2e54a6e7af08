"""Two reports of the same kind, before and after."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mergebench.checkpoints.documents import read_object
from mergebench.core.errors import FormatError
from mergebench.spectral.diagnostic import DIAGNOSTICS
from mergebench.spectral.report import KIND, VERSION, Record

_FIX = "give what `mergebench spectral --json` printed"


def load_report(path: Path) -> Record:
    """Read the JSON of an earlier analysis.

    Raises
    ------
    FormatError
        If it is none, or of another version.
    """
    data = read_object(path)
    if data.get("kind") != KIND:
        raise FormatError(f"{path}: is no spectral report", fix=_FIX)
    if data.get("version") != VERSION:
        raise FormatError(
            f"{path}: a spectral report of another version",
            expected=str(VERSION),
            got=f"{data.get('version')!r:.40}",
            fix="make it again with this version of mergebench",
        )
    try:
        _check(data)
    except (KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{path}: a spectral report that is damaged", fix=_FIX) from error
    return data


def _check(data: Record) -> None:
    for each in data["models"]:
        each["label"] + ""
    for found in data["diagnostics"].values():
        dict(found["params"])
        for records in (*found["totals"].values(), found["rows"]):
            for record in records:
                (record["model"], record["other"])


def changes(earlier: Record, now: Record) -> tuple[list[Record], list[str]]:
    """Numbers that both reports have, where they differ, and notes.

    Models are the same if both reports have one each, if their labels agree, or else by their
    place where both have as many.

    Returns
    -------
    list of records
        ``diagnostic``, ``scope`` (``all``, ``layers``, ``modules`` or ``rows``), ``where`` (a
        tensor's name in rows), ``model``, ``other``, ``quantity``, ``before``, ``after``.
    list of str
    """
    models, notes = _same_models(earlier, now)
    found: list[Record] = []
    for name, after in now["diagnostics"].items():
        before = earlier["diagnostics"].get(name)
        if before is None or name not in DIAGNOSTICS:
            notes.append(f"the earlier report has no {name}")
            continue
        if before["params"] != after["params"]:
            notes.append(f"{name} had other parameters in the earlier report")
        for scope, records in _scopes(after):
            old = {_key(each): each for each in dict(_scopes(before))[scope]}
            for record in records:
                key = (record.get("tensor", record.get("where")),
                       models.get(record["model"]), models.get(record["other"]))  # fmt: skip
                if key in old:
                    found += _compared(name, scope, old[key], record)
    return found, notes


def _scopes(found: Record) -> Iterator[tuple[str, list[Record]]]:
    yield from found["totals"].items()
    yield "rows", found["rows"]


def _key(record: Record) -> tuple[Any, ...]:
    return record.get("tensor", record.get("where")), record["model"], record["other"]


def _same_models(earlier: Record, now: Record) -> tuple[dict[Any, Any], list[str]]:
    old = [each["label"] for each in earlier["models"]]
    new = [each["label"] for each in now["models"]]
    if set(old) & set(new) and len(new) > 1:
        places = {number: old.index(label) for number, label in enumerate(new) if label in old}
    elif len(old) == len(new):
        places = dict(enumerate(range(len(old))))
    else:
        places = {number: old.index(label) for number, label in enumerate(new) if label in old}
    missing = [label for number, label in enumerate(new) if number not in places]
    notes = [f"the earlier report has no counterpart of {label}" for label in missing]
    return {None: None, **places}, notes


def _compared(name: str, scope: str, before: Record, after: Record) -> Iterator[Record]:
    spec = DIAGNOSTICS[name]
    try:
        old, new = _numbers(spec.headline(before)), _numbers(spec.headline(after))
    except (KeyError, TypeError):
        return
    for quantity, value in new.items():
        if quantity in old and old[quantity] != value:
            yield {
                "diagnostic": name,
                "scope": scope,
                "where": after.get("tensor", after.get("where")),
                "model": after["model"],
                "other": after["other"],
                "quantity": quantity,
                "before": old[quantity],
                "after": value,
            }


def _numbers(shown: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in shown.items() if isinstance(value, (int, float))}
