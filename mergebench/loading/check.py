"""Which library loads a folder, and what it says."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mergebench.adapters_zoo.adapter import CONFIG_KEY, is_adapter, is_saved_delta, parse_object
from mergebench.checkpoints.containers import open_weights
from mergebench.checkpoints.documents import read_object
from mergebench.core.errors import MergebenchError
from mergebench.loading.report import Loaded, NotCheckedError, need
from mergebench.loading.with_diffusers import check_diffusers, check_pipeline
from mergebench.loading.with_peft import check_peft
from mergebench.loading.with_transformers import check_transformers


def library_of(form: str, config: Mapping[str, Any] | None) -> str | None:
    """Which library will load an output; ``None`` where nothing says so.

    Parameters
    ----------
    form : model, lora or delta
    config : mapping or None
        The ``config.json`` of the model.
    """
    if form == "lora":
        return "peft"
    if form != "model" or not config:
        return None
    if "_class_name" in config:
        return "diffusers"
    return "transformers" if "model_type" in config or "architectures" in config else None


def need_library(form: str, config: Mapping[str, Any] | None) -> None:
    """Make sure that the library which is to load an output is installed.

    Raises
    ------
    NotCheckedError
        Naming the extra.
    """
    if (library := library_of(form, config)) is not None:
        need(library, "accelerate")


def check_loading(path: Path, base: Path | None = None) -> Loaded:
    """Ask the library that loads a model or an adapter whether it fits; no values are read.

    Parameters
    ----------
    path : Path
        A model folder, a pipeline, an adapter folder or a single file.
    base : Path, optional
        Where the config of a single file, or the model under an adapter, is.

    Raises
    ------
    NotCheckedError
        If the library is not installed, or nothing says what the model is.
    MergebenchError
        If there is nothing at the path.
    """
    if not path.exists():
        raise MergebenchError(
            f"{path}: no such file or folder", fix="check the spelling of the path"
        )
    if path.is_file():
        if path.parent.joinpath("config.json").is_file() and path.name.startswith(
            ("model.", "diffusion_pytorch_model.")
        ):
            return check_loading(path.parent, base)
        with _as_folder(path, base) as folder:
            return check_loading(folder, base)
    if (path / "adapter_config.json").is_file():
        return check_peft(path, base)
    if (path / "model_index.json").is_file():
        return check_pipeline(path)
    if (path / "delta.safetensors").is_file():
        raise NotCheckedError(f"{path}: is a task vector, which no other library loads")
    if not (path / "config.json").is_file():
        raise NotCheckedError(
            f"{path}: has no config.json, so nothing says which tensors it should hold",
            fix="give a folder that has one",
        )
    config = read_object(path / "config.json")
    if "_class_name" in config:
        return check_diffusers(path, config)
    return check_transformers(path, config)


@contextmanager
def _as_folder(file: Path, base: Path | None) -> Iterator[Path]:
    """A folder in which a single file stands beside the config it goes with."""
    opened = open_weights(file)
    if is_saved_delta(opened.metadata):
        raise NotCheckedError(f"{file}: is a task vector, which no other library loads")
    settings = None
    if is_adapter(opened.tensors, None, opened.metadata):
        name, describing = "adapter_model.safetensors", "adapter_config.json"
        if (text := opened.metadata.get(CONFIG_KEY)) is not None:
            settings = parse_object(str(file), CONFIG_KEY, text)
        fix = "write the adapter into a folder: -o DIR"
    else:
        name, describing = "model.safetensors", "config.json"
        under = base if base is None or base.is_dir() else base.parent
        if under is not None and (under / describing).is_file():
            settings = read_object(under / describing)
            if "_class_name" in settings:
                name = "diffusion_pytorch_model.safetensors"
        fix = "give --base with the folder of a model that has one"
    if settings is None or file.suffix != ".safetensors":
        raise NotCheckedError(
            f"{file}: has no {describing}, so nothing says which tensors it should hold", fix=fix
        )
    with TemporaryDirectory(prefix="mergebench-") as place:
        folder = Path(place)
        (folder / name).symlink_to(file.resolve())
        (folder / describing).write_text(json.dumps(settings), encoding="utf-8")
        yield folder
