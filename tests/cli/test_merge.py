"""``mergebench merge``: the words people type first, and what they get."""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers.compare import assert_close, assert_same
from tests.helpers.files import F32, F64, listing, read, tree
from tests.helpers.models import added
from tests.helpers.running import assert_done, assert_refused, call, command
from tests.helpers.scene import Scene
from tests.helpers.updates import update_of


def test_two_adapter_files_merge_as_typed(scene: Scene) -> None:
    """The first example of the help page works in a folder with two adapter files."""
    ran = command(
        "merge", "a.safetensors", "b.safetensors", "--method", "breadcrumbs", cwd=scene.path
    )

    assert_done(ran)
    assert ran.err == ""
    assert ran.out.startswith("merged.safetensors: LoRA adapter, ")
    assert "truncated to rank 8: relative residual" in ran.out
    assert sorted(update_of(scene.path / "merged.safetensors")) == sorted(scene.updates[0])


def test_merged_adapter_opens_and_merges_again(scene: Scene) -> None:
    """What a merge of adapters wrote is an adapter for the next command."""
    assert_done(call("merge", "a.safetensors", "b.safetensors", cwd=scene.path))
    shown = call("inspect", "merged.safetensors", "--json", cwd=scene.path)
    again = call(
        *("merge", "merged.safetensors", "a.safetensors", "-m", "task_arithmetic"),
        *("-o", "again.safetensors"),
        cwd=scene.path,
    )

    assert assert_done(shown).json["update"]["ranks"] == {"8": 4}
    assert_done(again)
    one, two = scene.updates
    expected = {name: 1.5 * one[name] + 0.5 * two[name] for name in one}
    assert_close(update_of(scene.path / "again.safetensors"), expected)


def test_linear_merge_of_adapters_loses_nothing(scene: Scene) -> None:
    """Adapters are averaged by concatenating their factors, without a residual."""
    ran = call("merge", "lora1", "lora2", "-o", "out", cwd=scene.path)

    assert_done(ran)
    assert "truncated" not in ran.out
    one, two = scene.updates
    assert_close(update_of(scene.path / "out"), {n: (one[n] + two[n]) / 2 for n in one})


@pytest.mark.parametrize("names", [("ft1.safetensors", "ft2.safetensors"), ("ft1", "ft2")])
def test_checkpoints_without_base_name_the_option(scene: Scene, names: tuple[str, str]) -> None:
    """Two full checkpoints and a method on task vectors: one line that names --base."""
    before = tree(scene.path)

    ran = command("merge", *names, "--method", "breadcrumbs", cwd=scene.path)

    assert_refused(ran, "is a full checkpoint", "add --base")
    assert tree(scene.path) == before


def test_saved_task_vectors_give_a_task_vector(scene: Scene) -> None:
    """Two saved task vectors are merged into a third."""
    ran = call(
        *("merge", "tau1.safetensors", "tau2.safetensors", "-m", "task_arithmetic"),
        *("-p", "lam=0.5"),
        cwd=scene.path,
    )

    assert_done(ran)
    assert ran.out.startswith("merged.safetensors: task vector, ")
    one, two = scene.taus
    merged = read(scene.path / "merged.safetensors")
    assert_close(merged, {name: 0.5 * (one[name] + two[name]) for name in one})
    shown = call("inspect", "merged.safetensors", "--json", cwd=scene.path)
    assert shown.json["kind"] == "task vector"


def test_soup_of_checkpoint_files_needs_no_base(scene: Scene) -> None:
    """The default method averages weights, keeps dtypes and copies integers."""
    ran = call("merge", "ft1.safetensors", "ft2.safetensors", cwd=scene.path)

    assert_done(ran)
    merged = read(scene.path / "merged.safetensors")
    one, two = scene.tuned
    mean = {name: (one[name].astype(F64) + two[name]) / 2 for name in one}
    assert_close(merged, mean)
    assert {name: array.dtype for name, array in merged.items()} == {
        name: array.dtype for name, array in scene.base.items()
    }


def test_summary_counts_what_was_done(scene: Scene) -> None:
    """The result on standard output says what was written, from how much, in how many passes."""
    ran = call("merge", "ft1", "ft2", "--base", "base", "-m", "ties", "-o", "out", cwd=scene.path)

    first, second = assert_done(ran).out.splitlines()
    size = (scene.path / "out" / "model.safetensors").stat().st_size
    assert first == f"out: model, {size / 1000:.1f} kB"
    entries = sum(array.size for array in scene.base.values() if array.dtype == F32)
    assert second.startswith(
        f"merged 9 tensors ({entries / 1000:.1f}k entries), copied 1, 3 passes"
    )


def test_merge_prints_json(scene: Scene) -> None:
    """--json gives place, size, residuals and digests of every output."""
    ran = call(
        *("merge", "lora1", "lora2", "-m", "ties", "-p", "lam=0.5,1", "-o", "out", "--json"),
        cwd=scene.path,
    )

    outputs = assert_done(ran).json["outputs"]
    assert ran.err == ""
    assert [each["label"] for each in outputs] == ["lam=0.5", "lam=1"]
    assert [each["path"] for each in outputs] == ["out/lam=0.5", "out/lam=1"]
    for each in outputs:
        weights = scene.path / each["path"] / "adapter_model.safetensors"
        assert each["bytes"] == weights.stat().st_size
        assert sorted(each["digests"]) == sorted(read(weights))
        assert sorted(each["residuals"]) == sorted(scene.updates[0])
        assert all(0 < value < 1 for value in each["residuals"].values())
    assert set(assert_done(ran).json) == {"seconds", "outputs"}


def test_quiet_says_nothing(scene: Scene) -> None:
    """--quiet merges without a word."""
    ran = assert_done(call("merge", "ft1", "ft2", "-o", "out", "--quiet", cwd=scene.path))

    assert (ran.out, ran.err) == ("", "")
    assert "model.safetensors" in listing(scene.path / "out")


def test_then_is_applied_in_order(scene: Scene) -> None:
    """Ops after the method work on its result, one after the other."""
    ran = call(
        *("merge", "ft1", "ft2", "-b", "base", "-m", "task_arithmetic", "-o", "out"),
        *("--then", "scale:lam=0.5", "--then", "trim:density=0.25,scope=tensor"),
        cwd=scene.path,
    )

    assert_done(ran)
    merged = read(scene.path / "out")
    one, two = scene.taus
    for name, array in scene.base.items():
        if name not in one:
            continue
        half = 0.5 * (one[name] + two[name])
        threshold = np.sort(np.abs(half).reshape(-1))[-int(0.25 * half.size)]
        expected = added({name: array}, {name: np.where(np.abs(half) >= threshold, half, 0)})
        assert_close({name: merged[name]}, expected)


def test_compat_preset_supplies_defaults(scene: Scene) -> None:
    """A preset's values hold where the user gives none, and the user's own win."""
    common = ("merge", "ft1", "ft2", "-b", "base", "-m", "breadcrumbs")
    preset = ("-p", "density=1.0", "-p", "gamma=0.01", "-p", "scope=tensor", "-p", "count=exact")
    for arguments in (
        ("--compat", "mergekit-0.1.5", "-p", "lam=0.7", "-o", "short"),
        (*preset, "-p", "conflict=keep", "-p", "lam=0.7", "-o", "long"),
    ):
        assert_done(call(*common, *arguments, cwd=scene.path))

    assert_same(read(scene.path / "short"), read(scene.path / "long"))
