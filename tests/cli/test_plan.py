"""``plan`` and ``--dry-run``: everything is checked and shown, nothing is written."""

from __future__ import annotations

import pytest

from tests.helpers.compare import assert_files
from tests.helpers.files import F32, read, tree, write
from tests.helpers.running import assert_done, assert_refused, call
from tests.helpers.scene import Scene

TIES = ("ft1:0.5", "ft2", "--base", "base", "--method", "ties")


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", *TIES),
        ("plan", *TIES, "--json"),
        ("merge", *TIES, "--dry-run"),
        ("merge", *TIES, "-n", "--json", "-o", "deep/down/out"),
        ("merge", "a.safetensors", "b.safetensors", "-m", "breadcrumbs", "-p", "lam=1,2", "-n"),
    ],
)
def test_planning_writes_nothing(scene: Scene, arguments: tuple[str, ...]) -> None:
    """No file appears or changes, hidden ones included."""
    before = tree(scene.path)

    assert_done(call(*arguments, cwd=scene.path))

    assert_files(tree(scene.path), before)


def test_plan_shows_the_fate_of_everything(scene: Scene) -> None:
    """The plan names inputs with weights, ops, output, copies, passes, memory and disk."""
    ran = assert_done(call("plan", *TIES, "-o", "out", cwd=scene.path))

    shown = dict(line.split(None, 1) for line in ran.out.splitlines())
    assert sorted(shown["inputs"].strip().split(", ")) == ["ft1 × 0.5", "ft2 × 1"]
    assert shown["base"].strip() == "base"
    assert shown["ops"].startswith("trim(density=0.2, scope=model, count=exact) → elect_sign(")
    assert shown["output"].strip() == "model: out"
    assert shown["files"].strip() == "model.safetensors"
    entries = sum(array.size for array in scene.base.values() if array.dtype == F32)
    assert shown["merged"].strip() == f"9 tensors, {entries:,} entries"
    assert shown["copied"].strip() == "1 tensors (I64, equal in all): model.position_ids"
    assert shown["passes"].startswith("3 over ")
    assert "workers, at least " in shown["memory"]
    assert shown["disk"].strip().endswith("kB")


def test_plan_as_json(scene: Scene) -> None:
    """--json gives the same facts as data, byte counts exact."""
    data = assert_done(call("plan", *TIES, "-p", "lam=0.5,1", "--json", cwd=scene.path)).json

    assert data["method"] == "ties"
    assert data["form"] == "model"
    assert data["base"] == "base"
    assert {each["path"]: each["weight"] for each in data["inputs"]} == {"ft1": 0.5, "ft2": 1.0}
    assert [(each["label"], each["path"]) for each in data["outputs"]] == [
        ("lam=0.5", "merged/lam=0.5"),
        ("lam=1", "merged/lam=1"),
    ]
    assert data["outputs"][0]["recipe"]["params"]["lam"] == 0.5
    assert data["tensors"] == {
        "merged": 9,
        "copied": {"model.position_ids": "I64, equal in all"},
        "tied": {},
    }
    floating = sum(array.nbytes for array in scene.base.values() if array.dtype == F32)
    buffer = scene.base["model.position_ids"].nbytes
    assert data["entries"] == floating // 4
    assert data["passes"] == 3
    assert data["read_bytes"] == 3 * (3 * floating + buffer)
    assert data["files"] == ["model.safetensors"]
    assert 0 < data["least_memory"] <= data["memory"] <= 512 << 20


def test_planned_bytes_are_the_bytes_written(scene: Scene) -> None:
    """The disk space that the plan promises is what the weights take."""
    arguments = ("ft1", "ft2", "-o", "out", "--shard-size", "2kB")
    data = assert_done(call("plan", *arguments, "--json", cwd=scene.path)).json
    assert_done(call("merge", *arguments, cwd=scene.path))

    written = {path.name: path.stat().st_size for path in scene.path.glob("out/*.safetensors")}
    assert sorted(written) == data["files"]
    assert sum(written.values()) == data["write_bytes"]
    assert len(written) > 1


def test_plan_needs_no_free_place(scene: Scene) -> None:
    """A plan may be looked at where the output exists already; the merge is refused there."""
    (scene.path / "out").mkdir()

    assert_done(call("plan", *TIES, "-o", "out", cwd=scene.path))
    assert_refused(call("merge", *TIES, "-o", "out", cwd=scene.path), "out", "--force")


def test_default_place_is_a_file_for_files_and_a_folder_for_folders(scene: Scene) -> None:
    """Files give merged.safetensors; folders, or shards asked for, give merged/."""
    cases = {
        ("ft1.safetensors", "ft2.safetensors"): "merged.safetensors",
        ("ft1.safetensors", "ft2"): "merged",
        ("ft1", "ft2"): "merged",
        ("ft1.safetensors", "ft2.safetensors", "--shard-size", "1MB"): "merged",
    }
    for arguments, place in cases.items():
        data = assert_done(call("plan", *arguments, "--json", cwd=scene.path)).json
        assert [each["path"] for each in data["outputs"]] == [place]


def test_errors_surface_before_any_work(scene: Scene) -> None:
    """A tensor of another shape is named with both shapes, by the plan already."""
    arrays = read(scene.path / "ft2.safetensors")
    arrays["model.norm.weight"] = arrays["model.norm.weight"][:8]
    write(scene.path / "odd.safetensors", arrays)

    ran = call("plan", "ft1.safetensors", "odd.safetensors", "-b", "base", cwd=scene.path)

    assert_refused(ran, "model.norm.weight", "base is 16", "odd.safetensors is 8")
