"""``compress`` and ``decompress``: goals, tables, and what is refused before work begins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.files import F32, read, write
from tests.helpers.running import assert_done, assert_refused, call
from tests.helpers.scene import Scene

OUT = ("-o", "p.mbz.safetensors")


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A saved task vector large enough for headers not to count."""
    random = np.random.default_rng(0)
    arrays = {
        f"model.layers.{at}.w.weight": random.standard_normal((200, 300)).astype(F32)
        for at in range(3)
    }
    about = {"kind": "delta", "version": 1, "base": None, "replaced": []}
    write(tmp_path / "tau.safetensors", arrays, {"mergebench": json.dumps(about)})
    return tmp_path


def compressed(folder: Path, *more: Any) -> Any:
    return assert_done(call("compress", "tau.safetensors", *OUT, *more, "--json", cwd=folder)).json


@pytest.mark.parametrize("ratio", ["20x", "60", "200×"])
@pytest.mark.parametrize("scheme", ["ternary", "sparse"])
def test_a_ratio_is_reached_and_not_by_far(large: Path, ratio: str, scheme: str) -> None:
    """Counted with the header, over the tensors of the input."""
    report = compressed(large, "--target-ratio", ratio, "-s", scheme)

    size = (large / "p.mbz.safetensors").stat().st_size
    wanted = float(ratio.rstrip("x×"))
    assert report["bytes"] == size
    assert report["ratio"] == pytest.approx(3 * 200 * 300 * 4 / size)
    assert wanted <= report["ratio"] <= 1.15 * wanted
    assert report["params"]["density"] < 0.6


@pytest.mark.parametrize(
    ("scheme", "more", "error"),
    [
        ("ternary", ("-p", "level=mse"), 0.5),
        ("ternary", ("-p", "alpha=1.5"), 0.65),
        ("sparse", (), 0.3),
        ("sparse", ("-p", "values=int8"), 0.1),
        ("lowrank", (), 0.4),
    ],
)
def test_an_error_is_kept_and_used(large: Path, scheme: str, more: Any, error: float) -> None:
    """As measured on the file, and the density is not more than it needs."""
    report = compressed(large, "--max-error", error, "-s", scheme, *more)

    assert 0.93 * error <= report["relative_error"] <= error


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--max-error", "0.1"), ("not reached", "0.4", "sparse")),
        (("--max-error", "0.3", "-s", "one-bit"), ("not reached", "0.6")),
        (("--target-ratio", "40x", "-s", "one-bit"), ("not reached", "30.")),
        (("--target-ratio", "100000x"), ("not reached",)),
        (("--target-ratio", "20x", "--max-error", "0.1"), ("one of them",)),
        (("--target-ratio", "much"), ("20x", "much")),
        (("--target-ratio", "1"), ("more than 1",)),
        (("--max-error", "1.5"), ("(0, 1)", "1.5")),
        (("--target-ratio", "9x", "-s", "lowrank"), ("energy",)),
        (("-s", "ternery"), ("no scheme", "ternary")),
        (("-s", "ternary+sparse"), ("no scheme", "lowrank+sparse")),
        (("-p", "densty=0.1"), ("no parameter `densty`", "density")),
        (("-p", "density=1.4"), ("(0, 1]", "1.4")),
        (("-p", "level=best"), ("level", "std")),
        (("-p", "density"), ("NAME=VALUE",)),
        (("-p", "density=.1", "-p", "density=.2"), ("once",)),
        (("-s", "lowrank", "-p", "energy=2"), ("energy", "(0, 1]")),
        (("-s", "lowrank", "-p", "density=.1"), ("no parameter `density`", "energy")),
        (("--exclude", "class=head"), ("models",)),
    ],
)
def test_wrong_options_are_refused(large: Path, more: Any, words: Any) -> None:
    """In one line, and nothing is written."""
    before = sorted(large.iterdir())

    assert_refused(call("compress", "tau.safetensors", *OUT, *more, cwd=large), *words)
    assert sorted(large.iterdir()) == before


