"""Dtypes: kept, converted, too small, or not for merging."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.helpers.compare import assert_close, assert_same
from tests.helpers.files import BF16, F16, F32, F64, listing, read, write
from tests.helpers.models import added, base_model, fine_tune, task_vector
from tests.helpers.running import assert_done, assert_refused, call
from tests.helpers.scene import Scene

ADD = ("-b", "base.safetensors", "-m", "task_arithmetic", "-o", "out.safetensors")


def test_base_decides_the_dtype_tensor_by_tensor(scene: Scene) -> None:
    """Without --dtype every merged tensor has the dtype it has in the base."""
    mixed = dict(scene.base)
    mixed["model.norm.weight"] = mixed["model.norm.weight"].astype(F64)
    mixed["lm_head.weight"] = mixed["lm_head.weight"].astype(BF16)
    write(scene.path / "base.safetensors", mixed)

    assert_done(call("merge", "ft1", "ft2", *ADD, cwd=scene.path))

    merged = read(scene.path / "out.safetensors")
    assert {n: a.dtype for n, a in merged.items()} == {n: a.dtype for n, a in mixed.items()}
    deltas = [task_vector(tuned, mixed) for tuned in scene.tuned]
    expected = added(mixed, {name: deltas[0][name] + deltas[1][name] for name in deltas[0]})
    assert_close(
        {n: a for n, a in merged.items() if n != "lm_head.weight"},
        {n: a for n, a in expected.items() if n != "lm_head.weight"},
    )


@pytest.mark.parametrize(("dtype", "digits"), [(BF16, 8), (F16, 11), (F32, 24)])
def test_results_are_rounded_once(scene: Scene, dtype: np.dtype, digits: int) -> None:
    """Half-precision models are merged in float32 and rounded to nearest at the end."""
    base = base_model(7, dtype)
    tuned = [fine_tune(base, seed) for seed in (1, 2, 3)]
    for name, arrays in (("base", base), *((f"t{n}", each) for n, each in enumerate(tuned))):
        write(scene.path / f"{name}.safetensors", arrays)
    names = [f"t{n}.safetensors" for n in range(3)]

    assert_done(call("merge", *names, *ADD, "-p", "lam=0.3", cwd=scene.path))

    deltas = [task_vector(each, base) for each in tuned]
    for name, array in read(scene.path / "out.safetensors").items():
        if name in deltas[0]:
            exact = base[name].astype(F64) + 0.3 * sum(delta[name] for delta in deltas)
            spacing = 2.0 ** (np.floor(np.log2(np.abs(exact))) + 1 - digits)
            parts = np.abs(base[name].astype(F64)) + sum(np.abs(delta[name]) for delta in deltas)
            slack = 2.0**-22 * parts  # of sums in float32
            assert np.all(np.abs(array.astype(F64) - exact) <= spacing / 2 + slack), name


def test_overflow_names_the_tensor_and_leaves_nothing(scene: Scene) -> None:
    """A value too large for --dtype f16 stops the merge; a smaller scale gets through."""
    large = {name: array.copy() for name, array in scene.tuned[0].items()}
    large["model.norm.weight"][5] = 70_000.0
    write(scene.path / "large.safetensors", large)
    before = listing(scene.path)
    for out in ("out", "out.safetensors", "deep/out"):
        ran = call(
            *("merge", "large.safetensors", "-b", "base", "-m", "task_arithmetic"),
            *("--dtype", "f16", "-o", out),
            cwd=scene.path,
        )
        assert_refused(ran, "model.norm.weight", "1 values do not fit f16", "bf16 or f32")
    swept = call(
        *("merge", "large.safetensors", "-b", "base", "-m", "task_arithmetic"),
        *("--dtype", "f16", "-p", "lam=0.5,1", "-o", "swept"),
        cwd=scene.path,
    )
    assert_refused(swept, "model.norm.weight")

    assert listing(scene.path) == before
    fits = ("merge", "large.safetensors", "-b", "base", "-m", "task_arithmetic", "-p", "lam=0.5")
    assert_done(call(*fits, "--dtype", "f16", "-o", "out", cwd=scene.path))


def test_config_says_the_dtype(scene: Scene) -> None:
    """With --dtype the config of the output names the new dtype; nothing else in it changes."""
    config = json.loads((scene.path / "base" / "config.json").read_text())
    old = {**config, "torch_dtype": "float32", "text_config": {"dtype": "float32", "n": 1}}
    (scene.path / "base" / "config.json").write_text(json.dumps(old))
    common = ("merge", "ft1", "ft2", "-b", "base")
    assert_done(call(*common, "--dtype", "bf16", "-o", "half", cwd=scene.path))
    assert_done(call(*common, "-o", "same", cwd=scene.path))

    half = json.loads((scene.path / "half" / "config.json").read_text())
    assert half == {**old, "torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16", "n": 1}}
    kept = (scene.path / "same" / "config.json").read_bytes()
    assert kept == (scene.path / "base" / "config.json").read_bytes()


def test_integers_come_from_the_base(scene: Scene) -> None:
    """Integer and boolean tensors are copied, whatever --dtype says."""
    extra = {"steps": np.array(41, np.int64), "mask": np.array([True, False])}
    for name, arrays in (("base", scene.base), ("ft1", scene.tuned[0]), ("ft2", scene.tuned[1])):
        write(scene.path / f"{name}.safetensors", {**arrays, **extra})

    files = ("ft1.safetensors", "ft2.safetensors")
    for options in (ADD, ("-o", "out.safetensors"), (*ADD, "--dtype", "bf16")):
        assert_done(call("merge", *files, *options, "-f", cwd=scene.path))
        merged = read(scene.path / "out.safetensors")
        kept = {name: merged[name] for name in (*extra, "model.position_ids")}
        assert_same(kept, {**extra, "model.position_ids": scene.base["model.position_ids"]})


@pytest.mark.parametrize("options", [ADD, ("-o", "out.safetensors")])
def test_integers_must_agree(scene: Scene, options: tuple[str, ...]) -> None:
    """A buffer that differs between inputs is refused by name, with or without a base."""
    other = dict(scene.tuned[1])
    other["model.position_ids"] = other["model.position_ids"] + 1
    write(scene.path / "other.safetensors", other)
    before = listing(scene.path)

    ran = call("merge", "ft1.safetensors", "other.safetensors", *options, cwd=scene.path)

    assert_refused(ran, "model.position_ids", "I64", "must agree", "other.safetensors")
    assert listing(scene.path) == before


def test_float64_inputs_are_merged_in_float64(scene: Scene) -> None:
    """Differences too small for float32 survive where an input is stored in float64."""
    base = {"w": np.ones((4, 4), F64)}
    write(scene.path / "base.safetensors", base)
    write(scene.path / "t.safetensors", {"w": base["w"] + 1e-12})

    assert_done(call("merge", "t.safetensors", *ADD, "-p", "lam=3", cwd=scene.path))

    merged = read(scene.path / "out.safetensors")["w"]
    assert merged.dtype == F64
    assert np.allclose(merged - 1, 3e-12, rtol=1e-3, atol=0)


def test_empty_and_scalar_tensors(scene: Scene) -> None:
    """A tensor without entries and one without dimensions go through every method."""
    base = {"none": np.zeros((0, 3), F32), "scale": np.array(2.0, F32), "w": np.ones((2, 2), F32)}
    tuned = {**base, "scale": np.array(3.0, F32)}
    write(scene.path / "base.safetensors", base)
    write(scene.path / "t.safetensors", tuned)
    one_of_five = ("ties", "-p", "density=0.2")
    none = ("ties", "-p", "density=0.1")
    cases = ((("task_arithmetic",), 3.0), (("linear",), 3.0), (one_of_five, 3.0), (none, 2.0))
    for method, scale in cases:
        ran = call(
            *("merge", "t.safetensors", "-b", "base.safetensors", "-o", "out.safetensors"),
            *("-f", "-m", *method),
            cwd=scene.path,
        )
        assert_done(ran)
        assert_same(read(scene.path / "out.safetensors"), {**base, "scale": np.array(scale, F32)})
