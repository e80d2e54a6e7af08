"""Compiled functions kept as machine code, which is loaded and called without their compiler.

Importing numba, and letting it load what it has kept, takes 0.8 s of every process. llvmlite, by
which it compiles, links machine code in 0.1 s. A function is called as numba calls it (its
documented calling convention): the types of its arguments are compared before it is.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import Any

from mergebench.compute.linking import Arguments, Call, Code, linked, plain
from mergebench.core.cache_folder import cache_folder

#: Entries, over all models and passes, that are done with otherwise before code is loaded.
WORTHWHILE = 1 << 24
#: Bytes of a file that is none of ours: functions take a tenth of a megabyte.
_MOST = 1 << 24
#: Modules that decide how code is compiled, kept and called.
_OWN = ("jit", "linking", "objects")
#: Seconds to wait for another process that compiles the same.
_PATIENCE = 120.0


class Entry:
    """A function of a module of kernels, compiled or loaded when it is first called.

    Parameters
    ----------
    module, name : str
        Of the function, which :mod:`mergebench.compute.jit` compiles. It takes arrays, booleans,
        integers, ``None`` and tuples of these, some of them maybe as
        :class:`~mergebench.compute.linking.Held`, and gives an integer.
    """

    #: One is found at a time, as numba compiles one at a time.
    _finding = Lock()

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name
        self._known: dict[Any, Call] = {}
        self._arguments = Arguments()

    def __call__(self, *given: Any) -> int:
        """Call it; arguments of other types are another function.

        Raises
        ------
        TypeError, OverflowError
            If it takes no such arguments.
        RuntimeError
            If what was kept ends with an error; numba raises the error itself.
        """
        kinds, values = self._arguments.of(given)
        known = self._known.get(kinds)
        if known is None:
            with Entry._finding:
                known = self._known.get(kinds) or self._found(kinds, plain(given))
                self._known[kinds] = known
        return known(given, values)

    def _found(self, kinds: Sequence[str], given: Sequence[Any]) -> Call:
        if _told():
            # What numba is told would not hold for what was kept.
            return self._by_numba()
        places = _places(self.module, self.name, kinds)
        made = _kept(places)
        if made is None:
            # Workers of one machine begin together, and one of them is to compile.
            with _alone(places):
                made = _kept(places) or self._made(given, places)
        code, data = made
        if code.fits(given):
            with suppress(ValueError, RuntimeError):
                return linked(code, data)
        return self._by_numba()

    def _made(self, given: Sequence[Any], places: Sequence[Path]) -> tuple[Code, bytes]:
        from mergebench.compute.jit import machine_code

        made = machine_code(self._function(), given)
        for place in places:
            with suppress(OSError):
                _write(place, *made)
                break
        return made

    def _function(self) -> Any:
        return getattr(import_module(self.module), self.name)

    def _by_numba(self) -> Call:
        function = self._function()
        return lambda given, _: int(function(*plain(given)) or 0)


def _renew() -> None:
    Entry._finding = Lock()


# A child must not wait for a thread that only its parent has.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


def _told() -> bool:
    """Whether numba was told how to compile."""
    names = (name for name in os.environ if name.startswith("NUMBA_"))
    return any(name != "NUMBA_CACHE_DIR" for name in names) or Path(".numba_config.yaml").exists()


def _places(module: str, name: str, kinds: Sequence[str]) -> list[Path]:
    """Where code of these sources for this machine may be; nowhere if it cannot be told apart."""
    try:
        source = _source(module)
        here = Path(__file__).parent
        files = {*source.parent.glob("*.py"), *(here / f"{each}.py" for each in _OWN)}
        texts = [each.read_bytes() for each in sorted(files)]
        about = hashlib.sha256(repr((kinds, *_machine())).encode())
    except (ImportError, OSError, RuntimeError):
        return []
    for text in texts:
        about.update(hashlib.sha256(text).digest())
    file = f"{module.rpartition('.')[2]}.{name}-{about.hexdigest()[:24]}.o"
    return [folder / file for folder in _folders(source)]


@cache
def _machine() -> tuple[str, ...]:
    """What compiles, and for which processor."""
    from llvmlite import binding

    return (
        *(version(each) for each in ("numba", "llvmlite", "numpy")),
        binding.get_default_triple(),
        binding.get_host_cpu_name(),
        binding.get_host_cpu_features().flatten(),
    )


def _folders(source: Path) -> Iterator[Path]:
    """Where numba is told to keep code, else beside the module, else with the user."""
    if asked := os.environ.get("NUMBA_CACHE_DIR", ""):
        yield Path(asked)
        return
    yield source.parent / "__pycache__"
    # Who has no home keeps nothing there.
    with suppress(RuntimeError):
        yield cache_folder() / "kernels"


def _source(module: str) -> Path:
    # Found, not imported, which would import the compiler.
    found = importlib.util.find_spec(module)
    if found is None or not found.origin:
        raise OSError(module)
    return Path(found.origin)


@contextmanager
def _alone(places: Iterable[Path]) -> Iterator[None]:
    """Hold a lock, so that other processes wait for this one's code rather than make it too.

    Who waits too long, or where there are no locks, makes it: files appear whole.
    """
    with ExitStack() as stack:
        for place in places:
            with suppress(ImportError, OSError):
                import fcntl

                place.parent.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(place.with_suffix(".lock").open("ab"))
                end = time.monotonic() + _PATIENCE
                while time.monotonic() < end:
                    try:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        time.sleep(0.05)
                    else:
                        # Closing would not do, where a fork has a copy.
                        stack.callback(fcntl.flock, file, fcntl.LOCK_UN)
                        break
                break
        yield


def _kept(places: Iterable[Path]) -> tuple[Code, bytes] | None:
    for place in places:
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            return _read(place)
    return None


def _read(place: Path) -> tuple[Code, bytes]:
    """What was kept.

    Raises
    ------
    OSError, ValueError, KeyError, TypeError, RecursionError
        If it is not there, or damaged.
    """
    if place.stat().st_size > _MOST:
        raise ValueError(place)
    head, _, data = place.read_bytes().partition(b"\n")
    found = json.loads(head)
    if found["sha256"] != hashlib.sha256(data).hexdigest():
        raise ValueError(place)
    name, symbol, result = (str(found[each]) for each in ("name", "symbol", "result"))
    types, outside = (tuple(map(str, found[each])) for each in ("types", "outside"))
    return Code(name, symbol, result, types, outside), data


def _write(place: Path, code: Code, data: bytes) -> None:
    head = {"sha256": hashlib.sha256(data).hexdigest(), **asdict(code)}
    place.parent.mkdir(parents=True, exist_ok=True)
    part = place.with_name(f".{place.name}-{secrets.token_hex(4)}-part")
    try:
        part.write_bytes(json.dumps(head).encode() + b"\n" + data)
        part.replace(place)
    finally:
        part.unlink(missing_ok=True)
