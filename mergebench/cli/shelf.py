"""``zoo``: a shelf of adapters."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergebench.cli import console
from mergebench.cli import options as o
from mergebench.core.errors import EXIT_FINDINGS

if TYPE_CHECKING:
    from mergebench.ship.shelf import Entry

app = typer.Typer(
    help="Keep adapters on a shelf, where what they have in common is stored once.\n\n"
    "Examples:\n\n\b\n"
    "  mergebench zoo add adapter1 --as one\n"
    "  mergebench zoo ls",
    rich_markup_mode=None,
    no_args_is_help=True,
)
Name = Annotated[str, typer.Argument(help="What it is called on the shelf.", show_default=False)]


def _shelf(given: Path | None) -> Path:
    from mergebench.ship.shelf import default_shelf

    return default_shelf(os.environ) if given is None else given.expanduser()


@app.command("add")
def add(
    references: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER...", help="Folders, files, or hf://org/name.", show_default=False
        ),
    ],
    name: Annotated[
        str | None, typer.Option("--as", help="What to call it, if there is one.")
    ] = None,
    shelf: o.Shelf = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace what is there.")] = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Put adapters on the shelf; each is compared with its manifest first.

    Examples:

    \b
      mergebench zoo add lora1 lora2
      mergebench zoo add adapter1 --as one --json
    """
    from mergebench.core.errors import ParameterError
    from mergebench.ship.shelving import add as put

    if name is not None and len(references) > 1:
        raise ParameterError("--as: names one adapter", got=f"{len(references)} adapters")
    rows = []
    for each in references:
        with console.bar(quiet or as_json, "bytes") as progress:
            found, notes = put(_shelf(shelf), each, name, force=force, progress=progress)
        rows.append({**_row(found), "notes": notes})
        if not as_json and not quiet:
            for text in notes:
                console.note(text)
            console.say(f"{found.name}: {console.size(found.size)}, {found.path}")
    if as_json:
        console.say_json(rows)


def _row(entry: Entry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "path": str(entry.path),
        "bytes": entry.size,
        "uncompressed": entry.uncompressed,
        **{key: value for key, value in entry.about.items() if key != "uncompressed"},
    }


@app.command("ls")
def ls(shelf: o.Shelf = None, as_json: o.Json = False) -> None:
    """List what is on the shelf, and what that takes on the disk.

    Examples:

    \b
      mergebench zoo ls
      mergebench zoo ls --json
    """
    from mergebench.ship.shelf import entries
    from mergebench.ship.shelf_care import disk_bytes

    place = _shelf(shelf)
    found = entries(place)
    total = sum(each.size for each in found)
    held, plain = disk_bytes(place), sum(each.uncompressed for each in found)
    if as_json:
        rows = [_row(each) for each in found]
        data = {"shelf": str(place), "adapters": rows, "bytes": total}
        console.say_json({**data, "on_disk": held, "uncompressed": plain})
        return
    if found:
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        for heading in ("name", "kind", "size", "uncompressed", "base", "source"):
            right = heading in ("size", "uncompressed")
            table.add_column(heading, justify="right" if right else "left", overflow="fold")
        for each in found:
            sizes = console.size(each.size), console.size(each.uncompressed)
            words = [console.cell(each.about.get(key, "")) for key in ("kind", "base", "source")]
            table.add_row(each.name, words[0], *sizes, *words[1:])
        console.out().print(table)
    ratio = plain / held if held else 1.0
    console.say(
        f"{place}: {len(found)} adapters, {console.size(held)} on disk for {console.size(total)}, "
        f"{console.size(plain)} uncompressed ({ratio:.1f}x)"
    )


