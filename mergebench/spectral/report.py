"""What an analysis found, as plain data, and how rows add up."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from mergebench.core.version import own_version
from mergebench.spectral.diagnostic import DIAGNOSTICS, Diagnostic, Values

#: Of the JSON form. Fields may be added under one number; any other change raises it.
VERSION = 1
KIND = "mergebench spectral"
#: What ``where`` says of a whole model.
ALL = "all"
_DIGITS = re.compile(r"(\d+)")

Record = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Found:
    """All that one diagnostic said.

    Attributes
    ----------
    name, about : str
    params : mapping
    rows : list of records
        ``tensor``, ``layer``, ``module``, ``model``, ``other`` and the values of the diagnostic;
        models by their place in the report, or ``None``.
    all, layers, modules : lists of records
        ``where``, ``model``, ``other`` and combined values.
    sentences : list of str
    """

    name: str
    about: str
    params: Mapping[str, Any]
    rows: list[Record]
    all: list[Record]
    layers: list[Record]
    modules: list[Record]
    sentences: list[str]


@dataclass(frozen=True, eq=False)
class Report:
    """An analysis.

    Attributes
    ----------
    base : mapping or None
        ``label`` and ``fingerprint``.
    models : list of mappings
        ``label``, ``fingerprint``, ``kind``, ``merged``.
    settings : mapping
    tensors : list of records
        Every tensor looked at, in the order of the model.
    found : mapping of diagnostic to Found
    notes : list of str
    lapack : str
    """

    base: Mapping[str, Any] | None
    models: list[Record]
    settings: Mapping[str, Any]
    tensors: list[Record]
    found: Mapping[str, Found]
    notes: list[str] = field(default_factory=list)
    lapack: str = ""

    @property
    def summary(self) -> list[str]:
        """Sentences of all diagnostics."""
        return [text for found in self.found.values() for text in found.sentences]

    def to_json(self) -> Record:
        """Plain data; what is not finite or not defined is ``None``."""
        diagnostics = {
            name: {
                "about": each.about,
                "params": dict(each.params),
                "sentences": each.sentences,
                "totals": {"all": each.all, "layers": each.layers, "modules": each.modules},
                "rows": each.rows,
            }
            for name, each in self.found.items()
        }
        data = {
            "kind": KIND,
            "version": VERSION,
            "mergebench": own_version(),
            "lapack": self.lapack,
            "base": None if self.base is None else dict(self.base),
            "models": self.models,
            "settings": dict(self.settings),
            "summary": self.summary,
            "notes": self.notes,
            "tensors": self.tensors,
            "diagnostics": diagnostics,
        }
        plain: Record = _plain(data)
        return plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not isfinite(value):
        return None
    return value


def gather(
    name: str, params: Mapping[str, Any], rows: list[Record], labels: Sequence[str]
) -> Found:
    """Add up the rows of a diagnostic: per layer, per type of modules, and all of them.

    Parameters
    ----------
    rows : list of records
        With the fields of :class:`Found` and ``values``.
    labels : sequence of str
        How sentences call the models.
    """
    spec = DIAGNOSTICS[name]
    rows = _finished(spec, params, rows)
    everything = sorted(_combined(spec, rows, lambda _: ALL), key=_by_models)
    sentences = [
        f"{_subject(each, labels)}: {text}" for each in everything if (text := spec.say(each))
    ]
    return Found(
        name,
        spec.summary,
        params,
        [{**{k: v for k, v in row.items() if k != "values"}, **row["values"]} for row in rows],
        everything,
        sorted(_combined(spec, rows, lambda row: row["layer"]), key=_in_depth),
        sorted(_combined(spec, rows, lambda row: row["module"]), key=_by_models),
        sentences,
    )


def _by_models(record: Record) -> tuple[int, int]:
    one, other = (-1 if record[key] is None else record[key] for key in ("model", "other"))
    return one, other


def _in_depth(record: Record) -> tuple[Any, ...]:
    """By model, then blocks by their numbers, then classes of tensors outside of blocks."""
    parts = _DIGITS.split(record["where"])
    numbered = [(int(each), "") if each.isdigit() else (-1, each) for each in parts]
    return *_by_models(record), len(parts) == 1, numbered


def _subject(record: Record, labels: Sequence[str]) -> str:
    if record["model"] is None:
        return "together"
    if record["other"] is None:
        return labels[record["model"]]
    return f"{labels[record['model']]} and {labels[record['other']]}"


def _finished(spec: Diagnostic, params: Mapping[str, Any], rows: list[Record]) -> list[Record]:
    if spec.finish is None:
        return rows
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        shapes = [tuple(row["shape"]) for row in own]
        values = spec.finish([row["values"] for row in own], shapes, **params)
        for row, new in zip(own, values, strict=True):
            row["values"] = new
    return rows


def _combined(spec: Diagnostic, rows: Sequence[Record], where: Any) -> list[Record]:
    groups: dict[tuple[Any, ...], list[Values]] = {}
    for row in rows:
        key = (where(row), row["model"], row["other"])
        groups.setdefault(key, []).append(row["values"])
    return [
        {"where": place, "model": model, "other": other, **spec.combine(values)}
        for (place, model, other), values in groups.items()
    ]
