"""Merges that are run twice: by one process, and by many."""

from __future__ import annotations

import json
from pathlib import Path

from tests.helpers.adapters import factors, save_peft
from tests.helpers.files import BF16
from tests.helpers.models import base_model, fine_tune, save_folder
from tests.helpers.running import assert_done, call
from tests.helpers.statistics import options_for

#: Arguments by name; models lie in the working folder.
FULL = ("ft1", "ft2:0.7", "ft3", "-b", "base")
OWN = "own.json"
MERGES = {
    "task arithmetic": (*FULL, "-m", "task_arithmetic", "-p", "lam=0.4", "-o", "out"),
    "one file": (*FULL, "-m", "task_arithmetic", "-o", "out.safetensors"),
    "ties": (*FULL, "-m", "ties", "-o", "out"),
    "shards": (*FULL, "-m", "ties", "--shard-size", "2kB", "-o", "out"),
    "dare": (*FULL, "-m", "dare_ties", "-p", "seed=3", "-o", "out"),
    "sweep": (*FULL, "-m", "ties", "-p", "lam=0.5,1", "-p", "density=0.3", "-o", "out"),
    "adapters": ("lora1", "lora2", "-m", "task_arithmetic", "-o", "out"),
    "truncated": ("lora1", "lora2", "-m", "ties", "--rank", "2", "-o", "out"),
    "parts": (*FULL, "-m", "ties", "--method-for", "block=0:ties:density=0.5", "-o", "out"),
    "norms": (*FULL, "-m", "ties", "--then", "lines", "-o", "out"),
    "own parameters": (OWN, "-o", "out"),
    "per task": (*FULL, "-m", "emr", "-o", "out"),
    "groups": (*FULL, "-m", "flexmerge", "-p", "blocks=layer", "-o", "out"),
    "competing": (*FULL, "-m", "pcb", "-o", "out"),
    "on paper": (*FULL, "-m", "pcb", "-p", "variant=paper", "-o", "out"),
    "layers": (*FULL, "-m", "task_arithmetic", "--then", "larv", "-o", "out"),
    "with data": ("ft1", "ft2", "-b", "base", "-m", "fisher", "-o", "out"),
    "tensor scope": (*FULL, "-m", "breadcrumbs", "-p", "scope=tensor", "-o", "out"),
}


def build(folder: Path) -> Path:
    """A base, three fine-tunes of it, in shards too, and two adapters."""
    base = base_model(dtype=BF16)
    save_folder(folder / "base", base, shards=2)
    for number in (1, 2, 3):
        save_folder(folder / f"ft{number}", fine_tune(base, number))
        save_peft(folder / f"lora{number}", factors(number, rank=2))
    models = [
        {"path": str(folder / "ft1"), "params": {"density": 0.3}},
        {"path": str(folder / "ft2"), "params": {"density": 0.6}},
    ]
    own = {"mergebench": 1, "method": "ties", "models": models, "base": str(folder / "base")}
    (folder / OWN).write_text(json.dumps(own))
    return folder


def arguments(name: str, inputs: Path, place: Path) -> list[str]:
    """A merge with paths that hold in every folder, and its output in ``place``."""
    *given, dash, out = MERGES[name]
    if name == "with data":
        given += options_for("fisher", ["ft1", "ft2"], inputs)
    there = {each.name for each in inputs.iterdir()}
    given.append(dash)
    return [
        "run" if OWN in given else "merge",
        *(_absolute(each, inputs, there) for each in given),
        str(place / out),
    ]


def _absolute(word: str, inputs: Path, there: set[str]) -> str:
    return str(inputs / word) if word.partition(":")[0] in there else word


def run_alone(name: str, inputs: Path, place: Path) -> None:
    """The merge by one process."""
    place.mkdir(parents=True)
    assert_done(call(*arguments(name, inputs, place), cwd=place))


def spoiled(model: Path, place: Path) -> Path:
    """A copy of a model whose last tensor of floats ends in three NaN."""
    place.mkdir()
    for file in model.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    weights = place / "model.safetensors"
    data = bytearray(weights.read_bytes())
    # Eight integers follow.
    data[-70:-64] = b"\xc0\x7f" * 3
    weights.write_bytes(data)
    return place
