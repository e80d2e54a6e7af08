"""The recorded mergekit cases: which configuration, for which models, stored where."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  safetensors needs it to read bfloat16 into NumPy
import numpy as np
import yaml
from safetensors.numpy import load_file

HERE = Path(__file__).resolve().parent
CONFIGS = HERE / "mergekit"
MERGEKIT_VERSION = "0.1.5"
TORCH_VERSION = "2.13.0"
RECORDED = HERE / "recorded" / f"mergekit-{MERGEKIT_VERSION}"
BF16_MATH = "-bf16math"


@dataclass(frozen=True)
class Case:
    """One configuration run on the models of one dtype (``"float32"`` or ``"bfloat16"``)."""

    name: str
    dtype: str

    @property
    def label(self) -> str:
        """The name of the recorded file without its suffix."""
        return f"{self.name}-{self.dtype}"

    @property
    def text(self) -> str:
        """The YAML that mergekit is given.

        The arithmetic is done in the ``dtype`` of the configuration, float32 but for the
        bf16math cases, and the result is stored in the dtype of the models.
        """
        text = (CONFIGS / f"{self.name}.yml").read_text()
        if self.dtype == "bfloat16" and not self.name.endswith(BF16_MATH):
            text += "out_dtype: bfloat16\n"
        return text

    @property
    def config(self) -> dict[str, Any]:
        """The parsed configuration."""
        parsed: dict[str, Any] = yaml.safe_load(self.text)
        return parsed

    def recorded(self, folder: Path = RECORDED) -> dict[str, np.ndarray]:
        """Return the tensors that mergekit wrote, in the dtype of the models."""
        return load_file(folder / f"{self.label}.safetensors")


def cases(folder: str = "") -> Iterator[Case]:
    """Yield every case of a folder in the order of its name, float32 before bfloat16."""
    for path in sorted((CONFIGS / folder).glob("*.yml")):
        name = str(Path(folder, path.stem))
        if not name.endswith(BF16_MATH):
            yield Case(name, "float32")
        yield Case(name, "bfloat16")


def every_case() -> Iterator[Case]:
    """Yield the cases that a classification by entries explains, and then those of folders."""
    yield from cases()
    for folder in sorted(path.name for path in CONFIGS.iterdir() if path.is_dir()):
        yield from cases(folder)
