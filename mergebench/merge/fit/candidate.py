"""Recipes under test: merged in memory, or in a folder that is gone afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from types import TracebackType
from typing import Self

from mergebench.core.errors import ParameterError
from mergebench.core.tensor import Array
from mergebench.merge.engine import execute, execute_in_memory
from mergebench.merge.limits import DEFAULT_MEMORY
from mergebench.merge.plan import Plan
from mergebench.merge.planning import make_plan
from mergebench.merge.resume import resume_key
from mergebench.merge.shared import Shared
from mergebench.recipe import ModelRef, Recipe


class Candidate:
    """One recipe, with one result.

    Parameters
    ----------
    recipe : Recipe
        Without lists of values; ``out`` and ``form`` do not matter: a whole model is made.
    label : str
    memory : int, bytes
    workers : int, optional
    scratch : Path, optional
        Where a folder may be written; the system's place for temporary files by default.
    shared : Shared, optional
        What other candidates have measured of the same inputs.

    Attributes
    ----------
    merging : float
        Seconds that merging has taken so far.
    """

    def __init__(
        self,
        recipe: Recipe,
        label: str,
        *,
        memory: int = DEFAULT_MEMORY,
        workers: int | None = None,
        scratch: Path | None = None,
        shared: Shared | None = None,
    ) -> None:
        self.recipe = replace(recipe, form="model", out=None, shard_size=None)
        self.label = label
        self._memory, self._workers, self._scratch = memory, workers, scratch
        self._shared = shared
        self._place: TemporaryDirectory[str] | None = None
        self._arrays: dict[str, Array] | None = None
        self.merging = 0.0

    @cached_property
    def plan(self) -> Plan:
        """What the recipe comes to; every error of the recipe shows here."""
        made = make_plan(self.recipe, memory=self._memory, workers=self._workers)
        if len(made.variants) != 1:
            raise ParameterError(
                f"{self.recipe.method or 'the recipe'} gives {len(made.variants)} models",
                expected="one to be scored",
                fix="name one of its tasks, or a method that gives one model",
            )
        return made

    @cached_property
    def key(self) -> str:
        """Names the bytes of the model, 32 hex digits."""
        return resume_key(self.plan, self.plan.variants[0])

    def arrays(self) -> dict[str, Array]:
        """Tensor name -> values."""
        if self._arrays is None:
            plan = self.plan
            with self._timed():
                (self._arrays,) = execute_in_memory(plan, shared=self._shared)
        return self._arrays

    def updates(self) -> dict[str, Array]:
        """Tensor name -> what is added to the base, in float32; the caller's alone."""
        asked = replace(self.recipe, form="delta", dtype="f32")
        plan = make_plan(asked, memory=self._memory, workers=self._workers)
        with self._timed():
            (found,) = execute_in_memory(plan, shared=self._shared)
        return found

    def folder(self) -> Path:
        """A folder of the whole model; the model's own where it is merely one."""
        if (given := self._as_given()) is not None:
            return given
        if self._place is None:
            self._place = TemporaryDirectory(prefix="mergebench-fit-", dir=self._scratch)
            out = Path(self._place.name) / "model"
            with self._timed():
                plan = make_plan(
                    replace(self.recipe, out=str(out)), memory=self._memory, workers=self._workers
                )
                execute(plan, shared=self._shared)
        return Path(self._place.name) / "model"

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = perf_counter()
        yield
        self.merging += perf_counter() - started

    def _as_given(self) -> Path | None:
        """The folder of a recipe that is one whole model and nothing else."""
        if self.recipe != only(self.recipe.models[0].path):
            return None
        path = Path(self.recipe.models[0].path).expanduser()
        whole = (path / "config.json").is_file() and not (path / "adapter_config.json").exists()
        return path if whole else None

    def close(self) -> None:
        """Give memory and disk back."""
        self._arrays = None
        if self._place is not None:
            self._place.cleanup()
            self._place = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def only(path: str, base: str | None = None) -> Recipe:
    """The recipe of one model as it is; an adapter with its base."""
    return Recipe(models=(ModelRef(path),), method="linear", form="model", base=base)
