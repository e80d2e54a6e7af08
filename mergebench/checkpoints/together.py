"""Several outputs of one run, which appear once all of them are complete."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Protocol

from mergebench.checkpoints.staging import Stage
from mergebench.core.errors import ResourceError


class Opening(Protocol):
    """What of an output this looks at."""

    stage: Stage
    kept: bool

    def enter(self) -> None:
        """Open it."""

    def seal(self) -> None:
        """Check that nothing is missing and wait until all of it is on the disk."""

    def leave(self, *, resumable: bool) -> None:
        """Give up, keeping what a later run can use."""


@contextmanager
def together(outputs: Sequence[Opening]) -> Iterator[None]:
    """Open several outputs of one run, and let them appear once all of them are complete.

    A run that is killed while they appear is recognised by the next one with the same keys,
    which then shows the rest. An error after which that helps carries a note saying so.

    Raises
    ------
    ResourceError, MergebenchError
        As entering an output, and if the system refuses to write or to rename.
    """
    entered = False
    try:
        for output in outputs:
            output.enter()
        entered = True
        yield
        for output in outputs:
            output.seal()
        for output in outputs:
            output.stage.swap()
    except BaseException as error:
        # An error before any work says nothing about what earlier runs have left.
        resumable = not entered or is_resumable(error)
        with ExitStack() as stack:
            for output in outputs:
                stack.callback(output.leave, resumable=resumable)
        if any(output.kept for output in outputs):
            error.add_note("what is done is kept: run the same command again to go on from there")
        raise
    try:
        with ExitStack() as stack:
            for output in outputs:
                stack.callback(output.stage.forget)
    except KeyboardInterrupt as error:
        error.add_note("the output is complete")
        raise


def is_resumable(error: BaseException) -> bool:
    """Whether the same command may succeed next time: not so if an input or the plan is wrong."""
    outside = (OSError, ResourceError, MemoryError)
    return (
        not isinstance(error, Exception)
        or isinstance(error, outside)
        or isinstance(error.__cause__, OSError)
    )
