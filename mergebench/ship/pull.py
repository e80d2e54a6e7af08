"""Models and adapters brought from the Hub into a folder: whole and checked, or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from mergebench.checkpoints.destination import check_destination
from mergebench.checkpoints.hub import HubRef, download, list_files, parse_hub
from mergebench.checkpoints.hub_client import endpoint, is_offline
from mergebench.checkpoints.hub_files import RemoteFile, digest, needed
from mergebench.checkpoints.sides import is_weights
from mergebench.checkpoints.staging import Stage
from mergebench.core.errors import FormatError, MergebenchError, ParameterError
from mergebench.manifest import MANIFEST
from mergebench.merge.verify import verify
from mergebench.sources import PULLED

_ALSO = ("README.md", "mergebench_*")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Pulled:
    """What was brought.

    Attributes
    ----------
    ref : HubRef
    out : Path
    commit : str
    files : mapping of name to RemoteFile
    left : tuple of str
        What the repository has besides.
    verified : int or None
        Tensors that were compared with the manifest; ``None`` without one.
    notes : tuple of str
    """

    ref: HubRef
    out: Path
    commit: str
    files: Mapping[str, RemoteFile]
    left: tuple[str, ...]
    verified: int | None
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "repo": self.ref.repo,
            "revision": self.ref.revision or "main",
            "commit": self.commit,
            "out": str(self.out),
            "files": [{"name": e.name, "bytes": e.size} for e in self.files.values()],
            "left_out": list(self.left),
            "verified_tensors": self.verified,
            "notes": list(self.notes),
        }


def pull(
    reference: str,
    out: Path | None = None,
    *,
    revision: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Pulled:
    """Bring a model or an adapter into a folder.

    Of several formats of the weights one is taken. Every file is compared with the digest that the
    Hub lists, and the tensors with the manifest, if there is one. ``mergebench_origin.json`` says
    which commit it was. A pull that was cut short is taken up by the next one.

    Parameters
    ----------
    reference : str
        ``org/name[@revision][/file]``, with or without ``hf://``.
    out : Path, optional
        The folder; by default the last part of the name.
    revision : str, optional
        A branch, a tag or a commit.
    force : bool, default False
        Replace an existing model.
    progress : callable, optional

    Raises
    ------
    MergebenchError
        If it is not there, or if what came is not what it should be.
    """
    ref = parse_hub(reference)
    if revision is not None and ref.revision is not None:
        raise ParameterError(f"{reference}: has a revision", fix="leave out --revision")
    ref = HubRef(ref.repo, revision or ref.revision, ref.path)
    place = Path(ref.repo.split("/")[-1]) if out is None else out.expanduser()
    if is_offline():
        raise MergebenchError(
            f"{ref}: the Hub is not asked, because HF_HUB_OFFLINE is set",
            fix=f"unset it; commands take {ref} out of the cache without pulling it",
        )
    commit, files = list_files(ref)
    chosen = wanted(ref, list(files))
    key = hashlib.sha256(f"pull {ref.repo}@{commit}/{ref.path}".encode()).hexdigest()[:32]
    check_destination(place, single_file=False, force=force, key=key)
    stage = Stage(place, single_file=False, force=force, key=key)
    stage.open(sum(files[name].size for name in chosen), lambda _: True)
    keep = True
    try:
        if stage.journal is None:
            stage.begin()
        if not stage.finished:
            _, chosen = download(ref, commit, files, chosen, stage.part)
            taken = {name: files[name] for name in chosen}
            keep = False
            _check(ref, stage.part, taken, progress)
            _write_origin(stage.part, ref, commit, taken)
            shutil.rmtree(stage.part / ".cache", ignore_errors=True)
        verified, notes = _verified(ref, place if stage.finished else stage.part, progress)
        keep = True
        stage.seal()
        stage.swap()
    except BaseException as error:
        stage.leave(keep=keep)
        if keep and isinstance(error, KeyboardInterrupt):
            error.add_note(f"the same pull goes on with what has come of {ref}")
        raise
    stage.forget()
    left = tuple(name for name in files if name not in chosen and not _is_plain(name))
    return Pulled(ref, place, commit, {n: files[n] for n in chosen}, left, verified, notes)


def wanted(ref: HubRef, names: Sequence[str]) -> list[str]:
    """The files to pull, shards that an index names excepted.

    Raises
    ------
    MergebenchError
        If there is no model.
    """
    if not ref.path and "model_index.json" in names:
        return _pipeline(names)
    _, found = needed(str(ref), ref.path, names)
    folder = "" if ref.path in names else ref.path
    inside = f"{folder}/" if folder else ""
    for name in names:
        own = name.removeprefix(inside)
        known = any(fnmatchcase(own, pattern) for pattern in _ALSO)
        if name.startswith(inside) and known and "/" not in own and name not in found:
            found.append(name)
    return found


def _pipeline(names: Sequence[str]) -> list[str]:
    """Everything of a diffusers pipeline, with one format and no variant of the weights."""
    found = []
    safe = {str(PurePosixPath(n).parent) for n in names if n.endswith(".safetensors")}
    for name in names:
        stem = PurePosixPath(name).name
        if name.endswith(".py") or _is_plain(name):
            continue
        if is_weights(name):
            if "/" not in name:
                continue
            if str(PurePosixPath(name).parent) in safe and not name.endswith(".safetensors"):
                continue
            plain = f"{stem.split('.')[0]}.{stem.rsplit('.', 1)[-1]}"
            if stem != plain and str(PurePosixPath(name).with_name(plain)) in names:
                continue
        found.append(name)
    return found


def _is_plain(name: str) -> bool:
    """Files that a repository has and a model does not need."""
    return name == ".gitattributes"


def _check(
    ref: HubRef, folder: Path, files: Mapping[str, RemoteFile], progress: Progress | None
) -> None:
    total, done = sum(each.size for each in files.values()), 0
    for name, known in files.items():
        place = folder / name
        found = digest(place, known) if place.is_file() and not place.is_symlink() else None
        if found != (known.sha256 or known.git):
            raise FormatError(
                f"{ref}: {name} did not come as the Hub lists it",
                expected=f"{'SHA-256' if known.sha256 else 'git'} {known.sha256 or known.git}",
                got=str(found),
                fix="pull again",
            )
        done += known.size
        if progress is not None:
            progress("checking", done, total)


def _write_origin(folder: Path, ref: HubRef, commit: str, files: Mapping[str, RemoteFile]) -> None:
    data = {
        "repo": ref.repo,
        "revision": ref.revision or "main",
        "commit": commit,
        "endpoint": endpoint(),
        "files": {
            name: {"bytes": each.size, "sha256" if each.sha256 else "git": each.sha256 or each.git}
            for name, each in files.items()
        },
    }
    (folder / PULLED).write_bytes((json.dumps(data, indent=1) + "\n").encode())


def _verified(
    ref: HubRef, folder: Path, progress: Progress | None
) -> tuple[int | None, tuple[str, ...]]:
    if not (folder / MANIFEST).is_file():
        return None, ("there is no manifest: the digests of the Hub alone were compared",)
    verdict = verify(folder, origins=False, progress=progress)
    if verdict.findings:
        raise FormatError(
            f"{ref}: is not what its manifest says",
            got=f"{len(verdict.findings)} findings, {verdict.findings[0]}",
            fix="pull another revision, or ask who pushed it",
        )
    return verdict.tensors, verdict.notes
