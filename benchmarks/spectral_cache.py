"""What kept decompositions save the second adapter on a base, in one run.

``python benchmarks/spectral_cache.py`` writes a base in bf16 with the spectra of trained matrices
and two LoRAs on it, and looks at one after the other, with an empty cache before the first. The
questions: intruders at one threshold, which bounds settle for most matrices; at many thresholds,
where bounds leave some open and the base has to be decomposed; and what needs full decompositions
of both matrices. One thread, so that CPU seconds are seconds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
from intruders import factors, matrix, timed
from rich.console import Console
from rich.table import Table
from safetensors.numpy import save_file

from mergebench.spectral.engine import analyse
from mergebench.spectral.store import Store
from mergebench.spectral.subjects import open_inputs

MANY = ",".join(f"{step / 20:g}" for step in range(2, 19))
QUESTIONS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "intruders, ε = 0.5": (["intruders"], {"epsilon": "0.5"}),
    "intruders, ε = 0.1, 0.15 … 0.9": (["intruders"], {"epsilon": MANY}),
    "intruders, every matrix decomposed": (["intruders"], {"exact": True}),
    "intruders and rotation": (["intruders", "rotation"], {}),
}


def write(folder: Path, shapes: list[tuple[int, int]], rank: int, share: float) -> None:
    """The base, and two adapters in PEFT's format."""
    about = SimpleNamespace(leading=64, power=0.7, top=12.0)
    random = np.random.default_rng(0)
    base: dict[str, Any] = {}
    adapters: list[dict[str, Any]] = [{}, {}]
    for number, (rows, columns) in enumerate(shapes):
        array = matrix(random, rows, columns, about)
        base[f"model.layers.{number}.proj.weight"] = array.astype(ml_dtypes.bfloat16)
        for adapter in adapters:
            left, right = factors(random, array, rank, share)
            name = f"base_model.model.model.layers.{number}.proj"
            adapter[f"{name}.lora_B.weight"], adapter[f"{name}.lora_A.weight"] = left, right
    save_file(base, folder / "base.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["proj"]}
    for number, adapter in enumerate(adapters):
        place = folder / f"lora{number}"
        place.mkdir()
        save_file(adapter, place / "adapter_model.safetensors")
        (place / "adapter_config.json").write_text(json.dumps(config))


def main() -> None:
    """Print a row for each question."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=1536)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--share", type=float, default=0.3)
    args = parser.parse_args()
    shapes = [(args.size, args.size), (args.size, 2 * args.size)] * args.layers
    table = Table(
        title=f"CPU seconds, {len(shapes)} matrices of {args.size} × {args.size} and more"
    )
    for heading in (
        "question",
        "first",
        "second",
        "second without cache",
        "second ÷ first",
        "kept",
    ):
        table.add_column(heading, justify="left" if heading == "question" else "right")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, shapes, args.rank, args.share)
        # What is imported on the way is no part of the first question.
        place = str(folder / "base.safetensors")
        analyse(open_inputs([str(folder / "lora0")], place), diagnostics=["contribution"])
        for number, (question, (names, params)) in enumerate(QUESTIONS.items()):
            store = Store(folder / f"cache{number}")

            def look(
                adapter: int, store: Store | None, names: Any = names, params: Any = params
            ) -> Any:
                inputs = open_inputs(
                    [str(folder / f"lora{adapter}")], str(folder / "base.safetensors")
                )
                return analyse(
                    inputs,
                    diagnostics=names,
                    params={"intruders": params},
                    memory=64 << 30,
                    workers=1,
                    store=store,
                )

            first, _ = timed(lambda: look(0, store))  # noqa: B023
            again = Store(folder / f"cache{number}")
            second, kept = timed(lambda: look(1, again))  # noqa: B023
            plain, fresh = timed(lambda: look(1, None))
            one, two = (
                json.dumps(each.to_json()["diagnostics"], sort_keys=True) for each in (kept, fresh)
            )
            if one != two:
                raise SystemExit(f"{question}: what was kept changes the result")
            times = [f"{each:.2f}" for each in (first, second, plain)]
            used = f"{again.hits} of {len(shapes)}"
            table.add_row(question, *times, f"{second / first:.2f}", used)
    Console().print(table)


if __name__ == "__main__":
    main()
