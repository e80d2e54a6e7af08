"""Registries of things that live one to a file: methods, ops, adapter kinds, diagnostics."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from importlib.metadata import entry_points
from threading import RLock
from typing import Generic, TypeVar

from mergebench.core.errors import ParameterError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """Named entries, filled by importing every module of a leaf folder once.

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
            package = importlib.import_module(self.package)
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{self.package}.{module.name}")
            for point in entry_points(group=self.group):
                point.load()

    def __getitem__(self, name: str) -> T:
        self._load()
        try:
            return self._entries[name]
        except KeyError:
            raise ParameterError(
                f"no {self.noun} {name!r}", fix=did_you_mean(name, self._entries)
            ) from None

    def __contains__(self, name: str) -> bool:
        self._load()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(sorted(self._entries))
