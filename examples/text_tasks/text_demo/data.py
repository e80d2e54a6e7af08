"""Local files of texts with labels, split, and written as the task ``classify`` reads them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .settings import TEMPLATE

SPLITS = ("train", "val", "test")
_ALIASES = {"training": "train", "validation": "val", "valid": "val", "dev": "val", "eval": "val"}
# Of every class, the rest is for training.
_SHARES = {"test": 0.2, "val": 0.2}
_DIALECTS = {".csv": ",", ".tsv": "\t"}

Row = tuple[str, int]


class DataError(Exception):
    """A file is not as the README says; the message is one line for its owner."""


@dataclass(frozen=True)
class TextTask:
    """One classification task: a description per class, and rows of (text, class) per split."""

    name: str
    prompts: tuple[str, ...]
    splits: Mapping[str, Sequence[Row]]

    def to_json(self, max_length: int, scale: float) -> str:
        """The file that ``--task classify:FILE.json`` reads."""
        plain: dict[str, Any] = {"prompts": self.prompts, "max_length": max_length, "scale": scale}
        return json.dumps(plain | dict(self.splits), ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class _Line:
    text: str
    label: str
    split: str


def read_tasks(files: Sequence[Path], seed: int, limit: int, template: str) -> list[TextTask]:
    """Read two files or more.

    Raises
    ------
    DataError
        As :func:`read_task`, and for one file, or two of one name.
    """
    names = [path.stem for path in files]
    if len(names) < 2 or len(set(names)) < len(names):
        raise DataError("two files or more, each of another name: a task is called after its file")
    return [read_task(path, seed, limit, template) for path in files]


def read_task(path: Path, seed: int, limit: int = 0, template: str = TEMPLATE) -> TextTask:
    """Read one file of texts with labels.

    Parameters
    ----------
    path : Path
        ``.csv`` or ``.tsv`` with a header, or ``.jsonl`` of objects: ``text``, ``label``, and
        where the file has splits of its own ``split``. ``.json`` is what ``classify`` reads, taken
        as it is.
    seed : int
        Of the split, where the file has none.
    limit : int
        The most rows of a split, 0 for all.
    template : str
        Turns a label into its description where no ``NAME.labels.json`` beside the file does.

    Raises
    ------
    DataError
        If the file is none of these, or too small to be split.
    """
    if path.suffix.lower() == ".json":
        prompts, splits = _ready(path)
    else:
        lines = _without_repeats(list(_lines(path)), path)
        labels = sorted({line.label for line in lines})
        prompts = _described(labels, path, template)
        number = {label: index for index, label in enumerate(labels)}
        given = {line.split for line in lines}
        if given == {""}:
            lines = _split(lines, seed)
        elif "" in given:
            raise DataError(f"{path}: some rows name their split and others do not")
        splits = {
            split: [(line.text, number[line.label]) for line in lines if line.split == split]
            for split in SPLITS
        }
    for split in SPLITS:
        if not splits[split]:
            raise DataError(f"{path}: no rows for {split}: give more, or a column `split`")
    kept = {split: rows[: limit or None] for split, rows in splits.items()}
    return TextTask(path.stem, tuple(prompts), kept)


def _lines(path: Path) -> Iterator[_Line]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            records: Any
            if (suffix := path.suffix.lower()) in _DIALECTS:
                records = enumerate(csv.DictReader(file, delimiter=_DIALECTS[suffix]), start=2)
            elif suffix == ".jsonl":
                records = ((n, json.loads(line)) for n, line in enumerate(file, 1) if line.strip())
            else:
                raise DataError(f"{path}: is no .csv, .tsv, .jsonl or .json")
            for number, record in records:
                yield _line(record, f"{path}, line {number}")
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def _line(record: Any, where: str) -> _Line:
    if not isinstance(record, dict):
        raise DataError(f"{where}: is no object with `text` and `label`")
    text, label = (record.get(key) for key in ("text", "label"))
    if not isinstance(text, str) or not text.strip() or not isinstance(label, (str, int)):
        raise DataError(f"{where}: needs a `text` and a `label`")
    split = str(record.get("split") or "").strip().lower()
    split = _ALIASES.get(split, split)
    if split and split not in SPLITS:
        raise DataError(f"{where}: split {split!r} is none of {', '.join(SPLITS)}")
    return _Line(" ".join(text.split()), str(label).strip(), split)


def _without_repeats(lines: Sequence[_Line], path: Path) -> list[_Line]:
    """The first row of every text: one in two splits would be tested on what was learned."""
    first: dict[str, _Line] = {}
    for line in lines:
        first.setdefault(line.text, line)
    if len({line.label for line in first.values()}) < 2:
        raise DataError(f"{path}: fewer than two labels")
    return list(first.values())


def _split(lines: Sequence[_Line], seed: int) -> list[_Line]:
    """Every class 60/20/20, in an order drawn from ``seed``."""
    by_label: dict[str, list[_Line]] = {}
    for line in lines:
        by_label.setdefault(line.label, []).append(line)
    drawn = np.random.default_rng(seed)
    found = []
    for label in sorted(by_label):
        rows = [by_label[label][index] for index in drawn.permutation(len(by_label[label]))]
        counts = {split: round(share * len(rows)) for split, share in _SHARES.items()}
        for split, count in counts.items():
            found += [_Line(row.text, row.label, split) for row in rows[:count]]
            rows = rows[count:]
        found += [_Line(row.text, row.label, "train") for row in rows]
    return [found[index] for index in drawn.permutation(len(found))]


def _described(labels: Sequence[str], path: Path, template: str) -> list[str]:
    beside = path.with_suffix(".labels.json")
    given: Any = {}
    if beside.is_file():
        try:
            given = json.loads(beside.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{beside}: is no JSON: {error}") from None
        if not isinstance(given, dict) or not all(isinstance(v, str) for v in given.values()):
            raise DataError(f"{beside}: must map labels to their descriptions")
        unknown = sorted(set(given) - set(labels))
        if unknown:
            raise DataError(f"{beside}: {path.name} has no label {unknown[0]!r}")
    words = {label: label.replace("_", " ").replace("-", " ") for label in labels}
    return [given.get(label) or template.format(label=words[label]) for label in labels]


def _ready(path: Path) -> tuple[list[str], dict[str, list[Row]]]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        prompts = [str(each) for each in data["prompts"]]
        splits = {split: [(str(t), int(n)) for t, n in data[split]] for split in SPLITS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: needs `prompts`, `train`, `val` and `test`: {error!r}") from None
    highest = max((n for rows in splits.values() for _, n in rows), default=0)
    if highest >= len(prompts):
        raise DataError(f"{path}: label {highest} has no prompt, there are {len(prompts)}")
    return prompts, splits
