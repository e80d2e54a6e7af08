"""Options that most commands share: what is read, what is written, and how much is said."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

Models = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL...",
        help="Checkpoints, adapters, saved task vectors, or base+adapter; :0.3 after one is its "
        "weight.",
        show_default=False,
    ),
]
Base = Annotated[
    str | None,
    typer.Option("--base", "-b", help="The checkpoint everything was fine-tuned from."),
]
Out = Annotated[
    str | None,
    typer.Option(
        "--out",
        "-o",
        help="A .safetensors file or a folder; merged.safetensors or merged/ by default.",
    ),
]
Force = Annotated[bool, typer.Option("--force", "-f", help="Replace an existing output.")]
DryRun = Annotated[bool, typer.Option("--dry-run", "-n", help="Print the plan and stop.")]
Inputs = Annotated[
    Path | None,
    typer.Option(
        "--inputs",
        help="Folder that holds the inputs, if they are not where they were.",
        exists=True,
        file_okay=False,
    ),
]
Check = Annotated[
    bool,
    typer.Option("--check", help="Then try to load it, and show the drift: `mergebench check`."),
]
Report = Annotated[
    bool,
    typer.Option(
        "--report", help="List what the method reports, tensor by tensor; --json always does."
    ),
]
PrintRecipe = Annotated[
    bool, typer.Option("--print-recipe", help="Print the recipe and stop; nothing is opened.")
]
Shelf = Annotated[
    Path | None,
    typer.Option(
        "--shelf",
        help="The folder; mergebench/shelf below XDG_DATA_HOME by default.",
        envvar="MERGEBENCH_SHELF",
    ),
]


def _hush(wanted: bool) -> bool:
    """Keep the Hub's client from drawing bars of its own, which it would for transfers."""
    if wanted:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return wanted


Json = Annotated[bool, typer.Option("--json", help="Print JSON.", callback=_hush)]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        help="No progress, no summary.",
        envvar="MERGEBENCH_QUIET",
        callback=_hush,
    ),
]


def size(option: str, text: str) -> int:
    """Bytes of a text such as ``512MiB``.

    Raises
    ------
    ParameterError
        Naming the option.
    """
    from mergebench.checkpoints.sizes import parse_size
    from mergebench.core.errors import ParameterError

    try:
        return parse_size(text)
    except ParameterError as error:
        raise ParameterError(
            f"{option}: {error.what}", got=error.got, expected=error.expected
        ) from None
