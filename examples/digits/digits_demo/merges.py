"""The merges of the demonstration, each one call of the installed ``mergebench`` command."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .experts import family
from .settings import Settings


@dataclass(frozen=True)
class Merge:
    """One method on one kind of expert.

    ``grid`` holds the values of λ as text; empty means that the method has none. ``rank`` None
    merges the full fine-tunes, a number merges the LoRAs of that rank.
    """

    title: str
    method: str
    grid: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    rank: int | None = None

    @property
    def name(self) -> str:
        """A short name, unique in the demonstration, used for folders and results."""
        return f"{self.method}-{family(self.rank)}"


def merges(settings: Settings) -> list[Merge]:
    """List every merge in the order of the table."""
    density = ("density=0.2",)
    full = [
        Merge("Uniform soup", "linear"),
        Merge("Task arithmetic", "task_arithmetic", settings.sum_grid),
        Merge("TIES", "ties", settings.ties_grid, density),
        Merge("Breadcrumbs", "breadcrumbs", settings.sum_grid),
    ]
    adapters = [
        merge
        for rank in settings.ranks
        for merge in (
            Merge(
                f"Task arithmetic, LoRA r={rank}", "task_arithmetic", settings.sum_grid, (), rank
            ),
            Merge(f"TIES, LoRA r={rank}", "ties", settings.ties_grid, density, rank),
        )
    ]
    return full + adapters


def find_command() -> str:
    """Return the ``mergebench`` beside this Python, or else the one on the path."""
    beside = Path(sys.executable).with_name("mergebench")
    found = str(beside) if beside.exists() else shutil.which("mergebench")
    if found is None:
        raise FileNotFoundError("no `mergebench` command: install the package first")
    return found


def arguments(merge: Merge, experts: Sequence[Path], base: Path, out: Path) -> list[str]:
    """Return the command line of ``merge``, without the program's name."""
    line = ["merge", *map(str, experts), "--method", merge.method]
    if merge.grid:
        line += ["--base", str(base)]
        for option in (*merge.options, f"lam={','.join(merge.grid)}"):
            line += ["-p", option]
    if merge.rank is not None:
        line += ["--as", "model"]
    return [*line, "-o", str(out), "--quiet"]


def outputs(merge: Merge, out: Path) -> dict[str, Path]:
    """Map each λ of ``merge`` (or ``""``) to the folder that the command fills."""
    if len(merge.grid) > 1:
        return {lam: out / f"lam={lam}" for lam in merge.grid}
    return {(merge.grid[0] if merge.grid else ""): out}


def run_merge(merge: Merge, experts: Sequence[Path], base: Path, out: Path) -> dict[str, Path]:
    """Merge into ``out``, replacing what is there, and return :func:`outputs`."""
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    line = [find_command(), *arguments(merge, experts, base, out)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(line)}\nexited {done.returncode}:\n{done.stderr}")
    return outputs(merge, out)
