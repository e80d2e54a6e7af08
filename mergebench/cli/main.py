"""The command line: ``mergebench COMMAND``."""

from __future__ import annotations

import errno
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mergebench.cli import (
    checking,
    comparing,
    compressing,
    console,
    editing,
    fitting,
    grafting,
    learning,
    looking,
    merging,
    reports,
    searching,
    shelf,
    shipping,
    soups,
    spectra,
    statistics,
    trying,
    zoo,
)
from mergebench.cli.lazy import lazily
from mergebench.core.errors import EXIT_BUG, EXIT_DONE, EXIT_INTERRUPTED, EXIT_USER, MergebenchError

_UNWRITABLE = (errno.ENOSPC, errno.EIO, errno.EBADF, errno.EFBIG)


class _PipeClosedError(Exception):
    """Carries a broken pipe past typer, which would make it exit code 1: findings."""


class _InterruptedError(Exception):
    """Carries the notes of an interrupt past typer, which would turn it into a bare exit code."""


class _Group(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise _PipeClosedError from error
        except KeyboardInterrupt as error:
            raise _InterruptedError("; ".join(_notes(error))) from error


app = typer.Typer(
    name="mergebench",
    cls=_Group,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Merge, inspect and ship fine-tuned models and adapters.\n\n"
    "Examples:\n\n\b\n"
    "  mergebench merge a.safetensors b.safetensors --method breadcrumbs\n"
    "  mergebench merge ft1 ft2 --base base --method ties -p density=0.2 -o merged",
)
app.command("merge")(merging.merge)
app.command("plan")(merging.plan)
app.command("run")(merging.run)
app.command("compare")(comparing.compare)
app.command("inspect")(looking.inspect)
app.command("diff")(looking.diff)
app.command("crosstalk")(reports.crosstalk)
app.command("verify")(checking.verify)
app.command("check")(trying.check)
app.command("spectral")(spectra.spectral)
app.command("doctor")(checking.doctor)
app.command("compress")(compressing.compress)
app.command("decompress")(compressing.decompress)
app.command("methods")(looking.methods)
app.command("adapters")(zoo.adapters)
app.command("make-basis")(zoo.make_basis)
app.command("push")(shipping.push)
app.command("pull")(shipping.pull)
app.add_typer(editing.app, name="edit")
fitting.app.command("search")(searching.search)
fitting.app.command("soup")(soups.soup)
fitting.app.command("atlas")(learning.atlas)
fitting.app.command("adamerging")(learning.adamerging)
fitting.app.command("statistics")(statistics.statistics)
fitting.app.command("graft")(grafting.graft)
app.add_typer(fitting.app, name="fit")
app.add_typer(shelf.app, name="zoo")


def _version(wanted: bool) -> None:
    if wanted:
        from mergebench.core.version import own_version

        console.say(f"mergebench {own_version()}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del version
    if ctx.invoked_subcommand is None:
        console.say(ctx.get_help())
        raise typer.Exit(EXIT_USER)


def main() -> None:
    """Run the command line; every error becomes one line and an exit code.

    0 done, 1 findings, 2 the user can fix it, 70 a bug, 130 interrupted.
    """
    state = ""
    try:
        code = lazily(app)(prog_name="mergebench", standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        code = EXIT_INTERRUPTED
    except _InterruptedError as error:
        code, state = EXIT_INTERRUPTED, str(error)
    except (_PipeClosedError, BrokenPipeError):
        # The reader of our output has gone, as `head` does; nobody is left to tell.
        _discard_output()
        code = EXIT_DONE
    except OSError as error:
        code = _explain(error)
        if error.filename is None:
            _discard_output()
    except Exception as error:
        code = _explain(error)
    if code == EXIT_INTERRUPTED:
        console.fail(f"interrupted; {state or 'nothing was written'}")
    sys.exit(code)


def _discard_output() -> None:
    """What is still to be printed would only fail again when the process ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _notes(error: BaseException) -> list[str]:
    """What those who saw an error pass have added to it."""
    return list(getattr(error, "__notes__", ()))


def _explain(error: Exception) -> int:
    """Print one line; the exit code."""
    if isinstance(error, MergebenchError):
        console.fail("; ".join([str(error), *_notes(error)]))
        return EXIT_USER
    # What typer raises for a wrong command line; its class moves between releases.
    if (words := getattr(error, "format_message", None)) is not None:
        place = getattr(getattr(error, "ctx", None), "command_path", "mergebench")
        console.fail(f"{place}: {words().rstrip('.')}; see `{place} --help`")
        return EXIT_USER
    # Files are named in our own errors; what has no name is the output.
    if isinstance(error, OSError) and error.errno in _UNWRITABLE and error.filename is None:
        console.fail(f"the output cannot be printed: {error.strerror}")
        return EXIT_USER
    if os.environ.get("MERGEBENCH_DEBUG"):
        raise error
    console.fail(
        f"internal error: {type(error).__name__}: {error}; this is a bug in mergebench, "
        "set MERGEBENCH_DEBUG=1 for details"
    )
    return EXIT_BUG
