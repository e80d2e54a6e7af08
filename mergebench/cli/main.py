"""The command line: ``mergebench COMMAND``."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mergebench.cli import console, looking, merging
from mergebench.core.errors import EXIT_BUG, EXIT_INTERRUPTED, EXIT_USER, MergebenchError


class _OutsideError(Exception):
    """Carries an interrupt or a closed pipe past typer, which has exit codes of its own for it."""


class _Group(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, BrokenPipeError) as error:
            raise _OutsideError from error


app = typer.Typer(
    name="mergebench",
    cls=_Group,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Merge, inspect and ship fine-tuned models and adapters.\n\n"
    "Examples:\n\n"
    "  mergebench merge a.safetensors b.safetensors --method breadcrumbs\n\n"
    "  mergebench merge ft1 ft2 --base base --method ties -p density=0.2 -o merged",
)
app.command("merge")(merging.merge)
app.command("plan")(merging.plan)
app.command("run")(merging.run)
app.command("inspect")(looking.inspect)
app.command("diff")(looking.diff)
app.command("methods")(looking.methods)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        console.say(f"mergebench {version('mergebench')}")
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
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
        sys.exit(code)
    except MergebenchError as error:
        console.fail(str(error))
        sys.exit(EXIT_USER)
    except (_OutsideError, KeyboardInterrupt, BrokenPipeError) as error:
        if isinstance(error.__cause__ or error, KeyboardInterrupt):
            console.fail("interrupted; nothing was written")
            sys.exit(EXIT_INTERRUPTED)
        # The reader of our output has gone, as `head` does; nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        if (words := getattr(error, "format_message", None)) is not None:
            place = getattr(getattr(error, "ctx", None), "command_path", "mergebench")
            console.fail(f"{place}: {words()}; see `{place} --help`")
            sys.exit(EXIT_USER)
        if os.environ.get("MERGEBENCH_DEBUG"):
            raise
        console.fail(
            f"internal error: {type(error).__name__}: {error}; this is a bug in mergebench, "
            "set MERGEBENCH_DEBUG=1 for details"
        )
        sys.exit(EXIT_BUG)
