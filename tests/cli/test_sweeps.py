"""Several values, weights and references: what the words after the models mean."""

from __future__ import annotations

import pytest

from tests.helpers.compare import assert_close, assert_files, assert_same
from tests.helpers.files import F64, listing, read, tree, write
from tests.helpers.models import added, fine_tune
from tests.helpers.running import assert_done, assert_refused, call
from tests.helpers.scene import Scene
from tests.helpers.updates import update_of


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "breadcrumbs"])
def test_sweep_equals_separate_runs(scene: Scene, method: str) -> None:
    """lam=0.2,0.4,0.6 writes the very files that three runs write."""
    common = ("merge", "ft1.safetensors", "ft2.safetensors", "-b", "base", "-m", method)
    ran = call(*common, "-p", "lam=0.2,0.4,0.6", "-o", "s.safetensors", cwd=scene.path)
    assert_done(ran)

    for value in ("0.2", "0.4", "0.6"):
        alone = scene.path / f"alone-{value}.safetensors"
        assert_done(call(*common, "-p", f"lam={value}", "-o", alone, cwd=scene.path))
        assert (scene.path / f"s-lam={value}.safetensors").read_bytes() == alone.read_bytes()


def test_sweep_of_folders(scene: Scene) -> None:
    """In folders every output is whole: the files of a run of its own, under the same name."""
    common = ("merge", "ft1", "ft2", "-b", "base", "-m", "task_arithmetic")
    assert_done(call(*common, "-p", "lam=0.2,0.4,0.6", "-o", "many", cwd=scene.path))

    assert listing(scene.path / "many") == ["lam=0.2", "lam=0.4", "lam=0.6"]
    for value in ("0.2", "0.4", "0.6"):
        alone = scene.path / "alone" / f"lam={value}"
        assert_done(call(*common, "-p", f"lam={value}", "-o", alone, cwd=scene.path))
        assert_files(tree(scene.path / "many" / f"lam={value}"), tree(alone))


def test_sweep_over_two_parameters(scene: Scene) -> None:
    """Two lists give every combination."""
    ran = call(
        *("merge", "ft1", "ft2", "-b", "base", "-m", "ties", "-o", "out"),
        *("-p", "lam=0.5,1", "-p", "density=0.2,0.9"),
        cwd=scene.path,
    )

    assert_done(ran)
    assert listing(scene.path / "out") == [
        *("lam=0.5,density=0.2", "lam=0.5,density=0.9"),
        *("lam=1,density=0.2", "lam=1,density=0.9"),
    ]


def test_sweep_of_adapters(scene: Scene) -> None:
    """Adapters are swept like models."""
    ran = call(
        *("merge", "lora1", "lora2", "-m", "task_arithmetic", "-p", "lam=0.5,2", "-o", "out"),
        cwd=scene.path,
    )

    assert_done(ran)
    one, two = scene.updates
    for value in (0.5, 2):
        expected = {name: value * (one[name] + two[name]) for name in one}
        assert_close(update_of(scene.path / "out" / f"lam={value}"), expected)


def test_one_bad_value_stops_the_sweep(scene: Scene) -> None:
    """A value out of bounds in a list is refused before anything is written."""
    before = listing(scene.path)
    ran = call(
        *("merge", "ft1", "ft2", "-b", "base", "-m", "ties", "-p", "density=0.2,1.4"),
        cwd=scene.path,
    )

    assert_refused(ran, "ties: `density` must be a number in (0, 1]", "got 1.4")
    assert listing(scene.path) == before


def test_trailing_weights(scene: Scene) -> None:
    """A number after a colon is the weight of that model."""
    ran = call(
        *("merge", "ft1:0.3", "ft2:-1", "-b", "base", "-m", "task_arithmetic", "-o", "out"),
        cwd=scene.path,
    )

    assert_done(ran)
    one, two = scene.taus
    expected = added(scene.base, {name: 0.3 * one[name] - two[name] for name in one})
    assert_close(read(scene.path / "out"), expected)


def test_weights_of_a_soup_are_shares(scene: Scene) -> None:
    """The linear method divides by the sum of the weights, unless told not to."""
    for extra, total in (((), 4.0), (("-p", "normalize=false"), 1.0)):
        ran = call("merge", "ft1:1", "ft2:3", "-o", "out", "-f", *extra, cwd=scene.path)
        assert_done(ran)
        one, two = scene.tuned
        expected = {
            name: (one[name].astype(F64) + 3 * two[name].astype(F64)) / total
            for name in scene.taus[0]
        }
        expected["model.position_ids"] = scene.base["model.position_ids"]
        assert_close(read(scene.path / "out"), expected)


def test_path_that_ends_like_a_weight_wins(scene: Scene) -> None:
    """A file that is literally called ft1:0.3 is that file, with weight 1."""
    third = fine_tune(scene.base, 3)
    write(scene.path / "ft1.safetensors:0.3", third)

    data = assert_done(
        call("plan", "ft1.safetensors:0.3", "ft2.safetensors:0.5", "--json", cwd=scene.path)
    ).json
    assert_done(call("merge", "ft1.safetensors:0.3", "-o", "out.safetensors", cwd=scene.path))

    assert {each["path"]: each["weight"] for each in data["inputs"]} == {
        "ft1.safetensors:0.3": 1.0,
        "ft2.safetensors": 0.5,
    }
    assert_same(read(scene.path / "out.safetensors"), third)


def test_adapter_on_a_checkpoint(scene: Scene) -> None:
    """base+adapter is the model that has the adapter merged in."""
    assert_done(call("merge", "base+lora1", "-o", "applied", cwd=scene.path))
    assert_done(call("merge", "ft1+lora1:0.5", "ft2", "-o", "soup", cwd=scene.path))

    assert_close(read(scene.path / "applied"), added(scene.base, scene.updates[0]))
    on_top = added(scene.tuned[0], scene.updates[0])
    mean = {name: (0.5 * on_top[name] + scene.tuned[1][name]) / 1.5 for name in scene.taus[0]}
    mean["model.position_ids"] = scene.base["model.position_ids"]
    assert_close(read(scene.path / "soup"), mean)


def test_adapter_on_its_base_is_the_adapter(scene: Scene) -> None:
    """With the same base, base+adapter and the adapter alone are one task vector."""
    common = ("-b", "base", "-m", "ties", "-p", "density=0.5")
    assert_done(call("merge", "base+lora1", "ft2", *common, "-o", "pair", cwd=scene.path))
    assert_done(call("merge", "lora1", "ft2", *common, "-o", "bare", cwd=scene.path))

    assert_same(read(scene.path / "pair"), read(scene.path / "bare"))
