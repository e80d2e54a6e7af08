"""Sampled tensors of an output are computed again from its inputs."""

from __future__ import annotations

import json
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergebench import merge_models
from mergebench.compute.decompose import truncate
from mergebench.compute.spectra import Spectrum
from mergebench.core.errors import MergebenchError
from mergebench.manifest import MANIFEST
from mergebench.merge.replay import Replayed, plan_replay, replay
from tests.faults.machine import Machine
from tests.faults.merges import build_inputs as build_more
from tests.helpers.files import read, write
from tests.helpers.models import base_model, fine_tune, save_folder
from tests.helpers.running import assert_refused, call
from tests.helpers.scene import Scene, build_scene
from tests.safety.support import build_inputs, flip, merged, places_of

RECIPES: dict[str, dict[str, Any]] = {
    "linear": {"method": "linear"},
    "ties": {"method": "ties", "density": 0.5},
    "ties by tensor": {"method": "ties", "scope": "tensor"},
    "sharded": {"method": "task_arithmetic", "lam": 0.7, "shard_size": "60B", "dtype": "f32"},
    "delta": {"method": "breadcrumbs", "form": "delta"},
    "parts": {"method": "task_arithmetic", "where": ["block=0:lam=0.5"], "exclude": ["class=norm"]},
}


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """A folder with base and fine-tunes."""
    build_inputs(tmp_path)
    return tmp_path


def written(folder: Path, out: str, **options: Any) -> Path:
    """A merge of the inputs in a folder, which are recorded by relative paths."""
    with chdir(folder):
        merge_models(["ft1", "ft2"], base="base", out=out, **options)
    return folder / out


def replayed(place: Path, count: int | None = None, **options: Any) -> Replayed:
    """The result for an output beside its inputs."""
    seed = options.pop("seed", 0)
    return replay(plan_replay(place, inputs=place.parent, workers=1, **options), count, seed=seed)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("out", ["out", "out.safetensors"])
def test_every_tensor_is_what_the_recipe_gives(inputs: Path, recipe: str, out: str) -> None:
    """To the last bit, whatever the method and the form."""
    options = RECIPES[recipe]
    if out != "out":
        options = {key: value for key, value in options.items() if key != "shard_size"}
    place = written(inputs, out, **options)

    result = replayed(place)

    stored = read(place)
    assert result.findings == ()
    assert (result.tensors, result.of) == (len(stored), len(stored))
    assert result.bytes == sum(array.nbytes for array in stored.values())


def test_sweeps_and_adapters(tmp_path: Path) -> None:
    """Each output of a sweep replays alone; both factors of a LoRA module are compared."""
    build_more(tmp_path)
    common = ("lora1", "lora2", "-m", "ties", "-p", "lam=0.5,1", "-o", "out")
    assert call("merge", *common, cwd=tmp_path).code == 0

    for name in ("lam=0.5", "lam=1"):
        result = replay(plan_replay(tmp_path / "out" / name, inputs=tmp_path), 1)
        assert result.findings == ()
        assert (result.tensors, result.of) == (2, 4)
        assert "looked at the whole model" in result.notes[0]
    path = tmp_path / "out" / "lam=1" / "adapter_model.safetensors"
    flip(path, next(iter(places_of(path).values()))[0])
    (found,) = replay(plan_replay(path.parent, inputs=tmp_path)).findings
    assert found.what == (
        "1 entries differ from what the recipe gives, by less than another LAPACK may, but they "
        "are not as they were written"
    )


def other_lapack(factor: float) -> Any:
    """A decomposition with other bases of the same subspaces, whose product is scaled."""

    def found(matrix: Any, rank: int) -> Any:
        left, right, lost = truncate(matrix, rank)
        turn = np.linalg.qr(np.random.default_rng(rank).standard_normal((rank, rank)))[0]
        return factor * left @ turn, turn.T @ right, lost

    return found


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_factors_by_another_lapack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """What counts is the product; a real difference of it is found."""
    build_more(tmp_path)
    outs = {1 + 1e-7: "near", 1.2: "far"}
    for factor, out in outs.items():
        with monkeypatch.context() as patched:
            patched.setattr("mergebench.merge.factors.truncate", other_lapack(factor))
            with chdir(tmp_path):
                merge_models(["lora1", "lora2"], method="ties", dtype=dtype, out=out)
    near, far = (replay(plan_replay(tmp_path / out, inputs=tmp_path)) for out in outs.values())
    assert near.findings == ()
    (note,) = [each for each in near.notes if "another LAPACK may" in each]
    assert note.startswith("4 tensors differ by at most ")
    assert len(far.findings) == 4
    assert all("by more than another LAPACK may" in each.what for each in far.findings)


