"""Plain data out of files that anybody may have written."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

#: Deepest nesting of brackets. What programs write has less than ten levels; more than the
#: interpreter can follow would end in the middle of whatever walks the data.
DEPTH = 64


def parse_json(text: str) -> Any:
    """JSON as Python reads it, NaN and infinities included, in which nothing can do harm later.

    Raises
    ------
    ValueError
        If it is no JSON; for halves of surrogate pairs, integers of more than 4300 digits and
        nesting deeper than :data:`DEPTH`.
    """
    try:
        parsed = json.loads(text)
    except RecursionError:
        raise ValueError("too many nested brackets") from None
    check_depth(parsed)
    if "\\u" in text:
        try:
            json.dumps(parsed, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("half of a surrogate pair") from None
    return parsed


#: Most values of a YAML text, once every alias is written out.
VALUES = 100_000
#: Most bytes of YAML, of which PyYAML reads some ten thousand in a second and makes objects of a
#: hundred times the size; and most values of JSON beyond that, which takes a thousandth of both.
YAML, JSON_VALUES = 1 << 19, 300_000
_INTEGERS = 2**64


def parse_yaml(text: str) -> Any:
    """YAML or JSON: lists, mappings, texts, numbers, true, false and null, each key once.

    Raises
    ------
    ValueError
        If it is neither; for repeated keys, values of other types such as dates, integers beyond
        64 bits, halves of surrogate pairs; for more than :data:`VALUES` values, aliases written
        out; for nesting deeper than :data:`DEPTH`; and beyond :data:`YAML` bytes for what is no
        JSON, or may have more than :data:`JSON_VALUES` values.
    """
    import yaml

    large = len(text) > YAML or len(text.encode(errors="replace")) > YAML
    # Counted before anything is made of them; marks within texts count too.
    if large and sum(map(text.count, ",[{")) > JSON_VALUES:
        raise ValueError(f"more than {JSON_VALUES} values")

    class Loader(yaml.SafeLoader):
        # PyYAML looks at all open brackets again for every token.
        def fetch_flow_collection_start(self, token: Any) -> None:
            if self.flow_level >= DEPTH:
                raise ValueError("too many nested brackets")
            super().fetch_flow_collection_start(token)

    try:
        # YAML 1.1 takes JSON's 1e-05 for text, and halves of its escaped pairs for characters.
        data = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        if large:
            raise ValueError(
                f"more than {YAML} bytes must be JSON without a key twice: {error}"
            ) from None
        try:
            loader = Loader(text)
            node = loader.get_single_node()
            if node is not None:
                _count(node, {}, 0)
            data = None if node is None else loader.construct_document(node)
        except yaml.YAMLError as error:
            raise ValueError(str(error)) from None
        except RecursionError:
            raise ValueError("too many nested brackets") from None
        # The constructors of PyYAML stumble over tags on what they do not fit.
        except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
            raise ValueError(f"a value that does not fit its tag: {error}") from None
    check_depth(data)
    _check_plain([data])
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key twice")
    return found


def _count(node: Any, known: dict[int, int], depth: int) -> int:
    """Values of a node with its aliases written out."""
    if (size := known.get(id(node))) is not None:
        if not size:
            raise ValueError("a value that contains itself")
        return size
    if depth > DEPTH:
        raise ValueError("too many nested brackets")
    known[id(node)] = 0
    size = 1
    if isinstance(node.value, list):
        parts = node.value
        if parts and isinstance(parts[0], tuple):
            keys = [(key.tag, key.value) for key, _ in parts if isinstance(key.value, str)]
            if len(set(keys)) < len(keys):
                twice = next(key for key in keys if keys.count(key) > 1)
                raise ValueError(f"the key {twice[1]!r} twice")
            parts = [each for pair in parts for each in pair]
        size += sum(_count(part, known, depth + 1) for part in parts)
    if size > VALUES:
        raise ValueError(f"more than {VALUES} values, aliases written out")
    known[id(node)] = size
    return size


def _check_plain(level: Iterable[Any]) -> None:
    for each in level:
        if isinstance(each, dict):
            _check_plain(each)
            _check_plain(each.values())
        elif isinstance(each, list):
            _check_plain(each)
        elif isinstance(each, int) and not -_INTEGERS < each < _INTEGERS:
            raise ValueError("an integer beyond 64 bits")
        elif isinstance(each, str):
            each.encode()
        elif not isinstance(each, int | float | None):
            raise ValueError(
                f"a {type(each).__name__}, which is no plain value; texts may stand in quotes"
            )


def check_depth(data: Any) -> None:
    """Refuse data whose lists and mappings lie too deep in each other.

    Raises
    ------
    ValueError
        If they do.
    """
    level = [data]
    for _ in range(DEPTH):
        level = [
            part
            for each in level
            if isinstance(each, (dict, list))
            for part in (each.values() if isinstance(each, dict) else each)
            if isinstance(part, (dict, list))
        ]
        if not level:
            return
    raise ValueError("too many nested brackets")
