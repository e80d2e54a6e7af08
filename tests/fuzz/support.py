"""Documents broken field by field, and what must hold for whatever comes of them."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

FUZZ = Path(__file__).parents[2] / "benchmarks" / "fuzz"
#: Memory that one reading may take: so many times the bytes of its files, and a constant.
TIMES, CONSTANT = 128, 4 << 20
CHECKED = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


sys.path.insert(0, str(FUZZ))
targets, seeds = importlib.import_module("targets"), importlib.import_module("seeds")


def assert_holds(target: str, data: bytes) -> bool:
    """Taken or refused as promised, in bounded memory; the result is whether they are taken."""
    function: Callable[[bytes, Path], bool] = targets.TARGETS[target]
    _import_all(target)
    folder = Path(tempfile.mkdtemp(prefix="mergebench-fuzz-"))
    tracemalloc.start()
    try:
        taken = function(data, folder)
        peak = tracemalloc.get_traced_memory()[1]
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    finally:
        tracemalloc.stop()
        shutil.rmtree(folder)
    assert peak <= TIMES * size + CONSTANT, f"{peak} bytes for files of {size}"
    return taken


@cache
def _import_all(target: str) -> None:
    """Modules that are loaded when first needed do not belong to the cost of a file."""
    with tempfile.TemporaryDirectory() as folder:
        targets.TARGETS[target](next(iter(seeds.valid()[target].values())), Path(folder))


# Parts of JSON that some reader or other has stumbled over.
_FRAGMENTS = (
    *("null", "true", "false", "0", "-1", "-0", "1.5", "1e999", "NaN", "Infinity", "-Infinity"),
    *(str(2**31), str(2**53 + 1), str(2**63), str(2**64), "9" * 5000, "1e-400", "01", "+1"),
    *('""', '"a"', '"__metadata__"', '"\\ud800"', '"\\u0000"', '"\\u001b]0;x\\u0007"', '"a\\nb"'),
    *('"\u202e"', '"' + "x" * 3000 + '"', '"' + "a." * 1500 + '"', '"../../etc/passwd"', '"/"'),
    *("[]", "{}", "[[]]", "[null]", "[-1]", "[1,2,3]", '["a",1]', '[{"a":[]}]', '{"":null}'),
    *("[" * 70 + "]" * 70, "[" * 100_000, '{"a":' * 3000 + "1" + "}" * 3000, "\x00", "'a'", "// x"),
)
FRAGMENTS = st.one_of(
    st.sampled_from(_FRAGMENTS),
    st.integers(-(2**70), 2**70).map(str),
    st.text(max_size=8).map(json.dumps),
    st.floats().map(json.dumps),
)


def _places(document: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield here
    if isinstance(document, dict):
        for key, value in document.items():
            yield from _places(value, (*here, key))
    elif isinstance(document, list):
        for index, value in enumerate(document):
            yield from _places(value, (*here, index))


def _written(document: Any, place: tuple[Any, ...], how: str, fragment: str) -> str:
    """JSON in which the value at ``place`` is replaced, left out, repeated or renamed."""
    if not place and how == "replace":
        return fragment
    if isinstance(document, dict):
        parts = []
        for key, value in document.items():
            mine = place[:1] == (key,)
            last = mine and len(place) == 1
            name, text = (
                json.dumps(key),
                _written(value, place[1:] if mine else ("",), how, fragment),
            )
            if last and how == "rename":
                name = fragment
            if last and how == "twice":
                parts.append(f"{name}:{fragment}")
            if not (last and how == "drop"):
                parts.append(f"{name}:{text}")
        return "{" + ",".join(parts) + "}"
    if isinstance(document, list):
        parts = []
        for index, value in enumerate(document):
            mine = place[:1] == (index,)
            last = mine and len(place) == 1
            if last and how == "twice":
                parts.append(fragment)
            if not (last and how == "drop"):
                parts.append(_written(value, place[1:] if mine else ("",), how, fragment))
        return "[" + ",".join(parts) + "]"
    return json.dumps(document)


@st.composite
def broken_json(draw: st.DrawFn, documents: list[Any]) -> bytes:
    """One of the documents as JSON, with one or no field broken."""
    document = draw(st.sampled_from(documents))
    place = draw(st.sampled_from(list(_places(document))))
    how = draw(st.sampled_from(["replace", "drop", "twice", "rename", "keep"]))
    text = _written(document, place, how, draw(FRAGMENTS))
    return text.encode("utf-8", "surrogatepass")


@st.composite
def broken_bytes(draw: st.DrawFn, files: list[bytes]) -> bytes:
    """One of the files, cut, with some bytes changed, or some put in between."""
    data = bytearray(draw(st.sampled_from(files)))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        how = draw(st.sampled_from(["cut", "change", "insert", "repeat"]))
        if how == "cut":
            del data[at:]
        elif how == "change":
            piece = draw(st.sampled_from([b"\0", b"\xff", b"\x80", b"\xff" * 8, b"\1" + bytes(7)]))
            data[at : at + len(piece)] = piece
        elif how == "insert":
            data[at:at] = draw(st.binary(max_size=12))
        else:
            data[at:at] = data[at : at + draw(st.integers(1, 64))]
    return bytes(data)


def documents(target: str, *, skip: int = 0) -> list[Any]:
    """The JSON documents among the sound seeds of a target, ``skip`` bytes left out."""
    found = []
    for data in seeds.valid()[target].values():
        try:
            found.append(json.loads(data[skip:]))
        except ValueError:
            continue
    assert found
    return found


def files(target: str) -> list[bytes]:
    """The sound seeds of a target."""
    return list(seeds.valid()[target].values())
