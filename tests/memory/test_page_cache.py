"""Runs larger than a limit leave neither inputs nor output in the page cache."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from pathlib import Path

import numpy as np
import pytest

from mergebench import merge_models
from mergebench.checkpoints import descriptors, direct
from mergebench.checkpoints.reader import open_safetensors
from mergebench.compute.machine import PAGE
from mergebench.core.tensor import read_all, read_runs
from tests.helpers.files import BF16, tree, write
from tests.helpers.forked import forked
from tests.helpers.running import MAIN, assert_done
from tests.memory.measure import MIB, READY
from tests.memory.residency import forget, on_disk, resident, tells

INPUTS = ("base", "ft1", "ft2")
#: Of a tensor in bf16.
SHAPE = (2048, 2048)


@pytest.fixture
def models(tmp_path: Path) -> Iterator[Path]:
    """Three models of 48 MiB on a real disk."""
    with on_disk(tmp_path) as folder:
        random = np.random.default_rng(0)
        for file in INPUTS:
            arrays = {
                f"layers.{n}.weight": random.standard_normal(SHAPE, np.float32).astype(BF16)
                for n in range(6)
            }
            write(folder / f"{file}.safetensors", arrays)
            forget(folder / f"{file}.safetensors")
        yield folder


@pytest.mark.parametrize(("method", "workers"), [("task_arithmetic", 1), ("ties", 2)])
def test_a_large_merge_leaves_nothing_behind(models: Path, method: str, workers: int) -> None:
    """A small one leaves everything, for whoever reads it next; the bytes are the same."""
    merge = ["merge", "ft1.safetensors", "ft2.safetensors", "-b", "base.safetensors", "-m", method]
    merge += ["--allow-base-mismatch", "--workers", workers, "--force", "-o", "out.safetensors"]
    paths = [models / f"{name}.safetensors" for name in (*INPUTS, "out")]
    command = forked(READY)

    assert_done(command(MAIN, *merge, "--page-cache", "1TB", cwd=models))
    kept = [resident(path) / path.stat().st_size for path in paths]
    small = tree(models)["out.safetensors"]
    assert_done(command(MAIN, *merge, "--page-cache", "8MiB", cwd=models))
    left = [resident(path) for path in paths]

    assert min(kept) > 0.9
    # A page or two of headers, which were read before the merge was known to be large.
    assert max(left) < MIB
    assert tree(models)["out.safetensors"] == small


def test_samples_leave_nothing_behind(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs close together, too; what was there stays, and all that a disk takes long to find."""
    monkeypatch.setattr(descriptors, "_SEEK", inf)
    path = models / "base.safetensors"
    tensors = open_safetensors(path).tensors
    size = SHAPE[0] * SHAPE[1]
    # Behind what the system has read beyond the header.
    starts = (200_000, 202_048, 204_000, 209_000, size // 2, size - 300)
    spans = [(start, start + 300) for start in starts]
    out = np.empty(6 * 600, np.uint8)
    header = resident(path)
    cold = [read_runs(tensor, spans, out).copy() for tensor in tensors.values()]
    left = resident(path)
    whole = [read_all(tensor).reshape(-1) for tensor in tensors.values()]
    hot = [read_runs(tensor, spans, out).copy() for tensor in tensors.values()]

    # Of 36 places, each in a page or two of its own.
    assert left <= header + 4 * PAGE or not tells(path)
    assert resident(path) > 0.99 * path.stat().st_size
    for one, again, entries in zip(cold, hot, whole, strict=True):
        expected = np.concatenate([entries[start:stop] for start, stop in spans])
        assert one.tobytes() == again.tobytes() == expected.tobytes()
    forget(path)
    tensor = tensors["layers.3.weight"]
    tensor.advise(0, 300, "willneed")
    tensor.read(0, 300)
    there = resident(path)
    # Half of it lies in pages that are there.
    read_runs(tensor, [(0, 8 * PAGE)], np.empty(16 * PAGE, np.uint8))
    assert there <= resident(path) <= there + 4 * PAGE or not tells(path)
    monkeypatch.setattr(descriptors, "_SEEK", 0.0)
    read_runs(tensor, [(300_000, 300_300)], out)
    assert resident(path) > there


@pytest.mark.parametrize(
    "look",
    [
        ("spectral", "ft1.safetensors", "ft2.safetensors", "--only", "cosine,overlap", "-q"),
        ("check", "ft1.safetensors", "ft2.safetensors"),
    ],
    ids=lambda look: str(look[0]),
)
def test_large_models_are_looked_at_and_left(models: Path, look: tuple[str, ...]) -> None:
    """Small ones stay for whoever reads them next, and what is said of both is the same."""
    asked = [*look, "-b", "base.safetensors", "--workers", 2, "--json"]
    asked += ["--no-cache"] if look[0] == "spectral" else []
    paths = [models / f"{name}.safetensors" for name in INPUTS]
    said, command = [], forked(READY)
    for limit in ("1TB", "8MiB"):
        ran = command(MAIN, *asked, cwd=models, env={"MERGEBENCH_PAGE_CACHE": limit})
        said.append(ran.out)
        found = [resident(path) / path.stat().st_size for path in paths]
        if limit == "1TB":
            assert min(found) > 0.9

    assert max(found) < 1 / 48
    assert said[0] == said[1] != ""


@pytest.mark.parametrize(
    ("method", "include"), [("task_arithmetic", ()), ("ties", ()), ("linear", ("layers.3.*",))]
)
def test_large_outputs_go_past_the_cache(
    models: Path, monkeypatch: pytest.MonkeyPatch, method: str, include: tuple[str, ...]
) -> None:
    """Wherever tensors begin in a file, but for a page at either end of what is written at once."""
    monkeypatch.delenv("MERGEBENCH_PAGE_CACHE", raising=False)
    inputs = [str(models / f"{name}.safetensors") for name in INPUTS]
    for place, least in enumerate((1 << 28, 0)):
        monkeypatch.setattr(direct, "LARGE", least)
        for form in ("file.safetensors", "folder"):
            out = models / f"{place}{form}"
            merge_models(
                inputs[1:], base=inputs[0], method=method, out=out, include=include,
                allow_base_mismatch=True,
            )  # fmt: skip
    written = {path: resident(path) / path.stat().st_size for path in weights(models, "0")}
    past = {path: resident(path) / path.stat().st_size for path in weights(models, "1")}

    assert len(written) == len(past) == 2
    assert min(written.values()) > 0.9
    assert max(past.values()) < 1 / 48
    for one, other in zip(written, past, strict=True):
        assert one.read_bytes() == other.read_bytes()


def weights(folder: Path, first: str) -> list[Path]:
    return sorted(folder.glob(f"{first}*.safetensors")) + sorted(
        folder.glob(f"{first}*/*.safetensors")
    )
