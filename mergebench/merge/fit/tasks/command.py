"""Any program that is given a model's folder and prints JSON."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from mergebench.core.errors import MergebenchError, ParameterError
from mergebench.core.plain import parse_json
from mergebench.merge.fit.find import TASKS, Setting
from mergebench.merge.fit.task import UnderTest

#: Most characters of a program's complaint that are shown.
_TAIL = 300


class Command:
    """``program --model {path} --split {split}``: its last line that is a JSON object counts.

    No shell is involved, so a path cannot be taken for anything else. ``{path}`` is the folder of
    the model, ``{split}`` the split, ``{label}`` what the candidate is called.
    """

    def __init__(self, text: str, timeout: float | None) -> None:
        try:
            self.words = shlex.split(text)
        except ValueError as error:
            raise ParameterError(f"--task: {text!r} is no command", got=str(error)) from None
        self.timeout = timeout

    def score(self, model: UnderTest, split: str) -> Mapping[str, float]:
        """Run the program; see :class:`~mergebench.merge.fit.task.Scorer`."""
        given = {"{path}": str(model.folder()), "{split}": split, "{label}": model.label}
        words = [_filled(word, given) for word in self.words]
        try:
            done = _run(words, self.timeout)
        except subprocess.TimeoutExpired:
            raise MergebenchError(f"{self.words[0]}: took longer than {self.timeout:g} s") from None
        except OSError as error:
            raise MergebenchError(
                f"{self.words[0]}: cannot be run", got=str(error.strerror)
            ) from None
        if done.returncode:
            tail = " ".join(done.stderr.split())[-_TAIL:]
            raise MergebenchError(
                f"{self.words[0]}: exit code {done.returncode}", got=tail or "no message"
            )
        return _last_object(done.stdout, self.words[0])


def _run(words: list[str], timeout: float | None) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; whatever ends that early also ends all that it has started.

    Killing the program alone would leave its children, which hold the pipes that are read here
    and the memory that the next candidate needs.
    """
    process = subprocess.Popen(  # noqa: S603 - it is the user's own command
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        # A session of its own, so that its group holds nothing else.
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException:
        _end(process)
        raise
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def _end(process: subprocess.Popen[str]) -> None:
    if hasattr(os, "killpg"):
        # It is gone where the program and its children have ended by themselves.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()
    process.wait()


def _filled(word: str, given: Mapping[str, str]) -> str:
    return re.sub("|".join(map(re.escape, given)), lambda found: given[found[0]], word)


def _last_object(text: str, name: str) -> dict[str, Any]:
    """The whole output, or its last line, that is a JSON object."""
    for part in [text, *reversed(text.splitlines())]:
        try:
            data = parse_json(part)
        except ValueError:
            continue
        if isinstance(data, dict):
            return data
    raise MergebenchError(
        f"{name}: printed no JSON object", got=text.strip()[-_TAIL:] or "nothing",
        expected='such as {"accuracy": 0.9}',
    )  # fmt: skip


TASKS.add("command", lambda text, setting: Command(text, setting.timeout))
__all__ = ["Command", "Setting"]
