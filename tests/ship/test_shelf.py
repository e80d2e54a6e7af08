"""A shelf of adapters: the bytes that were added, stored once, usable where they are."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergebench.checkpoints import shelved
from mergebench.core.errors import MergebenchError, ParameterError
from mergebench.ship import shelf_changes
from mergebench.ship.cards import push_card
from mergebench.ship.packing import packing
from mergebench.ship.shelf import check_name, entries, entry, is_shelf, name_for
from mergebench.ship.shelf_care import collect, damage, disk_bytes, objects
from mergebench.ship.shelving import add
from tests.helpers.files import F32, listing, read, tree, write
from tests.helpers.running import Ran, assert_done, assert_refused, call
from tests.helpers.scene import Scene, build_scene


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    """Adapters and models."""
    return build_scene(tmp_path / "here")


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    """Where the shelf will be."""
    return tmp_path / "shelf"


def zoo(scene: Scene, shelf: Path, *args: Any) -> Ran:
    """Run a command of the shelf."""
    return call("zoo", *args, cwd=scene.path, env={"MERGEBENCH_SHELF": str(shelf)})


def adapter(folder: Path, frozen: np.ndarray[Any, Any], seed: int) -> Path:
    """A LoRA whose down-projection is given."""
    draw = np.random.default_rng(seed)
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    up = draw.standard_normal((64, frozen.shape[0])).astype(F32)
    arrays = {f"{stem}.lora_A.weight": frozen, f"{stem}.lora_B.weight": up}
    write(folder / "adapter_model.safetensors", arrays, {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": frozen.shape[0],
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def frozen() -> np.ndarray[Any, Any]:
    """A down-projection of 64 kB."""
    return np.random.default_rng(9).standard_normal((16, 1024)).astype(F32)


def test_what_comes_back_is_what_was_added(scene: Scene, shelf: Path) -> None:
    """Folders and single files, byte for byte."""
    assert_done(zoo(scene, shelf, "add", "lora1", "a.safetensors", "tau1.safetensors"))

    for name in ("lora1", "a", "tau1"):
        assert_done(zoo(scene, shelf, "export", name, "-o", f"back-{name}"))

    assert tree(scene.path / "back-lora1") == tree(scene.path / "lora1")
    for name in ("a", "tau1"):
        file = f"{name}.safetensors"
        assert tree(scene.path / f"back-{name}") == {file: (scene.path / file).read_bytes()}
    assert_refused(zoo(scene, shelf, "export", "a", "-o", "back-a"), "exists already")


def test_entries_are_inputs(scene: Scene, shelf: Path) -> None:
    """A path on the shelf gives what the folder gives, in every command."""
    assert_done(zoo(scene, shelf, "add", "lora1", "b.safetensors", "tau1.safetensors"))
    places = {name: zoo(scene, shelf, "path", name).out.strip() for name in ("lora1", "b", "tau1")}

    assert_done(call("diff", places["lora1"], "lora1", cwd=scene.path))
    assert_done(call("diff", places["b"], "b.safetensors", cwd=scene.path))
    assert_done(call("diff", places["tau1"], "tau1.safetensors", cwd=scene.path))
    merge = ("-m", "ties", "-b", "base", "-o")
    assert_done(call("merge", "lora1", "b.safetensors", *merge, "one", cwd=scene.path))
    assert_done(call("merge", places["lora1"], places["b"], *merge, "two", cwd=scene.path))
    one, two = read(scene.path / "one"), read(scene.path / "two")
    for name in one:
        np.testing.assert_array_equal(one[name], two[name])
    assert_done(call("verify", "two", "--replay", "all", cwd=scene.path))


def test_shared_tensors_are_stored_once(scene: Scene, shelf: Path) -> None:
    """Ten adapters on one frozen projection take the place of ten up-projections and one down."""
    same = frozen()
    for seed in range(10):
        adapter(scene.path / f"z{seed}", same, seed)

    assert_done(zoo(scene, shelf, "add", *(f"z{seed}" for seed in range(10))))

    shown = assert_done(zoo(scene, shelf, "ls", "--json")).json
    size = sum(path.stat().st_size for path in (scene.path / "z0").iterdir())
    assert shown["bytes"] == 10 * size
    large = [e for e in objects(shelf) if e.stat().st_size == same.nbytes]
    assert len(large) == 1
    assert shown["on_disk"] == shown["bytes"] - 9 * same.nbytes - 9 * head_size(scene.path / "z0")
    one = assert_done(zoo(scene, shelf, "show", "z3", "--json")).json
    assert one["shared_bytes"] == same.nbytes + head_size(scene.path / "z0")
    assert "10 adapters" in assert_done(zoo(scene, shelf, "ls")).out


def head_size(folder: Path) -> int:
    """Bytes of a file before its data."""
    with (folder / "adapter_model.safetensors").open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def test_removed_and_collected(scene: Scene, shelf: Path) -> None:
    """What another adapter has stays; the rest goes, and is told before."""
    same = frozen()
    for seed in range(2):
        adapter(scene.path / f"z{seed}", same, seed)
    assert_done(zoo(scene, shelf, "add", "z0", "z1"))
    full = len(objects(shelf))

    assert_done(zoo(scene, shelf, "rm", "z0"))
    assert len(objects(shelf)) == full
    planned = assert_done(zoo(scene, shelf, "gc", "--dry-run", "--json")).json
    assert len(objects(shelf)) == full
    done = assert_done(zoo(scene, shelf, "gc", "--json")).json

    assert done["objects"] == planned["objects"] == 1
    assert done["bytes"] == planned["bytes"] == 64 * 16 * 4
    assert_done(zoo(scene, shelf, "verify"))
    assert_done(zoo(scene, shelf, "export", "z1", "-o", "back"))
    assert_refused(zoo(scene, shelf, "rm", "z0", "z1"), "z0: is not on the shelf", "known: z1")
    assert [each.name for each in entries(shelf)] == ["z1"]
    assert_done(zoo(scene, shelf, "rm", "z1"))
    assert_done(zoo(scene, shelf, "gc"))
    assert disk_bytes(shelf) == 0
    assert "0 adapters" in assert_done(zoo(scene, shelf, "ls")).out


def test_names(scene: Scene, shelf: Path) -> None:
    """Taken ones are not replaced by the way; those that lead elsewhere are none."""
    assert_done(zoo(scene, shelf, "add", "lora1"))
    assert_refused(zoo(scene, shelf, "add", "lora1"), "on the shelf already", "--as")
    assert_done(zoo(scene, shelf, "add", "lora2", "--as", "lora1", "--force"))
    assert_done(call("diff", "lora2", shelf / "adapters" / "lora1", cwd=scene.path))
    assert_refused(zoo(scene, shelf, "add", "lora1", "lora2", "--as", "x"), "names one adapter")
    for name in ("../x", "a/b", ".x", "", "x" * 101, "a\n", "x.", "-x"):
        with pytest.raises(ParameterError):
            check_name(name)
        with pytest.raises(ParameterError):
            entry(shelf, name)
    for reference in ("x/ü ö/", "..", "/", "hf://org/na me@v1", "a" * 300, "x.safetensors"):
        check_name(name_for(reference))
    assert name_for("hf://org/style.v2@main") == "style.v2"
    assert listing(shelf / "adapters") == ["lora1"]


def test_what_does_not_belong(scene: Scene, shelf: Path) -> None:
    """Models, pickles, entries themselves, nothing, and folders that are no shelf."""
    torch = pytest.importorskip("torch")
    place = scene.path / "pickled"
    place.mkdir()
    stored = read(scene.path / "lora1")
    torch.save({k: torch.tensor(v) for k, v in stored.items()}, place / "adapter_model.bin")
    config = (scene.path / "lora1" / "adapter_config.json").read_bytes()
    (place / "adapter_config.json").write_bytes(config)
    assert_done(zoo(scene, shelf, "add", "lora1"))

    assert_refused(zoo(scene, shelf, "add", "ft1"), "is a model")
    assert_refused(zoo(scene, shelf, "add", "pickled"), "is a pickle", "mergebench merge pickled")
    inside = shelf / "adapters" / "lora1"
    assert_refused(zoo(scene, shelf, "add", inside, "--as", "x"), "is on a shelf", "zoo export")
    assert_refused(zoo(scene, shelf, "add", "gone"), "gone: no such file")
    assert_refused(zoo(scene, scene.path, "add", "lora1"), "is no shelf, and not empty")
    assert_refused(zoo(scene, shelf, "show", "lora"), "did you mean 'lora1'?")
    assert [each.name for each in entries(shelf)] == ["lora1"]


def test_manifests_are_compared(scene: Scene, shelf: Path) -> None:
    """A damaged output is not put on the shelf."""
    assert_done(call("merge", "lora1", "lora2", "-o", "out", cwd=scene.path))
    weights = scene.path / "out" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))

    assert_refused(zoo(scene, shelf, "add", "out"), "not as it was written", "not put on the shelf")
    assert entries(shelf) == []


def test_damage_is_found(scene: Scene, shelf: Path) -> None:
    """Changed, cut and missing objects: in `verify`, on export, and when they are opened."""
    adapter(scene.path / "z", frozen(), 1)
    assert_done(zoo(scene, shelf, "add", "z"))
    found = entry(shelf, "z")
    place = found.files[0].place(found.files[0].pieces[1])
    good = place.read_bytes()

    place.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    ran = zoo(scene, shelf, "verify")
    assert (ran.code, "its bytes have changed" in ran.out) == (1, True)
    assert zoo(scene, shelf, "verify", "z", "--json").json["findings"] != []
    assert_refused(zoo(scene, shelf, "export", "z", "-o", "back"), "is damaged")
    assert "back" not in listing(scene.path)
    assert_done(zoo(scene, shelf, "add", "z", "--force"))
    assert_done(zoo(scene, shelf, "verify"))
    place.write_bytes(good[:-1])
    assert_refused(call("inspect", found.path, cwd=scene.path), "is damaged", "bytes")
    place.unlink()
    assert_refused(call("inspect", found.path, cwd=scene.path), "is missing on the shelf")
    assert zoo(scene, shelf, "verify").code == 1
    assert_done(zoo(scene, shelf, "add", "z", "--force"))
    assert_done(zoo(scene, shelf, "verify"))


def lists() -> list[Any]:
    """Lists of objects that are none."""
    piece = ["0" * 64, 8]
    sound = {"shelf": 1, "file": "a.safetensors", "objects": [piece]}
    return [
        [], "x", {**sound, "shelf": 2}, {**sound, "file": "../a.safetensors"},
        {**sound, "objects": []}, {**sound, "objects": "x"}, {**sound, "objects": [["../x", 8]]},
        {**sound, "objects": [["0" * 64, -1]]}, {**sound, "objects": [["0" * 64, True]]},
        {**sound, "objects": [["0" * 64 + "/", 8]]}, {**sound, "objects": [[8, "0" * 64]]},
    ]  # fmt: skip


@pytest.mark.parametrize("data", lists())
def test_lists_of_strangers(tmp_path: Path, data: Any) -> None:
    """A list names objects by digits alone, so none leads out of the shelf."""
    path = tmp_path / "a.safetensors.shelf"
    path.write_text(json.dumps(data))
    with pytest.raises(MergebenchError, match="no sound list"):
        shelved.read_shelved(path)


def test_a_damaged_list_stops_collecting(scene: Scene, shelf: Path) -> None:
    """Who knows what it refers to? Nothing goes."""
    assert_done(zoo(scene, shelf, "add", "lora1", "lora2"))
    assert_done(zoo(scene, shelf, "rm", "lora2"))
    before = tree(shelf / "objects")
    (entry(shelf, "lora1").files[0].path).write_text("{}")

    assert_refused(zoo(scene, shelf, "gc"), "no sound list")

    assert tree(shelf / "objects") == before


def test_many_at_a_time(scene: Scene, shelf: Path) -> None:
    """Adding, removing and collecting at once leaves every adapter whole."""
    same = frozen()
    places = [adapter(scene.path / f"z{seed}", same, seed) for seed in range(6)]
    errors: list[BaseException] = []

    def work(place: Path) -> None:
        try:
            add(shelf, str(place))
            collect(shelf)
            add(shelf, str(place), force=True)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(place,)) for place in places]
    for each in threads:
        each.start()
    for each in threads:
        each.join()

    assert errors == []
    assert [each.name for each in entries(shelf)] == [place.name for place in places]
    assert [found for each in entries(shelf) for found in damage(each)] == []
    assert [name for name in listing(shelf / "adapters") if name.startswith(".")] == []


def test_a_shelf_that_appears_meanwhile(
    scene: Scene, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who first sees no shelf, and then what another run has begun in it, looks again."""
    looked: list[Path] = []

    def late(place: Path) -> bool:
        looked.append(place)
        if len(looked) == 1:
            add_by_another()
            return False
        return is_shelf(place)

    def add_by_another() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(shelf_changes, "is_shelf", is_shelf)
            add(shelf, str(scene.path / "lora1"))

    monkeypatch.setattr(shelf_changes, "is_shelf", late)
    add(shelf, str(scene.path / "lora2"))

    assert [each.name for each in entries(shelf)] == ["lora1", "lora2"]


