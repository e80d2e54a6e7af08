"""The geometric and selective cases: their references, and the classes of all differences.

Per entry the recorded value is **equal** to the float64 reference rounded to the stored dtype;
**rounding**, within what float32 norms, products and sums can make of it; **threshold**, explained
by keeping or dropping an entry whose place next to a threshold float32 cannot tell; or
**unexplained**.
"""

# ruff: noqa: T201  a script reports by printing

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

# As a script this file has its own folder on the path, and not the root of the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.oracle import geometric as oracle
from tests.oracle import methods
from tests.parity.cases import Case, cases
from tests.parity.models import DTYPES, tensors

FOLDER = "geometric"
CLASSES = ("equal", "rounding", "threshold", "unexplained")
#: Roundings of float32 that norms and coefficients of the largest tensor (768 entries) take on,
#: in units of the magnitudes that are added up.
ROUNDINGS = 8 * 2.0**-24
#: How far float32 variances and divergences may be off, relative to a threshold among them.
DOUBT = {"sce": 1e-5, "arcee_fusion": 2e-2}


@dataclass(frozen=True)
class Inputs:
    """What a configuration merges.

    Attributes
    ----------
    method, params
        As configured; ``t`` of mergekit's SLERP is among the weights.
    models : name -> arrays of every model that is not the base
    weights : list of float
    base : arrays, or ``None``
    deltas : as models, less the base; empty without one
    """

    method: str
    params: dict[str, Any]
    models: dict[str, list[np.ndarray]]
    weights: list[float]
    base: dict[str, np.ndarray] | None
    deltas: dict[str, list[np.ndarray]]


def inputs_of(case: Case) -> Inputs:
    """Read a configuration."""
    config = case.config
    method, params = config["merge_method"], dict(config.get("parameters", {}))
    named = config.get("base_model")
    weights = [each.get("parameters", {}).get("weight", 1.0) for each in config["models"]]
    names = [each["model"] for each in config["models"]]
    if method == "slerp":
        t = params.pop("t")
        weights, named = [1 - t if name == named else t for name in names], None
    else:
        kept = [index for index, name in enumerate(names) if name != named]
        names, weights = [names[i] for i in kept], [weights[i] for i in kept]
    tuned = [tensors(name, case.dtype) for name in names]
    models = {name: [model[name] for model in tuned] for name in tuned[0]}
    base = tensors(named, case.dtype) if named else None
    deltas = methods.task_vectors(base, models) if base is not None else {}
    return Inputs(method, params, models, weights, base, deltas)


def reference(given: Inputs) -> methods.Tensors:
    """Merge in float64 as mergekit 0.1.5 was observed to, without the base."""
    vectors = given.deltas or given.models
    w, params = given.weights, given.params
    match given.method:
        case "slerp":
            return oracle.each_tensor(vectors, lambda x: oracle.slerp(x, w))
        case "nuslerp":
            scope = oracle.each_tensor if params.get("nuslerp_flatten", True) else oracle.each_row
            return scope(vectors, lambda x: oracle.slerp(x, w, 0.999999))
        case "multislerp":
            how = {"steps": 1, "tol": 0.0, "log": False}
            normalize = params.get("normalize_weights", True)
            return oracle.each_tensor(
                vectors, lambda x: oracle.sphere_mean(x, w, normalize=normalize, **how)
            )
        case "karcher":
            steps = params.get("max_iter", 10)
            return oracle.each_tensor(vectors, lambda x: oracle.sphere_mean(x, w, steps=steps))
        case "model_stock":
            scope = oracle.each_row if params.get("filter_wise") else oracle.each_tensor
            return scope(vectors, lambda x: oracle.stock(x, w))
        case "sce":
            share = params.get("select_topk", 1.0)
            return oracle.each_tensor(
                vectors,
                lambda x: oracle.sce(x, w, oracle.most_varied(x, share, "nonzero"), tie="plus"),
            )
        case "nearswap":
            return oracle.each_tensor(vectors, lambda x: oracle.near(x[0], params["t"]))
        case "arcee_fusion":
            assert given.base is not None
            return oracle.fusion(given.base, {name: each[0] for name, each in vectors.items()})
        case "ram" | "ramplus_tl":
            how = {key: params[key] for key in ("epsilon", "r", "alpha") if key in params}
            how = {"r": 0.1 if given.method == "ramplus_tl" else 0.0, **how}
            return oracle.each_tensor(vectors, lambda x: oracle.ram(x, w, **how))
        case "passthrough":
            return oracle.each_tensor(vectors, lambda x: params["scale"] * x[0])
    raise ValueError(given.method)


