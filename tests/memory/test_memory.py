"""Merges of 2 GB stay within ``--memory``, or are refused with the number they need."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mergebench.merge.op import OPS
from tests.helpers.adapters import save_peft
from tests.helpers.files import BF16, header, listing, read, write
from tests.helpers.running import assert_done, assert_refused, call
from tests.helpers.statistics import options_for
from tests.memory.conftest import SHAPES
from tests.memory.measure import MIB, assert_within, measure

LIMIT = 256 * MIB
FILES = ("ft1.safetensors", "ft2.safetensors", "-b", "base.safetensors")


@pytest.mark.parametrize("scope", ["row", "tensor", "model"])
def test_ties_stays_within_its_memory(models: Path, scope: str) -> None:
    """One tensor alone exceeds the limit, and still no scope of TIES does."""
    out = models / f"{scope}.safetensors"
    arguments = ("merge", *FILES, "-m", "ties", "-p", f"scope={scope}", "-o", out)

    # The models are noise, and have nothing to do with each other.
    measured = measure([*arguments, "--memory", "256MiB", "--allow-base-mismatch"], models)

    assert_within(measured, LIMIT)
    entries, start = header(out)
    sizes = {name: tuple(entries[name]["shape"]) for name in SHAPES}
    assert sizes == SHAPES
    assert out.stat().st_size == start + sum(
        2 * rows * columns for rows, columns in SHAPES.values()
    )
    assert max(2 * rows * columns for rows, columns in SHAPES.values()) > LIMIT
    out.unlink()


def test_compressing_stays_within_its_memory(models: Path) -> None:
    """A task vector is read tile by tile, its blocks wait on the disk, and so it comes back."""
    out, back = models / "ft1.mbz.safetensors", models / "back.safetensors"
    pack = (
        "compress",
        "ft1.safetensors",
        "-b",
        "base.safetensors",
        "-o",
        out,
        "-p",
        "density=0.05",
    )
    measured = measure([*pack, "--memory", "256MiB", "--allow-base-mismatch"], models)

    assert_within(measured, LIMIT)
    assert out.stat().st_size < 20 * MIB
    unpack = ("decompress", out, "-b", "base.safetensors", "-o", back, "--memory", "256MiB")
    assert_within(measure(unpack, models), LIMIT)
    out.unlink()
    back.unlink()


@pytest.fixture
def vectors(tmp_path: Path) -> Path:
    """Models that are one long vector: a single row, which row-wise work may not cut."""
    random = np.random.default_rng(0)
    for name in ("base", "ft1", "ft2"):
        vector = random.standard_normal(6_000_000, np.float32).astype(BF16)
        write(tmp_path / f"{name}.safetensors", {"long.bias": vector})
    return tmp_path


@pytest.mark.parametrize(
    ("method", "memory"),
    [
        ("task_arithmetic", 40),
        ("task_arithmetic", 16),
        ("sce", 128),
        ("ramplus_tl", 128),
        ("ties", 128),
    ],
)
@pytest.mark.parametrize("holes", [False, True])
def test_what_kernels_leave_to_ops_is_planned_for(
    tmp_path: Path, method: str, memory: int, holes: bool
) -> None:
    """Many models, of which ops make float32 stacks where visitors look or an entry is NaN."""
    random = np.random.default_rng(0)
    names = [f"ft{n}.safetensors" for n in range(12)]
    shape = 4096, 1024
    for place, name in enumerate(["base.safetensors", *names]):
        values = random.standard_normal(shape, np.float32).astype(BF16)
        if holes and place in {2, 3}:
            values[::64] = np.nan
        write(tmp_path / name, {"weight": values})
    merge = ["merge", *names, "-b", "base.safetensors", "-m", method, "-o", "out.safetensors"]
    merge += ["--workers", 2, "--allow-base-mismatch", "--allow-nonfinite"]
    merge += ["-p", "scope=tensor"] if method == "ties" else []

    assert_within(measure([*merge, "--memory", f"{memory}MiB"], tmp_path), memory * MIB)


def test_too_little_memory_is_refused_with_the_number(vectors: Path) -> None:
    """The plan says how much is needed, before any work; with that much the merge works."""
    merge = ("merge", *FILES, "-m", "ties", "-p", "scope=row", "-o", "out.safetensors")
    before = listing(vectors)

    refused = call(*merge, "--memory", "64MiB", cwd=vectors)

    assert_refused(refused, "needs at least", "--memory 64 MiB", "row of 'long.bias'")
    assert listing(vectors) == before
    found = re.search(r"give --memory (\d+)MiB", refused.err)
    assert found is not None
    needed = int(found[1])
    plan = ("plan", *merge[1:], "--memory", f"{needed}MiB", "--json")
    least = assert_done(call(*plan, cwd=vectors)).json["least_memory"]
    assert needed == -(-least // MIB)
    assert_refused(call(*merge, "--memory", f"{needed - 1}MiB", cwd=vectors), f"{needed}MiB")
    assert_within(measure([*merge, "--memory", f"{needed}MiB"], vectors), needed * MIB)
    assert "out.safetensors" in listing(vectors)


def test_smaller_pieces_need_less(vectors: Path) -> None:
    """The same models over the whole tensor fit into what the row could not."""
    merge = ("merge", *FILES, "-m", "ties", "-p", "scope=tensor", "-o", "out.safetensors")

    assert_within(measure([*merge, "--memory", "96MiB"], vectors), 96 * MIB)


@pytest.mark.parametrize("method", ["emr", "flexmerge", "tall_masks"])
def test_results_of_every_model_fit_together(vectors: Path, method: str) -> None:
    """They are computed from one reading, a piece at a time."""
    merge = ("merge", *FILES, "-m", method, "-o", "out.safetensors")

    assert_within(measure([*merge, "--memory", "96MiB"], vectors), 96 * MIB)
    made = [name for name in listing(vectors) if name.startswith("out")]
    assert made == ["out-ft1.safetensors", "out-ft2.safetensors"]


@pytest.fixture
def matrices(tmp_path: Path) -> Path:
    """Models of one matrix and one vector, small beside what a decomposition holds."""
    random = np.random.default_rng(1)
    shapes = {"square.weight": (1100, 1000), "norm.bias": (50,)}
    base = {key: random.standard_normal(shape, np.float32) for key, shape in shapes.items()}
    for name, size in (("base", 0.0), ("ft1", 0.1), ("ft2", 0.1)):
        tuned = {
            key: (array + size * random.standard_normal(array.shape, np.float32)).astype(BF16)
            for key, array in base.items()
        }
        write(tmp_path / f"{name}.safetensors", tuned)
    return tmp_path


SPECTRAL = [
    ("tsv_merge", "singular_vectors"),
    ("iso_c", "isotropic"),
    ("iso_cts", "subspaces"),
    ("cart", "centred"),
    ("star", "cut_spectrum"),
    ("wudi -p solver=exact", "descend_wudi"),
    ("wudi -p steps=3", "descend_wudi"),
    ("knots_ties", "knots"),
    ("core_ties", "core_space"),
    ("tsv_compress", "compress"),
    ("tsv_compress --as lora", "compress"),
    ("twin_merging", "twin"),
    ("task_arithmetic --then svc", "svc"),
    ("task_arithmetic --then deintrude", "deintrude"),
    ("task_arithmetic --then truncate:rank=3", "truncate"),
]


@pytest.mark.parametrize(("method", "op"), SPECTRAL)
def test_decompositions_are_counted(matrices: Path, method: str, op: str) -> None:
    """A merge that decomposes matrices is refused with a number, and that number is enough.

    At least two fifths of it are used, so that the number is no excuse either.
    """
    assert OPS[op].workspace is not None
    # Files have no names of modules for adapters.
    out = "out" if "lora" in method else "out.safetensors"
    merge = ("merge", *FILES, "-m", *method.split(), "-o", out)
    refused = call(*merge, "--memory", "40MiB", cwd=matrices)
    assert_refused(refused, "needs at least", "a decomposition of 'square.weight' takes")
    found = re.search(r"give --memory (\d+)MiB", refused.err)
    assert found is not None
    measured = measure([*merge, "--memory", f"{found[1]}MiB"], matrices)
    assert_within(measured, int(found[1]) * MIB)
    assert measured.peak >= int(found[1]) * MIB * 0.4


def test_adapters_are_decomposed_in_factors(tmp_path: Path) -> None:
    """LoRAs of a matrix that could not be decomposed within the limit merge far below it."""
    random = np.random.default_rng(2)
    for name in ("a", "b"):
        B = random.standard_normal((4096, 8), np.float32)
        made = {"model.up_proj": (B, random.standard_normal((8, 4096), np.float32))}
        save_peft(tmp_path / name, made)
    merge = ("merge", "a", "b", "-m", "tsv_merge", "--memory", "64MiB")

    assert_within(measure([*merge, "-o", "out"], tmp_path), 64 * MIB)
    assert_within(measure([*merge, "--as", "delta", "-o", "delta"], tmp_path), 64 * MIB)


def test_fishers_are_read_in_pieces(vectors: Path) -> None:
    """Statistics as large as the models are counted in what the plan asks for, on both passes."""
    files = options_for("fisher", FILES[:2], vectors)
    merge = ("merge", *FILES[:2], "-m", "fisher", *files, "-o", "out.safetensors")

    assert_within(measure([*merge, "--memory", "84MiB"], vectors), 84 * MIB)


@pytest.mark.parametrize("alpha", ["0.9", "1"])
def test_grams_are_counted(matrices: Path, alpha: str) -> None:
    """RegMean of whole layers is refused with a number, and that number is enough.

    At alpha 1 the sums are near to singular, and decomposed.
    """
    files = options_for("regmean", FILES[:2], matrices)
    if alpha == "1":
        for name in files[1::2]:
            gram = np.array(read(matrices / name)["square.weight"])
            # Two inputs that are always equal.
            gram[4], gram[:, 4], gram[4, 4] = gram[3], gram[:, 3], gram[3, 3]
            about = {"mergebench_statistics": '{"version": 1, "kind": "gram"}'}
            save_file({"square.weight": gram}, matrices / name, about)
    merge = ("merge", *FILES[:2], "-m", "regmean", "-p", f"alpha={alpha}", *files)
    refused = call(*merge, "-o", "out.safetensors", "--memory", "40MiB", cwd=matrices)
    assert_refused(refused, "needs at least", "'square.weight' takes")
    found = re.search(r"give --memory (\d+)MiB", refused.err)
    assert found is not None
    chosen = ("-o", "out.safetensors", "--memory", f"{found[1]}MiB")
    measured = measure([*merge, *chosen], matrices)
    assert_within(measured, int(found[1]) * MIB)
    assert measured.peak >= int(found[1]) * MIB * 0.4