def test_only_one_changes_it_at_a_time(scene: Scene, shelf: Path, monkeypatch: Any) -> None:
    """Who waits too long is told who holds the shelf."""
    monkeypatch.setattr(shelf_changes, "PATIENCE", 0.1)
    with shelf_changes.locked(shelf), pytest.raises(MergebenchError, match="another run"):
        add(shelf, str(scene.path / "lora1"))
    add(shelf, str(scene.path / "lora1"))


def packed_file(path: Path, size: int) -> Path:
    """A saved task vector that says it was packed from so many bytes."""
    made = {"scheme": "ternary", "input_bytes": size, "relative_error": 0.25, "cosine": 0.9687}
    about = {"kind": "packed", "version": 1, "of": None, "made": made}
    return write(path, {"w": np.ones(4, F32)}, {"mergebench": json.dumps(about)})


def test_what_packing_says(tmp_path: Path, scene: Scene) -> None:
    """Sizes before and after, and the error, of a file or of a folder of one."""
    path = packed_file(tmp_path / "p" / "a.mbz.safetensors", 20_000)
    size = path.stat().st_size

    found = packing(path)

    assert found == packing(path.parent)
    assert found is not None
    assert (found.bytes, found.before) == (size, 20_000)
    assert dict(found.rows()) == {
        "packed by": "ternary", "bytes": f"{size:,}", "bytes before": "20,000",
        "times smaller": f"{20_000 / size:.1f}", "relative error": "0.25", "cosine": "0.9687",
    }  # fmt: skip
    assert packing(scene.path / "a.safetensors") is None
    assert packing(scene.path / "tau1.safetensors") is None
    card = push_card("org/name", None, None, None, found)
    assert "| relative error | 0.25 |" in card
    assert "mergebench merge hf://org/name" in card
    assert name_for(str(path)) == "a"


