"""Examples are scripts, not part of the package: their folder joins the import path here."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

for _name in ("digits", "text_tasks"):
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / _name))


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """The example trains with one thread per process, which these small layers need."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
