"""Small merges whose every step can be interrupted, and what must hold afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mergebench.merge.engine import check_outputs, execute
from mergebench.merge.planning import make_plan
from mergebench.recipe import ModelRef, Recipe
from mergebench.steps import Part
from tests.faults.machine import Machine
from tests.helpers.files import BF16, Array, tree, write

SHAPES = {"layers.0.q.weight": (6, 4), "layers.1.q.weight": (6, 4), "norm.weight": (4,)}


@dataclass(frozen=True)
class Merge:
    """One merge: how inputs become a recipe, and what stands in the way of its output.

    Attributes
    ----------
    recipe : callable of the folder with the inputs
    out : str
        Name of the output.
    old : mapping of path to bytes, or callable of the folder with the inputs
        What the output replaces: files, or the output of another recipe.
    """

    recipe: Callable[[Path], Recipe]
    out: str
    old: Mapping[str, bytes] | Callable[[Path], Recipe] = field(default_factory=dict)

    def run(self, inputs: Path, place: Path, notes: list[str] | None = None) -> None:
        """As the command line does: plan, check, write."""
        recipe = self.recipe(inputs)
        plan = make_plan(_to(recipe, place / self.out), workers=1)
        check_outputs(plan, force=bool(self.old))
        execute(plan, force=bool(self.old), note=None if notes is None else notes.append)

    def prepare(self, place: Path, inputs: Path) -> Path:
        """A fresh place, with what is to be replaced."""
        place.mkdir()
        if callable(self.old):
            Merge(self.old, self.out).run(inputs, place)
            return place
        for name, content in self.old.items():
            path = place / self.out / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return place


def _to(recipe: Recipe, out: Path) -> Recipe:
    return Recipe(**{**recipe.__dict__, "out": str(out)})


def _merge(inputs: Path, models: tuple[str, ...], **options: Any) -> Recipe:
    refs = tuple(ModelRef(str(inputs / name)) for name in models)
    return Recipe(refs, **{"method": "ties", **options})


def _full(inputs: Path, **options: Any) -> Recipe:
    models = ("ft1", "ft2")
    return _merge(inputs, models, base=str(inputs / "base"), **{"params": {}, **options})


#: With the very chain of the rest, and a threshold of its own.
_BLOCK = Part(include=("block=0",), method="ties")
OLD = {"model-00001-of-00009.safetensors": b"an old shard", "config.json": b"{}"}
MERGES = {
    "file": Merge(_full, "out.safetensors"),
    "shards": Merge(lambda inputs: _full(inputs, shard_size="60B"), "out"),
    "lora": Merge(lambda inputs: _merge(inputs, ("lora1", "lora2")), "out"),
    "sweep": Merge(lambda inputs: _full(inputs, params={"lam": (0.5, 1.0)}), "deep/out"),
    "tasks": Merge(lambda inputs: _full(inputs, method="emr"), "deep/out"),
    "tensor scope": Merge(lambda inputs: _full(inputs, params={"scope": "tensor"}), "out"),
    "parts": Merge(lambda inputs: _full(inputs, parts=(_BLOCK,)), "out.safetensors"),
    "replace": Merge(_full, "out", OLD),
    # The same files with the same headers and other values.
    "renew": Merge(_full, "out", lambda inputs: _full(inputs, params={"density": 0.6})),
}


def build_inputs(folder: Path) -> Path:
    """A base and two fine-tunes as folders, and two adapters."""
    random = np.random.default_rng(7)
    base = {name: random.standard_normal(shape).astype(BF16) for name, shape in SHAPES.items()}
    for name in ("base", "ft1", "ft2"):
        arrays: dict[str, Array] = dict(base)
        if name != "base":
            arrays = {
                key: (array + random.standard_normal(array.shape)).astype(BF16)
                for key, array in base.items()
            }
        arrays["steps"] = np.arange(3)
        write(folder / name / "model.safetensors", arrays, {"format": "pt"})
        (folder / name / "config.json").write_text('{"model_type": "toy"}')
    for name in ("lora1", "lora2"):
        factors = {
            f"base_model.model.layers.{layer}.q.lora_{role}.weight": random.standard_normal(
                shape, np.float32
            )
            for layer in (0, 1)
            for role, shape in (("A", (2, 4)), ("B", (6, 2)))
        }
        write(folder / name / "adapter_model.safetensors", factors)
        settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}
        (folder / name / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def state(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, hidden or not: files with their bytes, folders with ``None``."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def hidden(folder: Path) -> list[str]:
    """Names of the hidden files and folders below a folder, but not what is inside of them."""
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob(".*"))]
    return [name for name in names if name.split("/")[-1].startswith(".")]


def assert_same_state(place: Path, expected: Mapping[str, bytes | None]) -> None:
    """Exactly these files with these bytes, and no other folder."""
    actual = state(place)
    assert sorted(actual) == sorted(expected)
    assert [name for name, data in expected.items() if actual[name] != data] == []


def assert_each_whole(place: Path, *allowed: Mapping[str, bytes | None]) -> None:
    """Of what can be seen in a folder, every output is as in one of the states, or absent there."""
    seen = {name: data for name, data in tree(place).items() if "/." not in f"/{name}"}
    files = [{name: data for name, data in one.items() if data is not None} for one in allowed]
    for output in {_output_of(name) for one in (seen, *files) for name in one}:
        part = _only(seen, output)
        assert part in [_only(one, output) for one in files], f"{output}: {sorted(part)}"


def assert_resumable(place: Path) -> None:
    """What is hidden is the work and the journal of an output, and nothing else.

    An interrupt may come where the file of the lock is about to be deleted.
    """
    names = [name for name in hidden(place) if not name.endswith("-lock")]
    works = {name.removesuffix("-part") for name in names if name.endswith("-part")}
    journals = {name.removesuffix("-journal") for name in names if name.endswith("-journal")}
    assert len(works) + len(journals) == len(names), names
    assert works <= journals, names


def _output_of(name: str) -> str:
    """The output a file belongs to; several are folders two levels down."""
    parts = name.split("/")
    return "/".join(parts[:3] if parts[0] == "deep" else parts[:1])


def _only(files: Mapping[str, bytes | None], output: str) -> dict[str, bytes | None]:
    return {name: data for name, data in files.items() if _output_of(name) == output}


def fails(machine: Machine, merge: Merge, inputs: Path, place: Path) -> BaseException | None:
    """Run a merge on a machine that may fail; what it raised."""
    try:
        with machine.running():
            merge.run(inputs, place)
    except BaseException as error:
        return error
    return None
