"""Merged folders: companions, index, shards."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from tests.helpers.compare import assert_close, assert_files
from tests.helpers.files import F64, header, listing, metadata, read, tree, write
from tests.helpers.models import COMPANIONS, save_folder
from tests.helpers.running import assert_done, call
from tests.helpers.scene import Scene

OURS = {"README.md", "mergebench_manifest.json", "mergebench_recipe.yaml"}


def test_companions_are_copied_verbatim(scene: Scene) -> None:
    """Config, generation config, tokenizer and chat template are the base's, byte for byte."""
    assert_done(call("merge", "ft1", "ft2", "-b", "base", "-o", "out", cwd=scene.path))

    expected = tree(scene.path / "base")
    written = tree(scene.path / "out")
    assert set(written) == set(expected) | OURS
    for name in ("config.json", *COMPANIONS):
        assert written[name] == expected[name], name


def test_companions_come_from_the_base(scene: Scene) -> None:
    """Fine-tunes with tokenizers of their own do not change what is copied."""
    for name in ("ft1", "ft2"):
        (scene.path / name / "tokenizer.json").write_text(f'{{"of": "{name}"}}')
        (scene.path / name / "README.md").write_text("another card")

    assert_done(call("merge", "ft1", "ft2", "-b", "base", "-o", "out", cwd=scene.path))

    out = scene.path / "out"
    assert (out / "tokenizer.json").read_bytes() == COMPANIONS["tokenizer.json"]
    assert "another card" not in (out / "README.md").read_text()


def test_code_is_not_copied(scene: Scene) -> None:
    """Python files of a base stay behind, and a note says so."""
    (scene.path / "base" / "modeling_toy.py").write_text("raise SystemExit")

    ran = assert_done(call("merge", "ft1", "ft2", "-b", "base", "-o", "out", cwd=scene.path))

    assert "modeling_toy.py" not in listing(scene.path / "out")
    assert "modeling_toy.py is not copied" in ran.err


def test_merged_output_is_a_base_again(scene: Scene) -> None:
    """A merged folder merges again, and its own provenance is not copied as a companion."""
    common = ("-b", "base", "-m", "task_arithmetic")
    assert_done(call("merge", "ft1", *common, "-o", "one", cwd=scene.path))
    assert_done(call("merge", "ft2", "-b", "one", "-m", "ties", "-o", "two", cwd=scene.path))

    one, two = tree(scene.path / "one"), tree(scene.path / "two")
    assert set(one) == set(two)
    assert all(one[name] != two[name] for name in OURS)


@pytest.mark.parametrize("limit", [700, 1100, 2048, 5000])
def test_shards_hold_what_the_index_says(scene: Scene, limit: int) -> None:
    """Shards are numbered, no larger than asked unless one tensor is, and complete."""
    ran = call("merge", "ft1", "ft2", "-o", "out", "--shard-size", str(limit), cwd=scene.path)
    assert_done(ran)

    out = scene.path / "out"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    places = index["weight_map"]
    names = sorted(set(places.values()))
    assert names == [n for n in listing(out) if n.endswith(".safetensors")]
    assert names == [
        f"model-{i:05d}-of-{len(names):05d}.safetensors" for i in range(1, len(names) + 1)
    ]
    arrays = {}
    for name in names:
        held = read(out / name)
        assert dict.fromkeys(held, name) == {t: f for t, f in places.items() if f == name}
        assert len(held) == 1 or sum(array.nbytes for array in held.values()) <= limit
        assert metadata(out / name) == {"format": "pt"}
        arrays |= held
    assert index["metadata"] == {
        "total_size": sum(array.nbytes for array in arrays.values()),
        "total_parameters": sum(array.size for array in arrays.values()),
    }
    one, two = scene.tuned
    assert_close(arrays, {name: (one[name].astype(F64) + two[name]) / 2 for name in one})


def test_one_shard_needs_no_index(scene: Scene) -> None:
    """A model that fits the shard size is a single file."""
    assert_done(call("merge", "ft1", "ft2", "-o", "out", "--shard-size", "1GB", cwd=scene.path))

    weights = [name for name in listing(scene.path / "out") if "safetensors" in name]
    assert weights == ["model.safetensors"]


def test_folder_file_is_plain(scene: Scene) -> None:
    """The weights of a folder carry the usual metadata and nothing else; names are sorted."""
    assert_done(call("merge", "ft1", "ft2", "-o", "out", cwd=scene.path))

    entries, _ = header(scene.path / "out" / "model.safetensors")
    assert entries.pop("__metadata__") == {"format": "pt"}
    offsets = [entry["data_offsets"] for entry in entries.values()]
    assert offsets[0][0] == 0
    assert all(left[1] == right[0] for left, right in pairwise(offsets))
    floating = [name for name, entry in entries.items() if entry["dtype"] == "F32"]
    assert floating == sorted(floating)


def test_modes_follow_the_umask(scene: Scene) -> None:
    """Files are readable by others where the umask allows it."""
    assert_done(call("merge", "ft1", "ft2", "-o", "out", cwd=scene.path))
    probe = scene.path / "probe"
    probe.write_bytes(b"")

    for path in (scene.path / "out").iterdir():
        assert path.stat().st_mode == probe.stat().st_mode, path.name


def test_parts_of_sentence_transformers_are_copied(scene: Scene) -> None:
    """Numbered folders of a sentence-transformers model keep their configs."""
    (scene.path / "base" / "1_Pooling").mkdir()
    (scene.path / "base" / "1_Pooling" / "config.json").write_text('{"pooling": "mean"}')
    (scene.path / "base" / "modules.json").write_text("[]")

    assert_done(call("merge", "ft1", "ft2", "-b", "base", "-o", "out", cwd=scene.path))

    written, expected = tree(scene.path / "out"), tree(scene.path / "base")
    kept = [name for name in expected if name != "model.safetensors"]
    assert_files({name: written[name] for name in kept}, {name: expected[name] for name in kept})


def test_inputs_are_not_touched(scene: Scene) -> None:
    """Whatever is merged, the inputs keep their bytes and times."""
    paths = [path for path in scene.path.rglob("*") if path.is_file()]
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}

    for arguments in (
        ("ft1", "ft2", "-b", "base", "-m", "ties"),
        ("lora1", "lora2"),
        ("base+lora1",),
    ):
        assert_done(call("merge", *arguments, "-o", "out", "-f", cwd=scene.path))

    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths} == before


def test_file_in_a_folder_stands_for_the_folder(scene: Scene, tmp_path: Path) -> None:
    """A base given as folder/model.safetensors brings config and tokenizer with it."""
    base = scene.path / "base" / "model.safetensors"
    assert_done(call("merge", "ft1", "ft2", "-b", base, "-o", "out", cwd=scene.path))

    assert (scene.path / "out" / "tokenizer.json").read_bytes() == COMPANIONS["tokenizer.json"]
    assert save_folder(tmp_path / "again", scene.base).is_dir()
    assert write(tmp_path / "w.safetensors", scene.base).is_file()
