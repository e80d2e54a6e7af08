"""`--device`: said in the output, refused where it is not there, and nothing silent."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mergebench.core.errors import ResourceError
from mergebench.merge.api import merge_models
from mergebench.merge.device.tiles import OnDevice
from tests.helpers.compare import assert_same
from tests.helpers.files import BF16, read
from tests.helpers.running import assert_done, assert_refused, call
from tests.helpers.scene import Scene, build_scene


@pytest.fixture
def half(tmp_path: Path) -> Scene:
    """The usual folder in bfloat16."""
    return build_scene(tmp_path, BF16)


@pytest.fixture
def merged_there(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tensors whose tiles were merged on a device."""
    names: list[str] = []
    real = OnDevice.merge

    def noted(self: OnDevice, *args: object) -> bool:
        names.append(self.item.site.name)
        return real(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(OnDevice, "merge", noted)
    return names


@pytest.mark.parametrize(
    "method",
    [("ties", "-p", "scope=model"), ("breadcrumbs",), ("dare", "-p", "lam=0.5,1")],
    ids=" ".join,
)
def test_the_same_model_from_a_device(
    half: Scene, method: tuple[str, ...], merged_there: list[str]
) -> None:
    """Weights are the same, they were merged there, and the manifest says so."""
    words = ("merge", "ft1", "ft2", "-b", "base", "-m", *method)
    assert_done(call(*words, "-o", "plain", cwd=half.path))
    assert merged_there == []
    assert_done(call(*words, "-o", "there", "--device", "torch", cwd=half.path))

    assert merged_there
    plain = sorted(half.path.glob("plain*/**/*.safetensors"))
    assert plain
    for path in plain:
        other = half.path / str(path.relative_to(half.path)).replace("plain", "there", 1)
        assert_same(read(other), read(path))
        (manifest,) = other.parent.glob("*manifest*.json")
        notes = json.loads(manifest.read_text())["notes"]
        assert any(f"torch {torch.__version__}: entries may differ" in note for note in notes)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("gpu", "expected cpu, cuda, cuda:1, auto or torch"),
        ("cuda:x", "expected cpu, cuda, cuda:1, auto or torch"),
        ("cuda:99", "--device cuda:99: there is none"),
    ],
)
def test_devices_that_are_not_there(half: Scene, asked: str, said: str) -> None:
    """One line, exit code 2, and nothing is written."""
    ran = call("merge", "ft1", "ft2", "-b", "base", "-o", "out", "--device", asked, cwd=half.path)
    assert_refused(ran, said)
    assert not (half.path / "out").exists()


def test_nan_is_named() -> None:
    """What is not finite is found on the device, and named as ever."""
    base = {"w": np.ones((4, 4), np.float32)}
    bad = {"w": np.full((4, 4), np.nan, np.float32)}
    with pytest.raises(Exception, match="'w' has 16 NaN and 0 infinite entries of 16"):
        merge_models([bad, base], base=base, device="torch")


def test_overflow_is_named() -> None:
    """So is what does not fit the output."""
    base = {"w": np.full((4, 4), 30000, np.float16)}
    more = {"w": np.full((4, 4), 60000, np.float16)}
    with pytest.raises(Exception, match="16 values do not fit f16"):
        merge_models([more, more], base=base, method="task_arithmetic", device="torch")


def test_a_full_device_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """When its memory runs out: which tensor, and what to do."""

    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("mergebench.merge.device.lane.Lane.read", full)
    base = {"w": np.ones((4, 4), np.float32)}
    with pytest.raises(ResourceError, match="does not hold 16 entries of w in all models"):
        merge_models([base, base], base=base, device="torch")


def test_work_of_another_device_is_not_continued(half: Scene) -> None:
    """The key of an output holds the device, so that no output is made of both."""
    from mergebench.merge.planning import make_plan
    from mergebench.merge.resume import resume_key
    from mergebench.recipe import ModelRef, Recipe

    recipe = Recipe(
        models=tuple(ModelRef(str(half.path / name)) for name in ("ft1", "ft2")),
        base=str(half.path / "base"),
        method="linear",
        out=str(half.path / "out"),
    )
    keys = set()
    for device in ("cpu", "torch"):
        plan = make_plan(recipe, device=device)
        keys.add(resume_key(plan, plan.variants[0]))
    assert len(keys) == 2
