"""Fits inside of a comparison: ``fit …`` as it is typed, with the comparison's models and tasks."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from mergebench.merge.fit.candidate import Candidate
    from mergebench.merge.fit.compare import Fitted
    from mergebench.merge.fit.entries import Entry
    from mergebench.merge.fit.scores import Scores
    from mergebench.recipe import Recipe

#: Of what is kept: fits that did something else before must not be taken for what they do now.
_VERSION = 2
#: What the comparison says itself.
_OURS = ("out", "force", "as_json", "quiet", "models", "task")


class Nested:
    """Runs fits by their own commands, so that all there are, and all their options, are known.

    Parameters
    ----------
    models, tasks : sequence of str
        As they were given.
    recipe : Recipe
        The models alone.
    scores : Scores
    given : mapping of parameter to value
        What the comparison was told, passed on to fits that have such an option.
    make : callable
    kept : bool
        Whether recipes are kept for a later run, beside the scores.
    """

    def __init__(
        self,
        models: Sequence[str],
        tasks: Sequence[str],
        recipe: Recipe,
        scores: Scores,
        given: Mapping[str, Any],
        make: Callable[[Recipe, str], Candidate],
        *,
        kept: bool,
    ) -> None:
        self._models, self._tasks, self._recipe = list(models), list(tasks), recipe
        self._scores, self._given, self._make, self._kept = scores, dict(given), make, kept

    def check(self, entries: Sequence[Entry]) -> None:
        """Refuse fits that there are not, and options that they do not have, before any work.

        Raises
        ------
        ParameterError
        """
        for entry in entries:
            if entry.fit:
                command = _command(entry)
                with _named(entry):
                    command.make_context("fit", [*entry.fit[1:], *self._models])

    def __call__(self, entry: Entry) -> Fitted:
        """The recipe that a fit makes.

        Raises
        ------
        MergebenchError
            As the command does.
        """
        from mergebench.merge.fit.scores import default_file

        place = default_file().parent / "fits" / f"{self._key(entry)}.json"
        place.parent.mkdir(parents=True, exist_ok=True)
        with suppress(OSError, ValueError, KeyError, TypeError):
            if self._kept:
                return _fitted(json.loads(place.read_text(encoding="utf-8")))
        found = self._run(entry, place.with_suffix(".journal"))
        if self._kept:
            from mergebench.pages.files import replaced

            with replaced(place) as file:
                json.dump(found, file)
        return _fitted(found)

    def _key(self, entry: Entry) -> str:
        plain = replace(self._recipe, base=None, include=(), exclude=())
        with self._make(plain, "models") as candidate:
            key = candidate.key
        given = {
            name: self._given[name]
            for name in ("base", "select", "report_on", "limit", "include", "exclude")
        }
        about = [_VERSION, list(entry.fit), key, [task.spec for task in self._scores.tasks], given]
        return hashlib.blake2b(json.dumps(about).encode(), digest_size=16).hexdigest()

    def _run(self, entry: Entry, journal: Path) -> dict[str, Any]:
        from mergebench.recipe.reading import read_recipe

        command = _command(entry)
        known = {each.name: each for each in command.params}
        said = {each.name for each in command.params
                if set(each.opts) & {word.partition("=")[0] for word in entry.fit[1:]}}  # fmt: skip
        words = [*entry.fit[1:], *self._models, "--json"]
        if self._kept and "study" in known and "study" not in said:
            words += ["--study", str(journal)]
        for task in self._tasks:
            words += ["--task", task]
        # What learns takes its last epoch unless its line asks for scores: `--select` looks at
        # labels, which fits without them must not see.
        passed = {k: v for k, v in self._given.items() if k != "select" or "learn_on" not in known}
        for name, value in passed.items():
            if name not in known or name in said or value is None or value is False:
                continue
            option = known[name].opts[0]
            for each in value if isinstance(value, list) else [value]:
                words += [option] if each is True else [option, str(each)]
        with TemporaryDirectory(prefix="mergebench-fit-") as folder:
            out = Path(folder) / "fit.yaml"
            text, started = io.StringIO(), perf_counter()
            with redirect_stdout(text), _named(entry):
                command.main([*words, "-o", str(out)], prog_name="fit", standalone_mode=False)
            seconds = perf_counter() - started
            recipe = read_recipe(out)
        data = json.loads(text.getvalue())
        tried = data.get(self._given["select"])
        trials = [[each["label"], each["value"]] for each in tried or [] if "label" in each]
        return {
            "recipe": recipe.to_dict(), "chosen": str(data.get("chosen", "")),
            "seconds": round(seconds, 3), "trials": trials,
        }  # fmt: skip


def _fitted(data: Mapping[str, Any]) -> Fitted:
    from mergebench.merge.fit.compare import Fitted
    from mergebench.recipe.reading import recipe_from_dict

    trials = tuple((str(label), value) for label, value in data["trials"])
    return Fitted(recipe_from_dict(data["recipe"]), data["chosen"], data["seconds"], trials)


def _command(entry: Entry) -> Any:
    from mergebench.cli.fitting import app
    from mergebench.core.errors import ParameterError, did_you_mean

    group: Any = typer.main.get_command(app)
    name = entry.fit[0] if entry.fit else ""
    if name not in group.commands:
        raise ParameterError(
            f"{entry.title!r}: there is no such fit", fix=did_you_mean(name, group.commands)
        )
    command = group.commands[name]
    taken = {word for each in command.params if each.name in _OURS for word in each.opts}
    for word in entry.fit[1:]:
        if word.startswith("-") and word.partition("=")[0] in taken:
            raise ParameterError(
                f"{entry.title!r}: {word} is said by the comparison", fix="leave it out"
            )
    return command


@contextmanager
def _named(entry: Entry) -> Iterator[None]:
    """Name the entry in what typer says of a wrong command line."""
    from mergebench.core.errors import ParameterError

    try:
        yield
    except Exception as error:
        words = getattr(error, "format_message", None)
        if words is None:
            raise
        raise ParameterError(f"{entry.title!r}: {words().rstrip('.')}") from None
