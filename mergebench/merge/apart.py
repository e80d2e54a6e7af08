"""Merges that give every model a result of its own: which is which, and what they are called."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mergebench.core.errors import ParameterError, did_you_mean
from mergebench.merge.at import At, Stack
from mergebench.merge.op import Chain, Op, OpSpec

_UNSAFE = re.compile(r"[^\w.=+~-]+|^\.+")


def _pick(stack: Stack, at: At, model: int) -> Stack:
    """The row of one model."""
    return stack[model : model + 1, :]


_SPEC = OpSpec(
    name="pick",
    function=_pick,
    params={},
    granularity=lambda **_: "entry",
    statistic=lambda **_: None,
    reduces=True,
    linear=lambda **_: True,
    chooses=True,
)


@dataclass(frozen=True)
class _Pick(Op):
    """Ends the chain of one model's result; the rest of the chain is shared by all of them.

    It is no registered op: the order of models is the merge's own, which users do not see.
    """

    @property
    def spec(self) -> OpSpec:
        return _SPEC


def pick(model: int) -> Op:
    """The op that leaves the task vector of one model, by its place in canonical order."""
    return _Pick("pick", (("model", model),))


def place_of(tail: Chain) -> int:
    """The place in canonical order of the model whose result a chain with this end gives."""
    ((_, place),) = tail[0].params
    return int(place)


def names_of(labels: Sequence[str]) -> tuple[str, ...]:
    """What the results of models are called: the last parts of their paths that differ.

    Parameters
    ----------
    labels : sequence of str
        Paths or references, ``base+adapter`` among them (which is called after the adapter).

    Returns
    -------
    tuple of str
        Different from each other, whatever the case of letters, and fit for names of files. Equal
        labels are numbered in their order: ``ft``, ``ft-2``.
    """
    parts = [_parts(label) for label in labels]
    depth = [1] * len(parts)
    for _ in range(max((len(each) for each in parts), default=0)):
        names = [_joined(each, count) for each, count in zip(parts, depth, strict=True)]
        twice = [index for index, name in enumerate(names) if _lower(names).count(name.lower()) > 1]
        for index in twice:
            others = [
                parts[other] for other in twice if names[other].lower() == names[index].lower()
            ]
            if any(other != parts[index] for other in others):
                depth[index] += 1
    return _numbered([_joined(each, count) for each, count in zip(parts, depth, strict=True)])


def _parts(label: str) -> list[str]:
    path = Path(label.rpartition("+")[2] or label)
    path = path if path.name not in ("", "..") else path.resolve()
    whole = [*path.parts[:-1], path.stem if path.suffix in _SUFFIXES else path.name]
    safe = [_UNSAFE.sub("_", part).strip("_") for part in whole]
    return [part for part in safe if part.strip(".")] or ["model"]


_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".json")


def _joined(parts: Sequence[str], count: int) -> str:
    return "-".join(parts[-count:])


def _lower(names: Sequence[str]) -> list[str]:
    return [name.lower() for name in names]


def _numbered(names: Sequence[str]) -> tuple[str, ...]:
    taken: set[str] = set()
    found = []
    for name in names:
        chosen, number = name, 1
        while chosen.lower() in taken or (number > 1 and chosen.lower() in _lower(names)):
            number += 1
            chosen = f"{name}-{number}"
        taken.add(chosen.lower())
        found.append(chosen)
    return tuple(found)


def chosen(tasks: Sequence[str], names: Sequence[str], method: str) -> tuple[int, ...]:
    """Places of the models whose results are wanted; all of them if ``tasks`` is empty.

    Raises
    ------
    ParameterError
        For a name that no model has, or one that is given twice.
    """
    for task in tasks:
        if task not in names:
            raise ParameterError(
                f"{method}: no result is called {task!r}",
                expected="one of " + ", ".join(sorted(names)),
                fix=did_you_mean(task, names),
            )
    if len(set(tasks)) < len(tasks):
        raise ParameterError(f"{method}: a task is named twice", got=", ".join(tasks))
    return tuple(names.index(task) for task in tasks) or tuple(range(len(names)))
