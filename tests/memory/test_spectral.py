"""Decompositions stay within ``--memory``, which is refused where it is too little."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.adapters import save_peft
from tests.helpers.files import F32, write
from tests.helpers.running import assert_refused, call
from tests.memory.measure import MIB, assert_within, measure

_SIZE = 896
_BEFORE = """
import scipy.optimize, scipy.special
import mergebench.spectral.engine
from mergebench.spectral.diagnostic import DIAGNOSTICS
assert len(list(DIAGNOSTICS)) > 0
"""
# A compiler is a library too.
_PASSES = """
from mergebench.compute.entrywise import Room, Rows, passes
from mergebench.compute.pairwise import inner_products
from mergebench.compute.supports import shared_supports
inner_products(Rows(None, [None], 1), [(0, 0)], (), passes())
shared_supports(Rows(None, [None], 1), 1, passes())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Full and low-rank updates of two square matrices."""
    place = tmp_path_factory.mktemp("spectra")
    random = np.random.default_rng(0)
    names = [f"layers.{number}.proj" for number in range(2)]
    base = {f"{n}.weight": random.standard_normal((_SIZE, _SIZE), np.float32) for n in names}
    write(place / "base.safetensors", base)
    for model in ("one", "two"):
        tuned = {n: a + 0.1 * random.standard_normal(a.shape, np.float32) for n, a in base.items()}
        write(place / f"{model}.safetensors", tuned)
        made = {
            n: (random.standard_normal((_SIZE, 8)).astype(F32),
                random.standard_normal((8, _SIZE)).astype(F32))
            for n in names
        }  # fmt: skip
        save_peft(place / f"lora-{model}", made)
    return place


@pytest.mark.parametrize(
    ("models", "names"),
    [
        (("one.safetensors", "two.safetensors"), None),
        (("lora-one", "lora-two"), None),
        (("lora-one",), "intruders"),
        (("one.safetensors",), "spectra"),
        (("one.safetensors", "two.safetensors"), "alignment,interference,angles"),
    ],
)
def test_the_least_memory_is_enough(
    folder: Path, models: tuple[str, ...], names: str | None
) -> None:
    """What the refusal names is kept to, by two workers that must take turns."""
    arguments = ["spectral", *models, "-b", "base.safetensors", "--no-cache", "-q", "-j", 2]
    arguments += [] if names is None else ["--only", names]
    refused = call(*arguments, "--memory", "1MiB", cwd=folder)
    assert_refused(refused, "decomposing 896 × 896", "--memory 1 MiB")
    least = int(re.search(r"give --memory (\d+)MiB", refused.err)[1])

    measured = measure([*arguments, "--memory", f"{least}MiB"], folder, _BEFORE)

    assert_within(measured, least * MIB)
    assert least <= 16 + 24 * 8 * _SIZE**2 / MIB


def test_supports_need_no_matrix(folder: Path) -> None:
    """What is looked at entry by entry takes as much for a matrix of 72 MB as for a small one."""
    random = np.random.default_rng(1)
    base = {"layers.0.proj.weight": random.standard_normal((3000, 3000), np.float32)}
    models = {"large-base": base}
    for model in ("large-one", "large-two"):
        name, values = next(iter(base.items()))
        models[model] = {name: values + 0.1 * random.standard_normal(values.shape, np.float32)}
    for model, arrays in models.items():
        write(folder / f"{model}.safetensors", arrays)
    arguments = ["spectral", "large-one.safetensors", "large-two.safetensors", "-b",
                 "large-base.safetensors", "--no-cache", "-q", "-j", 1, "--only",
                 "overlap,cosine,signs", "--memory", "36MiB"]  # fmt: skip

    assert_within(measure(arguments, folder, _BEFORE + _PASSES), 36 * MIB)