@dataclass
class Outcome:
    """The classes of all entries of one case."""

    counts: Counter[str] = field(default_factory=Counter)
    largest_rounding: float = 0.0


def otherwise(given: Inputs, name: str, got: np.ndarray) -> np.ndarray:
    """The reference with ``got``'s own choice among entries that float32 cannot tell apart.

    As many of them must have been kept as there was room for; else the reference as it is.
    """
    vectors = [np.asarray(each, np.float64).ravel() for each in given.deltas[name]]
    assert given.base is not None
    kept = got != np.asarray(given.base[name], np.float64).ravel()
    if given.method == "arcee_fusion":
        values = oracle.importance(given.base[name], np.asarray(given.deltas[name][0])).ravel()
        limit = oracle.importance_limit(values)
        mask = values >= limit
        doubtful = np.abs(values - limit) <= DOUBT[given.method] * limit
        return np.where(np.where(doubtful, kept, mask), vectors[0], 0.0)
    mask = oracle.most_varied(vectors, given.params["select_topk"], "nonzero")
    values = np.var(vectors, axis=0)
    limit = values[mask].min(initial=np.inf)
    doubtful = np.abs(values - limit) <= DOUBT[given.method] * limit
    if (kept & doubtful).sum() == (mask & doubtful).sum():
        mask = np.where(doubtful, kept, mask)
    return oracle.sce(vectors, given.weights, mask, tie="plus")


def classify(case: Case, outputs: Mapping[str, np.ndarray] | None = None) -> Outcome:
    """Class every entry of ``outputs``, by default of what was recorded for ``case``."""
    given, outcome = inputs_of(case), Outcome()
    outputs = case.recorded() if outputs is None else outputs
    selects = given.method == "arcee_fusion" or "select_topk" in given.params
    stored = DTYPES[case.dtype]

    def rounded(values: np.ndarray) -> np.ndarray:
        return values.astype(stored).astype(np.float64)

    for name, delta in reference(given).items():
        under = np.zeros(delta.size)
        if given.base is not None:
            under = np.asarray(given.base[name], np.float64).ravel()
        vectors = np.array([np.asarray(x, np.float64).ravel() for x in given.models[name]])
        slack = ROUNDINGS * (np.abs(under) + np.abs(vectors).sum(axis=0))
        got = np.asarray(outputs[name], np.float64).ravel()

        def near(want: np.ndarray, slack: np.ndarray = slack, got: np.ndarray = got) -> np.ndarray:
            return (rounded(want - slack) <= got) & (got <= rounded(want + slack))

        want = under + delta.ravel()
        equal = got == rounded(want)
        rounding = ~equal & near(want)
        threshold = np.zeros(got.shape, bool)
        if selects:
            threshold = ~equal & ~rounding & near(under + otherwise(given, name, got))
        unexplained = ~equal & ~rounding & ~threshold
        for kind, found in zip(CLASSES, (equal, rounding, threshold, unexplained), strict=True):
            outcome.counts[kind] += int(found.sum())
        gap = np.abs(got - rounded(want))[rounding].max(initial=0.0)
        outcome.largest_rounding = max(outcome.largest_rounding, float(gap))
    return outcome


def main() -> int:
    """Print the table of ``README.md``; return 1 if anything is unexplained."""
    print("| " + " | ".join(("case", *CLASSES, "largest rounding")) + " |")
    print("|---|" + "---:|" * (len(CLASSES) + 1))
    failures = 0
    for case in cases(FOLDER):
        outcome = classify(case)
        cells = [case.label.removeprefix(f"{FOLDER}/")]
        cells += [str(outcome.counts[kind]) for kind in CLASSES]
        print("| " + " | ".join([*cells, f"{outcome.largest_rounding:.1e}"]) + " |", flush=True)
        failures += outcome.counts["unexplained"]
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
