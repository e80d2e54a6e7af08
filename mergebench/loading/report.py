"""What a library says of a model that it is to load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any
from warnings import catch_warnings, simplefilter

from mergebench.core.errors import MergebenchError
from mergebench.packages import install_line

Shape = tuple[int, ...]
#: Library -> the extra that brings it along.
EXTRAS = {
    "transformers": "eval",
    "diffusers": "diffusers",
    "peft": "peft",
    "accelerate": "eval",
    "lm_eval": "eval",
}


class NotCheckedError(MergebenchError):
    """Nothing can be said about loading: a library or a config is missing."""


@dataclass(frozen=True)
class Loaded:
    """What a library says of a model.

    Attributes
    ----------
    library, version, architecture : str
    tensors : int
        Stored tensors that were compared.
    missing, unexpected : tuple of str
        Parameters that no stored tensor gives, and stored tensors that no parameter takes; tied
        weights and names that the library converts are in neither.
    misshapen : tuple of (name, stored shape, expected shape)
    errors : tuple of str
        What the library says where it refuses the model as a whole.
    notes : tuple of str
    """

    library: str
    version: str
    architecture: str
    tensors: int = 0
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    misshapen: tuple[tuple[str, Shape, Shape], ...] = ()
    errors: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def findings(self) -> int:
        """How many names and errors there are."""
        return sum(map(len, (self.missing, self.unexpected, self.misshapen, self.errors)))

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "library": self.library,
            "version": self.version,
            "architecture": self.architecture,
            "tensors": self.tensors,
            "missing": list(self.missing),
            "unexpected": list(self.unexpected),
            "misshapen": [
                {"name": name, "stored": list(stored), "expected": list(expected)}
                for name, stored, expected in self.misshapen
            ],
            "errors": list(self.errors),
            "notes": list(self.notes),
        }


def without_inherited(found: Loaded, origins: Sequence[tuple[str, Loaded]]) -> Loaded:
    """The report without names that are missing, or unexpected, in every input alike.

    Parameters
    ----------
    found : Loaded
    origins : sequence of (label, Loaded)
        Of the inputs.
    """
    if not origins:
        return found
    kept: dict[str, Any] = {}
    notes = list(found.notes)
    labels = ", ".join(label for label, _ in origins)
    for what in ("missing", "unexpected"):
        common = set.intersection(*(set(getattr(each, what)) for _, each in origins))
        names = getattr(found, what)
        same = sorted(common.intersection(names))
        kept[what] = tuple(name for name in names if name not in common)
        if same:
            notes.append(f"{len(same)} {what} as in {labels}: {few(same)}")
    return replace(found, **kept, notes=tuple(notes))


def few(names: Sequence[str], most: int = 3) -> str:
    """The first names of a list."""
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def compared(stored: Mapping[str, Shape], expected: Mapping[str, Shape]) -> dict[str, Any]:
    """The fields of :class:`Loaded` that a comparison of names and shapes gives."""
    return {
        "tensors": len(stored),
        "missing": tuple(sorted(expected.keys() - stored.keys())),
        "unexpected": tuple(sorted(stored.keys() - expected.keys())),
        "misshapen": tuple(
            (name, stored[name], expected[name])
            for name in sorted(stored.keys() & expected.keys())
            if stored[name] != expected[name]
        ),
    }


def need(*libraries: str) -> str:
    """The version of the first library.

    Raises
    ------
    NotCheckedError
        If one is not installed, naming the extra.
    """
    for name in libraries:
        if find_spec(name) is None:
            raise NotCheckedError(
                f"{name} is not installed, so nothing can be loaded with it",
                fix=install_line(EXTRAS[libraries[0]]),
            )
    return version(libraries[0])


def first_line(error: Exception) -> str:
    """Class and first line of another library's error."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}".rstrip(": ")


@contextmanager
def silent(*loggings: Any) -> Iterator[None]:
    """Without warnings, bars and reports of libraries, whose settings are put back."""
    before = [(each, each.get_verbosity(), each.is_progress_bar_enabled()) for each in loggings]
    try:
        for each in loggings:
            each.set_verbosity(60)
            each.disable_progress_bar()
        with catch_warnings():
            simplefilter("ignore")
            yield
    finally:
        for each, verbosity, bars in before:
            each.set_verbosity(verbosity)
            if bars:
                each.enable_progress_bar()
