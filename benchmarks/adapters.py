"""Merging LoRA adapters of a 7B-shaped model: concatenation against reading, truncation against
dense displacements.

``python benchmarks/adapters.py [--adapters 8] [--rank 16]``. Random adapters on the seven linear
layers of every block of a LLaMA of 7 billion parameters, in bfloat16, as PEFT saves them. Every
figure is CPU seconds of a process of its own, in turns:

- *read*: every byte of the adapters, through the page cache, in blocks of 1 MiB;
- *loaded*: every tensor of them in memory of its own, with safetensors and torch;
- *read and write*: that, and the bytes of the concatenation written;
- *concatenated*: the lossless merge of rank Σ rᵢ;
- *truncated*: the merge truncated to the rank of one adapter, in factors;
- *dense, truncated*: Σ ΔWᵢ of one layer of each shape as a matrix in float32, and the largest
  singular triplets of it, by a full decomposition (LAPACK, as PEFT's ``svd``) and by a randomized
  one (arXiv:0909.4061, two power iterations, as ``torch.svd_lowrank``), times the number of layers
  of that shape. The largest σ of both are compared with ours.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))

from measured import floor, measure, read

from mergebench.checkpoints.placement import TensorSpec, plan_layout
from mergebench.checkpoints.writer import Output

WIDTH, INNER, BLOCKS = 4096, 11008, 32
MODULES = {
    **{f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"},
    **{f"mlp.{name}_proj": (INNER, WIDTH) for name in ("gate", "up")},
    "mlp.down_proj": (WIDTH, INNER),
}
_FILE = "adapter_model.safetensors"


def layers(blocks: int) -> dict[str, tuple[int, int]]:
    """Names and shapes of all adapted weights."""
    return {
        f"model.layers.{block}.{name}": shape
        for block in range(blocks)
        for name, shape in MODULES.items()
    }


def make(folder: Path, count: int, rank: int, blocks: int) -> list[Path]:
    """Random adapters as PEFT saves them: α = 2r, both factors drawn."""
    specs = []
    for name, (rows, columns) in layers(blocks).items():
        stem = f"base_model.model.{name}"
        specs += [
            TensorSpec(f"{stem}.lora_A.weight", "BF16", (rank, columns)),
            TensorSpec(f"{stem}.lora_B.weight", "BF16", (rows, rank)),
        ]
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank,
        "target_modules": sorted({name.rpartition(".")[2] for name in MODULES}),
    }  # fmt: skip
    paths = []
    layout = plan_layout(specs)
    for number in range(count):
        path = folder / f"adapter{number}"
        path.mkdir(parents=True)
        (path / "adapter_config.json").write_text(json.dumps(config))
        random = np.random.default_rng(number)
        with Output(path / _FILE, layout, single_file=True) as output:
            for place in layout.places.values():
                values = 0.01 * random.standard_normal(place.spec.shape, dtype=np.float32)
                output.write(place.spec.name, 0, values.astype(ml_dtypes.bfloat16))
        paths.append(path)
    return paths


def merge(models: list[str], out: str, rank: int | None) -> None:
    """Σ ΔWᵢ as an adapter."""
    from mergebench.merge.engine import execute
    from mergebench.merge.planning import make_plan
    from mergebench.recipe.reading import recipe_from_dict

    recipe = {"models": models, "method": "task_arithmetic", "as": "lora", "out": out}
    if rank is not None:
        recipe["rank"] = rank
    execute(make_plan(recipe_from_dict(recipe), workers=1), force=True)


def dense(models: list[str], name: str, rank: int, how: str, out: str) -> None:
    """The truncation of one layer by way of the matrix."""
    import torch
    from safetensors import safe_open

    torch.set_num_threads(1)
    stem = f"base_model.model.{name}"
    total = None
    for model in models:
        with safe_open(str(Path(model) / _FILE), "pt") as file:
            a, b = (file.get_tensor(f"{stem}.lora_{side}.weight").float() for side in "AB")
        change = 2 * b @ a
        total = change if total is None else total.add_(change)
    assert total is not None
    if how == "full":
        U, S, Vh = torch.linalg.svd(total, full_matrices=False)
        U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
    else:
        U, S, V = torch.svd_lowrank(total, q=rank, niter=2)
        Vh = V.T
    np.savez(out, left=(U * S.sqrt()).numpy(), right=(S.sqrt()[:, None] * Vh).numpy())


def load(inputs: list[str]) -> list[dict[str, Any]]:
    """All tensors of the adapters, one adapter after the other."""
    from safetensors.torch import load_file

    kept: list[dict[str, Any]] = []
    for path in inputs:
        kept = [{name: tensor.clone() for name, tensor in load_file(path).items()}]
    return kept


def task(work: dict[str, Any]) -> Callable[[], object]:
    """What a measured process does."""
    kind = work.pop("kind")
    if kind == "read":
        return lambda: read(work["inputs"])
    if kind == "load":
        return lambda: load(work["inputs"])
    if kind == "floor":
        return lambda: floor(work["inputs"], work["out"], work["size"])
    if kind == "merge":
        return lambda: merge(**work)
    return lambda: dense(**work)


def run(**work: Any) -> dict[str, float]:
    """One measured process."""
    command = [sys.executable, __file__, "--task", json.dumps(work)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def energy(pair: tuple[np.ndarray, np.ndarray]) -> float:
    """‖BA‖, which of all matrices of this rank is the largest for the best approximation."""
    left, right = (np.linalg.qr(side.astype(np.float64), mode="r") for side in (pair[0], pair[1].T))
    return float(np.linalg.norm(left @ right.T))


def truncated_pair(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """B and A of one layer of our merge."""
    from safetensors.torch import load_file

    tensors = load_file(folder / _FILE)
    stem = f"base_model.model.{name}"
    b, a = (tensors[f"{stem}.lora_{side}.weight"].float().numpy() for side in "BA")
    return b, a


def compare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Medians over rounds."""
    models = [str(path) for path in make(folder, args.adapters, args.rank, args.blocks)]
    inputs = [str(Path(model) / _FILE) for model in models]
    whole, small = str(folder / "whole"), str(folder / "small")
    size = sum(Path(path).stat().st_size for path in inputs)
    runs: dict[str, list[dict[str, float]]] = {}
    for _ in range(args.rounds):
        for name, work in {
            "read": {"kind": "read", "inputs": inputs},
            "loaded": {"kind": "load", "inputs": inputs},
            "read and write": {
                "kind": "floor", "inputs": inputs, "out": str(folder / "floor"), "size": size,
            },
            "concatenated": {"kind": "merge", "models": models, "out": whole, "rank": None},
            "truncated": {"kind": "merge", "models": models, "out": small, "rank": args.rank},
        }.items():  # fmt: skip
            runs.setdefault(name, []).append(run(**work))
    medians: dict[str, Any] = {
        name: {key: statistics.median(each[key] for each in found) for key in found[0]}
        for name, found in runs.items()
    }
    every = layers(args.blocks)
    for how in () if args.quick else ("randomized", "full"):
        row = {"cpu": 0.0, "wall": 0.0, "memory": 0.0}
        lost = []
        for shape in sorted(set(every.values())):
            names = [name for name, each in every.items() if each == shape]
            place = str(folder / "dense.npz")
            found = run(
                kind="dense", models=models, name=names[0], rank=args.rank, how=how, out=place
            )
            row = {
                "cpu": row["cpu"] + len(names) * found["cpu"],
                "wall": row["wall"] + len(names) * found["wall"],
                "memory": max(row["memory"], found["memory"]),
            }
            pair = np.load(place)
            theirs = energy((pair["left"], pair["right"]))
            lost.append(energy(truncated_pair(Path(small), names[0])) / theirs)
        medians[f"dense, {how}"] = {**row, "kept": min(lost)}
    return {"bytes": size, "rows": medians}


