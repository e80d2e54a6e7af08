"""When one run may go on with the work of another, and the exact form of what was measured."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from mergebench.compute.cut import ALL, NONE, Cut
from mergebench.merge.op import OPS
from mergebench.merge.planning import make_plan
from mergebench.merge.resume import NOTATION, resume_key
from mergebench.recipe import ModelRef, Recipe
from mergebench.sources import source_of_arrays
from mergebench.steps import OpRef
from tests.faults.merges import build_inputs
from tests.helpers.files import read, write
from tests.helpers.statistics import options_for

ABOUT = '{"version": 1, "kind": "fisher"}'


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Inputs that may be changed."""
    return build_inputs(tmp_path / "inputs")


def recipe(inputs: Path, **options: Any) -> Recipe:
    """TIES of two fine-tunes, or what the options say."""
    chosen: dict[str, Any] = {
        "models": tuple(ModelRef(str(inputs / name)) for name in ("ft1", "ft2")),
        "base": str(inputs / "base"),
        "method": "ties",
        "params": {},
        "out": "out",
    }
    return Recipe(**{**chosen, **options})


def key(inputs: Path, memory: int = 1 << 29, workers: int = 1, **options: Any) -> str:
    """Of the only output."""
    plan = make_plan(recipe(inputs, **options), memory=memory, workers=workers)
    (variant,) = plan.variants
    return resume_key(plan, variant)


def test_how_a_merge_is_run_does_not_matter(inputs: Path) -> None:
    """Nor where it is written, in which order models stand, or whether a default is spelled out."""
    same = key(inputs)

    assert len(same) == 32
    assert key(inputs, memory=1 << 28, workers=3) == same
    assert key(inputs, out="elsewhere/out") == same
    assert key(inputs, models=tuple(reversed(recipe(inputs).models))) == same
    assert key(inputs, params={"density": 0.2}) == same


def test_statistics_are_inputs(inputs: Path) -> None:
    """Other numbers in the same place, or other times of the same file, are another merge."""
    names = ("ft1", "ft2")
    given = options_for("fisher", names, inputs)[1::2]
    refs = tuple(
        ModelRef(str(inputs / name), statistics=str(inputs / file))
        for name, file in zip(names, given, strict=True)
    )
    same = key(inputs, models=refs, method="fisher")
    assert key(inputs, models=tuple(reversed(refs)), method="fisher") == same
    arrays = {name: np.array(array) for name, array in read(inputs / given[0]).items()}
    first = min(arrays)
    arrays[first].reshape(-1)[0] += 1
    save_file(arrays, inputs / given[0], {"mergebench_statistics": ABOUT})
    assert key(inputs, models=refs, method="fisher") != same


@pytest.mark.parametrize(
    "options",
    [
        {"params": {"density": 0.3}},
        {"params": {"scope": "tensor"}},
        {"method": "breadcrumbs"},
        {"then": (OpRef("scale", {"lam": 0.5}),)},
        {"dtype": "f32"},
        {"shard_size": "60B"},
        {"out": "out.safetensors"},
        {"form": "delta"},
    ],
    ids=str,
)
def test_what_is_asked_matters(inputs: Path, options: dict[str, Any]) -> None:
    """Each of these is another output."""
    assert key(inputs, **options) != key(inputs)


def test_weights_matter(inputs: Path) -> None:
    """And whose they are."""
    models = recipe(inputs).models
    keys = {
        key(inputs, models=tuple(map(replace, models))),
        key(inputs, models=(replace(models[0], weight=0.5), models[1])),
        key(inputs, models=(models[0], replace(models[1], weight=0.5))),
    }
    assert len(keys) == 3


def touch(path: Path) -> None:
    """Another modification time."""
    about = path.stat()
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns + 1))


def rewrite(path: Path) -> None:
    """Another header and the same values, at the same time."""
    about = path.stat()
    write(path, read(path), {"format": "pt", "new": "entry"})
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


@pytest.mark.parametrize("change", [touch, rewrite])
@pytest.mark.parametrize("name", ["base", "ft1"])
def test_the_files_of_the_inputs_matter(
    inputs: Path, change: Callable[[Path], None], name: str
) -> None:
    """The base as much as the models."""
    before = key(inputs)

    change(inputs / name / "model.safetensors")

    assert key(inputs) != before


def test_the_config_of_an_adapter_matters(inputs: Path) -> None:
    """It scales the update, and stands in a file of its own."""
    models = tuple(ModelRef(str(inputs / name)) for name in ("lora1", "lora2"))
    before = key(inputs, models=models, base=None)
    path = inputs / "lora1" / "adapter_config.json"

    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 8}))

    assert key(inputs, models=models, base=None) != before


