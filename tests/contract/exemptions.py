"""What the contracts take for granted, and where they do not hold: the one place that says so."""

from __future__ import annotations

from collections.abc import Mapping

#: Every contract, with the promise that it checks.
CONTRACTS: Mapping[str, str] = {
    "identity": "one model, all parameters neutral: that model comes out",
    "base at zero": "a global scale of 0 gives the bits of the base",
    "order": "the order of the models does not change a bit",
    "tiling": "neither tiles, jobs, workers nor the memory budget change a bit",
    "files": "streamed from files is bit for bit the same as from memory",
    "untouched inputs": "no input array is written to",
    "layout": "transposed and strided arrays give the bits of contiguous ones",
    "buffers": "integer and boolean tensors are those of the base, and must agree",
    "double": "float64 inputs are merged in float64",
    "rounded once": "a small dtype is merged in float32 and rounded once",
    "non-finite": "NaN and infinity are refused, naming model, tensor and count",
    "torch": "numpy and torch agree within one ulp, with equal masks",
    "gradients": "gradients flow and equal finite differences",
    "homogeneous": "twice the task vectors give exactly twice the merged one",
    "in memory": "`apply` on arrays is the merge without its base",
    "factored": "a LoRA and its dense product merge alike to 1e-5",
    "sweep": "one output of several values is bit for bit the merge with that value",
    "parameters": "values outside of what is declared are refused by name",
    "description": "chains are equal, hashed and printed by their content",
}

#: A value with which a parameter changes nothing, in every method that has it.
NEUTRAL: Mapping[str, float] = {"lam": 1.0, "density": 1.0, "gamma": 0.0}

#: (contract, method) that is left out, and why.
METHODS_EXEMPT: Mapping[tuple[str, str], str] = {
    ("base at zero", "linear"): "it averages weights: there is no global scale to set to zero",
}

#: (contract, op) that is left out, and why.
OPS_EXEMPT: Mapping[tuple[str, str], str] = {}
