"""A YAML document that knows on which line each of its keys stands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from mergebench.core.errors import FormatError, did_you_mean
from mergebench.core.plain import parse_yaml

Path = tuple[str | int, ...]
#: Keys that no recipe of ours has.
_OWN = {"merge_method", "base_model", "slices", "modules", "tokenizer_source", "out_dtype"}
_OURS = {"mergebench", "method", "ops"}


@dataclass(frozen=True, eq=False)
class Document:
    """Parsed YAML.

    Attributes
    ----------
    where : str
        Of what file, for messages.
    data : object
    lines : mapping of path to int
        Line of each key and list entry, counted from 1.
    """

    where: str
    data: Any
    lines: Mapping[Path, int] = field(default_factory=dict)

    def refuse(
        self, path: Path, what: str, *, got: Any = None, expected: str = "", fix: str = ""
    ) -> FormatError:
        """An error about the value at a path, with its line."""
        place = path
        while place and place not in self.lines:
            place = place[:-1]
        line = f", line {self.lines[place]}" if place in self.lines else ""
        name = f"{spelled(path)}: " if path else ""
        shown = "" if got is None else repr(got)[:100]
        return FormatError(
            f"{self.where}{line}: {name}{what}", got=shown, expected=expected, fix=fix
        )

    def mapping(
        self, path: Path, value: Any, known: Iterable[str], also: Iterable[str] = ()
    ) -> Mapping[str, Any]:
        """A mapping with these keys only, those in ``also`` being no suggestions.

        Raises
        ------
        FormatError
            If it is none, or has another key; with the nearest known one.
        """
        if not isinstance(value, Mapping):
            raise self.refuse(path, "must be a mapping", got=value)
        names = list(known)
        for key in value:
            if key not in names and key not in also:
                raise self.refuse(
                    (*path, str(key)), "unknown key", fix=did_you_mean(str(key), names)
                )
        return value

    def text(self, path: Path, value: Any) -> str:
        """A text that is not empty."""
        if not isinstance(value, str) or not value:
            raise self.refuse(path, "must be text", got=value)
        return value

    def listed(self, path: Path, value: Any) -> list[Any]:
        """A list that is not empty."""
        if not isinstance(value, list) or not value:
            raise self.refuse(path, "must be a list", got=value)
        return value


def spelled(path: Path) -> str:
    """``models[0].parameters.weight``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def is_mergekit(data: Any) -> bool:
    """Whether parsed YAML is a configuration of mergekit, by its keys."""
    return isinstance(data, Mapping) and bool(_OWN & set(data)) and not _OURS & set(data)


def parse(text: str, where: str) -> Document:
    """Parse YAML.

    Raises
    ------
    FormatError
        If it is not one YAML document, or a key stands twice in a mapping.
    """
    try:
        data = parse_yaml(text)
    except ValueError as error:
        raise FormatError(f"{where}: not YAML ({str(error).splitlines()[0]})") from None
    lines: dict[Path, int] = {}
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        # JSON may be indented by tabs.
        node = None
    if node is not None:
        _note(node, (), lines)
    return Document(where, data, lines)


def _note(node: yaml.Node, path: Path, lines: dict[Path, int]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, str(key.value))
            lines[here] = key.start_mark.line + 1
            _note(value, here, lines)
    elif isinstance(node, yaml.SequenceNode):
        for place, value in enumerate(node.value):
            lines[*path, place] = value.start_mark.line + 1
            _note(value, (*path, place), lines)
