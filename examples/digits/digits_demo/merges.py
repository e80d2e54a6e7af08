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

    ``grid`` holds the values of λ as text, or those of the parameter ``over``; empty means that
    nothing is searched. ``rank`` None merges the full fine-tunes, a number merges the LoRAs of
    that rank. ``then`` names ops that follow, and ``based`` is for methods without λ that need
    the base. ``apart`` methods give every domain a model of its own.
    """

    title: str
    method: str
    grid: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    rank: int | None = None
    then: tuple[str, ...] = ()
    based: bool = False
    over: str = "lam"
    apart: bool = False

    @property
    def name(self) -> str:
        """A short name, unique in the demonstration, used for folders and results."""
        given = [option for option in self.options if not option.startswith("density=")]
        ops = [op.partition(":")[0] for op in self.then]
        return f"{'+'.join([self.method, *given, *ops])}-{family(self.rank)}"


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
    more = every(settings) if settings.every else []
    of_full = [merge for merge in more if merge.rank is None]
    return [*full, *of_full, *adapters, *more[len(of_full) :]]


def every(settings: Settings) -> list[Merge]:
    """List every other data-free method for more than two models, and some chains."""
    sums, means, ties = settings.sum_grid, settings.mean_grid, settings.ties_grid
    density = ("density=0.2",)
    full = [
        Merge("Karcher mean", "karcher"),
        Merge("Multi-SLERP", "multislerp"),
        Merge("Model stock", "model_stock", based=True),
        Merge("Magnitude pruning", "magnitude_prune", sums, density),
        Merge("DARE", "dare", sums),
        Merge("DARE TIES", "dare_ties", ties),
        Merge("DELLA", "della", ties),
        Merge("DELLA linear", "della_linear", sums),
        Merge("Consensus", "consensus_ta", sums),
        Merge("Breadcrumbs TIES", "breadcrumbs_ties", sums),
        Merge("PCB", "pcb", means),
        Merge("SCE", "sce", means),
        Merge("RAM", "ram", means),
        Merge("RAM+", "ramplus_tl", means),
        Merge("LiNeS", "lines", sums, over="beta"),
        Merge("TIES, LiNeS", "ties", means, density, then=("lines:beta=0.5",)),
        Merge("Task arithmetic, SVC", "task_arithmetic", sums, then=("svc",)),
        Merge("TIES, SVC", "ties", ties, density, then=("svc",)),
        Merge("WIDEN", "widen", sums),
        Merge("Orthogonal, sequential", "orthogonal", sums, ("claim=0.5",)),
        Merge("Orthogonal, joint", "orthogonal", sums, ("variant=joint", "claim=0.5")),
        Merge("TIES, LARV", "ties", ties, density, then=("larv",)),
        Merge("STAR", "star", means),
        Merge("CART", "cart", means),
        Merge("TSV-M", "tsv_merge", means),
        Merge("Iso-C", "iso_c", means),
        Merge("Iso-C, LARV", "iso_c", means, then=("larv",)),
        Merge("Iso-CTS", "iso_cts", means),
        Merge("WUDI", "wudi", means),
        Merge("WUDI, closed form", "wudi", means, ("solver=exact",)),
    ]
    per_task = [
        Merge("EMR", "emr", based=True, apart=True),
        Merge("TALL masks", "tall_masks", based=True, apart=True),
        Merge("TSV-Compress", "tsv_compress", based=True, apart=True),
        Merge("Twin-Merging", "twin_merging", based=True, apart=True),
        Merge("FlexMerge, size 2", "flexmerge", based=True, apart=True),
    ]
    rank = settings.ranks[-1]
    adapters = [
        Merge(f"KnOTS TIES, LoRA r={rank}", "knots_ties", ties, density, rank),
        Merge(f"KnOTS DARE TIES, LoRA r={rank}", "knots_dare_ties", ties, (), rank),
        Merge(f"Core Space TIES, LoRA r={rank}", "core_ties", ties, density, rank),
        Merge(f"TSV-M, LoRA r={rank}", "tsv_merge", means, (), rank),
        Merge(f"Iso-C, LoRA r={rank}", "iso_c", means, (), rank),
    ]
    return full + per_task + adapters


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
    if merge.grid or merge.based:
        line += ["--base", str(base)]
    for option in (
        *merge.options,
        *([f"{merge.over}={','.join(merge.grid)}"] if merge.grid else []),
    ):
        line += ["-p", option]
    for op in merge.then:
        line += ["--then", op]
    if merge.rank is not None:
        line += ["--as", "model"]
    return [*line, "-o", str(out), "--quiet"]


def outputs(merge: Merge, experts: Sequence[Path], out: Path) -> dict[str, Path]:
    """Map each λ of ``merge`` (or ``""``) to the folder that the command fills.

    Where every domain has a result of its own, map the name of each expert's folder instead.
    """
    if merge.apart:
        return {expert.name: out / expert.name for expert in experts}
    if len(merge.grid) > 1:
        return {value: out / f"{merge.over}={value}" for value in merge.grid}
    return {(merge.grid[0] if merge.grid else ""): out}


def run_merge(merge: Merge, experts: Sequence[Path], base: Path, out: Path) -> dict[str, Path]:
    """Merge into ``out``, replacing what is there, and return :func:`outputs`."""
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    line = [find_command(), *arguments(merge, experts, base, out)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(line)}\nexited {done.returncode}:\n{done.stderr}")
    return outputs(merge, experts, out)
