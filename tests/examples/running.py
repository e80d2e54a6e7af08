"""Runs of examples that several tests look at."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

#: Stands before a script that calls the command many times.
DRIVER = Path(__file__).with_name("driver.py")


def ran_once(
    factory: pytest.TempPathFactory, name: str, line: Callable[[Path], Sequence[object]]
) -> tuple[Path, Path, str]:
    """Work folder, output and printed text of a script.

    It runs once, also where several processes share the tests, each of which has a copy. ``line``
    prepares a folder, and says what Python is told.
    """
    own = factory.mktemp(name)
    session = own.parent.parent if "PYTEST_XDIST_WORKER" in os.environ else own.parent
    first = session / f"{name}-once"
    with (session / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (first / "printed").exists():
            told = [sys.executable, *line(first), "--work", first / "work", "--out", first / "out"]
            done = subprocess.run([*map(str, told)], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            (first / "printed").write_text(done.stdout)
    shutil.copytree(first, own, dirs_exist_ok=True)
    return own / "work", own / "out", (own / "printed").read_text()
