"""Models and pipelines of diffusers, opened on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergebench.checkpoints.documents import read_object
from mergebench.loading.report import Loaded, NotCheckedError, first_line, need, silent
from mergebench.loading.with_transformers import check_transformers, shapes_of


def check_diffusers(folder: Path, config: Mapping[str, Any]) -> Loaded:
    """Load one model of a pipeline without its values.

    Raises
    ------
    NotCheckedError
        If diffusers is not installed or does not know the class.
    """
    held = need("diffusers", "accelerate")
    import diffusers

    name = str(config.get("_class_name"))
    kind = getattr(diffusers, name, None)
    if kind is None or not hasattr(kind, "from_pretrained"):
        raise NotCheckedError(
            f"diffusers {held} has no {name}", fix="another version of diffusers may have it"
        )
    about: dict[str, Any] = {"library": "diffusers", "version": held, "architecture": name}
    tensors = shapes_of(folder)
    with silent(diffusers.utils.logging):
        try:
            _, said = kind.from_pretrained(
                str(folder.resolve()),
                device_map="meta",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                local_files_only=True,
                use_safetensors=True,
            )
        except Exception as error:
            return Loaded(**about, tensors=len(tensors), errors=(first_line(error),))
    return Loaded(
        **about,
        tensors=len(tensors),
        missing=tuple(sorted(said["missing_keys"])),
        unexpected=tuple(sorted(said["unexpected_keys"])),
        misshapen=tuple(
            sorted((name, tuple(one), tuple(two)) for name, one, two in said["mismatched_keys"])
        ),
        errors=tuple(map(str, said.get("error_msgs", ()))),
    )


def check_pipeline(folder: Path) -> Loaded:
    """Load every model that the index of a pipeline names; names begin with that of the model.

    Raises
    ------
    NotCheckedError
        As for each model.
    """
    held = need("diffusers", "accelerate")
    index = read_object(folder / "model_index.json")
    parts: list[tuple[str, Loaded]] = []
    errors: list[str] = []
    for name, described in index.items():
        if name.startswith("_") or not isinstance(described, list) or len(described) != 2:
            continue
        library, architecture = described
        place = folder / name
        if library is None or architecture is None:
            continue
        if not place.is_dir():
            errors.append(f"{name}: the folder is missing")
            continue
        if not (place / "config.json").is_file():
            # Schedulers and tokenizers have no weights.
            continue
        config = read_object(place / "config.json")
        if library == "transformers":
            parts.append((name, check_transformers(place, config, str(architecture))))
        elif library == "diffusers":
            parts.append((name, check_diffusers(place, config)))
        else:
            raise NotCheckedError(
                f"{name} is a model of {library}, whose code is not run",
                fix="check the folders of the other models one by one",
            )
    return Loaded(
        library="diffusers",
        version=held,
        architecture=str(index.get("_class_name", "pipeline")),
        tensors=sum(each.tensors for _, each in parts),
        missing=tuple(f"{part}/{name}" for part, each in parts for name in each.missing),
        unexpected=tuple(f"{part}/{name}" for part, each in parts for name in each.unexpected),
        misshapen=tuple(
            (f"{part}/{name}", one, two)
            for part, each in parts
            for name, one, two in each.misshapen
        ),
        errors=(*errors, *(f"{part}: {text}" for part, each in parts for text in each.errors)),
    )
