"""Tables of names: prefix in the original layout -> prefixes in diffusers' layout.

Several prefixes mean that the rows of one tensor are those of several: query, key and value.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Span:
    """Rows of a base tensor that are rows of a tensor of the other layout.

    Attributes
    ----------
    name : str
        Tensor of the base.
    start, rows : int
        Its first row that is meant, and how many.
    at : int
        Where they begin in the other layout's tensor.
    """

    name: str
    start: int
    rows: int
    at: int


@dataclass(frozen=True)
class Table:
    """One component of a pipeline, in both layouts.

    Attributes
    ----------
    prefixes : mapping of str to tuple of str
        Modules, or whole tensor names, of the original layout -> those of diffusers.
    original, diffusers : str
        What stands before them, with its dot.
    swapped : frozenset of str
        Prefixes of the original layout whose two halves of rows change places.
    """

    prefixes: Mapping[str, tuple[str, ...]]
    original: str
    diffusers: str
    swapped: frozenset[str] = frozenset()


def root_of(names: Collection[str], marker: str, roots: tuple[str, ...]) -> str | None:
    """The root under which a marking tensor stands; None where it is missing."""
    return next((root for root in roots if root + marker in names), None)


def to_diffusers(table: Table, shapes: Mapping[str, Shape]) -> dict[str, tuple[Span, ...]]:
    """Diffusers' tensors of a base in the original layout."""
    found: dict[str, tuple[Span, ...]] = {}
    for name, shape in shapes.items():
        if (split := _split(name, table.original, table.prefixes)) is None or not shape:
            continue
        prefix, rest = split
        targets = table.prefixes[prefix]
        at = 0
        for target, rows in zip(targets, _parts(name, len(targets), shapes), strict=True):
            spans: tuple[Span, ...] = (Span(name, at, rows, 0),)
            if prefix in table.swapped:
                half = rows // 2
                spans = (Span(name, half, rows - half, 0), Span(name, 0, half, rows - half))
            found[f"{table.diffusers}{target}{rest}"] = spans
            at += rows
    return found


def to_original(table: Table, shapes: Mapping[str, Shape]) -> dict[str, tuple[Span, ...]]:
    """Tensors of the original layout, of a base in diffusers' layout."""
    found: dict[str, tuple[Span, ...]] = {}
    for prefix, targets in table.prefixes.items():
        first = table.diffusers + targets[0]
        # "proj.1" is no end of "proj.10".
        ends = [n[len(first) :] for n in shapes if n == first or n.startswith(f"{first}.")]
        for rest in ends:
            names = [f"{table.diffusers}{target}{rest}" for target in targets]
            if not all(name in shapes and shapes[name] for name in names):
                continue
            spans: list[Span] = []
            at = 0
            for name in names:
                spans.append(Span(name, 0, shapes[name][0], at))
                at += shapes[name][0]
            if prefix in table.swapped:
                half = at // 2
                spans = [Span(names[0], half, at - half, 0), Span(names[0], 0, half, at - half)]
            found[f"{table.original}{prefix}{rest}"] = tuple(spans)
    return found


def _split(name: str, root: str, prefixes: Mapping[str, tuple[str, ...]]) -> tuple[str, str] | None:
    """The longest known prefix of a name below its root, and the rest."""
    if not name.startswith(root):
        return None
    path = name.removeprefix(root)
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        prefix = ".".join(parts[:count])
        if prefix in prefixes:
            return prefix, path.removeprefix(prefix)
    return None


def _parts(name: str, count: int, shapes: Mapping[str, Shape]) -> list[int]:
    """Rows of the stacked parts of a tensor: equal ones, and a rest after the first three."""
    rows = shapes[name][0]
    if count <= 3:
        return [rows // count] * count
    # Query, key and value have as many rows as the layer has inputs.
    width = shapes[name.rpartition(".")[0] + ".weight"][1]
    return [width, width, width, rows - 3 * width]
