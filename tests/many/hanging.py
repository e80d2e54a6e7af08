"""What makes one worker of a cluster stand still, so that it can be killed there."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from distributed import Worker, WorkerPlugin

from mergebench.merge.many import crew


class Hang(WorkerPlugin):
    """Makes whichever worker comes first to a step stand still there for ever.

    Its process is written into a marker.
    """

    def __init__(self, step: str, marker: str) -> None:
        self.step, self.marker = step, marker

    def setup(self, worker: Worker) -> None:
        """Replace a step of units by one that may hang."""
        self.true = getattr(crew, self.step)
        setattr(crew, self.step, self.once)

    def once(self, *arguments: Any) -> Any:
        """The step, unless this worker is the first."""
        try:
            with Path(self.marker).open("x") as file:
                file.write(str(os.getpid()))
        except FileExistsError:
            return self.true(*arguments)
        while True:
            time.sleep(1)

    def teardown(self, worker: Worker) -> None:
        """Put the step back."""
        setattr(crew, self.step, self.true)
