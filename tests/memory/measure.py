"""The peak of anonymous memory of a command, above the imported libraries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers.forked import forked
from tests.helpers.running import Ran

MIB = 1 << 20
#: The libraries are imported first, once for many processes.
READY = """
import threading
import psutil
import rich.console
import typer.main

import mergebench.compute.decompose
import mergebench.merge.engine
import mergebench.merge.many.numbered
import mergebench.merge.planning
from mergebench.adapters_zoo.adapter import KINDS
from mergebench.cli.main import app, main
from mergebench.merge.kernels import ready
from mergebench.merge.method import METHODS
from mergebench.merge.op import OPS

typer.main.get_command(app)
loaded = len(list(METHODS)) + len(list(OPS)) + len(list(KINDS))
# A compiler is a library too.
assert ready.kernels() is not None
assert ready.kernels(rows=True) is not None
"""
# Then a thread looks at the process every few milliseconds.
_CODE = """
import sys, threading
from pathlib import Path

import psutil

from mergebench.cli.start import main

status = Path("/proc/self/status")

def anonymous():
    if not status.exists():
        return psutil.Process().memory_full_info().uss
    for line in status.read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10

peak = baseline = anonymous()
done = threading.Event()

def watch():
    global peak
    while not done.wait(0.003):
        peak = max(peak, anonymous())

watcher = threading.Thread(target=watch)
watcher.start()
try:
    main()
except SystemExit as end:
    code = end.code or 0
finally:
    done.set()
    watcher.join()
print("peak above baseline:", max(peak, anonymous()) - baseline)
sys.exit(code)
"""


@dataclass(frozen=True)
class Measured:
    """What a command did, and the most anonymous memory it held above the libraries, in bytes."""

    ran: Ran
    peak: int


def measure(arguments: Sequence[Any], cwd: Path, before: str = "") -> Measured:
    """Run the command in a process that watches itself, after some Python of the caller's."""
    ran = forked(before + READY)(_CODE, *arguments, cwd=cwd)
    lines = [line for line in ran.out.splitlines() if line.startswith("peak above baseline: ")]
    assert len(lines) == 1, ran
    return Measured(ran, int(lines[0].rsplit(None, 1)[1]))


def assert_within(measured: Measured, limit: int) -> None:
    """The command succeeded and stayed within the limit."""
    assert measured.ran.code == 0, measured.ran
    assert 0 < measured.peak <= limit, f"{measured.peak / MIB:.0f} MiB of {limit / MIB:.0f} MiB"
