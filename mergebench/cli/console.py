"""Where text goes: results to stdout, progress and errors to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mergebench.core.text import UNSAFE, cell, printable, short_labels

if TYPE_CHECKING:
    from rich.console import Console


__all__ = [
    "bar", "cell", "err", "fail", "note", "number", "out", "printable", "say", "say_json",
    "short_labels", "size",
]  # fmt: skip

_WIDE = 10_000


def _console(**options: Any) -> Console:
    from rich.console import Console
    from rich.text import Text

    class Safe(Console):
        # Every str that rich draws, cells of tables included, becomes a Text here.
        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(printable(text), **options)

        def on_broken_pipe(self) -> None:
            if self.stderr:
                super().on_broken_pipe()
            raise BrokenPipeError  # rich would exit with 1: findings

    return Safe(highlight=False, emoji=False, markup=False, **options)


def out() -> Console:
    """The console for results."""
    # Off a terminal nothing is cut to its width: a name that is searched for must be whole.
    terminal = sys.stdout.isatty()
    return _console(soft_wrap=not terminal, width=None if terminal else _WIDE)


def err() -> Console:
    """The console for progress, notes and errors."""
    return _console(stderr=True, soft_wrap=True)


def say(text: str) -> None:
    """Print a line of result, never interpreted as markup."""
    out().print(text, markup=False)


def note(text: str) -> None:
    """Print a note beside the result."""
    err().print(f"note: {cell(text)}", style="dim", markup=False)


def fail(text: str) -> None:
    """Print an error: one line."""
    console = err()
    console.print("error:", style="bold red", end=" ")
    console.print(cell(text.replace("\n", " ")), markup=False)


def say_json(data: Any) -> None:
    """Print JSON for programs."""
    text = json.dumps(data, indent=1, ensure_ascii=False)
    # Inside of texts JSON has an escape for every character; outside there are line ends only.
    safe = UNSAFE.sub(
        lambda found: found[0] if found[0] == "\n" else f"\\u{ord(found[0]):04x}", text
    )
    sys.stdout.write(safe + "\n")


def size(count: float) -> str:
    """Bytes in words: ``1.3 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def number(count: float) -> str:
    """A count in words: ``22.6M``."""
    for unit in ("", "k", "M", "G"):
        if count < 1000:
            return f"{count:.0f}" if not unit else f"{count:.1f}{unit}"
        count /= 1000
    return f"{count:.2f}T"


@contextmanager
def bar(quiet: bool, unit: str = "entries") -> Iterator[Callable[[str, int, int], None] | None]:
    """A progress bar with rate and time left, on a terminal only."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.progress import (
        BarColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{number(speed)} {unit}/s")

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
        Rate(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err(), transient=True) as progress:
        task = progress.add_task("reading", total=None)

        def show(what: str, done: int, total: int) -> None:
            progress.update(task, description=what, completed=done, total=max(total, 1))

        yield show
