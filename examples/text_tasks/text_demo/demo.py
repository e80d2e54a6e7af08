"""The example from end to end: read, train, merge, learn, report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from time import perf_counter

import torch
import transformers
from rich.console import Console

from . import report
from .data import TextTask, read_tasks
from .experts import KINDS, Base, Expert
from .merges import Row, compared, find_command, fitted
from .settings import Settings


def run(
    files: Sequence[Path],
    base: str,
    settings: Settings,
    work: Path,
    out: Path,
    kinds: Sequence[str] = KINDS,
) -> dict[str, list[Row]]:
    """Cache models under ``work``; leave ``text_tasks.md``, ``.json`` and recipes in ``out``.

    Raises
    ------
    DataError
        As :func:`~.data.read_tasks`.
    """
    tasks = read_tasks(files, settings.seed, settings.limit, settings.template)
    console = Console()
    find_command()
    started = perf_counter()
    torch.set_num_threads(settings.threads)
    transformers.utils.logging.disable_progress_bar()
    out.mkdir(parents=True, exist_ok=True)
    root = Base(base)
    folder = root.make(work)
    asked = _write_tasks(tasks, settings, work)
    trained = 0
    for kind in kinds:
        for task in tasks:
            with console.status(f"training: {kind}, {task.name}"):
                trained += Expert(root, task, kind).make(settings, work)
    console.print(f"trained {trained} models, {perf_counter() - started:.0f} s", highlight=False)
    found = {}
    for kind in kinds:
        experts = {task.name: Expert(root, task, kind).folder(settings, work) for task in tasks}
        with console.status(f"merging: {kind}"):
            rows = compared(experts, folder, asked, kind, settings)
        with console.status(f"learning coefficients: {kind}"):
            rows += fitted(experts, folder, asked, settings, out / f"recipes-{kind}")
        report.show(rows, kind, console)
        found[kind] = rows
    _write(found, settings, out)
    seconds = perf_counter() - started
    console.print(f"wrote {out}, {seconds:.0f} s in all", highlight=False, soft_wrap=True)
    return found


def _write_tasks(tasks: Sequence[TextTask], settings: Settings, work: Path) -> dict[str, Path]:
    place = work / "tasks"
    place.mkdir(parents=True, exist_ok=True)
    files = {}
    for task in tasks:
        files[task.name] = place / f"{task.name}.json"
        text = task.to_json(settings.max_length, settings.scale)
        files[task.name].write_text(text, encoding="utf-8")
    return files


def _write(found: dict[str, list[Row]], settings: Settings, out: Path) -> None:
    text = "\n".join(report.markdown(rows, kind) for kind, rows in found.items())
    (out / "text_tasks.md").write_text(text, encoding="utf-8")
    plain = {
        "settings": asdict(settings),
        "rows": {kind: [asdict(row) for row in rows] for kind, rows in found.items()},
    }
    dumped = json.dumps(plain, indent=1, ensure_ascii=False) + "\n"
    (out / "text_tasks.json").write_text(dumped, encoding="utf-8")
