"""The demonstration from end to end: train, merge, evaluate, report."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter

from rich.console import Console

from . import picture, report
from .findings import findings
from .merges import find_command
from .pipeline import score_all, train_all, workers
from .settings import Settings


def run(settings: Settings, work: Path, out: Path) -> None:
    """Cache models under ``work``; leave ``digits.json``, ``.md`` and ``.png`` in ``out``."""
    console = Console()
    find_command()
    started = perf_counter()
    with workers() as pool:
        with console.status("training") as status:
            trained = train_all(
                pool, settings, work, lambda n, of: status.update(f"training: {n} of {of}")
            )
        console.print(f"trained {trained} models, {perf_counter() - started:.0f} s")
        with console.status("merging") as status:
            scores = score_all(
                pool, settings, work, lambda n, of: status.update(f"merging: {n} of {of}")
            )
    rows = report.write(settings, scores, out)
    picture.draw(rows, settings.seeds[0], out / "digits.png")
    report.print_table(rows, console)
    for sentence in findings(rows):
        console.print(f"- {sentence}", highlight=False, soft_wrap=True)
    report.print_claims(rows, console)
    seconds = perf_counter() - started
    console.print(f"wrote {out}, {seconds:.0f} s in all", highlight=False, soft_wrap=True)
