"""An output is compared with its manifest: a flipped bit anywhere is found and named."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import xxhash

from mergebench import merge_models
from mergebench.core.errors import MergebenchError
from mergebench.manifest import MANIFEST, RECIPE
from mergebench.merge.verify import verify
from tests.faults.merges import build_inputs as build_more
from tests.helpers.files import metadata, read, write
from tests.helpers.running import assert_refused, call
from tests.safety.support import (
    SHAPES,
    build_inputs,
    checked,
    edit,
    flip,
    merged,
    places_of,
)

KINDS: dict[str, dict[str, Any]] = {
    "folder": {"out": "out"},
    "shards": {"out": "out", "shard_size": "60B"},
    "file": {"out": "out.safetensors"},
    "delta file": {"out": "out.safetensors", "form": "delta"},
}


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """A folder with base and fine-tunes."""
    build_inputs(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_written_is_right(inputs: Path, kind: str) -> None:
    """No finding, no note, and every tensor read."""
    place = merged(inputs, **KINDS[kind])

    verdict = checked(place)

    assert verdict.findings == ()
    assert verdict.notes == ()
    stored = read(place)
    assert verdict.tensors == len(stored)
    assert verdict.bytes == sum(array.nbytes for array in stored.values())


@pytest.mark.parametrize("kind", KINDS)
def test_every_byte_of_an_output_counts(inputs: Path, kind: str) -> None:
    """One bit of each byte of each file is turned over: all are found, in the file they are in."""
    place = merged(inputs, **KINDS[kind])
    files = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())
    missed = []
    count = 0
    for path in files:
        tensors = places_of(path) if path.suffix == ".safetensors" else {}
        step = 1 if path.suffix == ".safetensors" else 3
        for byte in range(0, path.stat().st_size, step):
            flip(path, byte, byte % 8)
            verdict = checked(place)
            flip(path, byte, byte % 8)
            count += 1
            if path.name == "README.md":
                assert verdict.notes == ("README.md was edited since",)
                continue
            named = [
                each
                for each in verdict.findings
                if each.file == path.name
                and each.start is not None
                and each.start <= byte < each.stop
            ]
            inside = [name for name, (start, stop) in tensors.items() if start <= byte < stop]
            if not named or (inside and [each.tensor for each in named] != inside):
                missed.append((path.name, byte, [str(each) for each in verdict.findings]))
    assert missed == []
    assert count > 500


@pytest.mark.parametrize("kind", KINDS)
def test_flipped_bit_names_tensor_file_and_bytes(inputs: Path, kind: str) -> None:
    """The command prints one line for it and ends with exit code 1."""
    place = merged(inputs, **KINDS[kind])
    paths = [place] if place.is_file() else sorted(place.glob("*.safetensors"))
    ((path, (start, stop)),) = [
        (path, places_of(path)["norm.weight"]) for path in paths if "norm.weight" in places_of(path)
    ]
    flip(path, start + 3, 6)

    ran = call("verify", place, "--inputs", inputs, cwd=inputs)

    assert (ran.code, ran.err) == (1, "")
    first, last = ran.out.splitlines()
    assert first == (
        f"{path.name}: tensor 'norm.weight': its bytes are not those that were written "
        f"(bytes {start} to {stop})"
    )
    assert last.startswith(f"{place}: 1 finding; ")


def test_digests_in_a_header_are_those_of_the_tensors(inputs: Path) -> None:
    """xxh3-128 of every tensor in the order of the bytes, then that of the header itself."""
    place = merged(inputs, "out.safetensors")

    text = metadata(place)["mergebench_digests"]
    stored = read(place)
    names = sorted(stored, key=lambda name: places_of(place)[name])
    parts = [text[at : at + 32] for at in range(0, len(text), 32)]
    assert parts[:-1] == [xxhash.xxh3_128_hexdigest(stored[name].tobytes()) for name in names]
    head = place.read_bytes()[: places_of(place)[names[0]][0]]
    assert parts[-1] == xxhash.xxh3_128_hexdigest(head.replace(parts[-1].encode(), b"0" * 32))


def test_missing_and_extra_tensors(inputs: Path) -> None:
    """Also where somebody has written the file again."""
    place = merged(inputs, "out")
    path = place / "model.safetensors"
    arrays = read(path)
    del arrays["norm.weight"]
    arrays["layers.0.q.weight"] = arrays["layers.0.q.weight"].reshape(4, 6)
    arrays["steps"] = arrays["steps"].astype("int32")
    arrays["other"] = arrays["steps"]
    write(path, arrays, {"format": "pt"})

    said = {(each.kind, each.tensor): each.what for each in checked(place).findings}

    assert said[("tensor", "norm.weight")] == "is missing"
    assert said[("tensor", "other")] == "was not written by the merge"
    assert said[("header", "")] == "the header is not the one that was written"
    assert set(said) == {
        ("header", ""),
        ("file", ""),
        *(("tensor", name) for name in ("norm.weight", "other", "steps", "layers.0.q.weight")),
    }
    shapes = [each.what for each in checked(place).findings if each.tensor == "layers.0.q.weight"]
    assert shapes == ["is BF16 [4, 6], written was BF16 [6, 4]"]


def test_missing_and_extra_files(inputs: Path) -> None:
    """A stray shard is a finding, another added file a note."""
    place = merged(inputs, "out", shard_size="60B")
    shards = sorted(place.glob("*.safetensors"))
    shards[0].unlink()
    (place / "config.json").unlink()
    shutil.copy(shards[1], place / "model-00009-of-00009.safetensors")
    (place / "notes.txt").write_text("mine")
    (place / ".cache").mkdir()
    (place / ".cache" / "upload").write_text("what an upload leaves behind is nobody's business")

    verdict = checked(place)

    said = {(each.file, each.what) for each in verdict.findings if not each.tensor}
    assert said == {
        (shards[0].name, "the file is missing"),
        ("config.json", "the file is missing"),
        ("model-00009-of-00009.safetensors", "was not written by the merge"),
    }
    assert verdict.notes == ("notes.txt was added since",)


def test_index_that_contradicts_the_shards(inputs: Path) -> None:
    """The finding says how, not only that it changed."""
    place = merged(inputs, "out", shard_size="60B")
    path = place / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["norm.weight"] = index["weight_map"]["layers.0.q.weight"]
    path.write_text(json.dumps(index))

    (found,) = checked(place).findings

    assert (found.kind, found.file) == ("index", path.name)
    assert "'norm.weight'" in found.what


def test_recipe_that_is_not_the_manifests(inputs: Path) -> None:
    """Keys that differ are named; other words for the same are told apart."""
    place = merged(inputs, "out")
    path = place / RECIPE
    text = path.read_text()
    for new, what in (
        (text.replace("0.5", "0.6"), "is not the recipe of the manifest: params differ"),
        ("# mine\n" + text, "says the same as the manifest, in other words than were written"),
        ("]", "is damaged: it is not YAML"),
        ("text", "is damaged: it is no recipe"),
    ):
        path.write_text(new)
        (found,) = checked(place).findings
        assert (found.kind, found.file, found.what) == ("recipe", RECIPE, what)


def test_edited_manifest(inputs: Path) -> None:
    """A digest changed to fit other bytes is found by the manifest's own."""
    place = merged(inputs, "out")
    path, start = place / "model.safetensors", places_of(place / "model.safetensors")["steps"][0]
    flip(path, start)
    manifest = json.loads((place / MANIFEST).read_text())
    manifest["outputs"]["steps"] = xxhash.xxh3_128_hexdigest(read(path)["steps"].tobytes())
    (place / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")

    (found,) = checked(place).findings

    assert (found.kind, found.file) == ("manifest", MANIFEST)
    for text in ("{", "[]", '{"recipe": {}, "inputs": [3]}'):
        (place / MANIFEST).write_text(text)
        (found,) = checked(place).findings
        assert found.what.startswith("the manifest is damaged")


def test_inputs_that_changed_or_are_gone(inputs: Path) -> None:
    """Other values are a finding; another time, or nothing there any more, a note."""
    place = merged(inputs, "out")
    path = inputs / "ft1" / "model.safetensors"
    os.utime(path, ns=(1, 1))
    touched = checked(place)
    flip(path, places_of(path)["norm.weight"][0])
    changed = checked(place)
    write(path, read(path), {"format": "pt", "more": "text"})
    rewritten = checked(place)
    shutil.rmtree(inputs / "ft1")
    gone = checked(place)

    shown = f"ft1 (now {inputs / 'ft1'})"
    time = f"input {shown} has another modification time and the same content"
    assert (touched.findings, touched.notes) == ((), (time,))
    (found,) = changed.findings
    assert (found.kind, found.file) == ("input", shown)
    assert found.what == "is not the input that was merged: values changed"
    (found,) = rewritten.findings
    assert "size of model.safetensors, header of model.safetensors changed" in found.what
    assert (gone.findings, gone.notes) == ((), ("input ft1 is not there any more",))


def test_inputs_are_found_where_they_were(inputs: Path, tmp_path: Path) -> None:
    """By the recorded path, if no folder is given; the weights file stands for its folder."""
    place = merged(inputs, "out")
    flip(inputs / "base" / "model.safetensors", 200)

    ran = call("verify", place / "model.safetensors", "--json", cwd=inputs)
    elsewhere = call("verify", place, "--json", cwd=place)

    assert ran.code == 1
    assert [each["file"] for each in ran.json["findings"]] == ["base"]
    assert elsewhere.code == 0
    gone = [f"input {name} is not there any more" for name in ("base", "ft1", "ft2")]
    assert sorted(elsewhere.json["notes"]) == gone


def test_adapters_and_pairs_as_inputs(inputs: Path) -> None:
    """base+adapter is looked for part by part."""
    build_more(inputs / "in")
    names = [str(Path("in") / "lora1"), str(Path("in") / "base") + "+" + str(Path("in") / "lora2")]
    with chdir(inputs):
        merge_models(names, base="in/base", out="pair", method="task_arithmetic")

    verdict = checked(inputs / "pair", inputs=inputs / "in")

    assert (verdict.findings, verdict.notes) == ((), ())
    flip(inputs / "in" / "lora2" / "adapter_model.safetensors", -1 + 500)
    (found,) = checked(inputs / "pair", inputs=inputs / "in").findings
    assert found.kind == "input"


@pytest.mark.parametrize("name", ["base", "base/model.safetensors"])
def test_without_a_manifest_nothing_can_be_checked(inputs: Path, name: str) -> None:
    """Exit code 2, and the next step."""
    ran = call("verify", name, cwd=inputs)

    assert_refused(ran, f"{name}: has no manifest", "mergebench check")
    assert_refused(call("verify", "nowhere", cwd=inputs), "nowhere: no such file or folder")


def test_foreign_files_are_refused(inputs: Path) -> None:
    """What was never an output is no damaged one."""
    (inputs / "text.safetensors").write_text("{}")

    with pytest.raises(MergebenchError, match="is a JSON file"):
        verify(inputs / "text.safetensors")


def test_output_of_an_earlier_version(inputs: Path) -> None:
    """Tensors are compared; a note says that the rest is not. Files had no digests then."""
    place = merged(inputs, "out")
    manifest = json.loads((place / MANIFEST).read_text())
    for key in ("tensors", "files", "beside", "digest"):
        del manifest[key]
    (place / MANIFEST).write_text(json.dumps(manifest))
    (place / "config.json").write_text("{}")
    verdict = checked(place)

    assert verdict.findings == ()
    assert "of an earlier version" in verdict.notes[0]
    flip(place / "model.safetensors", places_of(place / "model.safetensors")["steps"][0])
    (found,) = checked(place).findings
    assert found.tensor == "steps"
    data = {key: manifest[key] for key in ("recipe", "inputs", "kind", "version")}
    write(inputs / "old.safetensors", read(place), {"mergebench": json.dumps(data)})
    with pytest.raises(MergebenchError, match="earlier version"):
        verify(inputs / "old.safetensors")


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_threads(inputs: Path, workers: int) -> None:
    """Findings come in the order of the files; progress counts bytes."""
    place = merged(inputs, "out", shard_size="60B")
    for path in place.glob("*.safetensors"):
        for start, _ in places_of(path).values():
            flip(path, start)
    steps: list[tuple[str, int, int]] = []

    verdict = checked(place, workers=workers, progress=lambda *step: steps.append(step))

    assert [each.tensor for each in verdict.findings] == [
        name for path in sorted(place.glob("*.safetensors")) for name in places_of(path)
    ]
    assert len(verdict.findings) == len(SHAPES) + 1
    assert steps[-1] == ("verifying", verdict.bytes, verdict.bytes)
    edit(place / "config.json", {"new": 1})
    assert checked(place, workers=workers).findings[-1].file == "config.json"


@pytest.mark.parametrize("name", ["a" * 3000, "", "..", "a\0b", "\ud800"])
def test_names_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    """In a manifest they are files that are missing, or the manifest is damaged."""
    data = {"recipe": {}, "inputs": [], "outputs": {}, "files": {name: {}}}
    (tmp_path / MANIFEST).write_text(json.dumps(data))

    assert any(each.kind in ("file", "manifest") for each in verify(tmp_path).findings)


def test_manifests_nested_without_end(tmp_path: Path) -> None:
    """Damaged, as any other that is none."""
    (tmp_path / MANIFEST).write_text('{"recipe":' + "[" * 500 + "]" * 500 + "}")

    (found,) = verify(tmp_path).findings
    assert "damaged" in found.what
