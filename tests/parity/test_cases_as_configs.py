"""Every recorded case given to `mergebench run` as the file that mergekit was given.

What the presets make of the cases is held against mergekit elsewhere, entry by entry or by moments;
here the file must ask for the same.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.helpers.running import assert_done, call
from tests.parity import test_geometric, test_mergekit, test_random
from tests.parity.cases import BF16_MATH, Case, every_case
from tests.parity.models import NAMES, build

CASES = [case for case in every_case() if not case.name.endswith(BF16_MATH)]
MERGED: dict[str, Callable[[Case], dict[str, np.ndarray]]] = {
    "geometric": test_geometric.merged,
    "random": test_random.merged,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models of either dtype, each in a folder of its own."""
    folder = tmp_path_factory.mktemp("models")
    for dtype in ("float32", "bfloat16"):
        (folder / dtype).mkdir()
        for name in NAMES:
            build(folder / dtype, name, dtype)
    return folder


def assert_same_bytes(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    """Equal names, dtypes and bits."""
    assert {n: a.dtype for n, a in ours.items()} == {n: a.dtype for n, a in theirs.items()}
    assert [n for n, a in theirs.items() if ours[n].tobytes() != a.tobytes()] == []


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_the_file_asks_for_the_same(models: Path, case: Case) -> None:
    """As the call in Python that the recorded output was compared with."""
    place = models / case.dtype
    (place / "case.yml").write_text(case.text)
    assert_done(call("run", "case.yml", "-o", "out", "-f", cwd=place))
    folder = Path(case.name).parts[0]
    expected = MERGED.get(folder, test_mergekit.merged)(case)
    assert_same_bytes(load_file(place / "out/model.safetensors"), expected)


def test_another_file_is_noticed(models: Path) -> None:
    """The comparison can fail."""
    case = Case("ties-weighted-lambda", "float32")
    place = models / case.dtype
    (place / "case.yml").write_text(case.text.replace("weight: ", "weight: 1"))
    assert_done(call("run", "case.yml", "-o", "out", "-f", cwd=place))
    with pytest.raises(AssertionError):
        assert_same_bytes(load_file(place / "out/model.safetensors"), test_mergekit.merged(case))
