"""The comparison with PEFT's own merging: what it says of mergebench holds."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The benchmark, imported from its file."""
    place = Path(__file__).parents[2] / "benchmarks" / "peft_merging.py"
    spec = importlib.util.spec_from_file_location("peft_merging", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_sums_are_exact(script: ModuleType, tmp_path: Path) -> None:
    """Every sum is exact, also as an adapter that PEFT loads where it can be one."""
    rows = [*script.combinations(tmp_path), *script.features(tmp_path)]
    assert len(rows) == 14
    for title, _, ours, adapter in rows:
        if "one weight" in title:
            continue
        assert ours == "exact", title
        dense = "DoRA" in title
        assert ("not a LoRA" in adapter) if dense else adapter == "exact", title
    by_peft = {title: theirs for title, theirs, _, _ in rows}
    assert by_peft["cat, 0.7 and 0.3"] == "exact"
    assert by_peft["linear, 0.7 and 0.3"] != "exact"


def test_no_basis_and_no_rounding_matters(script: ModuleType, tmp_path: Path) -> None:
    """TIES on updates does not see how factors are written, and a model is rounded once."""
    assert script.rotated(tmp_path)[2] == "exact"
    merged, rounded = script.folded(tmp_path)
    assert merged[2] == rounded[1]


def test_errors_are_measured(script: ModuleType) -> None:
    """The measure is relative, and counts a tensor that is missing."""
    import torch

    exact = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
    assert script.error(exact, exact) == 0
    assert script.error({"a": exact["a"]}, exact) == pytest.approx(0.8)
    assert script.error({"a": torch.tensor([0.0]), "b": exact["b"]}, exact) == pytest.approx(0.6)
