"""One browser for all tests of a process, and the pages they look at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.browser.chromium import MissingError, axe_source, start
from tests.browser.looking import View
from tests.helpers.files import F32, write
from tests.helpers.running import assert_done, call
from tests.helpers.scene import build_scene

#: Names that would run, close an element, turn text around or be a formula if they were not text.
HOSTILE = (
    'layers.0.<img src=x onerror="window.ran=1">"\'</script><script>window.ran=2</script>.weight',
    "layers.0.&lt;b&gt;\u202egnp.$\\frac{1}{2}$.weight",
)


@dataclass(frozen=True)
class Page:
    """A report and the JSON of the same run."""

    path: Path
    data: Any


@pytest.fixture(scope="session")
def view(tmp_path_factory: pytest.TempPathFactory) -> Iterator[View]:
    """A headless Chromium; where it is missing every test fails, and says what to do."""
    missing, driver = "", None
    try:
        axe = axe_source()
        driver = start(tmp_path_factory.mktemp("profile"))
    except MissingError as error:
        missing = str(error)
    if driver is None:
        pytest.fail(missing, pytrace=False)
    yield View(driver, axe)
    driver.quit()


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Page]:
    """A report of two models, and one whose names are hostile."""
    folder = tmp_path_factory.mktemp("reports")
    build_scene(folder)
    random = np.random.default_rng(0)
    for file in ("hostile-base", "<b>hostile&"):
        arrays = {name: random.standard_normal((12, 12)).astype(F32) for name in HOSTILE}
        write(folder / f"{file}.safetensors", arrays)
    found = {}
    for name, options in (
        ("models", ("ft1", "ft2", "-b", "base", "--epsilon", "0.9,0.97")),
        ("hostile", ("<b>hostile&.safetensors", "-b", "hostile-base.safetensors")),
    ):
        page = folder / f"{name}.html"
        ran = call("spectral", *options, "--no-cache", "--json", "--html", page, cwd=folder)
        found[name] = Page(page, assert_done(ran).json)
    return found
