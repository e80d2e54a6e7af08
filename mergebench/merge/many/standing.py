"""Outputs that stand in their places already, as a plan would make them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergebench.checkpoints.disk import holds
from mergebench.checkpoints.placement import Layout
from mergebench.manifest import DIGESTS, MANIFEST, digests_of, is_intact, sealed
from mergebench.merge.outcome import Found, Written, written
from mergebench.merge.plan import Plan
from mergebench.merge.variants import Variant


def standing(plan: Plan) -> list[Written] | None:
    """What is known of the outputs of a plan, if all of them stand; ``None`` if not.

    They are known by their headers and manifests, which name the recipe, the inputs, the version
    of mergebench and the digests of what was written; data are not read.
    """
    found = [_digests(plan, variant) for variant in plan.variants]
    digests = [each for each in found if each is not None]
    if len(digests) < len(found):
        return None
    return written(plan, Found.nothing(plan), [dict(sorted(each.items())) for each in digests])


def _digests(plan: Plan, variant: Variant) -> Mapping[str, str] | None:
    if variant.out is None:
        return None
    layout, single = plan.package.layout_of(variant), plan.package.single_file
    for file in layout.files:
        path = variant.out if single else variant.out / file.name
        if not holds(path, file.size, file.head, file.late):
            return None
    try:
        if single:
            return _of_file(variant.out, layout)
        return _of_folder(variant.out, plan.package.manifest_of(variant))
    except (OSError, ValueError):
        return None


def _of_file(path: Path, layout: Layout) -> Mapping[str, str] | None:
    start, stop = layout.files[0].late
    with path.open("rb") as file:
        file.seek(start)
        text = file.read(stop - start).decode()
    found = digests_of({DIGESTS: text}, list(layout.places))
    return found if found is not None and sealed(layout, found) == text else None


def _of_folder(folder: Path, about: Mapping[str, Any]) -> Mapping[str, str] | None:
    text = (folder / MANIFEST).read_bytes()
    if not is_intact(text):
        return None
    said, wanted = json.loads(text), json.loads(json.dumps(about))
    same = all(said.get(key) == value for key, value in wanted.items())
    return dict(said["outputs"]) if same else None
