"""Intruder dimensions of a LoRA: certified bounds beside full decompositions, in one run.

``python benchmarks/intruders.py`` takes the matrices of a decoder of one billion parameters, bf16,
with a spectrum like that of trained ones (a bulk below singular values that fall by a power law,
which ``--leading`` and ``--power`` shape), and LoRAs from faint to overwhelming. Three ways answer
the same question, on one thread and in the same process, taking turns: bounds, with a full
decomposition wherever they do not decide; the eigenvectors of both Gram matrices, in float32 and
as exact as that; and singular value decompositions of both matrices.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from time import process_time
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

from mergebench.compute.alignment import alignments
from mergebench.core.tensor import Array

#: Rows, columns, and how many there are in a layer.
LAYER = (
    ("q, o", 2048, 2048, 2),
    ("k, v", 512, 2048, 2),
    ("gate, up", 8192, 2048, 2),
    ("down", 2048, 8192, 1),
)
EPSILON = 0.5


def matrix(random: np.random.Generator, rows: int, columns: int, args: Any) -> Array:
    """A matrix with a trained one's spectrum, as bf16 stores it."""
    import ml_dtypes

    count = args.leading
    left = np.linalg.qr(random.standard_normal((rows, count), np.float32))[0]
    right = np.linalg.qr(random.standard_normal((columns, count), np.float32))[0]
    values = args.top * np.arange(1, count + 1, dtype=np.float32) ** -args.power
    bulk = random.standard_normal((rows, columns), np.float32) / np.sqrt(max(rows, columns))
    made = (bulk + (left * values) @ right.T) / np.sqrt(columns)
    return np.asarray(made.astype(ml_dtypes.bfloat16).astype(np.float32))


def factors(
    random: np.random.Generator, base: Array, rank: int, share: float
) -> tuple[Array, Array]:
    """A LoRA whose largest singular value is about ``share`` of the base's."""
    rows, columns = base.shape
    left = random.standard_normal((rows, rank), np.float32)
    right = random.standard_normal((rank, columns), np.float32)
    probe = random.standard_normal((columns, 1), np.float32)
    for _ in range(20):
        probe = base.T @ (base @ probe)
        probe /= np.linalg.norm(probe)
    size = np.linalg.norm(base @ probe)
    return left * np.float32(share * size / np.sqrt(rows * columns)), right


def by_svd(base: Array, left: Array, right: Array, k: int) -> Array:
    """Largest cosines by two singular value decompositions."""
    known = np.linalg.svd(base, full_matrices=False)[0]
    tuned = np.linalg.svd(base + left @ right, full_matrices=False)[0]
    return np.asarray(np.abs(known.T @ tuned[:, :k]).max(axis=0))


def by_gram(base: Array, left: Array, right: Array, k: int) -> Array:
    """Largest cosines by the eigenvectors of two Gram matrices, all of the base's and k others."""
    from scipy.linalg import eigh

    tuned = base + left @ right
    tall = base.shape[0] > base.shape[1]
    one, two = (each.T if tall else each for each in (base, tuned))
    size = len(one)
    values, known = np.linalg.eigh(one @ one.T)
    with threadpool_limits(1):
        some, found = eigh(two @ two.T, subset_by_index=(size - k, size - 1))
    if not tall:
        return np.asarray(np.abs(known.T @ found[:, ::-1]).max(axis=0))
    across = known.T @ (one @ (two.T @ found[:, ::-1]))
    scale = np.sqrt(np.maximum(values, 1e-12))[:, None] * np.sqrt(some[::-1])
    return np.asarray(np.abs(across / scale).max(axis=0))


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds, and the result."""
    start = process_time()
    found = work()
    return process_time() - start, found


def main() -> None:
    """Print a row for each kind of matrix and size of update, and the totals of a layer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.05, 0.3, 1.0])
    parser.add_argument("--leading", type=int, default=64)
    parser.add_argument("--power", type=float, default=0.7)
    parser.add_argument("--top", type=float, default=12.0)
    args = parser.parse_args()
    table = Table(title=f"CPU seconds, rank {args.rank}, k = {args.k}, ε = {EPSILON}")
    for heading in ("matrix", "‖ΔW‖/‖W‖", "bounds", "undecided", "Gram", "SVD", "intruders"):
        table.add_column(heading, justify="left" if heading == "matrix" else "right")
    totals = np.zeros(3)
    undecided = count = 0
    with threadpool_limits(1):
        for name, rows, columns, times in LAYER:
            for share in args.shares:
                random = np.random.default_rng(0)
                base = matrix(random, rows, columns, args)
                left, right = factors(random, base, args.rank, share)
                fast, got = timed(lambda: alignments(base, (left, right), args.k, (EPSILON,)))  # noqa: B023
                gram, exact = timed(lambda: by_gram(base, left, right, args.k))  # noqa: B023
                full, _ = timed(lambda: by_svd(base, left, right, args.k))  # noqa: B023
                if got is None:
                    fast += full
                else:
                    differ = (got.upper < EPSILON) != (exact < EPSILON)
                    if np.any(differ & (np.abs(exact - EPSILON) > 1e-3)):
                        raise SystemExit(f"{name}: bounds and decompositions disagree")
                totals += np.array([fast, gram, full]) * times
                undecided += (got is None) * times
                count += times
                found = f"{np.sum(exact < EPSILON)} of {args.k}"
                cells = [f"{each:.2f}" for each in (fast, gram, full)]
                table.add_row(
                    f"{name} {rows}×{columns}",
                    f"{share:g}",
                    cells[0],
                    "no" if got else "yes",
                    *cells[1:],
                    found,
                )
    console = Console()
    console.print(table)
    console.print(
        f"a layer: bounds {totals[0]:.1f} s with {undecided} of {count} matrices undecided, "
        f"{totals[1] / totals[0]:.1f} × less than Gram matrices, "
        f"{totals[2] / totals[0]:.1f} × less than singular value decompositions of both matrices, "
        f"{totals[2] / totals[0] / 2:.1f} × less than one per matrix"
    )


if __name__ == "__main__":
    main()
