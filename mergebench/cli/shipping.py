"""``push`` and ``pull``: models and adapters to the Hub and from it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergebench.cli import console
from mergebench.cli import options as o

if TYPE_CHECKING:
    from mergebench.ship.planned import PushPlan


def push(
    path: Annotated[
        Path, typer.Argument(help="A folder or file to push.", show_default=False, metavar="PATH")
    ],
    repo: Annotated[str, typer.Argument(help="Where to: org/name.", show_default=False)],
    private: Annotated[
        bool, typer.Option("--private", help="Only you see a repository that is made.")
    ] = False,
    public: Annotated[
        bool, typer.Option("--public", help="Everybody sees a repository that is made.")
    ] = False,
    revision: Annotated[
        str | None,
        typer.Option("--revision", "--branch", help="The branch; it is made if missing."),
    ] = None,
    message: Annotated[str | None, typer.Option("--message", help="Of the commit.")] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", "-n", help="List files and show the card; write nothing.")
    ] = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Push a model or an adapter to the Hugging Face Hub, in one commit.

    It is compared with its manifest first. The model card is completed: base model, tags, how to
    load it. What the repository has already is not uploaded again, also after an interrupt.

    Examples:

    \b
      mergebench push merged org/merged --private --dry-run
      mergebench push adapter org/adapter --public --json
    """
    from mergebench.core.errors import ParameterError
    from mergebench.ship.planned import plan_push
    from mergebench.ship.push import push as run

    if private and public:
        raise ParameterError("--private and --public", fix="give one of them")
    asked = True if private else (False if public else None)
    with console.bar(quiet or as_json, "bytes") as progress:
        plan = plan_push(path, repo, revision, progress)
    if dry_run:
        _show_plan(plan, asked, as_json=as_json)
        return
    done = run(plan, asked, message, create_pr=create_pr)
    if as_json:
        console.say_json(
            {
                **done.plan.to_json(),
                "commit": done.commit,
                "url": done.url,
                "pull_request": done.pull_request,
                "created": done.created,
            }
        )
        return
    if not quiet:
        _show_files(done.plan)
    moved = sum(each.size for each in done.plan.changed)
    what = f"{console.size(moved)} in {len(done.plan.changed)} files"
    state = what if done.plan.changed or done.plan.deleted else "nothing had changed"
    console.say(f"{done.plan.ref.repo}: {state}, commit {done.commit}")
    console.say(done.pull_request or done.url)


def _show_plan(plan: PushPlan, private: bool | None, *, as_json: bool) -> None:
    from mergebench.checkpoints.hub_client import is_offline
    from mergebench.ship.push import compare

    exists = None
    if not is_offline():
        plan, remote = compare(plan, private)
        exists = remote.private is not None
    if as_json:
        console.say_json({**plan.to_json(), "exists": exists, "card": plan.card, "dry_run": True})
        return
    _show_files(plan)
    total = console.size(sum(each.size for each in plan.changed))
    where = f"{plan.ref.repo}, branch {plan.ref.revision or 'main'}"
    state = {None: "the Hub was not asked", True: "exists", False: "would be made"}[exists]
    console.say(f"{where}: {state}; {total} in {len(plan.changed)} files to push\n")
    console.say(plan.card.rstrip())


def _show_files(plan: PushPlan) -> None:
    for text in plan.notes:
        console.note(text)
    for each in plan.files:
        console.say(f"{each.state or 'file':8}{console.size(each.size):>10}  {each.name}")
    for name in plan.deleted:
        console.say(f"{'deleted':8}{'':>10}  {name}")


def pull(
    reference: Annotated[
        str,
        typer.Argument(help="org/name[@revision][/file].", show_default=False, metavar="REFERENCE"),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The folder; by default called like the repository."),
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help="A branch, a tag or a commit.")
    ] = None,
    force: o.Force = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Pull a model or an adapter from the Hugging Face Hub into a folder.

    Of several formats of the weights one is taken. What comes is compared with the digests of the
    Hub and with the manifest; the folder appears whole or not at all, and names its commit.

    Examples:

    \b
      mergebench pull org/merged -o pulled
      mergebench pull org/adapter@main -o pulled --json
    """
    from mergebench.ship.pull import pull as run

    with console.bar(quiet or as_json, "bytes") as progress:
        done = run(reference, out, revision=revision, force=force, progress=progress)
    if as_json:
        console.say_json(done.to_json())
        return
    if quiet:
        return
    for text in done.notes:
        console.note(text)
    if done.left:
        some = ", ".join(done.left[:4]) + (", …" if len(done.left) > 4 else "")
        console.note(f"{len(done.left)} files are not needed and were left: {some}")
    size = console.size(sum(each.size for each in done.files.values()))
    checked = "" if done.verified is None else f", {done.verified} tensors as they were written"
    console.say(f"{done.out}: {len(done.files)} files, {size}{checked}; commit {done.commit}")