def test_weights_are_refused(scene: Scene) -> None:
    """A model without its base, and an adapter that holds new values only."""
    assert_refused(call("compress", "ft1", *OUT, cwd=scene.path), "weights", "--base")
    about = {"kind": "delta", "version": 1, "base": None, "replaced": ["a.weight"]}
    path = scene.path / "new.safetensors"
    write(path, {"a.weight": np.ones((4, 4), F32)}, {"mergebench": json.dumps(about)})
    assert_refused(call("compress", path, *OUT, cwd=scene.path), "new values only")


def test_numbers_that_are_none_are_refused(large: Path) -> None:
    """NaN in an update, with its tensor."""
    arrays = dict(read(large / "tau.safetensors"))
    arrays["model.layers.1.w.weight"] = arrays["model.layers.1.w.weight"].copy()
    arrays["model.layers.1.w.weight"][3, 4] = np.nan
    about = {"kind": "delta", "version": 1, "base": None, "replaced": []}
    write(large / "tau.safetensors", arrays, {"mergebench": json.dumps(about)})

    assert_refused(
        call("compress", "tau.safetensors", *OUT, cwd=large), "model.layers.1.w.weight", "NaN"
    )


def test_outputs_are_replaced_when_asked(large: Path) -> None:
    """Never the input, never silently, and only under the name that says what it is."""
    compressed(large)
    assert_refused(call("compress", "tau.safetensors", *OUT, cwd=large), "exists", "--force")
    compressed(large, "--force", "-p", "density=0.1")
    assert_refused(call("compress", "p.mbz.safetensors", *OUT, "--force", cwd=large), "the input")
    assert_refused(
        call("compress", "tau.safetensors", "-o", "p.safetensors", cwd=large), ".mbz.safetensors"
    )


def test_losses_are_shown(large: Path) -> None:
    """Ratio, error and cosine, of the worst layers and in total; in inspect too."""
    ran = assert_done(call("compress", "tau.safetensors", *OUT, cwd=large))

    for word in ("relative error", "cosine", "times smaller", "lossy: ternary", "density=0.2"):
        assert word in ran.out
    assert "model.layers.2" in ran.out
    seen = assert_done(call("inspect", "p.mbz.safetensors", "--json", cwd=large)).json
    report = compressed(large, "-f")
    assert seen["packed"]["scheme"] == "ternary"
    assert seen["packed"]["relative_error"] == pytest.approx(report["relative_error"], rel=1e-5)
    assert seen["packed"]["entries in ternary"] == 3 * 200 * 300
    assert seen["kind"] == "task vector"


def test_packing_twice_is_noted(large: Path) -> None:
    """It loses again."""
    compressed(large)
    ran = call("compress", "p.mbz.safetensors", "-o", "q.mbz.safetensors", cwd=large)
    assert "packed already" in assert_done(ran).err


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_threads_gives_the_same_bytes(large: Path, workers: int) -> None:
    """Nor does a second run differ."""
    compressed(large)
    before = (large / "p.mbz.safetensors").read_bytes()
    compressed(large, "-f", "--workers", workers)
    assert (large / "p.mbz.safetensors").read_bytes() == before


def test_damaged_files_are_named(large: Path) -> None:
    """A changed bit in a block stops what reads it, before an output appears."""
    compressed(large)
    path = large / "p.mbz.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 4
    path.write_bytes(data)

    ran = call("decompress", "p.mbz.safetensors", "-o", "u.safetensors", cwd=large)
    assert_refused(ran, "p.mbz.safetensors", "block 0", "checksum")
    assert not (large / "u.safetensors").exists()


def test_what_is_not_packed_is_not_decompressed(scene: Scene) -> None:
    """And two outputs at once are none."""
    assert_refused(call("decompress", "lora1", "-o", "x", cwd=scene.path), "is not packed")
    assert_done(call("compress", "lora1", *OUT, cwd=scene.path))
    common = ("decompress", "p.mbz.safetensors", "-o", "x")
    ran = call(*common, "-b", "base", "--target", "vllm", cwd=scene.path)
    assert_refused(ran, "--base and --target")
    assert_refused(
        call("decompress", "p.mbz.safetensors", "-o", "p.mbz.safetensors", "-f", cwd=scene.path),
        "the input",
    )
