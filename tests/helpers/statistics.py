"""Statistics files that no data are behind."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors.numpy import save_file

from tests.contract.collecting import statistics_of, wanted


def options_for(method: str, models: Sequence[str], folder: Path) -> list[str]:
    """``--statistics`` with a file for every model, where a method needs some.

    Parameters
    ----------
    method : str
    models : sequence of str
        As the command line names them, weights included.
    folder : Path
        Where the models are, and the files go.
    """
    wants = wanted(method)
    paths = [folder / each.partition(":")[0] for each in models]
    options = []
    for index, arrays in enumerate(statistics_of(wants, paths, None) or ()):
        assert wants is not None
        place = folder / f"statistics-{index}.safetensors"
        about = {"version": 1, "kind": wants.kind}
        save_file(arrays, place, {"mergebench_statistics": json.dumps(about)})
        options += ["--statistics", place.name]
    return options
