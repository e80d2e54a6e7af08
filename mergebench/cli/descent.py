"""Options and output that commands share which learn by gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergebench.cli import console
from mergebench.cli import scoring as s

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from mergebench.merge.fit.learn import Learned, Settings
    from mergebench.merge.fit.mixture import Keep, Mixture
    from mergebench.merge.fit.scores import Scores
    from mergebench.merge.fit.soups import Make
    from mergebench.merge.plan import Plan
    from mergebench.recipe import Recipe

LearnOn = Annotated[str, typer.Option("--learn-on", help="Split whose batches are learned from.")]
Select = Annotated[
    str | None,
    typer.Option(
        "--select", help="Score every epoch on this split and take the best; else the last."
    ),
]
Epochs = Annotated[int | None, typer.Option("--epochs", min=1, help="Passes over the split.")]
Rate = Annotated[float | None, typer.Option("--rate", help="Learning rate of AdamW.")]
Patience = Annotated[
    int,
    typer.Option(
        "--patience", min=0, help="Stop after so many epochs that are no better (0: never)."
    ),
]
Seed = Annotated[
    int, typer.Option("--seed", min=0, help="Of the order of batches, and what else is drawn.")
]
Precision = Annotated[
    str, typer.Option("--precision", help="Of forward passes: float32, bfloat16 or float16.")
]


#: Coefficients that cannot move so far have learned little.
_FAR = 0.1


@dataclass(frozen=True)
class Asked:
    """What the user has asked for, but for how to learn."""

    models: list[str]
    task: list[str] | None
    base: str | None
    learn_on: str
    select: str | None
    report_on: str
    device: str
    out: Path
    force: bool
    limit: int | None
    batch_size: int
    memory: str
    workers: int | None
    as_json: bool
    quiet: bool
    forget: list[str] = field(default_factory=list)
    parts: int = 1
    blocks: int | None = None
    budget: int | None = None
    include: list[str] | None = None
    exclude: list[str] | None = None


def checked(asked: Asked) -> Scores:
    """The tasks, and all that can be refused before a model is opened."""
    from mergebench.core.errors import ParameterError, did_you_mean

    s.check_free(asked.out, asked.force)
    scores = s.scores_of(asked.task, asked.base, asked.limit, asked.batch_size, None, "stop", False)
    names = [each.name for each in scores.tasks]
    for name in asked.forget:
        if name not in names:
            raise ParameterError(f"--forget: no task {name!r}", fix=did_you_mean(name, names))
    for option, split in (("--learn-on", asked.learn_on), ("--select", asked.select)):
        if split == asked.report_on:
            raise ParameterError(
                f"{option} and --report-on are both {split!r}",
                fix="report on a split that nothing was learned from",
            )
    return scores


def advised(device: str) -> AbstractContextManager[None]:
    """As :func:`mergebench.merge.fit.memory.advised`."""
    from mergebench.merge.fit.memory import advised

    return advised(device)


def blocks_of(asked: Asked, plan: Plan, scores: Scores, settings: Settings) -> Keep | None:
    """Which blocks are held; all of them unless options say otherwise."""
    from mergebench.merge.fit.blocks import informative
    from mergebench.merge.fit.memory import check_room

    check_room(plan, asked.device, asked.budget)
    if asked.blocks is None and asked.budget is None:
        return None
    chosen = informative(
        plan,
        scores.tasks,
        settings,
        asked.learn_on,
        most=asked.blocks,
        budget=asked.budget,
        signs=dict.fromkeys(asked.forget, -1.0),
        device=asked.device,
    )
    return lambda name, row: (name, row) in chosen


def check_size(mixture: Mixture) -> None:
    """Refuse coefficients that no recipe would hold."""
    from mergebench.core.errors import ParameterError
    from mergebench.core.plain import JSON_VALUES
    from mergebench.recipe.reading import LARGEST

    # Numbers of float32 take fifteen characters at most, with what stands between them.
    each = 15 * mixture.parts + 32
    names = [name for row in mixture.vectors for name in row]
    size = sum(len(name.encode()) + each for name in names) + (1 << 16)
    if size > LARGEST or 2 * len(names) > JSON_VALUES:
        raise ParameterError(
            f"the recipe might have {size >> 20} MiB and {len(names):,} coefficients by name",
            expected=f"at most {LARGEST >> 20} MiB and {JSON_VALUES // 2:,} of them",
            fix="fewer --parts, or fewer blocks (--blocks, --budget)",
        )


def run(
    asked: Asked,
    mixture: Mixture,
    scores: Scores,
    settings: Settings,
    recipe_of: Callable[[Any], Recipe],
    make: Make,
    key: str,
) -> Learned:
    """Learn, with a bar, and what is learned so far beside the recipe."""
    import torch

    from mergebench.merge.fit.learn import learn
    from mergebench.merge.fit.state import Kept
    from mergebench.merge.fit.watch import watch

    about = (key, settings, [each.spec for each in scores.tasks], asked.learn_on, asked.select,
             asked.forget, asked.parts, asked.blocks, asked.budget, asked.batch_size,
             asked.device.partition(":")[0], torch.__version__)  # fmt: skip
    kept = Kept(asked.out.with_name(f"{asked.out.name}.state"), repr(about))
    if asked.force and not kept.is_own():
        kept.remove()
    elif kept.path.exists() and not asked.quiet:
        console.note(f"going on with {kept.path}, which an earlier run has left")
    seen = None
    if asked.select is not None:
        seen = watch(recipe_of, scores, asked.select, make, asked.forget)
    with console.bar(asked.quiet or asked.as_json, "steps") as progress:
        return learn(
            mixture,
            scores.tasks,
            settings,
            asked.learn_on,
            signs=dict.fromkeys(asked.forget, -1.0),
            tell=progress,
            device=asked.device,
            watch=seen,
            kept=kept,
        )


def form_of(mixture: Mixture) -> str:
    """How the recipe is written: as what the models are, where that loses nothing."""
    linear = mixture.parts == 1 and mixture.plan.recipe.method == "task_arithmetic"
    return "auto" if linear else "model"


def plain(asked: Asked, learned: Learned) -> dict[str, Any]:
    """What was learned, for programs."""
    data: dict[str, Any] = {"recipe": str(asked.out), "history": list(learned.history)}
    if learned.scores:
        data |= {"scores": list(learned.scores), "epoch": learned.epoch}
    return data | ({"temperatures": list(learned.heat)} if learned.heat else {})


def show(learned: Learned) -> None:
    """What was learned, in words."""
    console.say(
        f"loss {learned.history[0]:.4g} in the first epoch, {learned.history[-1]:.4g} in the last"
    )
    if learned.scores:
        first, best = learned.scores[0], learned.scores[learned.epoch]
        console.say(
            f"score {s.number(first)} at the start, {s.number(best)} after epoch {learned.epoch} "
            f"of {len(learned.history)}, which is taken"
        )
    elif learned.epoch != len(learned.history):
        console.say(f"taken after epoch {learned.epoch} of {len(learned.history)}")
    # The papers' rates are those of data sets of many thousands.
    if learned.reach < _FAR:
        console.say(
            f"coefficients move by {learned.reach:.3g} at most in {learned.steps} steps at this "
            "rate: raise --rate, or give more batches"
        )
