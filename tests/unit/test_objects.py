"""Machine code that is kept: found again without the compiler, and never believed blindly."""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from mergebench.compute import jit, objects
from mergebench.compute.linking import Held
from mergebench.compute.objects import Entry
from tests.helpers.running import Ran, python

MODULE = "kernels_of_a_test"
SOURCE = """
from mergebench.compute.jit import float_kernel, inner

@inner
def _times(x, by):
    return x * by

@float_kernel
def total(x, table, double, by, maybe, pair):
    found = 0
    for i in range(len(x)):
        found += _times(x[i], by) * (2 if double else 1)
    for i in range(table.shape[0]):
        for j in range(table.shape[1]):
            found += table[i, j] * (1 + 9 * (j == 1) + 99 * (j == 2))
    if maybe is not None:
        found += 1000 * len(maybe)
        maybe[0] = found
    return found + pair[0][0] + pair[1]

@float_kernel
def allocates(x):
    return len(x.copy())

@float_kernel
def half(x):
    return len(x) / 2

@float_kernel
def rest(x):
    found = 0
    for i in range(len(x)):
        found += int(x[i] % 3.0) + int(x[i] ** 1.5)
    return found

@float_kernel
def corner(x):
    return x[0, 1] + 10 * x[1, 0]

@float_kernel
def lengths(one, other):
    return 100 * len(one) + 10 * len(other) + sum_of(one) + sum_of(other)

@inner
def sum_of(some):
    found = 0
    for i in range(len(some)):
        found += len(some[i])
    return found

@float_kernel
def fails(x):
    if len(x) > 2:
        raise ValueError("too long")
    return len(x)
"""
#: A process of its own: what it gives, and whether numba was imported.
ALONE = f"""
import sys
import numpy as np
from mergebench.compute.linking import Held
from mergebench.compute.objects import Entry
x, pair = np.arange(3), (np.array([7]), 5)
found = Entry("{MODULE}", "total")(x, np.ones((1, 2), int), True, 2, None, pair)
print(found, "numba" in sys.modules)
"""


class Pair(NamedTuple):
    one: np.ndarray
    other: int


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a module of kernels; the folder where code is kept."""
    (tmp_path / f"{MODULE}.py").write_text(SOURCE)
    folder = tmp_path / "cache"
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in os.environ if name.startswith("NUMBA_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(folder))
    yield folder
    sys.modules.pop(MODULE, None)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what is compiled to be kept."""
    found: list[str] = []
    real = jit.machine_code

    def noted(function: Any, given: Any) -> Any:
        found.append(function.__name__)
        return real(function, given)

    monkeypatch.setattr(jit, "machine_code", noted)
    return found


def ask(entry: Callable[..., int], maybe: Any = None, table: Any = None) -> int:
    """Call ``total`` with what it takes."""
    table = np.arange(6).reshape(2, 3) if table is None else table
    return entry(np.arange(4), table, True, 3, maybe, Pair(np.array([7]), 5))


#: 2·3·(0+1+2+3), then 0+10+200 and 3+40+500, and 7+5.
TOTAL = 36 + 753 + 12


def test_kept_and_found(kept: Path, compiled: list[str]) -> None:
    assert ask(Entry(MODULE, "total")) == TOTAL
    assert compiled == ["total"]
    assert [each.name.partition("-")[0] for each in kept.glob("*.o")] == [f"{MODULE}.total"]
    again = Entry(MODULE, "total")
    assert [ask(again), ask(again)] == [TOTAL, TOTAL]
    assert compiled == ["total"]


def alone(kept: Path) -> Ran:
    path = os.pathsep.join([str(kept.parent), *filter(None, sys.path)])
    return python(ALONE, cwd=kept.parent, env={"PYTHONPATH": path, "NUMBA_CACHE_DIR": str(kept)})


