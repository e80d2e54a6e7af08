"""The contracts of merge methods, one function each: ``(method, case, parameters, …)``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from mergebench.compute.tiles import Tiling
from mergebench.core.errors import MergebenchError, MismatchError
from mergebench.core.tensor import ArrayTensor
from mergebench.merge.align import draw_keys
from mergebench.merge.apart import place_of
from mergebench.merge.chains import is_apart
from mergebench.merge.engine import execute_in_memory
from mergebench.merge.method import METHODS
from mergebench.merge.plan import Plan
from mergebench.merge.planning import make_plan
from mergebench.recipe import ModelRef, Recipe
from mergebench.sources import source_of_arrays

from .assertions import assert_close, assert_same_bits, assert_same_values
from .collecting import files_of, wanted
from .support import F32, Arrays, Case, apply, flat, merge_each, merge_models, merged

Params = Mapping[str, Any]
#: Larger than every tensor of a case.
WHOLE = Tiling(1 << 20, 1 << 20, 1)


def assert_identity(method: str, case: Case, params: Params) -> None:
    """A single model of weight 1 comes out; exact displacements leave no rounding at all."""
    alone = replace(case, models=case.models[:1], weights=(1.0,))
    assert_same_values(merged(method, alone, params), alone.models[0])


def assert_identity_within(method: str, case: Case, params: Params, epsilon: float) -> None:
    """A single model comes out, but for one rounding of the difference and one of the sum."""
    alone = replace(case, models=case.models[:1], weights=(1.0,))
    for name, got in merged(method, alone, params).items():
        model, base = alone.models[0][name], alone.base[name]
        assert got.dtype == base.dtype
        assert np.all(np.abs(got - model) <= epsilon * (np.abs(model) + np.abs(base))), name


def outputs(method: str, case: Case, params: Params) -> list[Arrays]:
    """The results of a merge: one, or where they are apart one for each model."""
    models = list(zip(case.models, case.weights, strict=True))
    marks = case.marks or None
    found = merge_each(models, base=case.base, method=method, marks=marks, **params)
    assert isinstance(found, list) == is_apart(METHODS[method](**params))
    assert not isinstance(found, list) or len(found) == len(models)
    return found if isinstance(found, list) else [found]


def computed(plan: Plan) -> Any:
    """What a plan gives in memory, models in its own order."""
    found = execute_in_memory(plan)
    places = [place_of(each.tail) if each.tail else 0 for each in plan.variants]
    return flat([found[places.index(place)] for place in sorted(places)])


def assert_base_at_zero(method: str, case: Case, params: Params) -> None:
    """The bits of the base, negative zeros among them."""
    assert any(np.any(np.signbit(a) & (a == 0)) for a in case.base.values())
    for each in outputs(method, case, params):
        assert_same_bits(each, case.base)


def assert_order_free(method: str, case: Case, params: Params, order: Sequence[int]) -> None:
    """The bits of any order of models and weights."""
    before, after = outputs(method, case, params), outputs(method, case.chosen(order), params)
    if len(before) == 1:
        assert_same_bits(after[0], before[0])
        return
    for each, index in zip(after, order, strict=True):
        assert_same_bits(each, before[index])


def planned(method: str, case: Case, params: Params, **options: Any) -> Plan:
    """The plan of a merge of arrays in memory, for one worker unless ``workers`` says otherwise."""
    labels = [f"models[{i}]" for i in range(len(case.models))]
    opened = [
        source_of_arrays(label, {name: ArrayTensor(array) for name, array in each.items()})
        for label, each in zip([*labels, "base"], [*case.models, case.base], strict=True)
    ]
    recipe = Recipe(
        models=tuple(map(ModelRef, labels, case.weights)), method=method, params=params, base="base"
    )
    files = files_of(wanted(method), case.models, case.base, case.marks or None)
    return make_plan(
        recipe,
        sources=opened[:-1],
        base=opened[-1],
        statistics=files,
        **{"workers": 1, **options},
    )


def places_in(plan: Plan) -> list[int]:
    """Where each model of a plan stood in its case."""
    return [int(model.label.strip("models[]")) for model in plan.models]


def as_planned(plan: Plan, case: Case) -> Case:
    """The models in the order in which a plan adds them up."""
    return replace(case.chosen(places_in(plan)), weights=plan.weights)


def assert_tiling_free(method: str, case: Case, params: Params, tiling: Tiling) -> None:
    """The bits of one big tile on one worker."""
    plan = planned(method, case, params)
    whole = computed(replace(plan, tiling=WHOLE))
    assert_same_bits(computed(replace(plan, tiling=tiling)), whole)


def assert_same_from_files(method: str, case: Case, params: Params, folder: Path) -> None:
    """The bits of the merge in memory, whether the result is returned or written."""
    expected = merged(method, case, params)
    paths = []
    for index, each in enumerate([case.base, *case.models]):
        paths.append(folder / f"{index}.safetensors")
        save_file(each, paths[-1])
    base, *models = paths
    pairs = list(zip(models, case.weights, strict=True))
    assert_same_bits(merge_models(pairs, base=base, method=method, **params), expected)
    written = merge_each(
        pairs, base=base, method=method, out=folder / "out.safetensors", force=True, **params
    )
    written = written if isinstance(written, list) else [written]
    assert_same_bits(flat([load_file(each.path) for each in written]), expected)


def assert_inputs_untouched(method: str, case: Case, params: Params) -> None:
    """Inputs that cannot be written to are enough, and torch tensors keep their bytes."""
    frozen = case.mapped(np.copy)
    for each in (frozen.base, *frozen.models):
        for array in each.values():
            array.flags.writeable = False
    expected = merged(method, frozen, params)
    assert_same_bits(frozen.base, case.base)
    tensors = case.mapped(np.copy)
    as_torch = replace(
        tensors,
        base={name: torch.from_numpy(array) for name, array in tensors.base.items()},
        models=tuple(
            {name: torch.from_numpy(array) for name, array in each.items()}
            for each in tensors.models
        ),
    )
    got = merged(method, as_torch, params)
    assert_same_bits({name: tensor.numpy() for name, tensor in got.items()}, expected)
    for before, after in zip(case.models, tensors.models, strict=True):
        assert_same_bits(after, before)
    assert_same_bits(tensors.base, case.base)


def assert_layout_free(method: str, case: Case, params: Params) -> None:
    """The bits of contiguous arrays, from column-major and from strided ones."""
    expected = merged(method, case, params)
    columns = case.mapped(lambda array: np.array(array, order="F"))
    assert_same_bits(merged(method, columns, params), expected)

    def strided(array: np.ndarray) -> np.ndarray:
        return np.repeat(array[::-1], 2, axis=0)[::-2] if array.ndim else array

    assert_same_bits(case.mapped(strided).base, case.base)
    assert_same_bits(merged(method, case.mapped(strided), params), expected)


def assert_buffers_kept(
    method: str, case: Case, params: Params, others: Mapping[str, np.ndarray], odd: str
) -> None:
    """Tensors that are not floating-point are copied, and refused where a model differs in one."""
    base, *models = ({**each, **others} for each in (case.base, *case.models))
    whole = replace(case, base=base, models=tuple(models))
    got = merged(method, whole, params)
    assert_same_bits({name: got[name] for name in others}, others)
    models[-1] = {**models[-1], odd: others[odd] ^ others[odd].dtype.type(1)}
    with pytest.raises(MismatchError, match=rf"^{odd}: .* must agree"):
        merged(method, replace(whole, models=tuple(models)), params)


def assert_rounded_once(method: str, case: Case, params: Params) -> None:
    """A merge in float32 of the same numbers, rounded to the dtype of the case."""
    (dtype,) = {array.dtype for array in case.base.values()}
    plan = planned(method, case, params)
    wide = as_planned(plan, case).astype(F32)
    chain = METHODS[method](**params)
    how = {"keys": draw_keys(plan.models), "places": places_in(plan), "marks": wide.marks}
    if METHODS[method].space == "weight":
        exact = apply(chain, wide.models, wide.weights, **how)
    else:
        exact = apply(chain, wide.task_vectors, wide.weights, base=wide.base, **how)
        base = {name: wide.base[name.partition("@")[0]] for name in exact}
        exact = {name: np.asarray(exact[name] + array) for name, array in base.items()}
    rounded = {name: array.astype(dtype) for name, array in exact.items()}
    assert_same_values(computed(plan), rounded)


def assert_refuses_nonfinite(method: str, case: Case, params: Params, where: str) -> None:
    """An error that names the model, the tensor, and how much of what is in it."""
    name = "model.layers.0.attn.weight"
    spoilt = case.mapped(np.copy)
    tables = {"the base": spoilt.base}
    tables |= {f"models[{index}]": each for index, each in enumerate(spoilt.models)}
    flat = tables[where][name].reshape(-1)
    flat[3], flat[11], flat[17] = np.nan, np.nan, -np.inf
    with pytest.raises(MergebenchError) as caught:
        merged(method, spoilt, params)
    said = f"{where}: tensor {name!r} has 2 NaN and 1 infinite entries of 20"
    assert caught.value.what == said


def assert_apply_is_merge(method: str, case: Case, params: Params) -> None:
    """The merge into a base of zeros is the chain on the models themselves."""
    raised = replace(case, base={name: np.zeros_like(a) for name, a in case.base.items()})
    plan = planned(method, raised, params)
    ordered = as_planned(plan, raised)
    chain, keys = METHODS[method](**params), draw_keys(plan.models)
    how = {"base": ordered.base, "keys": keys, "places": places_in(plan), "marks": ordered.marks}
    expected = apply(chain, ordered.models, ordered.weights, **how)
    assert_same_values(computed(plan), expected)


def assert_sweep_is_single(method: str, case: Case, params: Params, key: str, several: Any) -> None:
    """One reading of the inputs gives the bits of separate merges, value by value."""
    swept = iter(merged(method, case, {**params, key: list(several)}))
    for value in several:
        for alone in outputs(method, case, {**params, key: value}):
            assert_same_bits(next(swept), alone)
    assert not list(swept)


def assert_factored_is_dense(
    factored: Mapping[str, np.ndarray], dense: Mapping[str, np.ndarray]
) -> None:
    """The merge of factors is the merge of their products, to 1e-5 of the largest entry."""
    assert any(np.abs(array).max(initial=0) > 0 for array in dense.values()), "nothing to compare"
    assert_close(factored, dense, 1e-5)
