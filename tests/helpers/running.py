"""The command, in this process for speed or in one of its own."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from mergebench.cli.main import main

#: What a terminal would act on.
UNSAFE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\u2066\ud800-\udfff]")
#: The installed command.
COMMAND = Path(sys.executable).with_name("mergebench")


@dataclass(frozen=True)
class Ran:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, parsed."""
        return json.loads(self.out)


#: Code that runs the command line in a process of its own.
MAIN = "from mergebench.cli.start import main; main()"
#: The same where it hears Ctrl-C: a shell that starts tests in the background leaves their children
#: deaf to it.
START = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); {MAIN}"


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment without what would change the command's behaviour."""
    ours = ("MERGEBENCH_", "NO_COLOR", "FORCE_COLOR", "COLUMNS", "PYTHONWARNINGS")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    return kept | dict(extra or {})


def call(*args: Any, cwd: Path, env: Mapping[str, str] | None = None) -> Ran:
    """Run the command line in this process, in a folder."""
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    with (
        chdir(cwd),
        patch.dict(os.environ, clean_environment(env), clear=True),
        patch.object(sys, "argv", ["mergebench", *map(str, args)]),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    return Ran(code, out.getvalue(), err.getvalue())


def command(*args: Any, cwd: Path, env: Mapping[str, str] | None = None) -> Ran:
    """Run the installed command in a process of its own."""
    done = subprocess.run(
        [COMMAND, *map(str, args)],
        cwd=cwd,
        env=clean_environment(env),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return Ran(done.returncode, done.stdout, done.stderr)


def python(code: str, *args: Any, cwd: Path, env: Mapping[str, str] | None = None) -> Ran:
    """Run a piece of Python in a process of its own, with arguments in ``sys.argv``."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        cwd=cwd,
        env=clean_environment(env),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    return Ran(done.returncode, done.stdout, done.stderr)


@contextmanager
def started(code: str, *args: Any, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    """A piece of Python that runs and can be talked to; it is killed at the end, if it still runs.

    Arguments stand in its ``sys.argv``.
    """
    with subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        cwd=cwd,
        env=clean_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL, and wait until it is dead by it."""
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL


def assert_done(ran: Ran) -> Ran:
    """Exit code 0."""
    assert ran.code == 0, ran
    return ran


def assert_refused(ran: Ran, *words: str, code: int = 2) -> None:
    """One line on standard error with these words, nothing on standard output."""
    assert ran.code == code, ran
    lines = ran.err.splitlines()
    assert len(lines) == 1, ran.err
    assert lines[0].startswith("error: "), ran.err
    assert "Traceback" not in ran.err
    for word in words:
        assert word in lines[0], (word, lines[0])
    assert ran.out == ""


def assert_safe(ran: Ran) -> None:
    """Neither stream holds a character that a terminal would act on."""
    assert not UNSAFE.search(ran.out), ran.out
    assert not UNSAFE.search(ran.err), ran.err