def test_all_values_in_memory_matter(inputs: Path) -> None:
    """Also those between the samples of the fingerprint."""
    keys = set()
    prints = set()
    for value in (0.0, 1.0):
        model = np.zeros(5000, np.float32)
        model[4000] = value
        source = source_of_arrays("models[0]", {"w": tensor(model)})
        base = source_of_arrays("base", {"w": tensor(np.ones(5000, np.float32))})
        asked = recipe(inputs, models=(ModelRef("models[0]"),), base="base")
        plan = make_plan(asked, sources=[source], base=base, workers=1)
        keys.add(resume_key(plan, plan.variants[0]))
        prints.add(source.fingerprint)

    assert len(prints) == 1
    assert len(keys) == 2


def tensor(array: Any) -> Any:
    """An array as a tensor."""
    from mergebench.core.tensor import ArrayTensor

    return ArrayTensor(array)


def test_variants_have_keys_of_their_own(inputs: Path) -> None:
    """A sweep gives one output per value."""
    plan = make_plan(recipe(inputs, params={"lam": (0.5, 1.0)}), workers=1)

    keys = [resume_key(plan, variant) for variant in plan.variants]

    assert len(set(keys)) == 2
    assert keys[0] == key(inputs, params={"lam": 0.5})


FLOATS = st.floats(allow_nan=False)
CUTS = st.builds(Cut, FLOATS, st.binary(max_size=9), st.integers(-1, 1 << 60))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.binary() | FLOATS | CUTS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)


def exactly(value: Any) -> str:
    """A text that tells apart what ``==`` does not: types and the sign of zero."""
    return repr(value)


@given(VALUES)
def test_measured_values_survive_json_exactly(value: Any) -> None:
    """Types, order and every bit."""
    text = json.dumps(NOTATION.encode(value), allow_nan=False)

    assert exactly(NOTATION.decode(json.loads(text))) == exactly(value)


@pytest.mark.parametrize(
    "array",
    [
        np.array([[1.5, -0.0], [np.inf, np.nan]], np.float32),
        np.arange(3, dtype=np.int64)[::-1],
        np.zeros((0, 2)),
        np.array(True),
        np.float64(0.1),
        np.int64(-3),
    ],
)
def test_measured_arrays_survive_json_exactly(array: Any) -> None:
    """Dtype, shape and bytes; what comes back may be changed, and a number of numpy stays one."""
    found = NOTATION.decode(json.loads(json.dumps(NOTATION.encode(array))))

    assert type(found) is type(array)
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    assert found.tobytes() == np.ascontiguousarray(array).tobytes()
    assert found.flags.writeable == isinstance(array, np.ndarray)


@pytest.mark.parametrize("value", [ALL, NONE, float("nan")])
def test_special_thresholds_survive(value: Any) -> None:
    """Infinity and NaN are no JSON."""
    assert exactly(
        NOTATION.decode(json.loads(json.dumps(NOTATION.encode(value), allow_nan=False)))
    ) == exactly(value)


@pytest.mark.parametrize(
    "value",
    [{1}, object(), np.array([None]), [np.datetime64(1, "D")], 1j, OPS],
    ids=lambda value: type(value).__name__,
)
def test_other_values_are_not_kept(value: Any) -> None:
    """Rather than given back as something else."""
    with pytest.raises(TypeError, match="cannot be kept"):
        NOTATION.encode(value)


@pytest.mark.parametrize(
    "data",
    [
        {"other": 1},
        {},
        {"float": "x"},
        {"array": ["<f4", [2], "00"]},
        {"a": 1, "b": 2},
        {"cut": []},
    ],
)
def test_what_was_never_encoded_is_refused(data: Any) -> None:
    """Rather than guessed at."""
    with pytest.raises((ValueError, TypeError)):
        NOTATION.decode(data)


def test_journals_of_earlier_versions_are_read() -> None:
    """Every kind of value, as it has been written since there are journals."""
    data = {
        "tuple": [
            None, True, 3, "text",
            {"float": "0x1.8000000000000p+0"}, {"bytes": "00ff"}, [{"float": "-0x0.0p+0"}],
            {"dict": [["a", 1]]},
            {"cut": [{"float": "0x1.0000000000000p-1"}, {"bytes": "77"}, 7]},
        ]
    }  # fmt: skip
    values = (None, True, 3, "text", 1.5, b"\x00\xff", [-0.0], {"a": 1}, Cut(0.5, b"w", 7))

    assert exactly(NOTATION.decode(data)) == exactly(values)
    assert NOTATION.encode(values) == data
    array = {"array": ["<f4", [1, 2], "0000803f000000c0"]}
    found = NOTATION.decode(array)
    assert (found.dtype, found.tolist()) == (np.float32, [[1.0, -2.0]])
    assert NOTATION.encode(found) == array
