"""Registries of things that live one to a file: methods, ops, adapter kinds, diagnostics."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Iterator
from importlib.metadata import entry_points
from threading import RLock
from typing import Generic, TypeVar

from mergebench.core.errors import ParameterError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """Named entries, filled by importing the modules of a leaf folder when they are asked for.

    Parameters
    ----------
    noun : str
        What an entry is called in messages, such as ``"merge method"``.
    package : str
        The leaf folder whose modules register entries when imported.
    group : str
        Entry-point group through which other distributions add entries.
    """

    def __init__(self, noun: str, package: str, group: str) -> None:
        self.noun, self.package, self.group = noun, package, group
        self._entries: dict[str, T] = {}
        self._loaded = False
        # Held while modules are imported: another thread must wait for all of them.
        self._loading = RLock()

    def add(self, name: str, entry: T) -> T:
        """Register ``entry``; a second entry of one name is a programming error."""
        if name in self._entries:
            raise ValueError(f"{self.noun} {name!r} is registered twice")
        self._entries[name] = entry
        return entry

    def _load(self) -> None:
        with self._loading:
            if self._loaded:
                return
            self._loaded = True
            try:
                package = importlib.import_module(self.package)
                for module in pkgutil.iter_modules(package.__path__):
                    importlib.import_module(f"{self.package}.{module.name}")
                for point in entry_points(group=self.group):
                    point.load()
            except BaseException:
                # What is wrong with one is said again, rather than that the others are unknown.
                self._loaded = False
                raise

    def _find(self, name: str) -> T | None:
        # The smallest merge asks hundreds of times.
        if (found := self._entries.get(name)) is not None:
            return found
        with self._loading:
            if not self._loaded and isinstance(name, str) and name.isidentifier():
                # Nearly all stand in a module of their name, and importing all takes long.
                where = f"{self.package}.{name}"
                if importlib.util.find_spec(where) is not None:
                    importlib.import_module(where)
            if name not in self._entries:
                self._load()
        return self._entries.get(name)

    def __getitem__(self, name: str) -> T:
        found = self._find(name)
        if found is None:
            raise ParameterError(
                f"no {self.noun} {name!r}", fix=did_you_mean(str(name), self._entries)
            )
        return found

    def __contains__(self, name: str) -> bool:
        return self._find(name) is not None

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(sorted(self._entries))
