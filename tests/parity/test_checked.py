"""What methods and ops say of other implementations is what tests compare them with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mergebench import methods
from mergebench.merge.op import OPS
from tests.parity.cases import MERGEKIT_VERSION, Case, cases
from tests.parity.record_fusionbench import VERSION
from tests.parity.test_fusionbench import CASES as OF_FUSIONBENCH

MERGEKIT, FUSIONBENCH, PEFT = f"mergekit {MERGEKIT_VERSION}", f"FusionBench {VERSION}", "PEFT 0.21"
#: What `tests/adapters/test_peft_weighted.py` compares: `cat`, the two on ΔW, and `svd`.
OF_PEFT = {
    ("method", "task_arithmetic"): "1e-05",
    ("method", "magnitude_prune"): "1e-04",
    ("method", "ties"): "1e-04",
    ("op", "truncate"): "1e-05",
}
ROUNDINGS, MOMENTS = "8 roundings", "moments, 5σ"
Said = dict[tuple[str, str, str], str]


def _mergekit() -> Iterator[tuple[Case, str]]:
    for folder, how in (("", ROUNDINGS), ("geometric", ROUNDINGS), ("random", MOMENTS)):
        for case in cases(folder):
            yield case, how


def compared() -> Said:
    """(method or op, its name, implementation) -> tolerance, from the tests' own cases."""
    found: Said = {}
    for case, how in _mergekit():
        found["method", case.config["merge_method"], MERGEKIT] = how
    for asked, tolerance in OF_FUSIONBENCH.values():
        # A step that follows is what such a case is about.
        steps = [("op", step.partition(":")[0]) for step in asked.get("then", ())]
        kind, name = (*steps, ("method", asked["method"]))[0]
        assert found.get((kind, name, FUSIONBENCH)) in (None, f"{tolerance:.0e}"), name
        found[kind, name, FUSIONBENCH] = f"{tolerance:.0e}"
    for (kind, name), tolerance in OF_PEFT.items():
        found[kind, name, PEFT] = tolerance
    return found


def declared() -> Said:
    """The same, from the registries."""
    registries: Mapping[str, Mapping[str, Any]] = {
        "method": {name: methods[name] for name in methods},
        "op": {name: OPS[name] for name in OPS},
    }
    return {
        (kind, name, what): how
        for kind, entries in registries.items()
        for name, entry in entries.items()
        for what, how in entry.checked.items()
    }


def test_what_is_declared_is_what_is_compared() -> None:
    """No more and no less, with the tolerance of the test."""
    assert declared() == compared()


def test_presets_are_compared_with_what_they_are_named_after() -> None:
    """A preset of a recorded implementation has a recorded case, or the page would not say so."""
    names = {"mergekit-0.1.5": MERGEKIT, "fusionbench-0.2.33": FUSIONBENCH, "peft-0.21": PEFT}
    missing = {
        (name, preset)
        for name in methods
        for preset in methods[name].compat
        if preset in names and names[preset] not in methods[name].checked
    }
    # KnOTS has no algorithm there that runs on models of any architecture.
    assert missing == {("knots_ties", "fusionbench-0.2.33")}


def test_peft_is_compared_there() -> None:
    """The file that is named holds the four comparisons."""
    text = (Path(__file__).parents[1] / "adapters" / "test_peft_weighted.py").read_text()
    for how in ('"cat"', '"svd"', '"magnitude_prune_svd"', '"ties_svd"'):
        assert how in text
