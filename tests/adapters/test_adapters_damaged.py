"""Damaged adapters of every family: an error, or what they meant before; never something else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergebench.adapters_zoo.adapter import AdapterSource, ReadOptions
from mergebench.core.errors import MergebenchError
from mergebench.core.tensor import Array, ArrayTensor, read_all

from .support import read_values
from .test_adapters_families import CASES, Net, trained

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly:UserWarning"),
]
NAMES = sorted(CASES)


class Made(dict[str, tuple[AdapterSource, ReadOptions, dict[str, Array]]]):
    """Adapters by case, in few words."""

    def __repr__(self) -> str:
        return f"{len(self)} adapters"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """One adapter of every case, saved by PEFT, with what it means."""
    found = Made()
    for name in NAMES:
        source, base, _ = trained(Net(), CASES[name], tmp_path_factory.mktemp("made"))
        shapes = {key: array.shape for key, array in base.items()}
        tensors = {key: ArrayTensor(array) for key, array in base.items()}
        options = ReadOptions(base_shapes=shapes, base=tensors)
        found[name] = (source, options, read_values(source, options))
    return found


def _gone(source: AdapterSource, key: str, axis: int) -> AdapterSource:
    tensors = {name: tensor for name, tensor in source.tensors.items() if name != key}
    return replace(source, tensors=tensors)


def _twice(source: AdapterSource, key: str, axis: int) -> AdapterSource:
    array = read_all(source.tensors[key])
    wide = np.concatenate([array, array], axis=axis % array.ndim) if array.ndim else array[None]
    return replace(source, tensors={**source.tensors, key: ArrayTensor(wide)})


def _less(source: AdapterSource, key: str, axis: int) -> AdapterSource:
    array = read_all(source.tensors[key])
    short = np.delete(array, 0, axis=axis % array.ndim) if array.ndim else array
    return replace(source, tensors={**source.tensors, key: ArrayTensor(short)})


def _more(source: AdapterSource, key: str, axis: int) -> AdapterSource:
    name = key.rpartition(".")[0] + ".strange"
    return replace(source, tensors={**source.tensors, name: source.tensors[key]})


def _integers(source: AdapterSource, key: str, axis: int) -> AdapterSource:
    array = read_all(source.tensors[key]).astype(np.int32)
    return replace(source, tensors={**source.tensors, key: ArrayTensor(array)})


@settings(
    deadline=None,
    max_examples=400,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    st.sampled_from(NAMES),
    st.sampled_from([_gone, _twice, _less, _more, _integers]),
    st.integers(0, 10**6),
    st.integers(0, 3),
)
def test_an_error_or_the_same(made: Made, name: str, damage: object, place: int, axis: int) -> None:
    """What is left of a file with a tensor missing, cut, doubled or added keeps its meaning."""
    source, options, before = made[name]
    keys = sorted(source.tensors)
    key = keys[place % len(keys)]
    if "ranknum" in key or "indices" in key:
        return
    assert callable(damage)
    changed = damage(source, key, axis)
    try:
        after = read_values(changed, options)
    except MergebenchError:
        return
    assert after.keys() <= before.keys()
    for each, values in after.items():
        assert np.array_equal(values, before[each]), (key, each)
    assert damage is _gone or after.keys() == before.keys()


def test_cases_are_sound(made: Made, tmp_path: Path) -> None:
    """Undamaged, every one of them is read."""
    assert all(before for _, _, before in made.values())
