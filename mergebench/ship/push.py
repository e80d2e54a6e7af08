"""Outputs brought to the Hub: looked through first, then written in one commit, or not at all."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mergebench.checkpoints.hub import HubRef, list_files
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
from mergebench.checkpoints.hub_files import RemoteFile, digest
from mergebench.core.errors import MergebenchError, ParameterError
from mergebench.manifest import CARD
from mergebench.ship.planned import PushFile, PushPlan, card_file, read_text

#: What loaders would find beside, or instead of, what is pushed.
_SHADOWS = (
    "*.safetensors", "*.bin", "*.index.json", "*.index.*.json", "adapter_config.json",
    "mergebench_*",
)  # fmt: skip


@dataclass(frozen=True)
class Remote:
    """A repository as it is: ``private`` is ``None``, and no commit there, where it is missing."""

    private: bool | None = None
    commit: str | None = None
    files: Mapping[str, RemoteFile] | None = None
    branch_missing: bool = False


@dataclass(frozen=True)
class Pushed:
    """What was done: the commit, its address, and that of a pull request."""

    plan: PushPlan
    commit: str
    url: str
    pull_request: str | None = None
    created: bool = False


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
        card = card_file(plan.compose(_card_there(plan.ref, remote.commit)))
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
        return read_text(Path(client().hf_hub_download(ref.repo, CARD, revision=commit)))


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
