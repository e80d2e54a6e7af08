"""What is to be pushed, looked through before anybody is asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from mergebench.adapters_zoo.adapter import ReadOptions
from mergebench.checkpoints.descriptors import cannot
from mergebench.checkpoints.documents import read_bounded, read_object
from mergebench.checkpoints.hub import HubRef, parse_hub
from mergebench.checkpoints.reader import open_safetensors
from mergebench.checkpoints.shards import allowed_roots, stays_inside
from mergebench.checkpoints.sides import is_weights
from mergebench.core.errors import FormatError, MergebenchError, ParameterError
from mergebench.manifest import CARD, MANIFEST, from_metadata
from mergebench.merge.verify import verify
from mergebench.ship.cards import push_card
from mergebench.ship.packing import packing
from mergebench.sources import PULLED, Source
from mergebench.sources.opening import open_source

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class PushFile:
    """One file: where it lies, or its bytes.

    ``state`` is new, changed or same, once the repository has been looked at.
    """

    name: str
    size: int
    content: Path | bytes
    state: str = ""


@dataclass(frozen=True)
class PushPlan:
    """What would be pushed, and where to.

    Attributes
    ----------
    path : Path
    ref : HubRef
    files : tuple of PushFile
    deleted : tuple of str
        What loaders would take for a part of it.
    compose : callable
        ``text or None -> card``, out of the README that there is.
    written : bool
        Whether there is one here.
    verified : int or None
        Tensors that were compared with the manifest; ``None`` without one.
    notes : tuple of str
    """

    path: Path
    ref: HubRef
    files: tuple[PushFile, ...]
    compose: Callable[[str | None], str]
    written: bool
    verified: int | None
    notes: tuple[str, ...] = ()
    deleted: tuple[str, ...] = ()

    @property
    def card(self) -> str:
        """The model card."""
        (found,) = (each.content for each in self.files if each.name == CARD)
        assert isinstance(found, bytes)
        return found.decode()

    @property
    def changed(self) -> tuple[PushFile, ...]:
        """What the repository does not have."""
        return tuple(each for each in self.files if each.state != "same")

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "path": str(self.path),
            "repo": self.ref.repo,
            "revision": self.ref.revision or "main",
            "files": [{"name": e.name, "bytes": e.size, "state": e.state} for e in self.files],
            "deleted": list(self.deleted),
            "verified_tensors": self.verified,
            "notes": list(self.notes),
        }


def plan_push(
    path: Path, repo: str, revision: str | None = None, progress: Progress | None = None
) -> PushPlan:
    """Look through what is to be pushed; the Hub is not asked.

    Parameters
    ----------
    path : Path
        A folder or a file.
    repo : str
        ``org/name``.
    revision : str, optional
        A branch.
    progress : callable, optional

    Raises
    ------
    MergebenchError
        If there is nothing to push, if it is damaged, or if it is not what its manifest says.
    """
    ref = parse_hub(repo)
    if ref.path or "/" not in ref.repo or (ref.revision and revision):
        raise ParameterError(f"{repo}: where to push", expected="org/name, and --revision BRANCH")
    ref = replace(ref, revision=revision or ref.revision)
    if not path.exists():
        raise MergebenchError(f"{path}: no such file or folder", fix="check the spelling")
    found, notes = _local(path)
    heavy = [name for name in found if is_weights(name)]
    if not heavy:
        raise MergebenchError(
            f"{path}: holds no weights", got=", ".join(found) or "nothing", fix="name a model"
        )
    for name in heavy:
        if name.endswith(".safetensors"):
            open_safetensors(found[name])
        if any(fnmatchcase(name, pattern) for pattern in _PICKLES):
            notes.append(f"{name} is a pickle: some loaders run what it holds")
    made = manifest_of(path)
    compared = None if made is None else verified(path, "pushed", notes, progress)
    if made is None:
        notes.append("there is no manifest, so only headers were looked at")
    elif any(Path(str(each["path"])).is_absolute() for each in made["inputs"]):
        notes.append("manifest and recipe name folders of this machine, which everybody will read")
    packed = packing(path)
    source = _opened(path, notes, strict=packed is not None)
    written = found.get(CARD)
    compose = partial(push_card, ref.repo, made=made, source=source, packed=packed)
    files = [PushFile(n, p.stat().st_size, p) for n, p in found.items() if n != CARD]
    files.append(card_file(compose(None if written is None else read_text(written))))
    files.sort(key=lambda each: each.name)
    known = written is not None
    return PushPlan(path, ref, tuple(files), compose, known, compared, tuple(notes))


def card_file(text: str) -> PushFile:
    """A model card as a file."""
    return PushFile(CARD, len(text.encode()), text.encode())


def _local(path: Path) -> tuple[dict[str, Path], list[str]]:
    """Files to push by name, and notes on those that are not."""
    if not path.is_dir():
        return {path.name: path}, []
    found: dict[str, Path] = {}
    left: list[str] = []
    roots = allowed_roots(path)
    for each in sorted(path.rglob("*")):
        name = each.relative_to(path).as_posix()
        if each.is_dir() or name == PULLED:
            continue
        hidden = any(part.startswith(".") or part == "__pycache__" for part in name.split("/"))
        if hidden or not each.is_file() or not stays_inside(each, roots):
            left.append(name)
        else:
            found[name] = each
    return found, [f"{name} is not pushed" for name in left]


def manifest_of(path: Path) -> dict[str, Any] | None:
    """The manifest of a folder or a single file, if it has one."""
    if path.is_dir():
        return read_object(path / MANIFEST) if (path / MANIFEST).is_file() else None
    if path.suffix != ".safetensors":
        return None
    found = from_metadata(open_safetensors(path).metadata)
    return found if found is not None and "recipe" in found and "inputs" in found else None


def verified(path: Path, doing: str, notes: list[str], progress: Progress | None) -> int:
    """How many tensors are as the manifest says; one that is not is an error."""
    verdict = verify(path, origins=False, progress=progress)
    notes += verdict.notes
    if verdict.findings:
        raise FormatError(
            f"{path}: is not as it was written, so it is not {doing}",
            got=f"{len(verdict.findings)} findings, {verdict.findings[0]}",
            fix=f"`mergebench verify {path}` lists them; write it again",
        )
    return verdict.tensors


def _opened(path: Path, notes: list[str], *, strict: bool) -> Source | None:
    try:
        return open_source(str(path), ReadOptions())
    except MergebenchError as error:
        # Packed files say themselves whether they are sound.
        if strict and isinstance(error, FormatError):
            raise
        notes.append(f"it cannot be opened here: {error}")
        return None


def read_text(path: Path) -> str:
    """The text of a README."""
    try:
        return read_bounded(path).decode("utf-8")
    except OSError as error:
        raise cannot("read", path, error) from error
    except UnicodeDecodeError:
        raise FormatError(f"{path}: is not text", fix="correct or remove it") from None
