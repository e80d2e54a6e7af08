"""Inputs that are written once, and outputs of runs that nothing disturbed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.faults.merges import MERGES, build_inputs, state

Expected = Callable[[str], dict[str, bytes | None]]


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two fine-tunes and two adapters."""
    return build_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def expected(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Expected:
    """What an undisturbed run of a merge leaves, by the name of the merge."""
    places = tmp_path_factory.mktemp("expected")

    @cache
    def of(name: str) -> dict[str, bytes | None]:
        place = MERGES[name].prepare(places / name, inputs)
        MERGES[name].run(inputs, place)
        return state(place)

    return of
