"""Worker i of N: equal commands on a shared disk make one output, and nobody coordinates them.

Every worker makes the same plan, cuts it into the same units and has the same share in mind for
everybody. What it has done it leaves on a board on the shared disk, where the others read it: the
results of sweeps over the whole model, which all then combine in the order of names, and the
digests of what has been merged. Units of a worker that has died are done by those who wait for
them. Who finds that all units are done puts the output into its place; the others see it there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from time import monotonic, sleep
from typing import Any

from mergebench.checkpoints.locks import TakenError
from mergebench.checkpoints.placed import Staged
from mergebench.checkpoints.reserving import discard, find_reserved, reserve, sharing
from mergebench.checkpoints.together import is_resumable
from mergebench.checkpoints.writer import Output
from mergebench.core.errors import MergebenchError, ParameterError
from mergebench.merge.ahead import room_of
from mergebench.merge.engine import Progress, execute, outputs_of
from mergebench.merge.many.agree import marks_of
from mergebench.merge.many.board import Board
from mergebench.merge.many.leases import LEASE, Lease, Watch, came
from mergebench.merge.many.standing import standing
from mergebench.merge.many.team import Seat, Team
from mergebench.merge.outcome import Found, Written, written
from mergebench.merge.plan import Plan

#: Seconds to wait for a worker that has not started.
WAIT = 600.0
#: Seconds between attempts to have an output alone, or together with others.
_LOOK = 0.1
#: Seconds for which another process may have an output alone: it is making it, or showing it.
_DOOR = 60.0

_KEPT = "what is done is kept: run the same command again to go on from there"

Outputs = Callable[[], list[Output]]


def parse_seat(text: str) -> Seat:
    """``i/N`` with i from 0 to N - 1.

    Raises
    ------
    ParameterError
        For anything else.
    """
    number, slash, count = text.partition("/")
    if slash and number.isdecimal() and count.isdecimal() and int(number) < int(count):
        return Seat(int(number), int(count))
    raise ParameterError(
        "--worker", got=repr(text), expected="i/N with i from 0 to N - 1, such as 0/3"
    )


def execute_as_worker(
    plan: Plan,
    seat: Seat,
    *,
    force: bool = False,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
    wait: float = WAIT,
    lease: float = LEASE,
) -> list[Written]:
    """Take part in a merge that N equal commands make together.

    Parameters
    ----------
    plan : Plan
        Every variant must have a place, on a disk that all of them share.
    seat : Seat
    force : bool, default False
        Replace existing outputs.
    progress, note : callable, optional
        As in :func:`mergebench.merge.engine.execute`.
    wait : float, seconds, default 600
        For a worker that has not started, without which nothing goes on.
    lease : float, seconds, default 30
        Without a sign of life after which a worker on another machine counts as dead.

    Returns
    -------
    list of Written, in the order of ``plan.variants``
        Once the outputs are in their places, whoever has put them there. Of outputs that stood
        there before this worker began, residuals and readings are not known.

    Raises
    ------
    MergebenchError
        As :func:`mergebench.merge.engine.execute`; if another process is the same worker; if
        workers of another number, or of another merge, are at work; and if a worker is missing.
    """
    outputs = partial(outputs_of, plan, force=force, room=room_of(plan))
    if (stands := _stands(plan, force, note)) is not None:
        return stands
    watch, board = Watch(lease), None
    try:
        with _joined(outputs) as staged:
            board = Board(outputs()[0].stage.room / _name(plan, staged))
            with Lease(board.folder, seat.number, seat.count, watch):
                team = Team(plan, board, seat, staged, watch, wait, progress, note)
                found, digests = team.run()
        return _finished(plan, outputs, staged, found, digests, force)
    except BaseException as error:
        if board is None:
            # The others may have ended since this worker began.
            here = _stands(plan, force, note) if isinstance(error, MergebenchError) else None
            if here is not None:
                return here
        elif is_resumable(error):
            if not getattr(error, "__notes__", ()):
                error.add_note(_KEPT)
        # Those who come later are to find the same, and must not wait for this one.
        elif came(board.folder, seat.count):
            discard(outputs())
        raise


def _stands(plan: Plan, force: bool, note: Callable[[str], None] | None) -> list[Written] | None:
    """The outputs, if the other workers have done without this one."""
    found = None if force else standing(plan)
    if found is not None and note is not None:
        note(f"{plan.variants[0].out}: is complete, the other workers have done it all")
    return found


def _name(plan: Plan, staged: Sequence[Staged]) -> str:
    """Names one merge into these very files."""
    about = [marks_of(plan), [each.files for each in staged]]
    return hashlib.blake2b(json.dumps(about).encode(), digest_size=8).hexdigest()


@contextmanager
def _joined(outputs: Outputs) -> Iterator[list[Staged]]:
    """The places of outputs, made by the worker who comes first and held by all together."""
    since = monotonic()
    with ExitStack() as held:
        while True:
            try:
                if find_reserved(outputs()) is None:
                    reserve(outputs())
                held.enter_context(sharing(outputs()))
                if (staged := find_reserved(outputs())) is not None:
                    break
                held.close()
            except TakenError:
                if monotonic() - since > _DOOR:
                    raise
                sleep(_LOOK)
        yield staged


def _finished(
    plan: Plan,
    made: Outputs,
    staged: Sequence[Staged],
    found: Found,
    digests: list[dict[str, str]],
    force: bool,
) -> list[Written]:
    """Put outputs into their places, or see that another worker has."""

    def filled(
        plan: Plan, outputs: Sequence[Output], ledger: Any, progress: Any, note: Any
    ) -> tuple[Found, list[dict[str, str]]]:
        # Only into these files have the workers written.
        if [each.staged.files for each in outputs] != [each.files for each in staged]:
            raise MergebenchError(
                f"{outputs[0].destination}: another run has taken the place of this one",
                fix="run all workers again",
            )
        for output, own in zip(outputs, digests, strict=True):
            for target, digest in own.items():
                output.take(target, digest)
        return found, digests

    places = [output.stage.place for output in made()]
    since = monotonic()

    def shown() -> bool:
        return all(each.is_here(place) for each, place in zip(staged, places, strict=True))

    while not shown():
        try:
            return execute(plan, force=force, run=filled)
        except TakenError:
            if monotonic() - since > _DOOR:
                raise
            sleep(_LOOK)
        except MergebenchError:
            # It may have appeared since we looked.
            if not shown():
                raise
    return written(plan, found, digests)
