"""Merges chosen or learned with data beside those without, all by the installed command."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console

from mergebench.merge.method import METHODS

from .experts import Expert, expert_folders
from .fitted_report import LABELS, NOTHING, TEXTS, Line, findings, markdown, row_of, show_table
from .merges import find_command
from .pipeline import PROCESSES, train_all, workers
from .settings import Settings
from .task import write_tasks


def lines(settings: Settings, few: bool = False) -> dict[str, str]:
    """Title of every merge that only scores choose, if anything does -> what ``-m`` is told."""
    sums, ties, means = (
        "/".join(grid) for grid in (settings.sum_grid, settings.ties_grid, settings.mean_grid)
    )
    every = {
        "Uniform soup": "linear",
        "Greedy soup": SOUP,
        "Task arithmetic": f"task_arithmetic:lam={sums}",
        "TIES": f"ties:density=0.2,lam={ties}",
        "Breadcrumbs": f"breadcrumbs:lam={sums}",
        "LiNeS": f"lines:lam=0.5/1,beta={sums}",
        "TIES, LiNeS": f"ties:density=0.2,lam={means}+lines:beta=0.5",
        "TSV-M": f"tsv_merge:lam={means}",
        "WUDI, closed form": f"wudi:solver=exact,lam={means}",
    }
    return {title: every[title] for title in FEW} if few else every


SOUP = "fit soup"
#: Of which a quick run has one of each kind.
FEW = ("Uniform soup", "Greedy soup", "Task arithmetic", "TIES")
#: Title of merges by statistics -> the method, and the kind of statistics that it needs.
BY_STATISTICS = {"Fisher": ("fisher", "fisher"), "RegMean": ("regmean", "gram")}


def by_statistics() -> dict[str, tuple[str, str]]:
    """Those whose methods are installed."""
    return {title: each for title, each in BY_STATISTICS.items() if each[0] in METHODS}


def learned(few: bool = False) -> dict[str, tuple[str, str]]:
    """Title of every learned merge -> (what it needs, what ``-m`` is told)."""
    # Ten times the published rate: these splits have twelve batches, and steps take time.
    steps = f"--steps {10 if few else 240} --rate 0.01"
    epochs = "--epochs 20 --rate 0.01"
    every = {
        "AdaMerging, task-wise": (TEXTS, f"fit adamerging --by task {steps}"),
        "AdaMerging": (TEXTS, f"fit adamerging {steps}"),
        "AdaMerging++": (TEXTS, f"fit adamerging --plus {steps}"),
        "aTLAS, test-time": (TEXTS, f"fit atlas --setting test-time {epochs}"),
        "aTLAS": (LABELS, f"fit atlas {epochs}"),
    }
    return {"AdaMerging": every["AdaMerging"]} if few else every


def compare(settings: Settings, work: Path, out: Path, few: bool = False) -> None:
    """Train what is missing; leave ``digits_fitted.json`` and ``.md`` in ``out``."""
    console = Console()
    started = perf_counter()
    with workers() as pool:
        trained = train_all(pool, settings, work, lambda n, of: None)
    console.print(f"trained {trained} models, {perf_counter() - started:.0f} s", highlight=False)
    out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(PROCESSES) as threads:
        jobs = [threads.submit(measure, settings, work, s, few) for s in settings.seeds]
        seen = [job.result() for job in jobs]
    rows = [row_of(each) for each in zip(*seen, strict=True)]
    (out / "digits_fitted.md").write_text(markdown(rows))
    plain = {
        "settings": asdict(settings),
        "seeds": [[asdict(line) for line in each] for each in seen],
        "findings": findings(rows),
    }
    (out / "digits_fitted.json").write_text(json.dumps(plain, indent=1, ensure_ascii=False) + "\n")
    show_table(rows, console)
    console.print(f"wrote {out}, {perf_counter() - started:.0f} s in all", soft_wrap=True)


def measure(settings: Settings, work: Path, seed: int, few: bool = False) -> list[Line]:
    """Every line of the table for one seed: one ``compare``, once statistics are collected."""
    base = Expert(seed).folder(settings, work)
    experts = expert_folders(settings, work, seed, None)
    place = work / "fitted" / f"seed{seed}"
    tasks = write_tasks(place, seed)
    common = [*map(str, experts.values()), "--base", str(base), "--json"]
    for domain, file in tasks.items():
        common += ["--task", f"{domain}={file}"]
    needed = {title: needs for title, (needs, _) in learned(few).items()}
    asked = lines(settings, few) | {title: spec for title, (_, spec) in learned(few).items()}
    asked |= {title: method for title, (method, _) in by_statistics().items()}
    words = [part for spec in asked.values() for part in ("-m", spec)]
    for file in collected(experts, base, tasks, place, few):
        words += ["--statistics", file]
    first, *compared = _said("compare", *common, *words)
    alone, merged = compared[: len(experts)], compared[len(experts) :]
    by_title = dict(zip(asked, merged, strict=True))
    # A greedy soup has scored every expert by itself on validation.
    chosen = {each["label"]: each["value"] for each in by_title["Greedy soup"]["selection"]}
    best = max(experts, key=lambda domain: chosen[str(experts[domain])])
    own = {d: _values(each)[d] for d, each in zip(experts, alone, strict=True)}
    found = [
        Line("Base", "base", _values(first)),
        Line("Experts, each in its own domain", "experts", own),
        Line("Best single expert", "single", _values(alone[[*experts].index(best)]), LABELS, best),
    ]
    for title, each in by_title.items():
        (place / f"{title.lower().replace(',', '').replace(' ', '-')}.json").write_text(
            json.dumps(each["recipe"])
        )
        needs = needed.get(title) or _needs(title, each["chosen"])
        found.append(Line(title, "merge", _values(each), needs, each["chosen"], each["seconds"]))
    return found


def collected(
    experts: Mapping[str, Path],
    base: Path,
    tasks: Mapping[str, Path],
    place: Path,
    few: bool = False,
) -> list[str]:
    """Collect what merges by statistics need, on the validation images of each expert's domain."""
    files = []
    for _, kind in by_statistics().values():
        line = [*map(str, experts.values()), "--base", str(base), "--json", "--kind", kind]
        for domain in experts:
            line += ["--task", f"{domain}={tasks[domain]}"]
        line += ["--batches", "1"] if few else []
        made = _said("fit", "statistics", *line, "-o", str(place / kind), "--force")
        files += [each["path"] for each in made]
    return files


def _needs(title: str, chosen: str) -> str:
    if title in BY_STATISTICS:
        return TEXTS
    return LABELS if chosen else NOTHING


def _values(each: Mapping[str, Any]) -> dict[str, float]:
    return {task["task"]: task["scores"]["accuracy"] for task in each["tasks"]}


def _said(*line: str) -> Any:
    whole = [find_command(), *line]
    surroundings = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(whole, capture_output=True, text=True, check=False, env=surroundings)
    if done.returncode:
        raise RuntimeError(f"{' '.join(whole)}\nexited {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout)
