"""Outputs brought to the Hub: looked through first, then written in one commit, or not at all."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from mergebench.adapters_zoo.adapter import ReadOptions
from mergebench.checkpoints.descriptors import cannot
from mergebench.checkpoints.documents import read_bounded, read_object
from mergebench.checkpoints.hub import HubRef, RemoteFile, list_files, parse_hub
from mergebench.checkpoints.hub_client import (
    TRIES,
    client,
    endpoint,
    explained,
    has_token,
    is_offline,
    may_pass,
    patiently,
    status_of,
    without_token,
)
from mergebench.checkpoints.reader import open_safetensors
from mergebench.checkpoints.shards import allowed_roots, stays_inside
from mergebench.checkpoints.sides import is_weights
from mergebench.core.errors import FormatError, MergebenchError, ParameterError
from mergebench.manifest import CARD, MANIFEST, from_metadata
from mergebench.merge.verify import verify
from mergebench.ship.cards import push_card
from mergebench.ship.packing import packing
from mergebench.sources import PULLED, Source, open_source

_PIECE = 1 << 22
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
#: What loaders would find beside, or instead of, what is pushed.
_SHADOWS = (
    "*.safetensors", "*.bin", "*.index.json", "*.index.*.json", "adapter_config.json",
    "mergebench_*",
)  # fmt: skip
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
class Remote:
    """A repository as it is: ``private`` is ``None``, and no commit there, where it is missing."""

    private: bool | None = None
    commit: str | None = None
    files: Mapping[str, RemoteFile] | None = None
    branch_missing: bool = False


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


@dataclass(frozen=True)
class Pushed:
    """What was done: the commit, its address, and that of a pull request."""

    plan: PushPlan
    commit: str
    url: str
    pull_request: str | None = None
    created: bool = False


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
    files.append(_card_file(compose(None if written is None else _text(written))))
    files.sort(key=lambda each: each.name)
    known = written is not None
    return PushPlan(path, ref, tuple(files), compose, known, compared, tuple(notes))


def _card_file(text: str) -> PushFile:
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


def _text(path: Path) -> str:
    try:
        return read_bounded(path).decode("utf-8")
    except OSError as error:
        raise cannot("read", path, error) from error
    except UnicodeDecodeError:
        raise FormatError(f"{path}: is not text", fix="correct or remove it") from None


def compare(plan: PushPlan, private: bool | None) -> tuple[PushPlan, Remote]:
    """See what of it the repository has already; nothing is written.

    Parameters
    ----------
    plan : PushPlan
    private : bool or None
        What was asked for.

    Raises
    ------
    MergebenchError
        If the repository is to be made and nothing says who may see it, or if it is seen by
        others than was asked for.
    """
    remote = _remote(plan.ref)
    name = plan.ref.repo
    if remote.private is None and private is None:
        raise ParameterError(
            f"{name}: does not exist yet, and nothing says who may see it",
            fix="add --private or --public",
        )
    if remote.private is not None and private not in (None, remote.private):
        is_now, asked = ("private", "public") if remote.private else ("public", "private")
        raise ParameterError(
            f"{name}: is {is_now}, and --{asked} was given",
            fix=f"change it at {endpoint()}/{name}/settings, or push to another name",
        )
    there = remote.files or {}
    listed = plan.files
    if CARD in there and not plan.written and remote.commit is not None:
        # What people wrote there is not replaced by what is made here.
        card = _card_file(plan.compose(_card_there(plan.ref, remote.commit)))
        listed = tuple(card if each.name == CARD else each for each in listed)
    files = tuple(replace(each, state=_state(each, there)) for each in listed)
    ours = {each.name for each in files}
    deleted = [
        each
        for each in there
        if plan.path.is_dir()
        and each not in ours
        and "/" not in each
        and any(fnmatchcase(each, pattern) for pattern in _SHADOWS)
    ]
    return replace(plan, files=files, deleted=tuple(deleted)), remote


def _card_there(ref: HubRef, commit: str) -> str:
    with explained(ref.repo, repo=ref.repo):
        return _text(Path(client().hf_hub_download(ref.repo, CARD, revision=commit)))


def _remote(ref: HubRef) -> Remote:
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    api = client()
    with explained(ref.repo, repo=ref.repo):
        try:
            info = patiently(lambda: api.model_info(ref.repo))
        except RepositoryNotFoundError:
            return Remote()
        main = str(info.sha)
        at: str | None = main
        if ref.revision is not None:
            try:
                at = patiently(lambda: api.model_info(ref.repo, revision=ref.revision)).sha
            except RevisionNotFoundError:
                at = None
    if at is not None and ref.revision == at:
        raise ParameterError(
            f"{ref.repo}: {at[:12]} is a commit", expected="a branch", fix="give --revision BRANCH"
        )
    commit, files = list_files(ref, at or main)
    return Remote(bool(info.private), commit, files, branch_missing=at is None)


def _state(file: PushFile, there: Mapping[str, RemoteFile]) -> str:
    known = there.get(file.name)
    if known is None:
        return "new"
    if known.size != file.size:
        return "changed"
    found = digest(file.content, known)
    return "same" if found == (known.sha256 or known.git) else "changed"


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


def push(
    plan: PushPlan,
    private: bool | None = None,
    message: str | None = None,
    *,
    create_pr: bool = False,
) -> Pushed:
    """Write one commit with all that the repository lacks; make the repository if there is none.

    Large files are uploaded before, and those that are there are not uploaded again, so a push
    that was cut short is taken up by the next one.

    Parameters
    ----------
    plan : PushPlan
        As :func:`plan_push` gives it.
    private : bool, optional
        Who may see a repository that is made.
    message : str, optional
        Of the commit.
    create_pr : bool, default False
        Open a pull request instead.

    Raises
    ------
    MergebenchError
    """
    what = f"{plan.path} to {plan.ref.repo}"
    if not has_token() and not is_offline():
        raise MergebenchError(
            f"{what}: pushing needs a token, and there is none",
            fix="log in with `hf auth login`, or set HF_TOKEN",
        )
    title = message or f"Push {plan.path.resolve().name} with mergebench"
    created, pause = False, 1.0
    for left in reversed(range(TRIES)):
        # What the repository has is asked for anew each time: of a commit that went through, the
        # answer may have been lost.
        compared, remote = compare(plan, private)
        if remote.private is None or remote.branch_missing:
            _make(compared.ref, private, remote)
            created |= remote.private is None
            continue
        assert remote.commit is not None
        if not compared.changed and not compared.deleted:
            url = f"{endpoint()}/{plan.ref.repo}/commit/{remote.commit}"
            return Pushed(compared, remote.commit, url, created=created)
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                made = _commit(compared, remote.commit, title, create_pr=create_pr)
        except KeyboardInterrupt as error:
            error.add_note(f"no commit was made; {plan.ref.repo} keeps what was uploaded for it")
            raise
        except Exception as error:
            if not left or not may_pass(error) or (create_pr and status_of(error) != 429):
                with explained(what, repo=plan.ref.repo, write=True):
                    raise
            time.sleep(pause)
            pause *= 2
            continue
        notes = (*compared.notes, *_said(caught))
        return Pushed(
            replace(compared, notes=notes),
            str(made.oid),
            without_token(str(made.commit_url)),
            None if made.pr_url is None else str(made.pr_url),
            created,
        )
    raise MergebenchError(
        f"{what}: the repository does not stay as it was made", fix="try again later"
    )


def _said(caught: Iterable[warnings.WarningMessage]) -> list[str]:
    return [without_token(" ".join(str(each.message).split())) for each in caught]


def _make(ref: HubRef, private: bool | None, remote: Remote) -> None:
    api = client()
    with explained(ref.repo, repo=ref.repo, write=True):
        if remote.private is None:
            patiently(lambda: api.create_repo(ref.repo, private=private, exist_ok=True))
        else:
            patiently(lambda: api.create_branch(ref.repo, branch=ref.revision, exist_ok=True))


def _commit(plan: PushPlan, parent: str, title: str, *, create_pr: bool) -> Any:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    adds = [CommitOperationAdd(each.name, each.content) for each in plan.changed]
    gone = [CommitOperationDelete(name, is_folder=False) for name in plan.deleted]
    return client().create_commit(
        plan.ref.repo,
        [*gone, *adds],
        commit_message=title,
        revision=plan.ref.revision,
        parent_commit=parent,
        create_pr=create_pr,
    )
