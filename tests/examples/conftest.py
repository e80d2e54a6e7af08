"""Examples are scripts, not part of the package: their folder joins the import path here."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.examples.running import ran_once

EXAMPLES = Path(__file__).parents[2] / "examples"
for _name in ("digits", "text_tasks"):
    sys.path.insert(0, str(EXAMPLES / _name))


@pytest.fixture(scope="session")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """The digits, quickly: work folder, output and printed text; other runs find its models."""
    line = ["-W", "error", EXAMPLES / "digits" / "run.py", "--quick"]
    return ran_once(tmp_path_factory, "digits", lambda folder: line)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """The example trains with one thread per process, which these small layers need."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