def test_one_of_many_compiles(kept: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        found = [each.out for each in pool.map(alone, [kept] * 3)]
    assert sorted(found) == ["35 False\n", "35 False\n", "35 True\n"]


def test_without_the_compiler(kept: Path) -> None:
    found = [alone(kept), alone(kept)]
    # 2·2·(0+1+2) + 1+10 + 7+5.
    assert [each.out for each in found] == ["35 True\n", "35 False\n"], found


def test_all_kernels_are_linked() -> None:
    """Those of merges and reports need no compiler once they are kept."""
    code = (
        "import sys; from mergebench.merge.kernels import ready\n"
        "from mergebench.compute.entrywise import passes\n"
        "found = ready._compiled(False), ready._compiled(True), passes()\n"
        "print(None in found, 'numba' in sys.modules)"
    )
    for _ in range(2):
        ran = python(code, cwd=Path.cwd())
    assert ran.out == "False False\n", ran


def test_other_arguments_are_another_function(kept: Path, compiled: list[str]) -> None:
    entry, given = Entry(MODULE, "total"), np.zeros(2)
    assert ask(entry) == TOTAL
    assert ask(entry, given) == TOTAL + 2000
    assert given[0] == 36 + 753 + 2000
    assert compiled == ["total"] * 2
    assert ask(entry) == TOTAL
    assert len(compiled) == 2


def test_layouts_and_tuples_are_types(kept: Path, compiled: list[str]) -> None:
    """In columns, in rows, in neither order; and as many arrays in other tuples."""
    whole, corner = np.arange(6).reshape(2, 3), Entry(MODULE, "corner")
    wide = np.zeros((4, 6), int)
    wide[::2, ::2] = whole
    for each in (np.asfortranarray(whole), wide[::2, ::2], whole, whole[:, ::-1]):
        assert corner(each) == each[0, 1] + 10 * each[1, 0]
    assert corner(wide[1::2, ::2]) == 0
    assert compiled == ["corner"] * 3
    a, b, c = (np.zeros(size) for size in (1, 2, 4))
    lengths = Entry(MODULE, "lengths")
    assert [lengths((a, b), (c,)), lengths((a,), (b, c))] == [217, 127]


def test_arrays_that_change_in_place(kept: Path) -> None:
    entry = Entry(MODULE, "corner")
    table = np.arange(6).reshape(2, 3)
    assert entry(table) == 1 + 30
    table.shape = (3, 2)
    assert entry(table) == 1 + 20
    table.dtype = np.uint64
    assert entry(table) == 1 + 20
    table.setflags(write=False)
    assert entry(table) == 1 + 20
    assert len(list(kept.glob("*.o"))) == 3


def test_arguments_that_are_held(kept: Path, compiled: list[str]) -> None:
    """Taken apart once, they are the same arguments; what their arrays hold may change."""
    entry, x, maybe = Entry(MODULE, "total"), np.arange(4), np.zeros(2)
    table = np.arange(6).reshape(2, 3)
    front, back = Held(x, table), Held(3, maybe, Pair(np.array([7]), 5))
    assert entry(x, table, True, 3, maybe, Pair(np.array([7]), 5)) == TOTAL + 2000
    for _ in range(2):
        assert entry(front, True, back) == TOTAL + 2000
    assert entry(front, True, Held(3), Held(None, Pair(np.array([7]), 5))) == TOTAL
    x[:] = 0
    assert entry(front, True, back) == TOTAL + 2000 - 36
    assert compiled == ["total"] * 2
    assert maybe[0] == 753 + 2000
    assert Entry(MODULE, "half")(Held(np.arange(8))) == 4


def test_what_no_kernel_takes(kept: Path) -> None:
    entry = Entry(MODULE, "total")
    for wrong, error in ((7.9, TypeError), ([1], TypeError), (1 << 63, OverflowError)):
        with pytest.raises(error):
            entry(np.arange(4), np.ones((1, 1), int), True, wrong, None, Pair(np.array([7]), 5))
    for most in (-(1 << 63), (1 << 63) - 1):
        table = np.zeros((1, 1), int)
        assert entry(np.arange(0), table, True, 1, None, Pair(np.array([0]), most)) == most


def test_arguments_that_are_no_more(kept: Path) -> None:
    """An array has gone, and nothing, or another one in its place, comes instead."""
    entry = Entry(MODULE, "total")
    for size in (3, 5):
        assert ask(entry, np.zeros(size)) == TOTAL + 1000 * size
        assert ask(entry) == TOTAL


def damaged(data: bytes) -> bytes:
    return data[:-9] + b"\x90" + data[-8:]


def shorter(data: bytes) -> bytes:
    head, _, rest = data.partition(b"\n")
    found = json.loads(head)
    del found["types"]
    return json.dumps(found).encode() + b"\n" + rest


@pytest.mark.parametrize(
    "change",
    [damaged, shorter, lambda data: b"", lambda data: data[:100], lambda data: b"[]\n" + data,
     lambda data: b"{}\n" + data, lambda data: b"null\n"],
)  # fmt: skip
def test_what_is_not_sound_is_made_anew(
    kept: Path, compiled: list[str], change: Callable[[bytes], bytes]
) -> None:
    ask(Entry(MODULE, "total"))
    (file,) = kept.glob("*.o")
    sound = file.read_bytes()
    file.write_bytes(change(sound))
    assert ask(Entry(MODULE, "total")) == TOTAL
    assert compiled == ["total"] * 2
    assert [each for each in kept.iterdir() if each.suffix != ".lock"] == [file]
    assert len(file.read_bytes()) == len(sound)


def test_changed_sources_are_compiled(kept: Path, compiled: list[str]) -> None:
    """Of as many bytes, and as old."""
    ask(Entry(MODULE, "total"))
    source = kept.parent / f"{MODULE}.py"
    times = source.stat()
    source.write_text(SOURCE.replace("1000 *", "2000 *"))
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    sys.modules.pop(MODULE)
    importlib.invalidate_caches()
    shutil.rmtree(source.parent / "__pycache__", ignore_errors=True)
    assert ask(Entry(MODULE, "total"), np.zeros(3)) == TOTAL + 6000
    assert compiled == ["total"] * 2


def test_where_code_is_kept(
    kept: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the module, with the user where that cannot be, and nowhere."""
    home, beside = kept.parent / "home", kept.parent / "__pycache__"
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))

    def files() -> list[str]:
        return [str(each.parent.relative_to(kept.parent)) for each in kept.parent.rglob("*.o")]

    ask(Entry(MODULE, "total"))
    assert files() == ["__pycache__"]
    shutil.rmtree(beside)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    beside.write_bytes(b"no folder")
    for _ in range(2):
        assert ask(Entry(MODULE, "total")) == TOTAL
    assert files() == ["home/mergebench/kernels"]
    assert compiled == ["total"] * 2

    def homeless(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "expanduser", homeless)
    assert ask(Entry(MODULE, "total")) == TOTAL
    assert compiled == ["total"] * 3


def test_who_waits_too_long_compiles(
    kept: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "_PATIENCE", 0.2)
    kept.mkdir()
    monkeypatch.setattr(Path, "with_suffix", lambda path, suffix: kept / f"all{suffix}")
    with (kept / "all.lock").open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert ask(Entry(MODULE, "total")) == TOTAL
    assert compiled == ["total"]


def test_nothing_can_be_kept(kept: Path, compiled: list[str]) -> None:
    kept.write_bytes(b"a file, where a folder is to be")
    for _ in range(2):
        assert ask(Entry(MODULE, "total")) == TOTAL
    assert compiled == ["total"] * 2


def test_numba_does_what_cannot_be_kept(
    kept: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arrays of its own, other results, functions and calls, and wishes that it is to follow."""
    entry = Entry(MODULE, "allocates")
    assert [entry(np.arange(4)), entry(np.arange(5))] == [4, 5]
    assert Entry(MODULE, "half")(np.arange(8)) == 4
    assert Entry(MODULE, "rest")(np.arange(5.0)) == (0 + 1 + 2 + 0 + 1) + (0 + 1 + 2 + 5 + 8)
    numbas = ["allocates", "half", "rest"]
    assert compiled == numbas
    monkeypatch.setenv("NUMBA_OPT", "1")
    assert ask(Entry(MODULE, "total")) == TOTAL
    assert compiled == numbas
    monkeypatch.delenv("NUMBA_OPT")
    real = jit.machine_code

    def otherwise(*given: Any) -> Any:
        code, data = real(*given)
        return replace(code, types=code.types[:-1]), data

    monkeypatch.setattr(jit, "machine_code", otherwise)
    assert ask(Entry(MODULE, "total")) == TOTAL
    # That it is called in another way is kept, too.
    monkeypatch.setattr(jit, "machine_code", real)
    assert ask(Entry(MODULE, "total")) == TOTAL
    assert compiled == [*numbas, "total"]


def test_what_fails(kept: Path) -> None:
    entry = Entry(MODULE, "fails")
    assert entry(np.arange(2)) == 2
    with pytest.raises(RuntimeError, match=r"^fails: ended with error \d+$"):
        entry(np.arange(3))
    assert entry(np.arange(1)) == 1
