"""Processes of their own without a start of their own: forked from one that has imported enough.

Such a process reads its environment anew and takes what it did with it to its end, as any other,
but for what was imported before the fork. Starting Python and importing the command takes many
times as long as running the command on a small model.
"""

from __future__ import annotations

import atexit
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from tests.helpers.running import Ran, clean_environment

# Answers go where standard output went, so that nothing that is printed is taken for one. A process
# that hangs is ended as one of its own would be.
_SERVER = """
import gc, json, os, signal, sys
code, ready = None, sys.argv[1]
exec(ready, {"__name__": "ready"})
asked, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
gc.freeze()
for line in asked:
    order = json.loads(line)
    child = os.fork()
    if child == 0:
        code = order["code"]
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)
if code is not None:
    signal.alarm(300)
    asked.close()
    answers.close()
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    sys.argv[:] = ["-c", *order["args"]]
    for place, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(order[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), place)
    exec(code, {"__name__": "__main__"})
"""


class Forked:
    """A process that waits, ready to be forked.

    Parameters
    ----------
    ready : str
        Python that it runs once, before it is forked.
    """

    def __init__(self, ready: str) -> None:
        self._turn = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVER, ready],
            env=clean_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(self.close)

    def close(self) -> None:
        """Let it end."""
        self._process.communicate()

    def __call__(
        self, code: str, *args: Any, cwd: Path, env: Mapping[str, str] | None = None
    ) -> Ran:
        """As :func:`tests.helpers.running.python`, in a process forked from this one."""
        with tempfile.TemporaryDirectory() as folder, self._turn:
            out, err = Path(folder, "out"), Path(folder, "err")
            order = {
                "code": code, "args": [*map(str, args)], "cwd": str(cwd),
                "env": clean_environment(env), "out": str(out), "err": str(err),
            }  # fmt: skip
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            print(json.dumps(order), file=self._process.stdin, flush=True)
            said = self._process.stdout.readline()
            assert said, "the process that was to be forked has ended"
            return Ran(int(said), out.read_text(), err.read_text())


@cache
def forked(ready: str) -> Forked:
    """The process that has run this piece of Python, started by the first who asks."""
    return Forked(ready)
