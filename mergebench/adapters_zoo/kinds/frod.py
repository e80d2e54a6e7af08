"""FRoD: a weight decomposed over a shared basis, its core retrained."""

from __future__ import annotations

from functools import cache, partial

import numpy as np

from mergebench.adapters_zoo.adapter import KINDS, AdapterSource, Kind, ReadOptions
from mergebench.adapters_zoo.computed import Block
from mergebench.adapters_zoo.factors import put
from mergebench.adapters_zoo.lora_settings import for_module, read_settings
from mergebench.adapters_zoo.modules import Adapted, adapted_modules, claimed, whole
from mergebench.adapters_zoo.on_base import base_names, displaced, misfit
from mergebench.core.delta import Delta
from mergebench.core.errors import FormatError
from mergebench.core.tensor import Array, read_all

_ROLES = ("frod_lambda_l", "frod_lambda_s_values")
_SHARED = "base_model.frod_"


def _detect(source: AdapterSource) -> frozenset[str]:
    shared = {key for key in source.tensors if key.startswith(_SHARED)}
    return claimed(adapted_modules(source, _ROLES)) | shared


def _read(source: AdapterSource, options: ReadOptions) -> dict[str, Delta]:
    modules = adapted_modules(source, _ROLES)
    names = base_names(source, options, modules, "FRoD")
    settings = read_settings(source)
    deltas: dict[str, Delta] = {}
    for module in modules.values():
        basis, core = _core(source, module)
        flipped = for_module(settings, module.name).fan_in_fan_out
        change = partial(_changed, source, module, basis, core)
        name, delta = displaced(source, options, names, module, change, flipped=flipped)
        put(source.label, deltas, name, module.key, delta)
    return deltas


def _category(module: str) -> str:
    """Modules of one category share a basis: PEFT tells them by the ends of their paths."""
    parts = module.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    if parts[-3:] == ["attention", "output", "dense"]:
        return "attention_output"
    return f"{parts[-2]}_{parts[-1]}"


def _shared(source: AdapterSource, module: Adapted, part: str) -> Array:
    key = f"{_SHARED}{part}.{_category(module.name)}"
    if key not in source.tensors:
        raise FormatError(
            f"{source.label}: {key}, the basis of {module.name}, is not stored",
            fix="save the adapter with save_projection=True",
        )
    return read_all(source.tensors[key])


def _core(source: AdapterSource, module: Adapted) -> tuple[Array, Array]:
    """The shared basis V (inputs × inputs), and the trained core S + diag(λ)."""
    basis = _shared(source, module, "V").astype(np.float64)
    places = _shared(source, module, "s_indices")
    diagonal = whole(source, module, "frod_lambda_l").reshape(-1)
    values = source.tensors[module.keys["frod_lambda_s_values"]]
    sparse = read_all(values).astype(np.float64).reshape(-1)
    size = diagonal.size
    fits = places.ndim == 2 and places.shape == (2, sparse.size) and places.dtype.kind in "iu"
    inside = fits and bool(((places >= 0) & (places < size)).all())
    if basis.shape != (size, size) or not inside:
        raise FormatError(
            f"{source.label}: the basis of {module.name} does not fit its core",
            got=f"{basis.shape} and places of shape {places.shape}",
            expected=f"{(size, size)} and {sparse.size} places within",
        )
    core = np.diag(diagonal)
    np.add.at(core, tuple(places), sparse)
    return basis, core


def _changed(
    source: AdapterSource,
    module: Adapted,
    basis: Array,
    core: Array,
    weight: Block,
    rows: int,
    columns: int,
) -> Block:
    if basis.shape[0] != columns:
        raise misfit(source, module, f"{columns} inputs", str(basis.shape[0]))

    @cache
    def lengths() -> Array:
        squares = np.zeros(columns)
        for start in range(0, rows, 256):
            squares += (_over(slice(start, min(start + 256, rows))) ** 2).sum(0)
        return np.sqrt(squares)

    def _over(row: slice) -> Array:
        """Rows of W V⁻ᵀ."""
        part = weight(row, slice(0, columns))
        try:
            return np.asarray(np.linalg.solve(basis, part.T).T)
        except np.linalg.LinAlgError:
            return np.asarray(part @ np.linalg.pinv(basis, rcond=1e-6).T)

    def block(row: slice, column: slice) -> Array:
        size = lengths()
        directions = np.where(size > 1e-12, _over(row) / np.where(size > 1e-12, size, 1), 0)
        # PEFT keeps these directions in single precision.
        moved = directions.astype(np.float32).astype(np.float64) @ core @ basis.T
        return np.asarray((moved - weight(row, slice(0, columns)))[:, column])

    return block


KINDS.add(
    "frod",
    Kind(
        name="frod",
        formula="ΔW = U (S + diag(λ)) Vᵀ - W, U the normalised columns of W V⁻ᵀ",
        detect=_detect,
        read=_read,
        notes="FRoD of PEFT. Needs the base, and V in the file (save_projection).",
        peft_types=frozenset({"FROD"}),
    ),
)
