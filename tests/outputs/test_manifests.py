"""Provenance: what an output was made of, in files beside it or in its header."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import xxhash
import yaml

from tests.helpers.files import metadata, read
from tests.helpers.running import assert_done, call
from tests.helpers.scene import Scene

TIES = ("ft1:0.5", "ft2", "-b", "base", "-m", "ties", "-p", "density=0.3")


def manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest beside the weights."""
    return json.loads((folder / "mergebench_manifest.json").read_text())


def assert_digests(digests: dict[str, str], place: Path) -> None:
    """The digests are xxh3-128 of the stored bytes of every tensor."""
    arrays = read(place)
    assert sorted(digests) == sorted(arrays)
    for name, array in arrays.items():
        assert digests[name] == xxhash.xxh3_128(array.tobytes()).hexdigest(), name


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (TIES, "model"),
        ((*TIES, "--shard-size", "1kB", "--dtype", "bf16"), "model"),
        (("lora1", "lora2", "-m", "ties"), "lora"),
        ((*TIES, "--as", "delta"), "delta"),
    ],
)
def test_digests_are_those_of_the_bytes(
    scene: Scene, arguments: tuple[str, ...], kind: str
) -> None:
    """Manifest and --json give the digest of every stored tensor."""
    ran = assert_done(call("merge", *arguments, "-o", "out", "--json", cwd=scene.path))

    manifest = manifest_of(scene.path / "out")
    assert manifest["kind"] == kind
    assert_digests(manifest["outputs"], scene.path / "out")
    assert ran.json["outputs"][0]["digests"] == manifest["outputs"]


def test_manifest_names_inputs_by_content(scene: Scene) -> None:
    """Every input has role, path, weight, the fingerprint that inspect shows, and its files."""
    assert_done(call("merge", *TIES, "-o", "out", cwd=scene.path))

    manifest = manifest_of(scene.path / "out")
    inputs = {each["path"]: each for each in manifest["inputs"]}
    assert {name: each["role"] for name, each in inputs.items()} == {
        "base": "base",
        "ft1": "model",
        "ft2": "model",
    }
    assert (inputs["ft1"]["weight"], inputs["ft2"]["weight"]) == (0.5, 1.0)
    for name, each in inputs.items():
        shown = call("inspect", name, "--json", cwd=scene.path).json
        assert each["fingerprint"] == shown["fingerprint"]
        about = (scene.path / name / "model.safetensors").stat()
        (file,) = each["files"]
        assert file["name"] == "model.safetensors"
        assert (file["size"], file["mtime_ns"]) == (about.st_size, about.st_mtime_ns)


def test_manifest_holds_the_stored_recipe(scene: Scene) -> None:
    """Recipe file and manifest agree, and name the version that wrote them."""
    assert_done(call("merge", *TIES, "-o", "out", cwd=scene.path))

    manifest = manifest_of(scene.path / "out")
    stored = yaml.safe_load((scene.path / "out" / "mergebench_recipe.yaml").read_text())
    assert manifest["recipe"] == stored
    assert stored["params"]["density"] == 0.3
    version = call("--version", cwd=scene.path).out.split()[1]
    assert manifest["mergebench"] == version


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (TIES, "model"),
        (("a.safetensors", "b.safetensors"), "lora"),
        ((*TIES, "--as", "delta"), "delta"),
    ],
)
def test_single_files_carry_their_manifest(
    scene: Scene, arguments: tuple[str, ...], kind: str
) -> None:
    """A single file has recipe and inputs in its metadata, without times, and the usual format."""
    assert_done(call("merge", *arguments, "-o", "out.safetensors", cwd=scene.path))

    stored = metadata(scene.path / "out.safetensors")
    manifest = json.loads(stored["mergebench"])
    assert stored["format"] == "pt"
    assert manifest["kind"] == kind
    named = {f"{each['path']}:{each['weight']}" for each in manifest["recipe"]["models"]}
    assert named == {f"{arg}:1.0" if ":" not in arg else arg for arg in arguments[:2]}
    assert all(each["fingerprint"] for each in manifest["inputs"])
    assert "mtime" not in stored["mergebench"]


def test_recipe_in_a_single_file_runs_again(scene: Scene) -> None:
    """The recipe in a file's header, saved as a recipe, writes the same bytes."""
    assert_done(call("merge", *TIES, "-o", "out.safetensors", cwd=scene.path))
    recipe = json.loads(metadata(scene.path / "out.safetensors")["mergebench"])["recipe"]
    (scene.path / "again.json").write_text(json.dumps(recipe))
    assert_done(call("run", "again.json", "-o", "again.safetensors", cwd=scene.path))

    one, two = (scene.path / f"{name}.safetensors" for name in ("out", "again"))
    assert one.read_bytes() == two.read_bytes()


def test_base_that_inputs_name_is_recorded(scene: Scene) -> None:
    """A base found through the inputs' configs is noted, and stands in recipe and manifest."""
    for name in ("ft1", "ft2"):
        config = json.loads((scene.path / name / "config.json").read_text())
        named = {**config, "_name_or_path": str(scene.path / "base")}
        (scene.path / name / "config.json").write_text(json.dumps(named))

    ran = assert_done(call("merge", "ft1", "ft2", "-m", "ties", "-o", "out", cwd=scene.path))

    place = str(scene.path / "base")
    assert ran.err == f"note: base taken from what the inputs name: {place}\n"
    manifest = manifest_of(scene.path / "out")
    assert manifest["inputs"][0]["role"] == "base"
    assert manifest["inputs"][0]["path"] == place
    assert manifest["recipe"]["base"] == place
    explicit = ("merge", "ft1", "ft2", "-m", "ties", "-b", "base", "-o", "other")
    assert_done(call(*explicit, cwd=scene.path))
    files = [scene.path / name / "model.safetensors" for name in ("out", "other")]
    assert files[0].read_bytes() == files[1].read_bytes()
