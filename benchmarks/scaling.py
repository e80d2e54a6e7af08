"""How the cost of a merge grows: with the size of the models, their number, and threads.

``python benchmarks/scaling.py size|models|threads``. Every point is a process of its own, and the
least CPU of several rounds counts, since other work on a machine only adds to it. Costs against
size and number are fitted by a straight line, whose R² is printed; anonymous memory must not grow
with size. Speed-ups are of wall-clock time, printed beside that of a bare compiled loop in the same
seconds. Ends with an error if a line is none, or a speed-up falls behind.

Fine-tunes are hard links to a few synthetic ones, so that many models need little disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))

from synthetic import make

from mergebench.checkpoints.sizes import parse_size

HERE = Path(__file__).parent
METHODS: Mapping[str, Mapping[str, Any]] = {
    "linear": {},
    "task_arithmetic": {"lam": 0.4},
    "ties": {"scope": "tensor"},
    "breadcrumbs": {"scope": "tensor"},
    "model_stock": {},
}
#: The least that R² of a line, and a speed-up over that of the bare loop, may be.
LINE, SHARE = 0.98, 0.85
#: Part of the memory of the smallest point, and bytes, by which that of others may be larger.
FLAT, SLACK = 1.25, 8 << 20


def run(task: Mapping[str, Any]) -> dict[str, float]:
    """One measured process."""
    command = [sys.executable, str(HERE / "measured.py"), json.dumps(task)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def linked(folder: Path, size: int, own: int, models: int) -> tuple[Path, list[Path]]:
    """A base and fine-tunes, of which only ``own`` take space."""
    base, tuned = make(folder, size, min(own, models))
    paths = list(tuned)
    for number in range(len(tuned), models):
        path = folder / f"link{number}.safetensors"
        if not path.exists():
            os.link(tuned[number % len(tuned)], path)
        paths.append(path)
    return base, paths


def task_of(
    args: argparse.Namespace, method: str, base: Path, tuned: Sequence[Path], workers: int
) -> dict[str, Any]:
    """What one process is to do."""
    out = str(args.out / "out.safetensors")
    recipe: dict[str, Any] = {"method": method, "params": METHODS[method], "out": out}
    recipe["models"] = [str(path) for path in tuned]
    if method != "linear":
        recipe["base"] = str(base)
    memory = parse_size(args.memory)
    return {"recipe": recipe, "out": out, "workers": workers, "memory": memory}


def points(args: argparse.Namespace) -> Iterator[tuple[float, str, Path, list[Path]]]:
    """What is drawn to the right, its name, and the inputs; they are taken away after use."""
    for text in args.points:
        size, models = (text, args.models) if args.what == "size" else (args.size, int(text))
        folder = args.data / f"{args.what}-{size}"
        base, tuned = linked(folder, parse_size(size), args.own, models)
        at = base.stat().st_size / 1e9 if args.what == "size" else models
        yield at, text, base, tuned
        if args.what == "size":
            shutil.rmtree(folder)
    shutil.rmtree(args.data)


def fit(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Slope, start and R² of the straight line through points."""
    slope, start = np.polyfit(x, y, 1)
    rest = np.asarray(y) - (slope * np.asarray(x) + start)
    spread = np.asarray(y) - np.mean(y)
    return float(slope), float(start), float(1 - (rest @ rest) / (spread @ spread))


