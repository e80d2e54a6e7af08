"""What the contracts take for granted, and where they do not hold: the one place that says so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Every contract, with the promise that it checks.
CONTRACTS: Mapping[str, str] = {
    "identity": "one model, all parameters neutral: that model comes out",
    "base at zero": "a global scale of 0 gives the bits of the base",
    "order": "the order of the models does not change a bit, unless the chain declares to keep it",
    "tiling": "neither tiles, jobs, workers nor the memory budget change a bit",
    "files": "streamed from files is bit for bit the same as from memory",
    "untouched inputs": "no input array is written to",
    "layout": "transposed and strided arrays give the bits of contiguous ones",
    "buffers": "integer and boolean tensors are those of the base, and must agree",
    "double": "float64 inputs are merged in float64",
    "rounded once": "a small dtype is merged in float32 and rounded once",
    "non-finite": "NaN and infinity are refused, naming model, tensor and count",
    "torch": "numpy and torch agree within one ulp with equal masks, or a declared tolerance",
    "device": "on a device the same values come out within 1e-6, or a declared tolerance",
    "gradients": "gradients flow and equal finite differences",
    "homogeneous": "twice the task vectors give exactly twice the merged one",
    "in memory": "`apply` on arrays is the merge without its base",
    "factored": "a LoRA and its dense product merge alike to 1e-5",
    "gauge": "factors (B, A) and (B M, M⁻¹ A) of one update merge alike to 1e-9, in float64",
    "sweep": "one output of several values is bit for bit the merge with that value",
    "parameters": "values outside of what is declared are refused by name",
    "description": "chains are equal, hashed and printed by their content",
}

#: A value with which a parameter changes nothing, in every method that has it.
NEUTRAL: Mapping[str, Any] = {
    "lam": 1.0,
    "density": 1.0,
    "gamma": 0.0,
    "scale": 1.0,
    "select_topk": 1.0,
    "epsilon": 0.0,
    "r": 0.0,
    "alpha": 0.0,
    "t": 1e9,
    "iqr": 0.0,
    "threshold": 0.9995,
    "max_iter": 10,
    "tol": 1e-5,
    "share": 1.0,
    "common": 1.0,
    "steps": 1,
    "rate": 1e-5,
    "seed": 0,
    "k": 0,
    "mask_lam": 0.4,
    "calibration": 1.0,
    "beta": 0.0,
    "ratio": 1.0,
    "clip": 0.0,
    "claim": 1.0,
    "m": 0.0,
    "size": 2.0,
    "floor": 1e-6,
}
#: The same for parameters whose name means something else in another method.
NEUTRAL_OF: Mapping[str, Mapping[str, Any]] = {
    "atlas": {"coefficients": "1"},
    "lines": {"alpha": "1.0"},
    "widen": {"ratio": 1.0},
    "deintrude": {"epsilon": 0.5},
    "tsv_compress": {"share": "1"},
    # The authors' code leaves out the entry of lowest score.
    "pcb": {"variant": "paper", "normalize": True},
}


def neutral(method: str) -> dict[str, Any]:
    """Values with which the parameters of a method change nothing."""
    return {**NEUTRAL, **NEUTRAL_OF.get(method, {})}


_NO_SCALE = "it has no global scale to set to zero, `--then scale` has"
_ONE_MODEL = "it takes a single model, which has no order"
_ABSOLUTE = "it compares entries with a threshold in the units of the weights"

#: (contract, method) that is left out, and why.
METHODS_EXEMPT: Mapping[tuple[str, str], str] = {
    ("homogeneous", "pcb"): "the authors' code takes tanh of products of entries, in their unit",
    ("gradients", "deintrude"): "directions are found out of core, without derivatives",
    ("gradients", "orthogonal"): "singular values of joined bases coincide: no derivative",
    ("gradients", "pcb"): "bars and norms of its scores are found out of core, without derivatives",
    ("homogeneous", "widen"): "vectors are scored by a softmax of |τ|, in their unit",
    ("base at zero", "linear"): "it averages weights: there is no global scale to set to zero",
    ("base at zero", "atlas"): _NO_SCALE,
    ("base at zero", "slerp"): _NO_SCALE,
    ("base at zero", "fisher"): _NO_SCALE,
    ("base at zero", "regmean"): _NO_SCALE,
    ("base at zero", "regmean_pp"): _NO_SCALE,
    ("base at zero", "nuslerp"): _NO_SCALE,
    ("base at zero", "karcher"): _NO_SCALE,
    ("base at zero", "multislerp"): _NO_SCALE,
    ("base at zero", "model_stock"): _NO_SCALE,
    ("base at zero", "nearswap"): _NO_SCALE,
    ("base at zero", "passthrough"): _NO_SCALE,
    ("base at zero", "add_difference"): _NO_SCALE,
    ("order", "nearswap"): _ONE_MODEL,
    ("order", "passthrough"): _ONE_MODEL,
    ("order", "graft"): _ONE_MODEL,
    ("order", "arcee_fusion"): _ONE_MODEL,
    ("order", "hft"): _ONE_MODEL,
    ("order", "mos"): "the last model is the new task, the order is what it is told by",
    ("identity", "hft"): "it resets half of the modules of a single model too",
    ("double", "hft"): "the check takes a single model, half of whose modules it resets",
    ("base at zero", "deintrude"): "its λ scales single directions, not what is merged",
    ("homogeneous", "deintrude"): "it looks at the sum with the base, which does not grow along",
    ("order", "deintrude"): _ONE_MODEL,
    ("homogeneous", "nearswap"): _ABSOLUTE,
    ("homogeneous", "ram"): _ABSOLUTE,
    ("homogeneous", "ramplus_tl"): _ABSOLUTE,
    ("homogeneous", "arcee_fusion"): "importance is measured on the softmax of weights",
    ("identity", "arcee_fusion"): "it never takes over a model whole, only what matters in it",
    ("double", "arcee_fusion"): "it never takes over a model whole, so there is nothing to survive",
    ("sweep", "add_difference"): "it has no number that could have several values",
    ("base at zero", "twin_merging"): "its scale is that of the shared expert alone",
    ("base at zero", "flexmerge"): "its scale is that of what several tasks share alone",
    ("base at zero", "cart"): "its scale is that of what is added to the mean of the models",
    ("identity", "iso_c"): "it levels the singular values of a single model too",
    ("identity", "iso_cts"): "it levels the singular values of a single model too",
    ("gradients", "iso_cts"): "singular values of orthonormal vectors coincide: no derivative",
    ("gradients", "tsv_merge"): "singular values of orthonormal vectors coincide: no derivative",
    ("homogeneous", "wudi"): "the learning rate of its descent is absolute, as published",
    ("double", "iso_c"): "the check takes a single model, whose singular values it levels",
    ("double", "iso_cts"): "the check takes a single model, whose singular values it levels",
}

#: (contract, op) that is left out, and why.
OPS_EXEMPT: Mapping[tuple[str, str], str] = {
    ("order", "blend_last"): "the last model is the new task, the order is what it is told by",
    ("homogeneous", "clip"): _ABSOLUTE,
    ("gradients", "clip"): "what it has limited does not move with its input",
    ("homogeneous", "disentangle"): "vectors are scored by a softmax of |τ|, in their unit",
    ("homogeneous", "drop_small"): _ABSOLUTE,
    ("homogeneous", "keep_important"): "importance is measured on the softmax of weights",
    ("gradients", "project_rows"): "singular values of joined bases coincide: no derivative",
    ("gradients", "subspaces"): "orthonormal vectors have equal singular values: no derivative",
    (
        "gradients",
        "singular_vectors",
    ): "orthonormal vectors have equal singular values: no derivative",
    ("homogeneous", "descend_wudi"): "the learning rate of its descent is absolute, as published",
    (
        "homogeneous",
        "compete",
    ): "the authors' code takes tanh of products of entries, in their unit",
}

#: Ops that go by a rank found in the data: arrays without data do not do for them.
SHAPED_BY_DATA = frozenset({"core_space", "gram_mean", "knots", "project_rows"})

#: Ops that divide by shares, which nearly cancel for some weights of both signs, whatever those add
#: up to: there is no bound on what a rounding becomes.
NEARLY_CANCEL = frozenset({"energy_mean"})
