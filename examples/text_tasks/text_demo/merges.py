"""The rows of the tables, each from one call of the installed ``mergebench`` command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from .settings import Settings

# A weight next to none: zero would take the expert's singular vectors out as well.
_SLIGHT = 0.001
NOTHING, LABELS, TEXTS = "–", "labels", "texts"


@dataclass(frozen=True)
class Row:
    """One line of a table: accuracies on the test split, per task.

    ``needs`` says what of the validation split it was made with: nothing, its labels, or its
    texts alone.
    """

    title: str
    role: str
    values: dict[str, float]
    needs: str = NOTHING
    chosen: str = ""
    seconds: float | None = None
    problem: str = ""

    @property
    def average(self) -> float | None:
        """Mean over the tasks."""
        return fmean(self.values.values()) if self.values else None


def methods(kind: str, few: bool = False) -> dict[str, str]:
    """Title of every data-free merge -> what ``compare -m`` is told."""
    if few:
        return {
            "Average": "linear",
            "Task arithmetic": "task_arithmetic:lam=0.3/0.7",
            "TSV-M": "tsv_merge:lam=1/1.3",
        }
    sums, wide = "lam=0.3/0.4/0.5/0.6/0.7/0.8/1", "lam=0.7/1/1.3/1.6/2"
    found = {
        "Average": "linear",
        "Task arithmetic": f"task_arithmetic:{sums}",
        "TIES": f"ties:density=0.2/0.5,{wide}",
        "Breadcrumbs": f"breadcrumbs:density=0.85/0.5,{sums}",
        "DARE": f"dare:{sums}",
        "LiNeS": "lines:lam=0.8/1,beta=0.2/0.4/0.6",
        "STAR": f"star:{wide}",
        "CART": f"cart:share=0.08/0.2,{wide}",
        "Iso-C": f"iso_c:{wide}",
        "Iso-CTS": f"iso_cts:{wide}",
        "WUDI, closed form": f"wudi:solver=exact,{sums}",
        "TSV-M": f"tsv_merge:{wide}",
        "TSV-M, LiNeS": "tsv_merge:lam=1.3/1.6/2+lines:beta=0.4",
    }
    if kind == "lora":
        found |= {
            "KnOTS TIES": f"knots_ties:density=0.2/0.5,{wide}",
            "Core Space TIES": f"core_ties:density=0.2/0.5,{wide}",
        }
    return found


@dataclass(frozen=True)
class Learned:
    """Coefficients to learn: what ``mergebench fit`` is told.

    ``parts`` learns them for what TSV-M makes of each expert instead of the experts themselves.
    """

    needs: str
    options: list[str]
    parts: bool = False


def learned(settings: Settings) -> dict[str, Learned]:
    """Every learned merge by its title."""
    # Ten times the published rate, for fewer steps than are published.
    rate, steps = ["--rate", "0.01"], ["--steps", str(settings.steps)]
    epochs = ["--epochs", str(settings.epochs)]
    adamerging = Learned(TEXTS, ["adamerging", *steps, *rate])
    on_parts = Learned(TEXTS, ["adamerging", *steps], parts=True)
    if settings.few:
        return {"AdaMerging": adamerging, "TSV-M, AdaMerging": on_parts}
    return {
        "AdaMerging, task-wise": Learned(TEXTS, ["adamerging", "--by", "task", *steps, *rate]),
        "AdaMerging": adamerging,
        "AdaMerging++": Learned(TEXTS, ["adamerging", "--plus", *steps, *rate]),
        "TSV-M, AdaMerging": on_parts,
        "aTLAS, test-time": Learned(TEXTS, ["atlas", "--setting", "test-time", *epochs, *rate]),
        "aTLAS": Learned(LABELS, ["atlas", *epochs, *rate]),
    }


def find_command() -> str:
    """Return the ``mergebench`` beside this Python, or else the one on the path."""
    beside = Path(sys.executable).with_name("mergebench")
    found = str(beside) if beside.exists() else shutil.which("mergebench")
    if found is None:
        raise FileNotFoundError("no `mergebench` command: install the package first")
    return found


def compared(
    experts: Mapping[str, Path],
    base: Path,
    tasks: Mapping[str, Path],
    kind: str,
    settings: Settings,
) -> list[Row]:
    """Base, experts and every data-free merge of one kind of experts."""
    chosen = methods(kind, settings.few)
    line = ["compare", *_common(experts, base, tasks, settings)]
    for spec in chosen.values():
        line += ["-m", spec]
    found: list[dict[str, Any]] = json.loads(_said(line, settings))
    rows = [_row(each) for each in found]
    singles = dict(zip(experts, rows[1:], strict=False))
    own = {name: row.values[name] for name, row in singles.items()}
    best = max(singles, key=lambda name: singles[name].average or 0.0)
    top = Row("Best single expert", "single", singles[best].values, chosen=best)
    named = [
        Row(title, "merge", row.values, LABELS if row.chosen else NOTHING, row.chosen, row.seconds,
            row.problem)
        for title, row in zip(chosen, rows[1 + len(experts):], strict=True)
    ]  # fmt: skip
    return [
        Row("Base", "base", rows[0].values),
        Row("Experts, each on its own task", "experts", own),
        top,
        *named,
    ]


def fitted(
    experts: Mapping[str, Path],
    base: Path,
    tasks: Mapping[str, Path],
    settings: Settings,
    out: Path,
) -> list[Row]:
    """What coefficients learned on the validation split reach; recipes are left in ``out``."""
    rows = []
    out.mkdir(parents=True, exist_ok=True)
    chosen = learned(settings)
    pieces = parts(experts, base, settings, out / "parts")
    for title, each in chosen.items():
        recipe = out / (title.lower().replace(", ", "-") + ".yaml")
        models = pieces if each.parts else experts
        line = ["fit", each.options[0], *_common(models, base, tasks, settings), *each.options[1:]]
        line += ["--device", settings.device, "-o", str(recipe), "--force"]
        found = json.loads(_said(line, settings))
        values = {one["task"]: one["scores"]["accuracy"] for one in found["test"]}
        rows.append(Row(title, "merge", values, each.needs))
    return rows


def parts(
    experts: Mapping[str, Path], base: Path, settings: Settings, out: Path
) -> dict[str, Path]:
    """What each expert contributes to TSV-M, as models of their own.

    TSV-M makes the singular vectors of all experts orthogonal, whatever their weights, and is
    linear in those: with all but one next to zero, the part of that one is left. Parts are four
    times as long as in TSV-M, so that AdaMerging, which starts at 0.3 and stays in [0, 1], starts
    at λ = 1.2 and reaches 4.
    """
    found = {}
    for name in experts:
        found[name] = out / name
        weighed = [f"{path}:{1 if other == name else _SLIGHT}" for other, path in experts.items()]
        line = ["merge", *weighed, "--base", str(base), "-m", "tsv_merge", "-p", "lam=4"]
        _said(
            [*line, "--memory", settings.memory, "--force", "--quiet", "-o", str(found[name])],
            settings,
        )
    return found


def _common(
    experts: Mapping[str, Path], base: Path, tasks: Mapping[str, Path], settings: Settings
) -> list[str]:
    line = [*map(str, experts.values()), "--base", str(base), "--memory", settings.memory]
    for name, file in tasks.items():
        line += ["--task", f"{name}=classify:{file}"]
    return [*line, "--json"]


def _row(each: Mapping[str, Any]) -> Row:
    values = {one["task"]: one["scores"].get("accuracy") for one in each["tasks"]}
    problem = each.get("problem", "")
    return Row(
        each["model"], each["role"], {} if problem else values,
        chosen=each["chosen"], seconds=each["seconds"], problem=problem,
    )  # fmt: skip


def _said(line: Sequence[str], settings: Settings) -> str:
    whole = [find_command(), *line]
    surroundings = os.environ | {"OMP_NUM_THREADS": str(settings.threads)}
    done = subprocess.run(whole, capture_output=True, text=True, check=False, env=surroundings)
    if done.returncode:
        raise RuntimeError(f"{' '.join(whole)}\nexited {done.returncode}:\n{done.stderr}")
    return done.stdout
