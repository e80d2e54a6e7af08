"""``hf://org/name[@revision][/file]``: models on the Hub, brought into the client's own cache."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mergebench.checkpoints.documents import read_object
from mergebench.checkpoints.hub_client import client, explained, is_offline, patiently
from mergebench.checkpoints.hub_files import RemoteFile, escapes, needed
from mergebench.core.errors import FormatError, MergebenchError

#: How references to the Hub begin.
HUB = "hf://"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REFERENCE = re.compile(
    r"(?P<repo>[^/@]+(?:/[^/@]+)?)(?:@(?P<revision>refs/[^/]+/[^/]+|[^/]+))?(?:/(?P<path>.+))?"
)
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
