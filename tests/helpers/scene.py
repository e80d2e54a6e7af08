"""A folder with one of everything, and the values that lie in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers.adapters import Factors, factors, product, save_bare, save_delta, save_peft
from tests.helpers.files import F32, Array, write
from tests.helpers.models import COMPANIONS, base_model, fine_tune, save_folder, task_vector

ALPHA, RANK = 8.0, 4


@dataclass(frozen=True)
class Scene:
    """Where the files lie and what they hold.

    Attributes
    ----------
    path : Path
        Holds the model folders base, ft1 and ft2; the same as files base.safetensors and so on;
        the PEFT folders lora1 and lora2; the same as files a.safetensors and b.safetensors; the
        saved task vectors tau1.safetensors and tau2.safetensors.
    base : arrays of the base
    tuned : arrays of ft1 and ft2
    loras : factors of lora1 and lora2
    """

    path: Path
    base: dict[str, Array]
    tuned: tuple[dict[str, Array], ...]
    loras: tuple[Factors, ...]

    @property
    def taus(self) -> tuple[dict[str, Array], ...]:
        """The task vectors of ft1 and ft2, in float64."""
        return tuple(task_vector(tuned, self.base) for tuned in self.tuned)

    @property
    def updates(self) -> tuple[dict[str, Array], ...]:
        """What lora1 and lora2 add to the weights, in float64."""
        return tuple(product(made, ALPHA / RANK) for made in self.loras)


def build_scene(path: Path, dtype: Any = F32) -> Scene:
    """Write everything below a folder."""
    base = base_model(dtype=dtype)
    tuned = tuple(fine_tune(base, seed) for seed in (1, 2))
    loras = tuple(factors(seed, RANK) for seed in (1, 2))
    scene = Scene(path, base, tuned, loras)
    for name, arrays in (("base", base), ("ft1", tuned[0]), ("ft2", tuned[1])):
        save_folder(path / name, arrays, companions=COMPANIONS if name == "base" else None)
        write(path / f"{name}.safetensors", arrays)
    for name, bare, made in (("lora1", "a", loras[0]), ("lora2", "b", loras[1])):
        save_peft(path / name, made, ALPHA)
        save_bare(path / f"{bare}.safetensors", made, ALPHA)
    for number, tau in enumerate(scene.taus, start=1):
        single = {name: array.astype(F32) for name, array in tau.items()}
        save_delta(path / f"tau{number}.safetensors", single)
    return scene
