"""Cost of every method over the floor of the machine, measured in the same run.

``python benchmarks/run.py --size 1GB --models 3``. The floor reads every input byte once and
writes every output byte once through the page cache, with 1 MiB positional blocks.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))

from synthetic import make

from mergebench.checkpoints.sizes import parse_size

HERE = Path(__file__).parent
#: Recipes, with the most that a case may cost over the floor, and what is aimed at.
CASES: dict[str, dict[str, Any]] = {
    "linear": {"method": "linear", "must": 1.5, "aim": 1.15},
    "task_arithmetic": {
        "method": "task_arithmetic", "params": {"lam": 0.4}, "must": 1.5, "aim": 1.15
    },
    "lines, alpha given": {
        "method": "lines", "params": {"alpha": "0.25"}, "must": 1.5, "aim": 1.15
    },
    "lines, alpha by norms": {"method": "lines"},
    "dare": {"method": "dare", "must": 2.5, "aim": 1.6},
    "ties, per tensor": {
        "method": "ties", "params": {"scope": "tensor", "tie": "plus"}, "must": 6, "aim": 3
    },
    "breadcrumbs, per tensor": {
        "method": "breadcrumbs", "params": {"scope": "tensor"}, "must": 6, "aim": 3
    },
    "ties, per row": {
        "method": "ties", "params": {"scope": "row", "tie": "plus"}, "must": 6, "aim": 3
    },
    "ties, per row, signs of the model": {
        "method": "ties", "params": {"scope": "row"}, "must": 8, "aim": 4.5
    },
    "breadcrumbs, per row": {"method": "breadcrumbs", "must": 6, "aim": 3},
    "della, per row": {"method": "della", "params": {"tie": "plus"}, "must": 6, "aim": 3},
    "ties, whole model": {"method": "ties", "must": 8, "aim": 4.5},
    "slerp": {"method": "slerp", "models": 2, "must": 3, "aim": 2},
    "model_stock": {"method": "model_stock", "must": 3, "aim": 2},
    "karcher": {"method": "karcher", "must": 3, "aim": 2},
    "dare, L1 norm": {"method": "dare", "params": {"rescale": "l1"}},
    "consensus": {"method": "consensus_ta"},
    "sce, a tenth": {"method": "sce", "params": {"select_topk": 0.1}},
    "ram": {"method": "ram"},
}  # fmt: skip
#: Methods that look at weights, so that no base is read.
WITHOUT_BASE = ("linear", "karcher", "slerp")


def run(task: dict[str, Any]) -> dict[str, float]:
    """One measured process."""
    done = subprocess.run(
        [sys.executable, str(HERE / "measured.py"), json.dumps(task)],
        check=True,
        capture_output=True,
        text=True,
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def task_of(case: dict[str, Any], base: Path, tuned: list[Path], out: str) -> dict[str, Any]:
    """The recipe of a case."""
    recipe = {"method": case["method"], "params": case.get("params", {}), "out": out}
    recipe["models"] = [str(path) for path in tuned[: case.get("models")]]
    return recipe if case["method"] in WITHOUT_BASE else {**recipe, "base": str(base)}


def compare(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Medians over rounds; each measurement has one of the floor of its inputs beside it."""
    base, tuned = make(args.data, parse_size(args.size), args.models)
    out = str(args.data / "out.safetensors")
    wanted = {
        name: case
        for name, case in CASES.items()
        if args.only in name and (args.all or args.only or "must" in case)
    }
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in wanted}
    for _ in range(args.rounds):
        for name, case in wanted.items():
            recipe = task_of(case, base, tuned, out)
            inputs = [*recipe["models"], *([recipe["base"]] if "base" in recipe else [])]
            floor = run({"floor": True, "inputs": inputs, "out": out})
            task = {"recipe": recipe, "out": out, "workers": args.workers}
            found = run({**task, "memory": parse_size(args.memory)})
            runs[name].append(
                {**found, "floor": floor["cpu"], "ratio": found["cpu"] / floor["cpu"]}
            )
    return {name: _summary(found) for name, found in runs.items()}


def _summary(found: list[dict[str, float]]) -> dict[str, float]:
    medians = {key: statistics.median(each[key] for each in found) for key in found[0]}
    # Other work on the machine only ever adds to what either takes.
    least = min(each["cpu"] for each in found) / min(each["floor"] for each in found)
    return {**medians, "least": least}


def main() -> None:
    """Parse arguments, measure, print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="1GB", help="bytes of one checkpoint")
    parser.add_argument("--models", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--memory", default="512MiB")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--all", action="store_true", help="also cases without a target")
    parser.add_argument("--data", type=Path, default=HERE / "data")
    parser.add_argument("--keep", action="store_true", help="keep the synthetic checkpoints")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    args.data = args.data / f"{args.size}x{args.models}"
    medians = compare(args)
    if not args.keep:
        shutil.rmtree(args.data)
    if args.json:
        print(json.dumps(medians, indent=1))
        return
    table = Table(title=f"base + {args.models} × {args.size} in bf16, {args.workers} worker(s)")
    headings = ("", "wall s", "CPU s", "floor CPU s", "CPU ÷ floor", "least ÷ least", "must", "aim")
    for heading in (*headings, "memory MiB"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, row in medians.items():
        figures = [f"{row[key]:.2f}" for key in ("wall", "cpu", "floor", "ratio", "least")]
        bounds = [str(CASES[name].get(key, "")) for key in ("must", "aim")]
        table.add_row(name, *figures, *bounds, f"{row['memory'] / 2**20:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