def show(args: argparse.Namespace, found: dict[str, Any]) -> None:
    """A table, with the two ratios."""
    rows = found["rows"]
    mib = found["bytes"] / 2**20
    table = Table(title=f"{args.adapters} adapters of rank {args.rank}, {mib:.0f} MiB in bf16")
    for heading in ("", "CPU s", "wall s", "÷ read", "÷ truncated", "memory MiB"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, row in rows.items():
        table.add_row(
            name, f"{row['cpu']:.2f}", f"{row['wall']:.2f}",
            f"{row['cpu'] / rows['read']['cpu']:.1f}",
            f"{row['cpu'] / rows['truncated']['cpu']:.1f}", f"{row['memory'] / 2**20:.0f}",
        )  # fmt: skip
    console = Console()
    console.print(table)
    for name in rows.keys() & {"dense, randomized", "dense, full"}:
        console.print(f"‖ours‖ / ‖{name}‖, the least over shapes: {rows[name]['kept']:.6f}")


def main() -> None:
    """Parse arguments, measure, print a table or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=BLOCKS, help="blocks of the model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data", type=Path, help="where to write, by default a temporary folder")
    parser.add_argument("--quick", action="store_true", help="without the dense truncations")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        # Imported before the clock starts, on both sides.
        import safetensors.torch  # noqa: F401, I001
        import mergebench.merge.engine  # noqa: F401

        print(json.dumps(measure(task(json.loads(args.task)))))
        return
    folder = Path(tempfile.mkdtemp(prefix="adapters-", dir=args.data))
    try:
        found = compare(args, folder)
    finally:
        shutil.rmtree(folder)
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        show(args, found)


if __name__ == "__main__":
    main()
