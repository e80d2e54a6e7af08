"""Registries import what is asked for, and everything only where that does not say enough."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from mergebench.core.errors import ParameterError
from mergebench.core.registry import Registry

_MODULE = "from {package} import shelf\nfor name in {names}: shelf.add(name, name.upper())\n"


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry[str]:
    """A registry whose modules register the names listed here."""
    package = tmp_path / "things_of_a_test"
    package.mkdir()
    (package / "__init__.py").write_text("")
    for module, names in {"one": ["one"], "two": ["two", "also"], "three": ["three"]}.items():
        text = _MODULE.format(package=package.name, names=names)
        (package / f"{module}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    found: Registry[str] = Registry("thing", package.name, "things.of.a.test")
    monkeypatch.setattr(__import__(package.name), "shelf", found, raising=False)
    yield found
    for name in [name for name in sys.modules if name.partition(".")[0] == package.name]:
        del sys.modules[name]


def imported() -> set[str]:
    """Modules of the package that have been imported."""
    return {name.partition(".")[2] for name in sys.modules if name.startswith("things_of_a_test.")}


def test_one_is_imported_alone(shelf: Registry[str]) -> None:
    assert shelf["one"] == "ONE"
    assert "one" in shelf
    assert imported() == {"one"}


def test_what_stands_elsewhere_is_found(shelf: Registry[str]) -> None:
    assert shelf["also"] == "ALSO"
    assert imported() == {"one", "two", "three"}
    assert list(shelf) == ["also", "one", "three", "two"]


@pytest.mark.parametrize("name", ["tow", "one.py", "", "..one", "__init__", 5, None])
def test_what_is_not_there(shelf: Registry[str], name: Any) -> None:
    assert name not in shelf
    with pytest.raises(ParameterError, match="no thing"):
        shelf[name]


def test_what_is_wrong_with_one_is_said_again(shelf: Registry[str], tmp_path: Path) -> None:
    """Rather than that all others are unknown."""
    again = _MODULE.format(package="things_of_a_test", names=["one"])
    (tmp_path / "things_of_a_test" / "zero.py").write_text(again)
    assert shelf["one"] == "ONE"
    for _ in range(2):
        with pytest.raises(ValueError, match="'one' is registered twice"):
            list(shelf)
