"""Files of a repository: which of them a reference needs, and whether they came as listed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath, PureWindowsPath

from mergebench.checkpoints.containers import DCP, SFT
from mergebench.checkpoints.layout import some, weights_among
from mergebench.checkpoints.sides import is_side, is_weights
from mergebench.core.errors import MergebenchError

_ADAPTERS = (
    "delta.safetensors", SFT, "pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin"
)  # fmt: skip
_BESIDE = ("adapter_config.json", "mergebench_*", "*/chat_template*.jinja", "[0-9]*_*/config.json")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_PIECE = 1 << 22


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository: its size, and the digest that the Hub lists.

    Attributes
    ----------
    name : str
    size : int
    sha256 : str or None
        Of files in large file storage.
    git : str
        The git object, SHA-1 of the content behind a short header, of all other files.
    """

    name: str
    size: int
    sha256: str | None
    git: str


def escapes(name: str) -> bool:
    """Whether a name that a server gives leads out of the folder it is put into."""
    parts = PurePosixPath(name).parts
    return (
        not parts
        or name != PurePosixPath(name).as_posix()
        or any(part in ("..", ".") for part in parts)
        or "\\" in name
        or _CONTROL.search(name) is not None
        or PurePosixPath(name).is_absolute()
        or bool(PureWindowsPath(name).drive)
    )


def needed(label: str, path: str, names: Sequence[str]) -> tuple[str, list[str]]:
    """What of a repository a reference stands for, and the files to fetch for it.

    Parameters
    ----------
    label : str
        Named in messages.
    path : str
        A file or a folder; ``""`` for all of it.
    names : sequence of str
        All files of the repository.

    Returns
    -------
    str
        A file or a folder.
    list of str
        Without the shards that an index names.

    Raises
    ------
    MergebenchError
        If nothing is there, or several models.
    """
    if path in names:
        folder = PurePosixPath(path).parent.as_posix()
        folder = "" if folder == "." else folder
        return path, [path, *_beside(folder, names)]
    inside = f"{path}/" if path else ""
    own = [name.removeprefix(inside) for name in names if name.startswith(inside)]
    if not own:
        raise MergebenchError(f"{label}: the repository has no such file", got=some(list(names)))
    tops = [name for name in own if "/" not in name]
    weights = _weights(label, inside, tops, own)
    # A repository of one bare file, as adapters for diffusion models are published, is that file.
    alone = len(weights) == 1 and is_weights(weights[0]) and not any("config" in n for n in tops)
    top = inside + weights[0] if alone else path
    return top, [*(inside + name for name in weights), *_beside(path, names)]


def _weights(label: str, inside: str, tops: list[str], own: Sequence[str]) -> list[str]:
    if "adapter_config.json" in tops:
        safe = [name for name in tops if name.endswith(".safetensors")]
        return safe or [name for name in tops if name.endswith(".bin")]
    if alone := [name for name in _ADAPTERS if name in tops]:
        return alone[:1]
    if "model_index.json" in tops:
        parts = sorted({name.split("/")[0] for name in own if "/" in name and is_weights(name)})
        at = label.removesuffix(f"/{inside.rstrip('/')}") if inside else label
        raise MergebenchError(
            f"{label}: is a diffusers pipeline, which holds several models",
            got=some(parts),
            fix=f"name one of them, such as {at}/{inside}{parts[0] if parts else 'unet'}",
        )
    found = weights_among(label, sorted(tops))
    if found == DCP:
        return [found, *(name for name in tops if name.endswith(".distcp"))]
    return [found]


def _beside(folder: str, names: Sequence[str]) -> list[str]:
    """What a loader reads beside the weights of a folder."""
    inside = f"{folder}/" if folder else ""
    found = []
    for name in names:
        own = name.removeprefix(inside)
        if not name.startswith(inside) or is_weights(own):
            continue
        if (is_side(own) and "/" not in own) or any(fnmatchcase(own, each) for each in _BESIDE):
            found.append(name)
    return found


def digest(content: Path | bytes, known: RemoteFile) -> str:
    """The digest of a file or bytes, of the kind that the Hub lists for it."""
    state = hashlib.sha256() if known.sha256 else hashlib.sha1(usedforsecurity=False)
    if known.sha256 is None:
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        state.update(b"blob %d\0" % size)
    if isinstance(content, bytes):
        state.update(content)
    else:
        with content.open("rb") as file:
            while piece := file.read(_PIECE):
                state.update(piece)
    return state.hexdigest()
