"""``verify`` and ``doctor``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergebench.cli import console, machine_options, options, recipe_options
from mergebench.cli import machine_options as mo
from mergebench.cli import options as o
from mergebench.core.errors import EXIT_FINDINGS

if TYPE_CHECKING:
    from mergebench.merge.replay import Replayed
    from mergebench.merge.verify import Verdict


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
    inputs: o.Inputs = None,
    memory: mo.Memory = "512MiB",
    workers: mo.Workers = None,
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


def doctor(
    disk: Annotated[
        Path | None,
        typer.Option("--disk", help="A folder whose disk is tried, with one bounded file."),
    ] = None,
    disk_size: Annotated[str, typer.Option("--disk-size", help="Of that file.")] = "256MiB",
    torch: Annotated[
        bool, typer.Option("--torch", help="Ask torch for CUDA and MPS; takes seconds.")
    ] = False,
    as_json: o.Json = False,
) -> None:
    """Examine the installation and the machine. Exit code 1 if something needed is missing.

    Versions, extras, processor, memory, BLAS, variables (of tokens only that they are set), limits
    and, on request, a disk and the accelerators.

    Examples:

    \b
      mergebench doctor
      mergebench doctor --disk . --disk-size 1MiB --json
    """
    import os

    from mergebench.checkpoints.trial import try_disk
    from mergebench.doctor import examine

    tried = None if disk is None else try_disk(disk, o.size("--disk-size", disk_size))
    data = examine(os.environ, variables(), torch=torch)
    if tried is not None:
        data["disk"] = tried
    if as_json:
        console.say_json(data)
    else:
        _show_health(data)
    if data["problems"]:
        raise typer.Exit(EXIT_FINDINGS)


def _show_health(data: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, words in _health(data):
        table.add_row(name, words)
    console.out().print(table)
    for each in data["problems"]:
        console.say(f"problem: {each}")
    if not data["problems"]:
        console.say("all that is needed is there")


def _health(data: dict[str, Any]) -> Iterator[tuple[str, str]]:
    about, memory = data["environment"], data["environment"]["memory"]
    yield "mergebench", str(data["mergebench"])
    yield "python", f"{about['python']}, {about['executable']}"
    yield "platform", about["platform"]
    quota = "" if about["core_quota"] is None else f", {about['core_quota']:g} granted"
    yield (
        "processor",
        f"{about['processor']}, {about['cores']} cores, {about['usable_cores']} usable{quota}",
    )
    shown = [f"{console.size(size)} {name}" for name, size in memory.items() if size is not None]
    yield "memory", ", ".join(shown)
    for each in about["blas"]:
        words = f"{each['library']} {each['version']}, {each['threads']} threads"
        yield "threads of", f"{words} ({each['used_by']})" if each["used_by"] else words
    for each in data["packages"]:
        mark = "" if each["fits"] else "  ← does not fit"
        yield "package", f"{each['name']} {each['found'] or 'missing'} ({each['wanted']}){mark}"
    for name, extra in data["extras"].items():
        missing = ", ".join(each["name"] for each in extra["missing"])
        state = f"{missing} missing; {extra['install']}" if missing else "installed"
        yield "extra", f"{name}: {state}"
    for name, value in data["variables"].items():
        yield "variable", f"{name}: {value}"
    for name, value in data["limits"].items():
        yield "limit", f"{name.replace('_', ' ')}: {'none' if value is None else f'{value:,}'}"
    if found := data.get("accelerators"):
        cards = ", ".join(f"{e['name']} ({console.size(e['memory'])})" for e in found["cuda"])
        mps = ", MPS" if found["mps"] else ""
        yield "torch", f"{found['torch']}, CUDA: {cards or 'none'}{mps}, {found['threads']} threads"
    if disk := data.get("disk"):
        yield "disk", f"{disk['path']}: {disk['file_system'] or 'unknown file system'}"
        free = "unknown" if disk["free"] is None else console.size(disk["free"])
        cache = "" if disk["read_from_disk"] else " (from the cache)"
        done = f"{console.size(disk['bytes'])} written and synced"
        speeds = [f"{console.size(disk[way])}/s" for way in ("write", "read")]
        yield "disk", f"{free} free; {done} at {speeds[0]}, read at {speeds[1]}{cache}"
        for what in ("preallocation", "exchange", "locks"):
            yield "disk", f"{what}: {'yes' if disk[what] else 'no'}"


def variables() -> list[str]:
    """Environment variables that the command line reads."""
    found = {"MERGEBENCH_DEBUG"}
    for module in (options, recipe_options, machine_options):
        for each in vars(module).values():
            for option in getattr(each, "__metadata__", ()):
                named = getattr(option, "envvar", None)
                found.update([named] if isinstance(named, str) else named or [])
    return sorted(found)
