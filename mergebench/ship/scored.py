"""Compressing with the parameters that score best on a task."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mergebench.adapters_zoo.adapter import ReadOptions
from mergebench.adapters_zoo.packed_file import SUFFIX
from mergebench.checkpoints.descriptors import cannot
from mergebench.core.errors import ParameterError
from mergebench.merge.fit.candidate import Candidate, only
from mergebench.merge.fit.scores import Outcome, Scores, mean_value
from mergebench.merge.limits import DEFAULT_MEMORY
from mergebench.merge.sparse import check_place
from mergebench.recipe import Recipe
from mergebench.ship.compress import compress
from mergebench.ship.report import Report
from mergebench.ship.requested import parsed
from mergebench.sources.opening import open_source, with_base
from mergebench.sources.references import paths_of

_MOST = 1000
_PIECE = 1 << 22


@dataclass(frozen=True, eq=False)
class Trial:
    """One set of parameters, packed and scored.

    Attributes
    ----------
    label : str
        The parameters that were listed: ``alpha=2,density=0.1``.
    report : Report
        Its path is gone, unless it is the best.
    outcomes : tuple of Outcome
        One per task.
    """

    label: str
    report: Report
    outcomes: tuple[Outcome, ...]

    @property
    def value(self) -> float | None:
        """Mean over tasks of the metric that counts, more always better."""
        return mean_value(self.outcomes)


@dataclass(frozen=True, eq=False)
class Choice:
    """What was kept, out of what was tried.

    Attributes
    ----------
    best : Trial
        Of the highest value; the smaller file among equals, then the first.
    trials : tuple of Trial
    plain : tuple of Outcome
        What the tasks say of the model before it is packed.
    """

    best: Trial
    trials: tuple[Trial, ...]
    plain: tuple[Outcome, ...]


class Packed(Candidate):
    """A packed file on its base, known by its content: the same bytes are scored once."""

    def __init__(self, path: Path, base: str, label: str, **options: Any) -> None:
        super().__init__(only(str(path), base), label, **options)
        self._path, self._base = path, base

    @cached_property
    def key(self) -> str:
        """Names the bytes of the model, 32 hex digits."""
        digest = hashlib.blake2b(Candidate(only(self._base), "base").key.encode(), digest_size=16)
        with self._path.open("rb") as file:
            while data := file.read(_PIECE):
                digest.update(data)
        return digest.hexdigest()


def combinations(params: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every choice of one value of each list, with a label that names those.

    Raises
    ------
    ParameterError
        For an empty list, a value listed twice, or more than a thousand combinations.
    """
    lists = {name: value for name, value in params.items() if isinstance(value, list)}
    for name, values in lists.items():
        if not values or any(value in values[:at] for at, value in enumerate(values)):
            raise ParameterError(
                f"`{name}`", expected="a list of different values", got=str(values)
            )
    count = prod(len(values) for values in lists.values())
    if count > _MOST:
        raise ParameterError("too many combinations", expected=f"at most {_MOST}", got=str(count))
    for chosen in product(*lists.values()):
        picked = dict(zip(lists, chosen, strict=True))
        label = ",".join(f"{name}={value}" for name, value in picked.items())
        yield label, {**params, **picked}


def compress_best(
    model: str,
    out: str | Path,
    *,
    base: str,
    scores: Scores,
    split: str = "val",
    params: Mapping[str, Any] | None = None,
    force: bool = False,
    memory: int = DEFAULT_MEMORY,
    workers: int | None = None,
    tell: Callable[[str], None] | None = None,
    **options: Any,
) -> Choice:
    """Pack with every combination of listed parameters, and keep what scores best unpacked.

    ComPEFT (arXiv:2311.13171, section 2) chooses α this way.

    Parameters
    ----------
    model, out, base, force, memory, workers
        As of :func:`~mergebench.ship.compress.compress`; adapters need their base too.
    scores : Scores
        Tasks that score the base with the packed update on top.
    split : str, default "val"
    params : mapping, optional
        Parameters of the scheme, any of which may be a list of values.
    tell : callable, optional
        Told of every model that is scored.
    **options
        Others of :func:`~mergebench.ship.compress.compress`.

    Raises
    ------
    MergebenchError
        For anything the user can fix; then nothing is written.
    """
    out = Path(out)
    if not out.name.endswith(SUFFIX):
        raise ParameterError(f"{out}: a packed file is one file", fix=f"name it {SUFFIX} with -o")
    inputs = [str(path) for each in (model, base) for path in paths_of(each) if path.exists()]
    check_place(out, "safetensors", force=force, inputs=inputs)
    grid = list(combinations(params or {}))
    for _, values in grid:
        # A mistake in the last combination shows before the first is scored.
        parsed(options.get("scheme", "ternary"), dict(values))
    limits: dict[str, Any] = {"memory": memory, "workers": workers}
    plain = _unpacked(model, base, ReadOptions(lora_alpha=options.get("lora_alpha")))
    with Candidate(plain, f"{model}, not packed", **limits) as candidate:
        _ = candidate.plan
        trials: list[Trial] = []
        with _scratch(out.parent) as folder:
            for at, (label, values) in enumerate(grid):
                path = Path(folder) / f"{at}{SUFFIX}"
                report = compress(model, path, base=base, params=values, **limits, **options)
                with Packed(path, base, label or "packed", **limits) as packed:
                    trials.append(Trial(label, report, tuple(scores.of(packed, split, tell))))
                best = _better(trials)
                for each in trials:
                    if each is not best:
                        each.report.path.unlink(missing_ok=True)
            if (best := _better(trials)) is None:
                raise ParameterError("no trial has a score", got=trials[0].outcomes[0].problem)
            before = tuple(scores.of(candidate, split, tell))
            best.report.path.replace(out)
    at = trials.index(best)
    trials[at] = replace(best, report=replace(best.report, path=out))
    return Choice(trials[at], tuple(trials), before)


def _better(trials: Sequence[Trial]) -> Trial | None:
    """The trial that is kept; ``None`` while none has a score."""
    scored = [each for each in trials if each.value is not None]
    return max(scored, key=lambda each: (each.value, -each.report.bytes), default=None)


def _unpacked(model: str, base: str, options: ReadOptions) -> Recipe:
    """The recipe of what is packed, as it is."""
    under = open_source(base, options).checkpoint
    if under is None:
        raise ParameterError(f"{base}: the base must be a checkpoint", got="an adapter")
    if open_source(model, with_base(options, under)).checkpoint is not None:
        return only(model)
    return replace(only(model, base), lora_alpha=options.lora_alpha)


def _scratch(folder: Path) -> TemporaryDirectory[str]:
    """A folder beside the output, so that the best is renamed and not copied."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return TemporaryDirectory(prefix=".mergebench-", dir=folder)
    except OSError as error:
        raise cannot("written", folder, error) from error
