"""The models of a configuration, layer by layer, and the levels their parameters stand at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any

from mergebench.checkpoints.stacking import Slice
from mergebench.mergekit.document import Document, Path

#: Layers of an output: more than any model has, and few enough for a value of each.
MOST = 2000


@dataclass(frozen=True)
class Input:
    """One model of a slice: its reference, its layers (both ends included) and its parameters."""

    path: Path
    name: str
    layers: tuple[int, int] | None
    parameters: Any


@dataclass(frozen=True)
class Level:
    """One slice: its models and parameters."""

    path: Path
    inputs: tuple[Input, ...]
    parameters: Any


@dataclass(frozen=True, eq=False)
class Layers:
    """The models of a configuration, from the bottom of the output to its top.

    Attributes
    ----------
    document : Document
    slices : tuple of Level
        A single one without layers for whole models.
    outer : tuple of (path, parameters)
        Of the module and of the whole configuration.
    """

    document: Document
    slices: tuple[Level, ...]
    outer: tuple[tuple[Path, Any], ...]

    @property
    def sliced(self) -> bool:
        """Whether layers are taken out of models."""
        return self.slices[0].inputs[0].layers is not None

    @property
    def lengths(self) -> list[int]:
        """Layers of each slice; none for whole models."""
        ranges = [each.inputs[0].layers for each in self.slices]
        return [last - first + 1 for first, last in (r for r in ranges if r is not None)]

    @property
    def parameters(self) -> Iterator[tuple[Path, Any, bool]]:
        """``(path, parameters, whether they stand beside a single model)``."""
        for level in self.slices:
            for each in level.inputs:
                if each.parameters is not None:
                    yield (*each.path, "parameters"), each.parameters, True
            if level.parameters is not None:
                yield (*level.path, "parameters"), level.parameters, False
        yield from ((path, parameters, False) for path, parameters in self.outer)

    def levels(self, name: str, model: int | None) -> Iterator[list[tuple[Path, Any]]]:
        """For each slice, where a parameter stands, the nearest first."""
        for level in self.slices:
            inner: list[tuple[Path, Any]] = []
            if model is not None:
                each = level.inputs[model]
                inner.append(((*each.path, "parameters"), each.parameters))
            inner += [((*level.path, "parameters"), level.parameters), *self.outer]
            yield [
                ((*path, name), parameters[name])
                for path, parameters in inner
                if parameters is not None and parameters.get(name) is not None
            ]

    def split(self, base: str | None, *, needed: bool) -> tuple[int | None, list[int]]:
        """The place of the base among the models, and those of the others.

        Raises
        ------
        FormatError
            If the base is needed in every slice and is not there, or at another place.
        """
        count = len(self.slices[0].inputs)
        places = {
            next((i for i, each in enumerate(level.inputs) if each.name == base), None)
            for level in self.slices
        }
        if base is None or (places == {None} and not (needed and self.sliced)):
            return None, list(range(count))
        if None in places:
            if not needed:
                return None, list(range(count))
            level = next(
                each for each in self.slices if all(one.name != base for one in each.inputs)
            )
            raise self.document.refuse(
                level.path, "base_model is no source of this slice", got=base,
                fix="add it with the layers that the others are compared with",
            )  # fmt: skip
        under = next(iter(p for p in places if p is not None))
        return under, [place for place in range(count) if place != under]

    def reference(self, model: int) -> str:
        """What the recipe calls a model: blocks of several where layers are taken out."""
        names = [level.inputs[model] for level in self.slices]
        cuts: list[Slice] = []
        for each in names:
            if each.layers is None:
                return each.name
            first, last = each.layers
            if cuts and cuts[-1].path == each.name and cuts[-1].last + 1 == first:
                cuts[-1] = Slice(each.name, cuts[-1].first, last)
            else:
                cuts.append(Slice(each.name, first, last))
        return ",".join(map(str, cuts))

    def has(self, name: str) -> bool:
        """Whether a model is an input of every slice."""
        return all(any(each.name == name for each in level.inputs) for level in self.slices)

    def has_parameters(self, model: int) -> bool:
        """Whether parameters stand beside a model."""
        return any(level.inputs[model].parameters for level in self.slices)

    def path_of(self, model: int | None) -> Path:
        """Where a model stands."""
        return ("base_model",) if model is None else self.slices[0].inputs[model].path


def references(document: Document, data: Mapping[str, Any]) -> Layers:
    """The models that a configuration names.

    Raises
    ------
    FormatError
        For anything but one of ``models``, ``slices`` and a module ``default``.
    """
    outer: list[tuple[Path, Any]] = []
    path: Path = ()
    held = data
    if data.get("modules"):
        modules = document.mapping(("modules",), data["modules"], data["modules"])
        for name in modules:
            if name != "default":
                raise document.refuse(
                    ("modules", name), "parts of a model are not merged apart",
                    fix="merge one part with `include`, or a model with one part as `default`",
                )  # fmt: skip
        path = ("modules", "default")
        held = document.mapping(path, modules["default"], ("models", "slices", "parameters"))
        if held.get("parameters") is not None:
            outer.append(((*path, "parameters"), held["parameters"]))
        for key in ("models", "slices"):
            if data.get(key):
                raise document.refuse((key,), "stands beside `modules`", fix="keep one")
    if data.get("parameters") is not None:
        outer.append((("parameters",), data["parameters"]))
    for where, parameters in outer:
        if not isinstance(parameters, Mapping):
            raise document.refuse(where, "must be a mapping", got=parameters)
    if bool(held.get("models")) == bool(held.get("slices")):
        raise document.refuse(
            path, "needs one of `models`, `slices` and `modules`", fix="give exactly one"
        )
    if held.get("models"):
        here: Path = (*path, "models")
        listed = document.listed(here, held["models"])
        inputs = [_input(document, (*here, i), each, False) for i, each in enumerate(listed)]
        return Layers(document, (Level(path, tuple(inputs), None),), tuple(outer))
    slices = _slices(document, (*path, "slices"), held["slices"])
    return Layers(document, slices, tuple(outer))


def _slices(document: Document, path: Path, data: Any) -> tuple[Level, ...]:
    found: list[Level] = []
    count = 0
    for place, each in enumerate(document.listed(path, data)):
        here: Path = (*path, place)
        parts = document.mapping(here, each, ("sources", "parameters"))
        sources = document.listed((*here, "sources"), parts.get("sources"))
        inputs = [
            _input(document, (*here, "sources", i), source, True)
            for i, source in enumerate(sources)
        ]
        _check_slice(document, here, inputs, found)
        parameters = _parameters(document, here, parts)
        found.append(Level(here, tuple(inputs), parameters))
        count += 1 if inputs[0].layers is None else inputs[0].layers[1] - inputs[0].layers[0] + 1
        if count > MOST:
            raise document.refuse(here, "number of layers", got=count, expected=f"at most {MOST}")
    return tuple(found)


def _check_slice(
    document: Document, path: Path, inputs: Sequence[Input], before: Sequence[Level]
) -> None:
    lengths = [last - first for first, last in (i.layers for i in inputs if i.layers is not None)]
    for each, length in zip(inputs, lengths, strict=True):
        if length != lengths[0]:
            raise document.refuse(
                each.path, "number of layers", got=length + 1,
                expected=f"{lengths[0] + 1}, as of the first source",
            )  # fmt: skip
    if before and len(inputs) != len(before[0].inputs):
        raise document.refuse(
            path, "slices with other numbers of sources are not offered", got=len(inputs),
            expected=f"{len(before[0].inputs)}, as in the first slice",
        )  # fmt: skip


def _input(document: Document, path: Path, data: Any, sliced: bool) -> Input:
    if isinstance(data, str):
        raise document.refuse(path, "a model is a mapping", got=data, fix=f"write model: {data}")
    known = ("model", "layer_range", "parameters") if sliced else ("model", "parameters")
    parts = document.mapping(path, data, known)
    if "model" not in parts:
        raise document.refuse(path, "has no `model`")
    name = reference_of(document, (*path, "model"), parts["model"])
    layers = None
    if sliced:
        here: Path = (*path, "layer_range")
        given = parts.get("layer_range")
        ends = given if isinstance(given, list) else []
        if [type(each) for each in ends] != [int, int] or not 0 <= ends[0] < ends[1]:
            raise document.refuse(
                here, "must be two rising numbers", got=given, expected="such as [0, 16]"
            )
        layers = ends[0], ends[1] - 1
    return Input(path, name, layers, _parameters(document, path, parts))


def _parameters(document: Document, path: Path, parts: Mapping[str, Any]) -> Any:
    found = parts.get("parameters")
    if found is not None and not isinstance(found, Mapping):
        raise document.refuse((*path, "parameters"), "must be a mapping", got=found)
    return found


def reference_of(document: Document, path: Path, data: Any) -> str:
    """A model as ``path``, ``path+adapter``, or written out as a mapping.

    Raises
    ------
    FormatError
        For a revision, which only a model on the Hub has.
    """
    if isinstance(data, Mapping):
        parts = document.mapping(path, data, ("model", "lora", "override_architecture"))
        if parts.get("override_architecture") is not None:
            raise document.refuse((*path, "override_architecture"), "is not offered")
        found = _place(document, (*path, "model"), parts.get("model"))
        if parts.get("lora") is None:
            return found
        return f"{found}+{_place(document, (*path, 'lora'), parts['lora'])}"
    text = document.text(path, data)
    name, at, revision = text.partition("@")
    if at and not File(text).expanduser().exists():
        raise document.refuse(
            path, "revisions are not opened directly", got=text,
            fix=f"run `hf download {name} --revision {revision}` and give the folder",
        )  # fmt: skip
    return text


def _place(document: Document, path: Path, data: Any) -> str:
    if isinstance(data, Mapping):
        parts = document.mapping(path, data, ("path", "revision"))
        if parts.get("revision") is not None:
            raise document.refuse((*path, "revision"), "revisions are not opened directly")
        return document.text((*path, "path"), parts.get("path"))
    return document.text(path, data)