def test_small_tensors_stand_together() -> None:
    """Only large tensors are objects of their own."""
    file = Path(__file__)
    sizes = (10, shelved.SMALL, 0, 4, 4, 2 * shelved.SMALL, 0)
    tensors, at = [], 100
    for size in sizes:
        tensors.append(shelved.FileTensor("x", "U8", (size,), at, file))  # type: ignore[arg-type]
        at += size
    big = 110 + shelved.SMALL

    assert shelved.cuts(100, tensors, at) == [
        0,
        100,
        110,
        big,
        big + 8,
        big + 8 + 2 * shelved.SMALL,
    ]
    assert shelved.cuts(100, [], 100) == [0, 100]


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_packed_adapters_stand_on_the_shelf(scene: Scene, shelf: Path, folder: bool) -> None:
    """A file, and a folder of one with its config: named, listed, merged, given back."""
    place = scene.path / "packed"
    place.mkdir()
    path = place / "adapter.mbz.safetensors"
    report = assert_done(call("compress", "lora1", "-o", path, "--json", cwd=scene.path)).json
    if folder:
        config = (scene.path / "lora1" / "adapter_config.json").read_bytes()
        (place / "adapter_config.json").write_bytes(config)
    name = "packed" if folder else "adapter"

    assert_done(zoo(scene, shelf, "add", "packed" if folder else path))

    (row,) = assert_done(zoo(scene, shelf, "ls", "--json")).json["adapters"]
    assert row["name"] == name
    beside = sum(each.stat().st_size for each in place.iterdir() if each != path)
    assert row["uncompressed"] == report["input_bytes"] + beside
    assert row["bytes"] == path.stat().st_size + beside
    on_shelf = zoo(scene, shelf, "path", name).out.strip()
    merge = ("-m", "ties", "-o")
    assert_done(call("merge", path, "lora2", *merge, "one.safetensors", cwd=scene.path))
    assert_done(call("merge", on_shelf, "lora2", *merge, "two.safetensors", cwd=scene.path))
    one, two = (read(scene.path / f"{each}.safetensors") for each in ("one", "two"))
    assert {n: a.tobytes() for n, a in one.items()} == {n: a.tobytes() for n, a in two.items()}
    assert_done(zoo(scene, shelf, "export", name, "-o", "back"))
    assert tree(scene.path / "back") == tree(place)
    assert_done(zoo(scene, shelf, "verify"))
