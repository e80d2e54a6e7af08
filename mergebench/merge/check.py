"""A merged model tried out: does it load, how far did it go, what does it predict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergebench.adapters_zoo.adapter import ReadOptions
from mergebench.core.errors import MergebenchError
from mergebench.loading.check import check_loading
from mergebench.loading.perplexity import Perplexity, perplexity
from mergebench.loading.report import Loaded, NotCheckedError, without_inherited
from mergebench.merge.drift import Drift, Progress, drift
from mergebench.merge.inputs import check_input
from mergebench.merge.made import read_made
from mergebench.sources import Source
from mergebench.sources.opening import open_source, with_base


@dataclass(frozen=True, eq=False)
class Origins:
    """What a model was made of, as far as it is here.

    Attributes
    ----------
    base : Source or None
    inputs : tuple of Source
    notes : tuple of str
    """

    base: Source | None = None
    inputs: tuple[Source, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Checked:
    """What :func:`check` found.

    Attributes
    ----------
    path : Path
    loaded : Loaded or None
        ``None`` where no library was asked; then ``refused`` says why.
    refused : str
    drift : Drift or None
    perplexities : tuple of Perplexity
    notes : tuple of str
    """

    path: Path
    loaded: Loaded | None
    refused: str = ""
    drift: Drift | None = None
    perplexities: tuple[Perplexity, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def findings(self) -> int:
        """How many names and errors loading gave."""
        return 0 if self.loaded is None else self.loaded.findings

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "path": str(self.path),
            "loading": None if self.loaded is None else self.loaded.to_json(),
            "not_loaded": self.refused or None,
            "drift": None if self.drift is None else self.drift.to_json(),
            "perplexity": [each.to_json() for each in self.perplexities],
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Text:
    """A text to measure perplexity on.

    Attributes
    ----------
    file : Path
    context, stride : int or None
    every : bool
        Of the base and the inputs too.
    """

    file: Path
    context: int | None = None
    stride: int | None = None
    every: bool = False


def find_origins(
    path: Path,
    base: str | None = None,
    inputs: Sequence[str] = (),
    *,
    folder: Path | None = None,
    lora_alpha: float | None = None,
) -> Origins:
    """Open base and inputs: those that are named, else those of the manifest.

    Parameters
    ----------
    path : Path
        Of the model.
    base : str, optional
    inputs : sequence of str
    folder : Path, optional
        Where to look for what the manifest names, if it is not there.
    lora_alpha : float, optional

    Raises
    ------
    MergebenchError
        If something that was named cannot be opened.
    """
    options = ReadOptions(lora_alpha=lora_alpha)
    under = None if base is None else open_source(base, options)
    if under is not None and under.checkpoint is not None:
        options = with_base(options, under.checkpoint)
    if inputs:
        return Origins(under, tuple(open_source(each, options) for each in inputs))
    try:
        made = read_made(path)
    except MergebenchError:
        return Origins(under)
    found: list[Source] = []
    notes: list[str] = []
    for about in made.manifest.get("inputs", ()):
        is_base = about.get("role") == "base"
        if is_base and under is not None:
            continue
        try:
            source, changed, _ = check_input(about, made, folder, under)
        except MergebenchError as error:
            notes.append(str(error))
            continue
        if changed:
            notes.append(f"{source.label} is left out: it is not the input that was merged")
        elif is_base:
            under = source
        else:
            found.append(source)
    return Origins(under, tuple(found), tuple(notes))


def check(
    path: Path,
    origins: Origins,
    *,
    text: Text | None = None,
    lora_alpha: float | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Checked:
    """Ask the library that loads a model whether it fits, and measure drift and perplexity.

    Parameters
    ----------
    path : Path
        A model, a pipeline, an adapter or a task vector.
    origins : Origins
    text : Text, optional
    lora_alpha : float, optional
    workers : int, optional
    progress : callable, optional

    Raises
    ------
    MergebenchError
        If the model cannot be opened, or perplexity cannot be measured.
    """
    loaded, refused = None, ""
    try:
        loaded = _inherited(check_loading(path, _folder(origins.base)), origins)
    except NotCheckedError as error:
        refused = str(error)
    found, notes = _drift(path, origins, lora_alpha, workers, progress)
    many = () if text is None else tuple(_perplexities(path, origins, text, progress))
    return Checked(path, loaded, refused, found, many, (*origins.notes, *notes))


def _folder(source: Source | None) -> Path | None:
    return None if source is None or source.checkpoint is None else source.checkpoint.path


def _inherited(found: Loaded, origins: Origins) -> Loaded:
    if not found.findings:
        return found
    sources = origins.inputs if found.library == "peft" else (origins.base or origins.inputs[:1],)
    reports = []
    for each in sources:
        if not isinstance(each, Source) or (each.checkpoint is None) != (found.library == "peft"):
            continue
        path = each.path if each.checkpoint is None else each.checkpoint.path
        path = path or Path(each.label).expanduser()
        try:
            report = check_loading(path, _folder(origins.base))
        except MergebenchError:
            return found
        if report.errors:
            return found
        reports.append((each.label, report))
    return without_inherited(found, reports)


def _drift(
    path: Path,
    origins: Origins,
    lora_alpha: float | None,
    workers: int | None,
    progress: Progress | None,
) -> tuple[Drift | None, tuple[str, ...]]:
    options = ReadOptions(lora_alpha=lora_alpha)
    if origins.base is not None and origins.base.checkpoint is not None:
        options = with_base(options, origins.base.checkpoint)
    if (path / "model_index.json").is_file():
        return None, ("drift is measured of one model: pass the folder of one of the pipeline",)
    merged = open_source(str(path), options)
    if merged.checkpoint is not None and origins.base is None:
        return None, ("drift is not measured without a base: give --base",)
    inputs = origins.inputs
    notes: tuple[str, ...] = ()
    if origins.base is None and any(each.checkpoint is not None for each in inputs):
        inputs = tuple(each for each in inputs if each.checkpoint is None)
        notes = ("full models among the inputs are left out of the drift: give --base",)
    found = drift(merged, origins.base, inputs, workers=workers, progress=progress)
    return replace(found, notes=()), (*notes, *found.notes)


def _perplexities(
    path: Path, origins: Origins, text: Text, progress: Progress | None
) -> list[Perplexity]:
    under = _folder(origins.base)
    places = [path]
    if text.every:
        places += [] if under is None else [under]
        places += [each.path or Path(each.label).expanduser() for each in origins.inputs]
    return [
        perplexity(
            place,
            text.file,
            base=under,
            context=text.context,
            stride=text.stride,
            progress=progress,
        )
        for place in places
    ]
