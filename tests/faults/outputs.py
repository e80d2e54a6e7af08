"""A small output, written through the writer alone."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from mergebench.checkpoints.placement import Layout, TensorSpec, plan_layout
from mergebench.checkpoints.writer import Output

NAMES = ("a", "b", "c")
VALUES = {name: np.full(5, number, np.float32) for number, name in enumerate(NAMES, 1)}
KEY = "k" * 32


def layout(shard_size: int | None = 20) -> Layout:
    """Three tensors, by default each in a shard of its own."""
    return plan_layout([TensorSpec(name, "F32", (5,)) for name in NAMES], shard_size=shard_size)


def opened(place: Path, key: str | None = KEY, **options: Any) -> Output:
    """The output at a place: a file if the name ends so, else a folder of shards."""
    single = place.suffix == ".safetensors"
    options.setdefault("side", {} if single else {"config.json": b"{}"})
    return Output(place, layout(None if single else 20), single_file=single, key=key, **options)


def fill(output: Output, names: Iterable[str] = NAMES) -> None:
    """Write tensors and note that they are finished."""
    for name in names:
        output.write(name, 0, VALUES[name])
        output.finish(name, f"digest of {name}")


def write_part(
    place: Path,
    names: Iterable[str] = ("a", "b"),
    error: BaseException | None = None,
    **options: Any,
) -> Output:
    """Write some tensors and settle a value, then fail: with Ctrl-C unless told otherwise."""
    failure = error if error is not None else KeyboardInterrupt()
    output = opened(place, **options)
    try:
        with output:
            output.settle("value", {"of": [1, 2]})
            fill(output, names)
            raise failure
    except type(failure):
        return output
    raise AssertionError("the error was swallowed")


def write_rest(place: Path, **options: Any) -> Output:
    """Write what is not finished yet."""
    with opened(place, **options) as output:
        fill(output, [name for name in NAMES if name not in output.finished])
    return output
