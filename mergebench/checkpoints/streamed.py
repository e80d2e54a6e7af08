"""Checkpoints on the Hub, opened without downloading their weights."""

from __future__ import annotations

from pathlib import PurePosixPath

from mergebench.checkpoints.hub import Fetched, HubRef, download, list_files
from mergebench.checkpoints.hub_files import needed
from mergebench.checkpoints.layout import Checkpoint, open_checkpoint
from mergebench.checkpoints.reader import SafetensorsFile
from mergebench.checkpoints.remote import open_remote
from mergebench.checkpoints.sides import is_weights
from mergebench.core.errors import FormatError


def open_streamed(ref: HubRef, commit: str | None = None) -> tuple[Fetched, Checkpoint] | None:
    """Open a checkpoint of safetensors files: config and tokenizer come into the cache, no weights.

    Parameters
    ----------
    ref : HubRef
    commit : str, optional

    Returns
    -------
    Fetched and Checkpoint, or None
        ``None`` for adapters, which are small, and for other formats: these are downloaded.

    Raises
    ------
    MergebenchError
    """
    at, files = list_files(ref, commit)
    _, chosen = needed(str(ref), ref.path, list(files))
    first = chosen[0]
    inside = PurePosixPath(first).parent
    config = (inside / "config.json").as_posix()
    index = ".safetensors.index." in first
    if config not in files or not (index or first.endswith(".safetensors")):
        return None
    if (inside / "adapter_config.json").as_posix() in files:
        return None
    beside = [name for name in chosen if not is_weights(name)]
    root, _ = download(ref, at, files, beside, weights=False)

    def opened(name: str) -> SafetensorsFile:
        file = files.get((inside / name).as_posix())
        if file is None:
            raise FormatError(f"{ref}: {name} is named by the index, and not in the repository")
        return open_remote(ref, at, file)

    checkpoint = open_checkpoint(root / first, opener=opened)
    return Fetched(root / inside, at), checkpoint
