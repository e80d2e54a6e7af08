"""Rows as CSV: one table for each diagnostic in a folder, or one long table in a file."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergebench.checkpoints.descriptors import cannot
from mergebench.core.errors import MergebenchError
from mergebench.pages.files import replaced
from mergebench.spectral.report import Record

_PLACE = ("tensor", "layer", "module", "model", "other")
_LONG = ("diagnostic", *_PLACE, "quantity", "value")


def check_place(path: Path, names: Sequence[str], force: bool) -> None:
    """Refuse a place for tables that cannot be written to, before any work.

    Raises
    ------
    MergebenchError
        If the folder that is to hold it does not exist, a file stands where a folder is asked for,
        or something would be replaced without ``force``.
    """
    single = path.suffix.lower() == ".csv"
    if not path.parent.is_dir():
        raise MergebenchError(f"--csv {path}: {path.parent} is no folder", fix="make it first")
    if single and path.is_dir():
        raise MergebenchError(f"--csv {path}: is a folder", fix="name a file, or another folder")
    if not single and path.exists() and not path.is_dir():
        raise MergebenchError(
            f"--csv {path}: is a file", fix="give a folder, or a file whose name ends in .csv"
        )
    taken = [path] if single else [path / f"{name}.csv" for name in names]
    there = [each for each in taken if each.exists()]
    if there and not force:
        raise MergebenchError(
            f"--csv {path}: {there[0]} exists", fix="give another place, or --force to replace it"
        )


def write_tables(report: Record, path: Path) -> list[Path]:
    """Write the rows of a report, as :meth:`Report.to_json` gives it.

    A path that ends in ``.csv`` becomes one long table, with a line for each number. Else it
    becomes a folder: ``NAME.csv`` has a line for each tensor and model or pair, and lists within
    rows (directions, curves) stand in tables of their own, ``NAME.LIST.csv``.

    Returns
    -------
    list of Path
        What was written.

    Raises
    ------
    MergebenchError
        If the system refuses.
    """
    written = []
    try:
        if path.suffix.lower() == ".csv":
            _write(path, _LONG, _long(report))
            written.append(path)
        else:
            path.mkdir(exist_ok=True)
            for name, columns, lines in _tables(report):
                _write(path / f"{name}.csv", columns, lines)
                written.append(path / f"{name}.csv")
    except OSError as error:
        raise cannot("written", path, error) from error
    return written


def _tables(report: Record) -> Iterator[tuple[str, Sequence[str], list[Record]]]:
    for name, found in report["diagnostics"].items():
        lines: list[Record] = []
        inner: dict[str, list[Record]] = {}
        for row in found["rows"]:
            place = _placed(report, row)
            plain, lists = _split(row)
            lines.append({**place, **plain})
            for key, items in lists.items():
                for number, item in enumerate(items):
                    body = _flat(item) if isinstance(item, dict) else {"value": item}
                    inner.setdefault(key, []).append({**place, "item": number, **body})
        for table, records in ((name, lines), *((f"{name}.{k}", v) for k, v in inner.items())):
            columns = dict.fromkeys((*_PLACE, *(key for each in records for key in each)))
            yield table, tuple(columns), records


def _long(report: Record) -> Iterator[Record]:
    for name, found in report["diagnostics"].items():
        for row in found["rows"]:
            place = {"diagnostic": name, **_placed(report, row)}
            plain, lists = _split(row)
            for key, value in plain.items():
                yield {**place, "quantity": key, "value": value}
            for key, items in lists.items():
                for number, item in enumerate(items):
                    body = _flat(item) if isinstance(item, dict) else {"": item}
                    for part, value in body.items():
                        label = f"{key}[{number}]" + (f".{part}" if part else "")
                        yield {**place, "quantity": label, "value": value}


def _placed(report: Record, row: Record) -> Record:
    labels: dict[int | None, str] = {None: ""}
    labels |= {number: each["label"] for number, each in enumerate(report["models"])}
    return {
        **{key: row[key] for key in ("tensor", "layer", "module")},
        "model": labels[row["model"]],
        "other": labels[row["other"]],
    }


def _split(row: Record) -> tuple[Record, dict[str, list[Any]]]:
    """Numbers of a row, thresholds among them, and its other lists."""
    plain: Record = {}
    lists: dict[str, list[Any]] = {}
    for key, value in row.items():
        if key in _PLACE:
            continue
        if key == "shape":
            plain["shape"] = " × ".join(map(str, value))
        elif key == "thresholds":
            for each in value:
                for part in ("count", "energy"):
                    plain[f"{part} <{each['epsilon']:g}"] = each[part]
        elif isinstance(value, list):
            lists[key] = value
        elif isinstance(value, dict):
            plain |= {f"{key}.{part}": each for part, each in value.items()}
        else:
            plain[key] = value
    return plain, lists


def _flat(item: Mapping[str, Any]) -> Record:
    found: Record = {}
    for key, value in item.items():
        if isinstance(value, dict):
            found |= {f"{key} <{part}": each for part, each in value.items()}
        else:
            found[key] = value
    return found


def _write(path: Path, columns: Sequence[str], lines: Iterable[Record]) -> None:
    with replaced(path) as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        for line in lines:
            writer.writerow({key: "" if v is None else v for key, v in line.items()})