def lines(args: argparse.Namespace) -> bool:
    """Measure cost against size or number; whether every line is one, and memory flat."""
    x: list[float] = []
    found: dict[str, list[dict[str, float]]] = {method: [] for method in args.methods}
    for at, text, base, tuned in points(args):
        x.append(at)
        rounds: dict[str, list[dict[str, float]]] = {method: [] for method in args.methods}
        for _ in range(args.rounds):
            for method in args.methods:
                rounds[method].append(run(task_of(args, method, base, tuned, 1)))
        for method, runs in rounds.items():
            least = {key: min(each[key] for each in runs) for key in runs[0]}
            found[method].append(least)
            print(f"{text} {method}: {least}", file=sys.stderr, flush=True)
    unit = "GB" if args.what == "size" else "model"
    title = f"CPU s (MiB) against {args.what}; least of {args.rounds}"
    table = Table(title=title)
    for heading in ("", *args.points, f"s per {unit}", "R²", "memory"):
        table.add_column(heading, justify="left" if not heading else "right")
    held = True
    for method, runs in found.items():
        slope, _, square = fit(x, [each["cpu"] for each in runs])
        memory = [each["memory"] for each in runs]
        flat = args.what != "size" or max(memory) <= FLAT * memory[0] + SLACK
        held &= square >= LINE and flat
        cells = [f"{each['cpu']:.2f} ({each['memory'] / 2**20:.0f})" for each in runs]
        said = "flat" if max(memory) <= FLAT * memory[0] + SLACK else "grows"
        table.add_row(method, *cells, f"{slope:.2f}", f"{square:.4f}", said)
    Console(width=140).print(table)
    return held


def threads(args: argparse.Namespace) -> bool:
    """Measure one worker and two; whether each method gains as the bare loop does.

    Both are measured in the same seconds, since on a shared machine a second core is now there and
    now not: a round takes the bare loop and the merge with one thread, then both with two.
    """
    base, tuned = linked(args.data / "threads", parse_size(args.size), args.own, args.models)
    table = Table(title=f"1 → 2 threads, base + {args.models} × {args.size}; medians of pairs")
    for heading in ("", "wall s, 1", "wall s, 2", "speed-up", "bare loop's", "÷ bare loop",
                    "of all pairs", "CPU, 2 ÷ 1"):  # fmt: skip
        table.add_column(heading, justify="left" if not heading else "right")
    held = True
    for method in args.methods:
        rounds = []
        for number in range(args.rounds):
            found = []
            for count in (1, 2):
                merge = {**task_of(args, method, base, tuned, count), "written": False}
                found += [run({"bare": count}), run(merge)]
            rounds.append(found)
            print(f"{method}, {number + 1}: {found}", file=sys.stderr, flush=True)
        walls = np.array([[each["wall"] for each in found] for found in rounds])
        gains = walls[:, 1] / walls[:, 3]
        bare = walls[:, 0] / walls[:, 2]
        shares = gains / bare
        cpus = [found[3]["cpu"] / found[1]["cpu"] for found in rounds]
        held &= bool(np.median(shares) >= SHARE)
        cells = (*np.median(walls[:, [1, 3]], axis=0), np.median(gains), np.median(bare),
                 np.median(shares))  # fmt: skip
        table.add_row(
            method, *(f"{each:.2f}" for each in cells),
            f"{shares.min():.2f}…{shares.max():.2f}", f"{np.median(cpus):.2f}",
        )  # fmt: skip
    shutil.rmtree(args.data)
    Console(width=120).print(table)
    return held


DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "size": {"points": ["0.1GB", "0.5GB", "1GB", "2GB", "4GB"], "methods": ["linear", "ties"]},
    "models": {"points": ["2", "4", "8", "16"], "methods": ["task_arithmetic", "ties"]},
    "threads": {"points": [], "methods": ["ties", "breadcrumbs", "model_stock"]},
}


def main() -> None:
    """Parse arguments, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=list(DEFAULTS))
    parser.add_argument("--points", nargs="+", help="sizes, or numbers of models")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS))
    parser.add_argument("--size", default="0.4GB", help="of one model, where that is not measured")
    parser.add_argument("--models", type=int, default=3)
    parser.add_argument("--own", type=int, default=1, help="fine-tunes that are no links")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", default="512MiB")
    parser.add_argument("--data", type=Path, default=HERE / "data")
    parser.add_argument("--out", type=Path, help="folder of the outputs; --data by default")
    args = parser.parse_args()
    args.points = args.points or DEFAULTS[args.what]["points"]
    args.methods = args.methods or DEFAULTS[args.what]["methods"]
    args.data = args.data / f"scaling-{args.what}"
    args.data.mkdir(parents=True, exist_ok=True)
    args.out = args.out or args.data
    held = threads(args) if args.what == "threads" else lines(args)
    if not held:
        raise SystemExit(f"not within R² ≥ {LINE}, flat memory, or {SHARE} of the bare loop")


if __name__ == "__main__":
    main()
