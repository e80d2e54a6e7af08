"""What is said where Chromium or axe-core is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.browser import chromium


def test_what_is_missing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither is looked for on the network: an error names the script that installs both."""
    monkeypatch.setattr(chromium, "TOOLS", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))

    for function, what in ((chromium.axe_source, "axe-core"), (chromium.places, "Chromium")):
        with pytest.raises(chromium.MissingError, match=rf"{what} .*tests/browser/install\.sh"):
            function()


def test_what_is_on_the_path_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A browser and a driver of the system come before those of the tests."""
    for name in ("chromedriver", "google-chrome"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))

    browser, driver, environment = chromium.places()

    assert (browser, driver) == (str(tmp_path / "google-chrome"), str(tmp_path / "chromedriver"))
    assert environment["PATH"] == str(tmp_path)
