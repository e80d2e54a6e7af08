"""From what a user writes to a task."""

from __future__ import annotations

import hashlib
import importlib
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from mergebench.core.errors import MergebenchError, ParameterError
from mergebench.core.registry import Registry
from mergebench.merge.fit.task import Scorer, Task


@dataclass(frozen=True)
class Setting:
    """What built-in tasks are told.

    Attributes
    ----------
    base : Path or None
        Folder of the base, for architecture, tokenizer and frozen heads.
    limit : int or None
        Most examples of a split.
    batch : int
        Examples at a time.
    timeout : float or None
        Seconds that a command may take.
    """

    base: Path | None = None
    limit: int | None = None
    batch: int = 32
    timeout: float | None = None


#: Built-in tasks by the word before the colon; each is made from what follows it.
TASKS: Registry[Callable[[str, Setting], Any]] = Registry(
    "built-in task", "mergebench.merge.fit.tasks", "mergebench.tasks"
)
_NAMED = re.compile(r"(?P<name>[\w.-]+)=(?P<spec>.+)", re.DOTALL)
_MODULE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def parse_task(text: str, setting: Setting) -> Task:
    """A task from ``[NAME=]SPEC``.

    SPEC is a command with ``{path}`` in it, ``KIND:…`` for a built-in kind, a file ``eval.py`` or
    ``eval.py:factory``, or ``package.module:factory``. A factory is called without arguments and
    returns a :class:`~mergebench.merge.fit.task.Scorer`; in a file it is ``task`` unless named.

    Raises
    ------
    ParameterError
        If it is none of these, or a module, file or factory is not there.
    MergebenchError
        If what is there fails, or returns no scorer.
    """
    match = _NAMED.fullmatch(text)
    spec = match["spec"] if match else text
    kind, colon, rest = spec.partition(":")
    if "{path}" in spec:
        scorer, about = TASKS["command"](spec, setting), spec
    elif colon and kind in TASKS:
        scorer = TASKS[kind](rest, setting)
        about = f"{spec} limit={setting.limit} {getattr(scorer, 'identity', '')}"
    elif kind.endswith(".py"):
        path = Path(kind).expanduser()
        scorer, read = _of_file(path, rest or "task")
        about = f"{path.resolve()}:{rest or 'task'} {_code(scorer, read)}"
    elif _MODULE.fullmatch(spec):
        scorer, read = _call(spec, partial(_of_module, kind, rest))
        about = f"{spec} {_code(scorer, read)}"
    else:
        raise ParameterError(
            f"--task: {spec!r} is no task",
            expected="a command with {path}, "
            + ", ".join(f"{name}:…" for name in TASKS if name != "command")
            + ", FILE.py[:factory] or module:factory",
        )
    if not isinstance(scorer, Scorer):
        raise MergebenchError(
            f"task {spec}: has no method `score(model, split)`", got=type(scorer).__name__
        )
    return Task(match["name"] if match else _name(spec), scorer, about)


def _name(spec: str) -> str:
    """Something short to call a task that was given no name."""
    stem = Path((spec.partition(":")[2] or spec).split(" ", maxsplit=1)[0]).stem
    return re.sub(r"[^\w.-]+", "-", stem).strip("-") or "task"


def _code(scorer: Any, read: Iterable[bytes]) -> str:
    """A digest of the source of a task: what has its factory, and what has its class.

    A scorer may add an ``identity`` of its own: of data, or of modules that it imports.
    """
    sources = set(read) | _source_of(type(scorer).__module__)
    digest = hashlib.blake2b(digest_size=8)
    for each in sorted(sources):
        digest.update(hashlib.blake2b(each).digest())
    return f"{digest.hexdigest()} {getattr(scorer, 'identity', '')}".rstrip()


def _source_of(module: str) -> set[bytes]:
    """The bytes of a module's file, or of the compiled library it is."""
    place = getattr(sys.modules.get(module), "__file__", None)
    if place is None:
        return set()
    try:
        return {Path(place).read_bytes()}
    except OSError:
        # Such as within a zip file: its place is all that is known.
        return {place.encode()}


def _of_file(path: Path, factory: str) -> tuple[Any, set[bytes]]:
    try:
        source = path.read_bytes()
    except OSError as error:
        raise ParameterError(f"--task: {path} cannot be read", got=str(error.strerror)) from None
    name = f"_mergebench_task_{hashlib.blake2b(str(path.resolve()).encode()).hexdigest()[:16]}"
    loader = SourceFileLoader(name, str(path))
    module = ModuleType(name)
    module.__file__ = str(path)

    def make() -> Any:
        # Dataclasses and pickles of its objects look their module up by name.
        sys.modules[name] = module
        # What was read, not bytecode that is kept of it: a change within a second would be missed.
        exec(loader.source_to_code(source, str(path)), vars(module))  # noqa: S102 - the user's own
        return _made(module, factory)

    scorer, read = _call(f"{path}:{factory}", make)
    return scorer, {source, *read}


def _of_module(module: str, factory: str) -> tuple[Any, set[bytes]]:
    return _made(importlib.import_module(module), factory)


def _made(module: ModuleType, factory: str) -> tuple[Any, set[bytes]]:
    """What a factory returns, and the sources of where it was looked for and where it is."""
    made = getattr(module, factory)
    at = getattr(made, "__module__", None) or module.__name__
    return made(), _source_of(module.__name__) | _source_of(at)


def _call(spec: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except MergebenchError:
        raise
    except Exception as error:
        raise MergebenchError(
            f"task {spec}: could not be made", got=f"{type(error).__name__}: {error}"
        ) from error
