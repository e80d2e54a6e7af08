"""Kohya files: their names without a base, PEFT's with one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.helpers.adapters import factors, product, save_kohya, save_peft
from tests.helpers.compare import assert_close
from tests.helpers.files import F16, F32, listing, metadata, read
from tests.helpers.models import added, base_model, save_folder
from tests.helpers.running import assert_done, assert_refused, call
from tests.helpers.updates import kohya_update_of, update_of


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Two Kohya files of different rank and alpha, and the model they belong to."""
    save_kohya(tmp_path / "a.safetensors", factors(1, rank=4), alpha=2.0)
    save_kohya(tmp_path / "b.safetensors", factors(2, rank=3), alpha=6.0)
    save_folder(tmp_path / "base", base_model())
    return tmp_path


def expected(a: float, b: float) -> dict[str, np.ndarray]:
    """The weighted sum of both updates."""
    one, two = product(factors(1, rank=4), 0.5), product(factors(2, rank=3), 2.0)
    return {name: a * one[name] + b * two[name] for name in one}


def test_kohya_names_without_a_base(place: Path) -> None:
    """Without a base flattened names cannot be undone, so the output keeps them, alphas too."""
    assert_done(
        call("merge", "a.safetensors:0.5", "b.safetensors", "-m", "task_arithmetic", cwd=place)
    )

    merged = place / "merged.safetensors"
    flat = {
        f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}": update
        for name, update in expected(0.5, 1).items()
    }
    assert_close(kohya_update_of(merged), flat)
    tensors = read(merged)
    assert sorted({name.split(".", 1)[1] for name in tensors}) == [
        *("alpha", "lora_down.weight", "lora_up.weight"),
    ]
    assert all(tensors[name].shape == () for name in tensors if name.endswith(".alpha"))
    assert metadata(merged)["format"] == "pt"


def test_merged_kohya_file_merges_again(place: Path) -> None:
    """The output is a Kohya file for the next merge."""
    common = ("-m", "task_arithmetic", "-o")
    assert_done(
        call("merge", "a.safetensors", "b.safetensors", *common, "c.safetensors", cwd=place)
    )
    assert_done(
        call("merge", "c.safetensors", "b.safetensors", *common, "d.safetensors", cwd=place)
    )

    merged = kohya_update_of(place / "d.safetensors")
    assert_close(
        {
            name: merged[f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"]
            for name in expected(1, 2)
        },
        expected(1, 2),
    )


def test_nonlinear_merge_of_kohya_files(place: Path) -> None:
    """The literal first example works on Kohya files and says what it lost."""
    ran = call("merge", "a.safetensors", "b.safetensors", "--method", "breadcrumbs", cwd=place)

    assert "truncated to rank 7: relative residual" in assert_done(ran).out
    ranks = {
        array.shape[0]
        for name, array in read(place / "merged.safetensors").items()
        if name.endswith("lora_down.weight")
    }
    assert ranks == {7}


def test_peft_names_with_a_base(place: Path) -> None:
    """With the base the modules get their real names, in PEFT's format."""
    common = ("-b", "base", "--as", "lora", "-m", "task_arithmetic", "-o", "out")
    assert_done(call("merge", "a.safetensors", "b.safetensors:2", *common, cwd=place))

    assert "adapter_config.json" in listing(place / "out")
    assert_close(update_of(place / "out"), expected(1, 2))


def test_merged_into_the_base(place: Path) -> None:
    """Flattened names find the base's tensors."""
    common = ("-b", "base", "-m", "task_arithmetic", "-o", "out")
    assert_done(call("merge", "a.safetensors", "b.safetensors", *common, cwd=place))

    assert_close(read(place / "out"), added(base_model(), expected(1, 1)))


def test_kohya_and_peft_meet_on_a_base(place: Path) -> None:
    """Adapters of both formats merge once a base gives them common names."""
    save_peft(place / "p", factors(3), alpha=4.0)
    common = ("merge", "a.safetensors", "p", "-m", "task_arithmetic")
    assert_done(call(*common, "-b", "base", "-o", "out", cwd=place))

    one, two = product(factors(1, rank=4), 0.5), product(factors(3), 1.0)
    total = {name: one[name] + two[name] for name in one}
    assert_close(read(place / "out"), added(base_model(), total))
    for form in ("lora", "delta"):
        ran = call(*common, "--as", form, "-o", "apart", cwd=place)
        assert_refused(ran, "lora_unet_", "flattened", "--base")


def test_half_precision_factors_lose_nothing(place: Path) -> None:
    """Halving would cost f16 digits, so factors widen unless --dtype decides; alphas are exact."""
    for name, seed in (("h1", 1), ("h2", 2)):
        save_kohya(place / f"{name}.safetensors", factors(seed, dtype=F16))
    for options, dtype in (((), F32), (("--dtype", "f16"), F16)):
        assert_done(call("merge", "h1.safetensors", "h2.safetensors", *options, "-f", cwd=place))
        tensors = read(place / "merged.safetensors")
        assert {a.dtype for n, a in tensors.items() if not n.endswith("alpha")} == {dtype}
        assert {a.dtype for n, a in tensors.items() if n.endswith("alpha")} == {F32}
