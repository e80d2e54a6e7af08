"""Interrupted merges: nothing half-done is left."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.compare import assert_files
from tests.helpers.files import Array, listing, tree, write
from tests.helpers.running import COMMAND, Ran, clean_environment

ENTRIES = 3_000_000


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two fine-tunes that take a while to merge."""
    folder = tmp_path_factory.mktemp("large")
    random = np.random.default_rng(0)
    base = random.standard_normal(ENTRIES, np.float32)
    for name in ("base", "ft1", "ft2"):
        arrays: dict[str, Array] = {
            f"layers.{layer}.weight": base + random.standard_normal(ENTRIES, np.float32)
            for layer in range(3)
        }
        write(folder / f"{name}.safetensors", arrays)
    return folder


def interrupted(place: Path, *extra: str) -> Ran:
    """Start a merge and interrupt it as soon as it has begun to write."""
    with subprocess.Popen(
        [
            *(COMMAND, "merge", "ft1.safetensors", "ft2.safetensors", "-b", "base.safetensors"),
            *("-m", "ties", "--workers", "1", *extra),
        ],
        cwd=place,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while process.poll() is None and not list(place.rglob(".*mergebench-part")):
            time.sleep(0.002)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    return Ran(process.returncode, out, err)


@pytest.mark.parametrize(
    ("out", "extra"),
    [("out", ()), ("out.safetensors", ()), ("deep/down/out", ()), ("out", ("--page-cache", "1B"))],
)
def test_interrupt_leaves_nothing(place: Path, out: str, extra: tuple[str, ...]) -> None:
    """Ctrl-C exits 130 with one line; no output, no hidden file, no new folder remains."""
    before = listing(place)

    ran = interrupted(place, "-o", out, *extra)

    assert ran == Ran(130, "", "error: interrupted; nothing was written\n")
    assert listing(place) == before


def test_interrupt_keeps_what_was_to_be_replaced(place: Path) -> None:
    """With --force the earlier output survives an interrupt, byte for byte."""
    small = write(place / "kept" / "model.safetensors", {"w": np.zeros(4, np.float32)})
    before = tree(small.parent)

    ran = interrupted(place, "-o", "kept", "--force")

    assert ran.code == 130
    assert_files(tree(small.parent), before)


def test_interrupt_of_a_sweep(place: Path) -> None:
    """Of several outputs none is left behind either."""
    before = listing(place)

    ran = interrupted(place, "-o", "swept", "-p", "lam=0.5,1")

    assert ran.code == 130
    assert listing(place) == before
