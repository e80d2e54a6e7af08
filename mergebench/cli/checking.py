"""``verify``, ``check`` and ``doctor``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergebench.cli import console
from mergebench.cli import options as o
from mergebench.core.errors import EXIT_FINDINGS

if TYPE_CHECKING:
    from mergebench.merge.replay import Replayed
    from mergebench.merge.verify import Verdict

Inputs = Annotated[
    Path | None,
    typer.Option("--inputs", help="Folder that holds the inputs, if they are not where they were."),
]


def verify(
    out: Annotated[
        Path, typer.Argument(help="A merged folder or file.", show_default=False, metavar="OUT")
    ],
    replay: Annotated[
        str | None,
        typer.Option(
            "--replay",
            metavar="N|all",
            help="Compute N tensors, chosen at random, again from the inputs and compare.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the choice.")] = 0,
    inputs: Inputs = None,
    memory: o.Memory = "512MiB",
    workers: o.Workers = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Compare an output with its manifest, byte by byte. Exit code 1 if something differs.

    Tensors, headers, index, config, tokenizer, recipe and manifest are compared, and inputs that
    are still there.

    Examples:

    \b
      mergebench verify merged
      mergebench verify merged --replay 4 --json
    """
    from mergebench.merge.replay import plan_replay
    from mergebench.merge.replay import replay as run
    from mergebench.merge.verify import verify as compare

    count = _count(replay)
    again = None
    if replay is not None:
        again = plan_replay(out, inputs=inputs, memory=o.size("--memory", memory), workers=workers)
    with console.bar(quiet or as_json, "bytes") as progress:
        verdict = compare(out, inputs=inputs, workers=workers, progress=progress)
    replayed = None
    if again is not None:
        with console.bar(quiet or as_json) as progress:
            replayed = run(again, count, seed=seed, progress=progress)
    found = [*verdict.findings, *(replayed.findings if replayed else ())]
    if as_json:
        data = verdict.to_json()
        if replayed is not None:
            data["replay"] = {"seed": seed, **replayed.to_json()}
        console.say_json(data)
    elif not quiet:
        _show(verdict, replayed)
    if found:
        raise typer.Exit(EXIT_FINDINGS)


def _count(text: str | None) -> int | None:
    from mergebench.core.errors import ParameterError

    if text is None or text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ParameterError("--replay", got=repr(text), expected="a number from 1, or all")
    return int(text)


def _show(verdict: Verdict, replayed: Replayed | None) -> None:
    for text in (*verdict.notes, *(replayed.notes if replayed else ())):
        console.note(text)
    for each in (*verdict.findings, *(replayed.findings if replayed else ())):
        console.say(str(each))
    many = len(verdict.findings)
    result = f"{many} finding{'s' if many > 1 else ''}" if many else "as it was written"
    console.say(
        f"{verdict.path}: {result}; {verdict.tensors} tensors, "
        f"{console.size(verdict.bytes)} compared"
    )
    if replayed is not None:
        wrong = len(replayed.findings)
        result = f"{wrong} differ" if wrong else "equal to the last bit"
        console.say(
            f"replayed {replayed.tensors} of {replayed.of} tensors, "
            f"{console.size(replayed.bytes)}: {result}"
        )
