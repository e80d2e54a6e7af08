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
CASES: dict[str, dict[str, Any]] = {
    "linear": {"method": "linear"},
    "task_arithmetic": {"method": "task_arithmetic", "params": {"lam": 0.4}},
    "ties, per tensor": {"method": "ties", "params": {"scope": "tensor", "tie": "plus"}},
    "ties, whole model": {"method": "ties"},
    "ties, per row": {"method": "ties", "params": {"scope": "row"}},
    "dare": {"method": "dare"},
    "dare, L1 norm": {"method": "dare", "params": {"rescale": "l1"}},
    "della, per row": {"method": "della", "params": {"tie": "plus"}},
    "lines": {"method": "lines"},
    "consensus": {"method": "consensus_ta"},
    "breadcrumbs, per row": {"method": "breadcrumbs"},
    "breadcrumbs, per tensor": {"method": "breadcrumbs", "params": {"scope": "tensor"}},
    "karcher": {"method": "karcher"},
    "model_stock": {"method": "model_stock"},
    "sce, a tenth": {"method": "sce", "params": {"select_topk": 0.1}},
    "ram": {"method": "ram"},
}


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


def compare(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Medians over rounds; every round measures the floor beside every method."""
    base, tuned = make(args.data, parse_size(args.size), args.models)
    out = str(args.data / "out.safetensors")
    wanted = {name: case for name, case in CASES.items() if args.only in name}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in ("floor", *wanted)}
    for _ in range(args.rounds):
        inputs = [str(path) for path in (base, *tuned)]
        runs["floor"].append(run({"floor": True, "inputs": inputs, "out": out}))
        for name, case in wanted.items():
            recipe = {**case, "models": [str(path) for path in tuned], "out": out}
            if case["method"] not in ("linear", "karcher"):
                recipe["base"] = str(base)
            task = {"recipe": recipe, "out": out, "workers": args.workers}
            runs[name].append(run({**task, "memory": parse_size(args.memory)}))
            runs[name][-1]["ratio"] = runs[name][-1]["cpu"] / runs["floor"][-1]["cpu"]
    return {
        name: {key: statistics.median(each[key] for each in found) for key in found[0]}
        for name, found in runs.items()
    }


def main() -> None:
    """Parse arguments, measure, print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="1GB", help="bytes of one checkpoint")
    parser.add_argument("--models", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--memory", default="512MiB")
    parser.add_argument("--only", default="", help="cases whose name contains this")
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
    for heading in ("", "wall s", "CPU s", "CPU ÷ floor", "memory MiB"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, row in medians.items():
        ratio = f"{row['ratio']:.1f}" if "ratio" in row else ""
        figures = (f"{row['wall']:.2f}", f"{row['cpu']:.2f}", ratio, f"{row['memory'] / 2**20:.0f}")
        table.add_row(name, *figures)
    Console().print(table)


if __name__ == "__main__":
    main()