@app.command("show")
def show(name: Name, shelf: o.Shelf = None, as_json: o.Json = False) -> None:
    """Show one adapter: files, objects, and how many of them others have too.

    Examples:

    \b
      mergebench zoo show one
      mergebench zoo show one --json
    """
    from mergebench.ship.shelf import entries, entry

    place = _shelf(shelf)
    found = entry(place, name)
    others = {piece for each in entries(place) if each.name != name for piece in each.pieces}
    shared = found.pieces & others
    data = {
        **_row(found),
        "files": {
            **{file.file: file.size for file in found.files},
            **dict(found.beside),
        },
        "objects": len(found.pieces),
        "shared_objects": len(shared),
        "shared_bytes": sum(piece.size for piece in shared),
    }
    if as_json:
        console.say_json(data)
        return
    for key, value in data.items():
        if key == "files":
            for file, size in data["files"].items():
                console.say(f"  {file}: {console.size(size)}")
        else:
            in_bytes = key in ("bytes", "uncompressed", "shared_bytes")
            shown = console.size(value) if in_bytes else console.cell(value)
            console.say(f"{key.replace('_', ' ')}: {shown}")


@app.command("path")
def path(name: Name, shelf: o.Shelf = None, as_json: o.Json = False) -> None:
    """Print a path that stands for the adapter wherever mergebench takes one.

    Examples:

    \b
      mergebench zoo path one
      mergebench zoo path one --json
    """
    from mergebench.ship.shelf import entry

    found = entry(_shelf(shelf), name)
    place = found.path
    if len(found.files) == 1 and "adapter_config.json" not in found.beside:
        place = found.files[0].path
    if as_json:
        console.say_json({"path": str(place)})
        return
    console.say(str(place))


@app.command("export")
def export(
    name: Name,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The folder; called like it by default.")
    ] = None,
    shelf: o.Shelf = None,
    force: o.Force = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Write an adapter as the files it was added from, byte for byte, for other programs.

    Examples:

    \b
      mergebench zoo export one -o exported
      mergebench zoo export one -o exported --json
    """
    from mergebench.ship.shelf import entry
    from mergebench.ship.shelf_care import export as write

    place = Path(name) if out is None else out.expanduser()
    size = write(entry(_shelf(shelf), name), place, force=force)
    if as_json:
        console.say_json({"name": name, "out": str(place), "bytes": size})
    elif not quiet:
        console.say(f"{place}: {console.size(size)}")


@app.command("rm")
def rm(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME...", help="What to remove.", show_default=False)
    ],
    shelf: o.Shelf = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Remove adapters; `mergebench zoo gc` then frees what no other one has.

    Examples:

    \b
      mergebench zoo rm one
      mergebench zoo rm two three --json
    """
    from mergebench.ship.shelf import entry
    from mergebench.ship.shelf_changes import take_off

    place = _shelf(shelf)
    for each in names:
        entry(place, each)
    gone = [take_off(place, each).name for each in dict.fromkeys(names)]
    if as_json:
        console.say_json({"removed": gone})
    elif not quiet:
        console.say(f"removed: {', '.join(gone)}")


@app.command("gc")
def gc(
    shelf: o.Shelf = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", "-n", help="Say what would go, and stop.")
    ] = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Free what no adapter on the shelf has any more.

    Examples:

    \b
      mergebench zoo gc --dry-run
      mergebench zoo gc --json
    """
    from mergebench.ship.shelf_care import collect

    done = collect(_shelf(shelf), dry_run=dry_run)
    if as_json:
        data = {"objects": done.objects, "bytes": done.bytes, "leftovers": done.leftovers}
        console.say_json(data | {"dry_run": dry_run})
    elif not quiet:
        verb = "would free" if dry_run else "freed"
        console.say(f"{verb} {console.size(done.bytes)} in {done.objects} objects")


@app.command("verify")
def verify(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME...]", help="All of them by default.", show_default=False),
    ] = None,
    shelf: o.Shelf = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Compare every stored byte with its digest. Exit code 1 if something differs.

    Examples:

    \b
      mergebench zoo verify
      mergebench zoo verify one --json
    """
    from mergebench.ship.shelf import entries, entry
    from mergebench.ship.shelf_care import damage

    place = _shelf(shelf)
    chosen = [entry(place, each) for each in names] if names else entries(place)
    wrong: list[str] = []
    for each in chosen:
        with console.bar(quiet or as_json, "bytes") as progress:
            wrong += damage(each, progress)
    if as_json:
        console.say_json({"adapters": len(chosen), "findings": wrong})
    elif not quiet:
        for text in wrong:
            console.say(text)
        console.say(f"{len(chosen)} adapters: {len(wrong) or 'no'} findings")
    if wrong:
        raise typer.Exit(EXIT_FINDINGS)
