"""Units handed out to the workers of a Dask cluster."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any

from mergebench.core.errors import MergebenchError, ResourceError
from mergebench.merge.many.units import Unit

if TYPE_CHECKING:
    from distributed import Client

#: Units under way per worker: one is being done, the next one waits beside it.
_AHEAD = 2
#: Results per worker that wait for those before them.
_HELD = 8
#: Seconds between looks at whether there still are workers.
_LOOK = 1.0

Note = Callable[[str], None]


@dataclass(eq=False)
class Hands:
    """Units handed out to workers, a few at a time."""

    client: Client
    name: str
    patience: float
    note: Note | None
    _count: int = 0
    _looked: float = -_LOOK
    #: Since when there has been no worker.
    _alone: float | None = None

    def each(
        self,
        units: Iterable[tuple[Unit, tuple[Any, ...]]],
        work: Callable[..., Any],
        *,
        ordered: bool = False,
    ) -> Iterator[tuple[Unit, Any]]:
        """``(unit, result)`` as they come, or in order; a dead worker's units go to others."""
        waiting: deque[tuple[Unit, Any]] = deque()
        jobs = iter(units)
        try:
            while True:
                busy = sum(not future.done() for _, future in waiting)
                count = max(self._workers(), 1)
                room = min(_AHEAD * count - busy, _HELD * count - len(waiting))
                for _, (unit, arguments) in zip(range(room), jobs, strict=False):
                    waiting.append((unit, self._submit(work, arguments)))
                if not waiting:
                    return
                if not ordered:
                    waiting.rotate(-next((k for k, (_, f) in enumerate(waiting) if f.done()), 0))
                unit, future = waiting[0]
                if not future.done():
                    self._wait([each for _, each in waiting if not each.done()])
                    continue
                result = self._result(unit, future)
                waiting.popleft()
                yield unit, result
        except MergebenchError:
            raise
        except Exception as error:
            if isinstance(error, OSError) or self.client.status != "running":
                raise _gone(error) from error
            raise
        finally:
            with suppress(Exception):
                for _, future in waiting:
                    future.cancel()

    def _submit(self, work: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        # Never pure: what it does is to write.
        return self.client.submit(work, self.name, *arguments, pure=False)

    def _workers(self) -> int:
        """How many there are, or were a moment ago."""
        if monotonic() - self._looked >= _LOOK:
            self._count = len(self.client.scheduler_info()["workers"])
            self._looked = monotonic()
        return self._count

    def _wait(self, futures: Sequence[Any]) -> None:
        from distributed import wait

        with suppress(TimeoutError), self.client.as_current():
            wait(futures, timeout=_LOOK, return_when="FIRST_COMPLETED")
        if self._workers():
            self._alone = None
            return
        if self._alone is None:
            self._alone = monotonic()
            if self.note is not None:
                self.note(f"no worker is connected; waiting up to {self.patience:.0f} s for one")
        if monotonic() - self._alone > self.patience:
            raise ResourceError(
                "no worker is connected to the scheduler",
                got=f"none for {self.patience:.0f} s",
                fix="start some with `dask worker`, and run the same command again",
            )

    def _result(self, unit: Unit, future: Any) -> Any:
        from distributed import KilledWorker
        from distributed.client import FutureCancelledError

        try:
            result = future.result()
        except KilledWorker as error:
            raise ResourceError(
                f"{unit.names[0]}: every worker that was given it has died",
                got=str(error.last_worker.address if error.last_worker else "no worker"),
                fix="look at the workers' logs; their memory limit must exceed --memory by 1 GiB",
            ) from error
        except FutureCancelledError as error:
            raise _gone(error) from error
        except OSError as error:
            raise ResourceError(
                f"{unit.names[0]}: a worker cannot read or write", got=str(error)
            ) from error
        return _accepted(result)


def _gone(error: Exception) -> ResourceError:
    return ResourceError(
        "the scheduler of the cluster has gone",
        got=str(error) or type(error).__name__,
        fix="start it again, and run the same command",
    )


def _accepted(result: Any) -> Any:
    from mergebench.merge.many.crew import Refusal

    if isinstance(result, Refusal):
        if result.outside:
            raise result.error from OSError("on a worker")
        raise result.error
    return result
