"""Options that decide how a command uses the machine, each with its environment variable."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from mergebench.cli.options import size

Memory = Annotated[
    str,
    typer.Option(
        "--memory",
        help="Most memory to use, above the libraries; such as 512MiB.",
        envvar="MERGEBENCH_MEMORY",
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers", min=1, help="Threads; all cores by default.", envvar="MERGEBENCH_WORKERS"
    ),
]


def _kernels(choice: str) -> str:
    """Hand a choice on to where kernels are loaded."""
    if choice not in ("auto", "on", "off"):
        raise typer.BadParameter(f"{choice!r} is none of auto, on, off")
    os.environ["MERGEBENCH_KERNELS"] = choice
    return choice


Kernels = Annotated[
    str,
    typer.Option(
        "--kernels",
        help="Compiled code for what it can do: auto, for merges of some size; on; off, to compare "
        "or to go round it.",
        envvar="MERGEBENCH_KERNELS",
        callback=_kernels,
    ),
]
Executor = Annotated[
    str,
    typer.Option(
        "--executor",
        help="threads, of this machine; dask, the workers of the cluster of --scheduler.",
        envvar="MERGEBENCH_EXECUTOR",
    ),
]
Scheduler = Annotated[
    str | None,
    typer.Option(
        "--scheduler",
        help="Of a Dask cluster: an address such as tcp://10.0.0.1:8786, or its scheduler file.",
        envvar="MERGEBENCH_SCHEDULER",
        show_default=False,
    ),
]
Worker = Annotated[
    str | None,
    typer.Option(
        "--worker",
        help="i/N: be one of N that make one output on a shared disk; start 0/N to (N-1)/N.",
        show_default=False,
    ),
]
Wait = Annotated[
    float,
    typer.Option(
        "--wait", min=0, help="Seconds to wait for a worker that has not started.",
        envvar="MERGEBENCH_WAIT",
    ),
]  # fmt: skip


def _page_cache(size_: str) -> str:
    """Hand a limit on to where it is looked at."""
    if size_ != "auto":
        size("--page-cache", size_)
    os.environ["MERGEBENCH_PAGE_CACHE"] = size_
    return size_


PageCache = Annotated[
    str,
    typer.Option(
        "--page-cache",
        metavar="SIZE|auto",
        help="A merge that reads and writes more than this takes out of the system's page cache "
        "what it is done with; auto: half of the memory that is available, and outputs of "
        "256 MiB and more go past it.",
        envvar="MERGEBENCH_PAGE_CACHE",
        callback=_page_cache,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        help="Where is computed: cpu; cuda or cuda:1; auto, the first GPU if there is one; torch, "
        "as on a GPU but on the processor, to compare.",
        envvar="MERGEBENCH_DEVICE",
    ),
]
Cache = Annotated[
    str,
    typer.Option(
        "--cache",
        help="Models on the Hub: keep, download them into its cache; none, read them where they "
        "are.",
        envvar="MERGEBENCH_CACHE",
    ),
]


def streams(cache: str) -> bool:
    """Whether models on the Hub are read where they are.

    Raises
    ------
    ParameterError
    """
    from mergebench.core.errors import ParameterError

    if cache not in ("keep", "none"):
        raise ParameterError("--cache", got=repr(cache), expected="keep or none")
    return cache == "none"
