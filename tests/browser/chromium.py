"""A headless Chromium, as tests/browser/install.sh brings it along."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TOOLS = HERE / ".tools"
INSTALL = "run tests/browser/install.sh, as `make test` does"
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")


class MissingError(Exception):
    """A browser, its driver or axe-core is not installed."""


def axe_source() -> str:
    """The script of axe-core.

    Raises
    ------
    MissingError
    """
    found = sorted(TOOLS.glob("axe-*.js"))
    if not found:
        raise MissingError(f"axe-core is not installed; {INSTALL}")
    return found[-1].read_text(encoding="utf-8")


def places() -> tuple[str, str, dict[str, str]]:
    """Where browser and driver are, and what their environment needs.

    Raises
    ------
    MissingError
    """
    driver = shutil.which("chromedriver")
    browser = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if driver and browser:
        return browser, driver, dict(os.environ)
    below = TOOLS / "unpacked"
    driver, browser = (below / place for place in ("usr/bin/chromedriver",
                                                    "usr/lib/chromium/chromium"))  # fmt: skip
    if not (driver.exists() and browser.exists()):
        raise MissingError(f"Chromium and its driver are not installed; {INSTALL}")
    folders = {each.parent for each in below.glob("**/*-linux-*/**/*.so*")}
    libraries = sorted(map(str, folders), key=len)
    fonts = {"FONTCONFIG_SYSROOT": str(below)} if (below / "etc/fonts").is_dir() else {}
    return str(browser), str(driver), os.environ | fonts | {"LD_LIBRARY_PATH": ":".join(libraries)}


def start(profile: Path) -> Any:
    """A driver of a browser without a window; ``quit`` it.

    Parameters
    ----------
    profile : Path
        A folder of its own for what it keeps.

    Raises
    ------
    MissingError
    """
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService

    browser, driver, environment = places()
    options = ChromeOptions()
    options.binary_location = browser
    for each in (
        "--headless=new",
        "--no-sandbox",  # root has none, and only our own page is opened
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--disable-background-networking",
        "--hide-scrollbars",
        f"--user-data-dir={profile}",
    ):
        options.add_argument(each)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # Both paths are given, so that selenium looks for nothing and downloads nothing.
    return Chrome(options, ChromeService(executable_path=driver, env=environment))