def test_tensors_by_another_lapack(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entry by entry, relative to the largest; what damage adds is found however small."""
    product = Spectrum.product
    options = {"method": "task_arithmetic", "then": ["truncate:rank=1"], "dtype": "f32"}
    for factor, out in ((1 + 1e-6, "near"), (1.01, "far")):
        with monkeypatch.context() as patched:
            patched.setattr(
                Spectrum, "product", lambda self, s, f=factor: np.float32(f) * product(self, s)
            )
            written(inputs, out, **options)
    near, far = replayed(inputs / "near"), replayed(inputs / "far")
    assert near.findings == ()
    assert any("another LAPACK may" in each for each in near.notes)
    assert far.findings
    assert all("by more than another LAPACK may" in each.what for each in far.findings)
    path = inputs / "near" / "model.safetensors"
    flip(path, places_of(path)["layers.1.q.weight"][0])
    (found,) = replayed(inputs / "near").findings
    assert "not as they were written" in found.what


def test_tensors_that_differ_are_named(inputs: Path) -> None:
    """With the bytes from the first entry that differs to the last."""
    place = merged(inputs, "out")
    path = place / "model.safetensors"
    start, _ = places_of(path)["layers.1.q.weight"]
    for entry in (3, 4, 9):
        flip(path, start + 2 * entry + 1)

    (found,) = replayed(place).findings

    assert (found.kind, found.file, found.tensor) == ("replay", path.name, "layers.1.q.weight")
    assert (found.start, found.stop) == (start + 6, start + 20)
    assert found.what == "3 entries differ from what the recipe gives"


def test_other_tensors_than_the_recipe_gives(inputs: Path) -> None:
    """Missing, extra and misshapen ones are findings, the rest is compared."""
    place = merged(inputs, "out")
    path = place / "model.safetensors"
    arrays = read(path)
    arrays["other"] = arrays.pop("norm.weight")
    arrays["steps"] = arrays["steps"][:2]
    arrays["layers.0.q.weight"] = arrays["layers.0.q.weight"].astype(np.float32)
    write(path, arrays)

    said = {each.tensor: each.what for each in replayed(place).findings}

    assert said == {
        "norm.weight": "the recipe gives this tensor, and it is not here",
        "other": "the recipe does not give this tensor",
        "steps": "the recipe gives int64 of another shape or dtype",
        "layers.0.q.weight": "the recipe gives bfloat16 of another shape or dtype",
    }


def test_comparison_is_with_what_is_computed_now(inputs: Path) -> None:
    """Not with the digests: a recipe that gives something else is found."""
    place = written(inputs, "out", method="task_arithmetic")
    manifest = json.loads((place / MANIFEST).read_text())
    manifest["recipe"]["params"]["lam"] = 0.9
    (place / MANIFEST).write_text(json.dumps(manifest))

    found = {each.tensor for each in replayed(place).findings}

    assert found == {"layers.0.q.weight", "layers.1.q.weight", "norm.weight"}


def test_sample(tmp_path: Path) -> None:
    """As many as asked for, by the seed; only their data are read."""
    base = base_model()
    save_folder(tmp_path / "base", base)
    for seed in (1, 2):
        save_folder(tmp_path / f"ft{seed}", fine_tune(base, seed))
    for name, method in (("ta", "task_arithmetic"), ("whole", "ties")):
        command = ("merge", "ft1", "ft2", "-b", "base", "-m", method, "-o", name)
        assert call(*command, cwd=tmp_path).code == 0

    def sample(name: str, count: int | None, seed: int = 0) -> tuple[Replayed, int]:
        ready = plan_replay(tmp_path / name, inputs=tmp_path, workers=1)
        machine = Machine(reads=True)
        with machine.running():
            result = replay(ready, count, seed=seed)
        return result, machine.count

    every, reads = sample("ta", None)
    few, less = sample("ta", 2)
    assert (every.tensors, few.tensors, few.of) == (len(base), 2, len(base))
    assert (few.findings, few.notes) == ((), ())
    # Output, base and two models; the integer tensor, which is sampled here, is copied from one.
    assert (reads, less) == (4 * (len(base) - 1) + 2, 4 + 2)
    assert few.bytes < every.bytes
    other = {sample("ta", 2, seed)[0].bytes for seed in range(8)}
    assert len(other) > 1
    assert sample("ta", 2)[0] == few
    result, more = sample("whole", 1)
    assert more > less
    assert result.notes == ("trim, elect_sign looked at the whole model, so all inputs were read",)


@pytest.mark.parametrize("change", ["values", "gone", "other"])
def test_changed_inputs_are_refused(inputs: Path, change: str) -> None:
    """Before anything is computed, with the next step."""
    place = merged(inputs, "out")
    path = inputs / "ft2" / "model.safetensors"
    if change == "values":
        flip(path, places_of(path)["norm.weight"][0])
    elif change == "gone":
        path.rename(inputs / "away")
        path.parent.joinpath("config.json").unlink()
        path.parent.joinpath("tokenizer.json").unlink()
        path.parent.rmdir()
    else:
        write(path, read(inputs / "ft1" / "model.safetensors"), {"format": "pt"})

    ran = call("verify", place, "--replay", "1", "--inputs", inputs, cwd=inputs)

    assert_refused(ran, "ft2", "--inputs")


def test_inputs_in_memory_are_refused(tmp_path: Path) -> None:
    """They are gone when the process ends."""
    random = np.random.default_rng(1)
    models = [{"a.weight": random.standard_normal((3, 4))} for _ in range(2)]
    merge_models(models, out=tmp_path / "out")

    with pytest.raises(MergebenchError, match="input is not there any more"):
        plan_replay(tmp_path / "out")


def test_damaged_manifest_is_refused(inputs: Path) -> None:
    """It says what to repeat."""
    place = merged(inputs, "out")
    (place / MANIFEST).write_text("{")

    with pytest.raises(MergebenchError, match="the manifest cannot be read"):
        plan_replay(place, inputs=inputs)


def test_command(tmp_path: Path) -> None:
    """Prints how many of how many; --json has the same; wrong counts are refused."""
    scene: Scene = build_scene(tmp_path)
    merge = ("merge", "ft1", "ft2", "-b", "base", "-o", "out.safetensors")
    assert call(*merge, cwd=scene.path).code == 0

    ran = call("verify", "out.safetensors", "--replay", "3", "--seed", "4", cwd=scene.path)
    whole = call("verify", "out.safetensors", "--replay", "all", "--json", cwd=scene.path)

    assert (ran.code, ran.err) == (0, "")
    assert ran.out.splitlines()[1].startswith("replayed 3 of 10 tensors, ")
    assert ran.out.endswith(": equal to the last bit\n")
    assert whole.json["replay"] == {
        "seed": 0, "tensors": 10, "of": 10, "bytes": whole.json["bytes"], "findings": [],
        "notes": [],
    }  # fmt: skip
    for wrong in ("0", "-1", "many", "1.5"):
        refused = call("verify", "out.safetensors", f"--replay={wrong}", cwd=scene.path)
        assert_refused(refused, "--replay", "a number from 1, or all")


def test_another_version_is_noted(inputs: Path) -> None:
    """What it computed may differ in its last bit."""
    place = merged(inputs, "out")
    manifest = json.loads((place / MANIFEST).read_text())
    (place / MANIFEST).write_text(json.dumps(manifest | {"mergebench": "0.0.1"}))

    assert "written by mergebench 0.0.1, replayed by" in replayed(place, 1).notes[0]
