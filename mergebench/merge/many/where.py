"""Where a merge runs: on threads of this process, on a Dask cluster, or as one worker of N."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from mergebench.core.errors import MergebenchError, ParameterError, did_you_mean
from mergebench.merge import engine
from mergebench.merge.engine import Progress
from mergebench.merge.many.numbered import WAIT, execute_as_worker, parse_seat
from mergebench.merge.many.standing import standing
from mergebench.merge.outcome import Written
from mergebench.merge.plan import Plan
from mergebench.packages import install_line

EXECUTORS = ("threads", "dask")


@dataclass(frozen=True)
class Where:
    """A choice, checked before anything is opened.

    Attributes
    ----------
    executor : threads (default) or dask
    scheduler : str or distributed.Client, optional
        Of the cluster: an address or a scheduler file.
    worker : str, optional
        ``i/N``.
    wait : float, seconds
        For a worker that has not started, or for a cluster that has none.
    device : str
        Where this process runs chains; see :func:`mergebench.merge.device.choose.device_of`.

    Raises
    ------
    ParameterError
        For words that do not go together, and without Dask where it is needed.
    """

    executor: str = "threads"
    scheduler: Any = None
    worker: str | None = None
    wait: float = WAIT
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.executor not in EXECUTORS:
            raise ParameterError(
                f"--executor: {self.executor!r}", fix=did_you_mean(self.executor, EXECUTORS)
            )
        dask = self.executor == "dask"
        if self.worker is not None:
            parse_seat(self.worker)
            if dask:
                raise ParameterError(
                    "--worker and --executor dask: a cluster numbers its workers itself",
                    fix="give one of them",
                )
        if dask and self.device != "cpu":
            raise ParameterError(
                f"--device {self.device}: the workers of a cluster compute on processors",
                fix="start --worker 0/N, 1/N … with a device each, or leave it out",
            )
        if self.scheduler is not None and not dask:
            raise ParameterError("--scheduler: is for --executor dask", fix="add --executor dask")
        if dask and find_spec("distributed") is None:
            raise ParameterError(
                "--executor dask: Dask is not installed here", fix=install_line("dask")
            )
        if dask and not self.scheduler:
            raise ParameterError(
                "--executor dask: no scheduler is given",
                fix="name its address or its file with --scheduler; `dask scheduler` and "
                "`dask worker ADDRESS` start a cluster",
            )

    def check(self, plan: Plan, *, force: bool) -> None:
        """As :func:`mergebench.merge.engine.check_outputs`, before any work.

        Others may have completed what this worker was to take part in; that is no error.

        Raises
        ------
        MergebenchError
        """
        try:
            engine.check_outputs(plan, force=force)
        except MergebenchError:
            if self.worker is None or standing(plan) is None:
                raise

    def execute(
        self,
        plan: Plan,
        *,
        memory: int,
        stream: bool = False,
        force: bool = False,
        progress: Progress | None = None,
        note: Callable[[str], None] | None = None,
    ) -> list[Written]:
        """Run a plan there, as :func:`mergebench.merge.engine.execute` does here.

        Parameters
        ----------
        plan : Plan
        memory : int, bytes
            With which it was made, of each process.
        stream : bool
            With which it was made.
        force, progress, note
            As there.
        """
        if self.worker is not None:
            return execute_as_worker(
                plan, parse_seat(self.worker), force=force, progress=progress, note=note,
                wait=self.wait,
            )  # fmt: skip
        if self.executor == "threads":
            return engine.execute(plan, force=force, progress=progress, note=note)
        from mergebench.merge.many.cluster import ClusterRun, check_inputs, connected

        check_inputs(plan)
        with connected(self.scheduler) as client:
            run = ClusterRun(client, memory, stream, self.wait)
            return engine.execute(plan, force=force, progress=progress, note=note, run=run)
