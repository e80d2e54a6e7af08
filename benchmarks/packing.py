"""Packed ternary tensors beside other ways to store them, in one run and on one thread.

``python benchmarks/packing.py`` packs random signs at several densities, and stores the same signs
as two bitmasks, as a mask and the signs of what it keeps, as bytes, and with zstd (level 3, its
default) on each of these. Times are the least of several rounds that take turns, in nanoseconds a
parameter. Decoding ends at the two bitmasks, checksums included; coding starts at the mask and the
packed signs, as zstd's starts at packed bits. ``--constriction`` adds that library's ANS coder.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from math import log2
from time import perf_counter
from typing import Any

import numpy as np
import zstandard
from rich.console import Console
from rich.table import Table

from mergebench.adapters_zoo.packing import ROW, Head, Packed, head_bytes, open_packed, pack_block
from mergebench.adapters_zoo.planes import BLOCK, bytes_of, pack_plane
from mergebench.compute.planes import split
from mergebench.core.tensor import ArrayTensor

DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)


def entropy(density: float) -> float:
    """H(k) + k bits."""
    return -density * log2(density) - (1 - density) * log2(1 - density) + density


def timed(work: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = perf_counter()
    work()
    return perf_counter() - start


def blocks(packed: Packed) -> Iterator[Any]:
    """Every block, unpacked, and its entries below zero as a plane."""
    for number in range(len(packed.table)):
        block: Any = packed.block(number)
        yield block, block.signs


def measured(size: int, density: float, rounds: int, level: int) -> dict[str, Any]:
    """Bits and nanoseconds a parameter at one density."""
    random = np.random.default_rng(0)
    kept = random.random(size) < density
    coded = (kept * np.where(random.random(size) < 0.5, -1, 1)).astype(np.int8)
    made = [pack_block("ternary", coded[at : at + BLOCK]) for at in range(0, size, BLOCK)]
    table = np.array([row for _, row in made], ROW)
    head = head_bytes("x", Head("ternary", "BF16", (size,), (0.0, 1.0)), table)
    blob = head + b"".join(data for data, _ in made)
    packed = open_packed("file", "x", ArrayTensor(np.frombuffer(blob, np.uint8)))
    planes = []
    for at in range(0, size, BLOCK):
        plane, signs = (np.zeros(BLOCK // 64 + 2, np.uint64) for _ in range(2))
        ones = int(split(coded[at : at + BLOCK], plane, signs))
        planes.append((plane, signs, ones))
    forms = {
        "two bitmasks": np.packbits(coded > 0).tobytes() + np.packbits(coded < 0).tobytes(),
        "mask and signs": np.packbits(kept).tobytes() + np.packbits(coded[kept] < 0).tobytes(),
        "bytes": coded.tobytes(),
    }
    found: dict[str, Any] = {"entropy": entropy(density), "packed": 8 * len(blob) / size}
    press, release = zstandard.ZstdCompressor(level=level), zstandard.ZstdDecompressor()
    jobs: dict[str, Callable[[], Any]] = {
        "packed, coding": lambda: [
            (pack_plane(plane, BLOCK), bytes_of(signs, ones)) for plane, signs, ones in planes
        ],
        "packed, decoding": lambda: [None for _ in blocks(packed)],
    }
    for name, data in forms.items():
        pressed = press.compress(data)
        found[f"zstd of {name}"] = 8 * len(pressed) / size
        jobs[f"zstd of {name}, coding"] = lambda data=data: press.compress(data)
        jobs[f"zstd of {name}, decoding"] = lambda pressed=pressed: release.decompress(pressed)
    found["two bitmasks"], found["mask and signs"] = 2.0, 1 + density
    best = dict.fromkeys(jobs, float("inf"))
    for _ in range(rounds):
        for name, work in jobs.items():
            best[name] = min(best[name], timed(work))
    return found | {name: 1e9 * seconds / size for name, seconds in best.items()}


def with_constriction(size: int, density: float) -> tuple[float, float, float]:
    """Bits, coding and decoding of the ANS coder of ``constriction``."""
    import constriction

    random = np.random.default_rng(0)
    kept = random.random(size) < density
    symbols = (kept * (1 + (random.random(size) < 0.5))).astype(np.int32)
    chances = np.array([1 - density, density / 2, density / 2])
    model = constriction.stream.model.Categorical(chances, perfect=False)
    coder = constriction.stream.stack.AnsCoder()
    coding = timed(lambda: coder.encode_reverse(symbols, model))
    bits = coder.num_valid_bits() / size
    decoding = timed(lambda: coder.decode(model, size))
    return bits, 1e9 * coding / size, 1e9 * decoding / size


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=1 << 24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--level", type=int, default=3)
    parser.add_argument("--constriction", action="store_true")
    args = parser.parse_args()
    size = -(-args.size // BLOCK) * BLOCK
    rows = {density: measured(size, density, args.rounds, args.level) for density in DENSITIES}
    bits = Table(title=f"bits per parameter, {size:,} parameters")
    speed = Table(title="nanoseconds per parameter, one thread: coding / decoding")
    stored = ["entropy", "packed", "two bitmasks", "mask and signs"]
    stored += [name for name in rows[DENSITIES[0]] if name.startswith("zstd") and "," not in name]
    for table, columns in (
        (bits, [*stored, "bf16"]),
        (speed, ["packed", "zstd of two bitmasks", "zstd of mask and signs", "zstd of bytes"]),
    ):
        table.add_column("density")
        for column in columns:
            table.add_column(column, justify="right")
        if args.constriction:
            table.add_column("constriction", justify="right")
    for density, row in rows.items():
        more = with_constriction(size, density) if args.constriction else None
        cells = [f"{row[name]:.4f}" for name in stored]
        bits.add_row(f"{density:g}", *cells, "16", *([f"{more[0]:.4f}"] if more else []))
        pairs = [
            f"{row[f'{name}, coding']:.2f} / {row[f'{name}, decoding']:.2f}"
            for name in (
                "packed",
                "zstd of two bitmasks",
                "zstd of mask and signs",
                "zstd of bytes",
            )
        ]
        speed.add_row(f"{density:g}", *pairs, *([f"{more[1]:.1f} / {more[2]:.1f}"] if more else []))
    console = Console(width=160)
    console.print(bits)
    console.print(speed)


if __name__ == "__main__":
    main()
