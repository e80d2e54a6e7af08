"""Outputs that several processes make together, none of which has them open all the time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

from mergebench.checkpoints.locks import TakenError
from mergebench.checkpoints.placed import Staged
from mergebench.checkpoints.writer import Output
from mergebench.core.errors import MergebenchError

#: In journals of outputs that are reserved.
_RESERVED = "reserved"


def reserve(outputs: Sequence[Output]) -> None:
    """Make the places of outputs, or find them, and leave them to others with the same keys.

    They stay as after a run that was interrupted.

    Raises
    ------
    TakenError
        If another run has one of them, alone or with others.
    ResourceError, MergebenchError
        As entering an output; and where the disk has neither locks nor numbers of files, by which
        others could know whose the places are.
    """
    try:
        for output in outputs:
            output.enter()
        for output in outputs:
            if output.stage.journal is None and not output.stage.finished:
                raise MergebenchError(
                    f"{output.destination}: workers cannot share a disk without locks",
                    fix="write to another disk, or merge without --worker",
                )
            output.settle(_RESERVED, True)
            output.record()
    finally:
        with ExitStack() as stack:
            for output in outputs:
                stack.callback(output.leave, resumable=True)


def find_reserved(outputs: Sequence[Output]) -> list[Staged] | None:
    """Where outputs with these keys are being made; ``None`` unless all of them are."""
    found = []
    for output in outputs:
        root = output.stage.standing()
        if root is None:
            return None
        try:
            found.append(output.staged_at(root))
        except OSError:
            return None
    return found


@contextmanager
def sharing(outputs: Sequence[Output]) -> Iterator[None]:
    """Keep runs of other merges away from outputs that are reserved.

    Raises
    ------
    TakenError
        If a run has one of them alone.
    """
    with ExitStack() as stack:
        for output in sorted(outputs, key=lambda each: str(each.stage.place)):
            lock = output.stage.join()
            if lock is not None:
                stack.callback(lock.release)
        yield


def discard(outputs: Sequence[Output]) -> None:
    """Delete what was reserved, unless others are at it."""
    with suppress(TakenError), ExitStack() as stack:
        for output in outputs:
            stack.callback(output.leave, resumable=False)
            output.enter()
