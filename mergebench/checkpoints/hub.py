"""``hf://org/name[@revision][/file]``: models on the Hub, brought into the client's own cache."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from mergebench.checkpoints.containers import DCP, SFT
from mergebench.checkpoints.documents import read_object
from mergebench.checkpoints.hub_client import client, explained, is_offline, patiently
from mergebench.checkpoints.layout import some, weights_among
from mergebench.checkpoints.sides import is_side, is_weights
from mergebench.core.errors import FormatError, MergebenchError

#: How references to the Hub begin.
HUB = "hf://"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REFERENCE = re.compile(
    r"(?P<repo>[^/@]+(?:/[^/@]+)?)(?:@(?P<revision>refs/[^/]+/[^/]+|[^/]+))?(?:/(?P<path>.+))?"
)
_ADAPTERS = (
    "delta.safetensors", SFT, "pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin"
)  # fmt: skip
_BESIDE = ("adapter_config.json", "mergebench_*", "*/chat_template*.jinja", "[0-9]*_*/config.json")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True)
class HubRef:
    """A reference to the Hub, taken apart.

    Attributes
    ----------
    repo : str
        ``org/name``.
    revision : str or None
        A branch, a tag or a commit; the main branch if ``None``.
    path : str
        A file or a folder of the repository; ``""`` for all of it.
    """

    repo: str
    revision: str | None = None
    path: str = ""

    def __str__(self) -> str:
        at = "" if self.revision is None else f"@{self.revision}"
        return f"{HUB}{self.repo}{at}" + (f"/{self.path}" if self.path else "")


@dataclass(frozen=True)
class Fetched:
    """Where a reference lies in the cache, and of which commit it is."""

    path: Path
    commit: str


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


def is_hub(reference: str) -> bool:
    """Whether a reference begins like one to the Hub."""
    return reference.startswith(HUB)


def parse_hub(reference: str) -> HubRef:
    """Take a reference apart.

    Raises
    ------
    MergebenchError
        If it names no model of the Hub.
    """
    text = reference.removeprefix(HUB)
    found = _REFERENCE.fullmatch(text)
    if found is None or _CONTROL.search(text):
        raise MergebenchError(
            f"{reference}: is no reference to the Hub", expected="hf://org/name[@revision][/file]"
        )
    if found["repo"].split("/")[0] in ("datasets", "spaces", "buckets"):
        raise MergebenchError(f"{reference}: is no model", expected="hf://org/name")
    path = (found["path"] or "").rstrip("/")
    if path and escapes(path):
        raise MergebenchError(f"{reference}: names a file outside of the repository")
    return HubRef(found["repo"], found["revision"], path)


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


def list_files(ref: HubRef, commit: str | None = None) -> tuple[str, dict[str, RemoteFile]]:
    """Commit and files of a repository, by name.

    Raises
    ------
    MergebenchError
        If the Hub does not tell, or names a file that would leave its folder.
    """
    api = client()
    with explained(str(ref), repo=ref.repo):
        at = commit or patiently(
            lambda: _commit_of(api.model_info(ref.repo, revision=ref.revision))
        )
        entries = list(api.list_repo_tree(ref.repo, recursive=True, revision=at))
    found = {}
    for entry in entries:
        if not hasattr(entry, "blob_id"):
            continue
        if escapes(entry.path):
            raise FormatError(
                f"{ref}: names a file outside of its folder, {entry.path!r}",
                fix="do not use this repository",
            )
        lfs = None if entry.lfs is None else str(entry.lfs.sha256)
        found[entry.path] = RemoteFile(entry.path, int(entry.size), lfs, str(entry.blob_id))
    return at, found


def _commit_of(info: Any) -> str:
    sha = str(info.sha)
    if not _COMMIT.fullmatch(sha):
        raise MergebenchError(f"the Hub names {sha[:60]!r} as a commit", fix="check HF_ENDPOINT")
    return sha


def fetch(ref: HubRef, commit: str | None = None) -> Fetched:
    """Bring what a reference needs into the cache, and nothing else.

    Of a repository with weights in several formats that is one of them, and what a loader reads
    beside it. What is in the cache is not downloaded again. With ``HF_HUB_OFFLINE`` only the cache
    is looked at.

    Parameters
    ----------
    ref : HubRef
    commit : str, optional
        Take this commit, whatever the revision has become.

    Raises
    ------
    MergebenchError
    """
    if is_offline():
        return _from_cache(ref, commit)
    at, files = list_files(ref, commit)
    top, chosen = needed(str(ref), ref.path, list(files))
    root, _ = download(ref, at, files, chosen)
    if commit is None:
        _remember(root.parent.parent, ref, at)
    return Fetched(root / top if top else root, at)


def download(
    ref: HubRef,
    commit: str,
    files: Mapping[str, RemoteFile],
    chosen: Sequence[str],
    folder: Path | None = None,
    *,
    weights: bool = True,
) -> tuple[Path, list[str]]:
    """Bring files and the shards that indexes among them name to this machine.

    Parameters
    ----------
    ref : HubRef
    commit : str
    files : mapping of name to RemoteFile
        All that there are.
    chosen : sequence of str
    folder : Path, optional
        Where to put them; into the cache by default.
    weights : bool, default True
        Whether to bring the shards too.

    Returns
    -------
    Path
        What the names are relative to.
    list of str
        The names.
    """
    from huggingface_hub import snapshot_download

    names = list(chosen)
    while True:
        with explained(str(ref), repo=ref.repo):
            patterns = [glob.escape(name) for name in names]
            root = Path(
                snapshot_download(
                    ref.repo, revision=commit, allow_patterns=patterns, local_dir=folder
                )
            )
        more = [name for name in _of_indexes(root, names) if name in files and name not in names]
        if not more or not weights:
            return root, names
        names += more


def _remember(folder: Path, ref: HubRef, commit: str) -> None:
    """Note in the cache what a revision stands for, as the client does."""
    place = folder / "refs" / (ref.revision or "main")
    if _COMMIT.fullmatch(place.name) or escapes(ref.revision or "main"):
        return
    # A cache that cannot be written is one that cannot be used without a network.
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        part = place.with_name(f".{place.name}.{os.getpid()}")
        part.write_text(commit, encoding="ascii")
        part.replace(place)


def _of_indexes(root: Path, names: Sequence[str]) -> list[str]:
    """The shards that the indexes among some files name."""
    found: dict[str, None] = {}
    for name in names:
        if name.endswith(".json") and ".index." in name:
            listed = read_object(root / name).get("weight_map")
            shards = listed.values() if isinstance(listed, Mapping) else ()
            folder = PurePosixPath(name).parent
            found.update({(folder / str(shard)).as_posix(): None for shard in shards})
    return list(found)


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


def _from_cache(ref: HubRef, commit: str | None) -> Fetched:
    place = cached(ref, commit)
    if place is None:
        raise MergebenchError(
            f"{ref}: is not in the cache, and the Hub is not asked, because HF_HUB_OFFLINE is set",
            fix="unset it, or give a path",
        )
    return place


def cached(ref: HubRef, commit: str | None = None) -> Fetched | None:
    """What the cache has of a reference; the Hub is not asked."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{ref.repo.replace('/', '--')}"
    at = commit or ref.revision or "main"
    if not _COMMIT.fullmatch(at):
        try:
            at = (folder / "refs" / at).read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            return None
    place = folder / "snapshots" / at
    if not _COMMIT.fullmatch(at) or not place.is_dir():
        return None
    place = place / ref.path if ref.path else place
    return Fetched(place, at) if place.exists() else None
