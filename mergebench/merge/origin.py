"""Were these models made from this base? Names, fingerprints and a sample of the entries.

Two models that were trained apart have unrelated matrices, though their tensors have the same
names and shapes: the cosine between them is zero and the difference is as long as √2 of either.
What is merged then is noise. Fine-tunes stay close to their base.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergebench.core.errors import MismatchError
from mergebench.merge.align import Aligned
from mergebench.merge.configs import FIX
from mergebench.merge.sampled import Likeness, likeness, task_norms
from mergebench.merge.spaces import Spaces
from mergebench.sources import Source, base_fingerprint

#: Mean cosines below UNRELATED stop the merge, those below DISTANT are noted. Fine-tunes measure
#: 0.98 and more, models trained apart between -0.05 and 0.05 (docs/safety.md).
UNRELATED, DISTANT = 0.1, 0.5
#: A task vector longer than the base is noted, whatever its direction.
LONG = 1.0
#: Standard deviations that must lie between 0 and UNRELATED, or the sample is too small to tell.
SIGMAS = 6
#: Longest over shortest task vector above which a note is written.
UNEQUAL = 3.0
#: The same for ops that are known to fail there: just above what healthy fine-tunes measured.
FRAGILE = 2.0

_HUB = re.compile(r"models--([^/\\]+?)--([^/\\]+)")


@dataclass(frozen=True)
class Origin:
    """What was measured, and what the user should know of it.

    Attributes
    ----------
    reference : str or None
        The base, or without one the model that the others are compared with.
    likeness : mapping of model to {group: Likeness}
    norms : mapping of model to float
        Estimates of ``‖τ‖``; empty in weight space.
    notes : tuple of str
    """

    reference: str | None
    likeness: Mapping[str, Mapping[str, Likeness]]
    norms: Mapping[str, float]
    notes: tuple[str, ...]

    @property
    def unequal(self) -> float | None:
        """Longest over shortest task vector; ``None`` for fewer than two that are not zero."""
        some = [norm for norm in self.norms.values() if norm]
        return max(some) / min(some) if len(some) > 1 else None

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        models = {
            label: {
                group: {
                    "cosine": found.cosine,
                    "ratio": found.ratio,
                    "matrices": len(found.pairs),
                    "entries": found.entries,
                    "tells": tells(found),
                    "worst": {pair.name: pair.cosine for pair in found.worst()},
                }
                for group, found in groups.items()
            }
            for label, groups in self.likeness.items()
        }
        return {
            "reference": self.reference,
            "models": models,
            "task_vector_norms": dict(self.norms),
            "longest_over_shortest": self.unequal,
        }


def tells(found: Likeness) -> bool:
    """Whether a sample is large enough to tell unrelated models from related ones.

    Between unrelated models the mean cosine is normal with :attr:`Likeness.deviation`; at six
    deviations it comes above UNRELATED once in 10⁹ samples, and about 3600 entries are enough.
    """
    return SIGMAS * found.deviation <= UNRELATED


def check_saved(models: Sequence[Source], base: Source | None, *, allow: bool) -> list[str]:
    """Refuse task vectors that were saved as differences to another base.

    Raises
    ------
    MismatchError
        Naming the task vector and the base, or two task vectors of different bases.
    """
    marks = [(model, mark) for model in models if (mark := base_fingerprint(model)) is not None]
    notes = []
    for model, mark in marks:
        if base is not None and mark != base.fingerprint:
            text = f"{model.label}: is a difference to another model than the base {base.label}"
            got, wanted = f"one of fingerprint {base.fingerprint[:8]}", f"the base {mark[:8]}"
        elif base is None and mark != marks[0][1]:
            text = f"{model.label}: is a difference to another model than {marks[0][0].label} is"
            got, wanted = f"bases of fingerprints {mark[:8]} and {marks[0][1][:8]}", "one base"
        else:
            continue
        if not allow:
            raise MismatchError(
                text,
                got=got,
                expected=wanted,
                fix="give the base it was taken from, or add --allow-base-mismatch",
            )
        notes.append(text)
    return notes


def named_bases(models: Sequence[Source]) -> list[str]:
    """A note if adapters name different bases."""
    named = {
        name
        for model in models
        if isinstance(name := model.config.get("base_model_name_or_path"), str) and name
    }
    if len(named) < 2:
        return []
    return ["the adapters name different bases: " + ", ".join(sorted(named))]


def names_another(name: str, given: str) -> bool:
    """Whether a base that an adapter names is surely not the given one.

    Told by their places, if both are paths or both are names on the Hub.
    """
    path = Path(name).expanduser()
    if path.exists():
        one, two = path.resolve(), Path(given).expanduser().resolve()
        return one not in (two, two.parent) and two != one.parent
    cached = _HUB.search(str(Path(given).expanduser().resolve()))
    return cached is not None and name.count("/") == 1 and name != "/".join(cached.groups())


def measure(
    models: Sequence[Source],
    base: Source | None,
    aligned: Aligned,
    spaces: Spaces,
    *,
    allow: bool,
    fragile: Sequence[str] = (),
) -> Origin:
    """Compare full models with the base on a sample of their matrices, and task vectors' norms.

    Parameters
    ----------
    models : sequence of Source, in canonical order
    base : Source or None
        Without it the models are compared with the first of them, and nothing is refused.
    aligned : Aligned
        With every tensor's weights.
    spaces : Spaces
    allow : bool
        Make notes of what would be refused.
    fragile : sequence of str, default none
        The ops that are known to fail where task vectors differ in length.

    Raises
    ------
    MismatchError
        If a model is unrelated to the base, saying what was measured.
    """
    full = [each for each in models if each.checkpoint is not None]
    if base is not None:
        reference, others = base, full
    elif len(full) > 1:
        reference, others = full[0], full[1:]
    else:
        reference, others = None, []
    notes: list[str] = []
    table: dict[str, Mapping[str, Likeness]] = {}
    if reference is not None and others:
        found = likeness(_tensors(reference), [_tensors(each) for each in others])
        table = dict(zip(_labels(others), found, strict=True))
        for label, groups in table.items():
            notes += _judge(label, reference.label, groups, apart=base is None, allow=allow)
    norms: dict[str, float] = {}
    items = {name: e for name, e in aligned.items.items() if spaces.at(name) == "delta"}
    if items:
        measured = task_norms(items)
        norms = {label: norm for label, (norm, _) in zip(_labels(models), measured, strict=True)}
        shares = {k: share for k, (_, share) in zip(norms, measured, strict=True)}
        notes += _unequal(shares, fragile)
    return Origin(reference.label if table and reference else None, table, norms, tuple(notes))


def _labels(models: Sequence[Source]) -> list[str]:
    """Labels, numbered where a model is given more than once."""
    names = [model.label for model in models]
    return [
        name if names.index(name) == place else f"{name} ({names[: place + 1].count(name)})"
        for place, name in enumerate(names)
    ]


def _tensors(source: Source) -> dict[str, Any]:
    assert source.checkpoint is not None
    own = source.checkpoint
    return {name: tensor for name, tensor in own.tensors.items() if name not in own.aliases}


def _judge(
    label: str, reference: str, groups: Mapping[str, Likeness], *, apart: bool, allow: bool
) -> Iterator[str]:
    for group, found in groups.items():
        if not tells(found) or (found.cosine >= DISTANT and found.ratio <= LONG):
            continue
        worst = ", ".join(f"{pair.name} ({pair.cosine:.3f})" for pair in found.worst())
        figures = (
            f"cosine {found.cosine:.3f} and ‖τ‖/‖θ‖ {found.ratio:.2f} over {found.entries:,} "
            f"sampled entries of {len(found.pairs)} {group} matrices; least alike: {worst}"
        )
        if found.cosine >= UNRELATED:
            yield f"{label} is far from {reference}: {figures}"
        elif apart:
            yield f"{label} and {reference} look unrelated, merging them makes noise: {figures}"
        elif allow:
            yield f"{label} was not fine-tuned from {reference}: {figures}"
        else:
            raise MismatchError(
                f"{label}: was not fine-tuned from {reference}: {figures}",
                expected=f"a cosine of at least {UNRELATED}, fine-tunes have more than {DISTANT}",
                fix=FIX,
            )


def _unequal(shares: Mapping[str, float], fragile: Sequence[str]) -> list[str]:
    some = {label: share for label, share in shares.items() if share}
    if len(some) < 2:
        return []
    long, short = max(some, key=lambda k: some[k]), min(some, key=lambda k: some[k])
    ratio = some[long] / some[short]
    if ratio <= (FRAGILE if fragile else UNEQUAL):
        return []
    text = (
        f"task vectors differ in length: ‖wτ‖ {some[long]:.3g} ({long}) is {ratio:.1f} times "
        f"{some[short]:.3g} ({short}) and will outweigh it; {1 / ratio:.2g} of its weight for "
        f"{long} would even them out"
    )
    if fragile:
        text += f"; {', '.join(fragile)} is known to fail where they differ (docs/safety.md)"
    return [text]
