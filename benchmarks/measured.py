"""One measured run in a process of its own: the floor, a merge, or a loop. Prints JSON.

CPU seconds are those of this process; memory is the peak of anonymous memory (RssAnon) above
what the imported libraries take.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

_BLOCK = 1 << 20


def anonymous() -> int:
    """Bytes of anonymous memory that this process holds now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the kernel reports no RssAnon")


def measure(work: Callable[[], object]) -> dict[str, float]:
    """Wall and CPU seconds and the peak of anonymous memory of ``work``."""
    baseline = anonymous()
    peak = baseline
    running = True

    def watch() -> None:
        nonlocal peak
        while running:
            peak = max(peak, anonymous())
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    wall, cpu = time.perf_counter(), time.process_time()
    watcher.start()
    try:
        work()
    finally:
        running = False
        watcher.join()
    return {
        "wall": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
        "memory": peak - baseline,
    }


def read(inputs: list[str]) -> bytearray:
    """Read every input byte once; returns the last block."""
    buffer = bytearray(_BLOCK)
    for name in inputs:
        source = os.open(name, os.O_RDONLY)
        size = os.fstat(source).st_size
        for start in range(0, size, _BLOCK):
            os.preadv(source, [buffer], start)
        os.close(source)
    return buffer


def floor(inputs: list[str], out: str, size: int | None = None) -> None:
    """Read every input byte once and write ``size`` bytes, or as many as the first input has."""
    buffer = read(inputs)
    size = Path(inputs[0]).stat().st_size if size is None else size
    target = os.open(out, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.posix_fallocate(target, 0, size)
    for start in range(0, size, _BLOCK):
        os.pwrite(target, memoryview(buffer)[: min(_BLOCK, size - start)], start)
    os.close(target)


class Nowhere:
    """A sink that forgets what it is given."""

    def write(self, name: str, byte_start: int, data: object) -> None:
        """Forget entries."""

    def finish(self, name: str) -> None:
        """Forget a tensor."""


def bare(threads: int) -> dict[str, float]:
    """A compiled loop that computes in the first cache, the same work split among threads."""
    from concurrent.futures import ThreadPoolExecutor

    import numba
    import numpy as np

    @numba.njit(nogil=True)
    def turn(values: np.ndarray, turns: int) -> None:
        for _ in range(turns):
            for place in range(values.size):
                values[place] = values[place] * np.float32(0.999) + np.float32(0.001)

    jobs, arrays = 64, [np.ones(2048, np.float32) for _ in range(64)]
    turn(arrays[0], 1)

    def work() -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda number: turn(arrays[number], 300_000), range(jobs)))

    return measure(work)


def main() -> None:
    """``measured.py '{"floor": true | "bare": threads | "recipe": …}'``."""
    task = json.loads(sys.argv[1])
    if task.get("bare"):
        print(json.dumps(bare(task["bare"])))
        return
    if task.get("floor"):
        result = measure(lambda: floor(task["inputs"], task["out"]))
    else:
        from mergebench.merge.engine import execute, execute_into
        from mergebench.merge.kernels import ready
        from mergebench.merge.planning import make_plan
        from mergebench.recipe.reading import recipe_from_dict

        # Compiled once on a machine, which is not part of what a merge costs.
        if ready.choice() != "off":
            ready.kernels()
            ready.kernels(rows=True)
        recipe = recipe_from_dict(task["recipe"])
        memory, workers = task["memory"], task["workers"]

        def merge() -> None:
            execute(make_plan(recipe, memory=memory, workers=workers), force=True)

        if task.get("written", True):
            result = measure(merge)
        else:
            # Computing alone: planning and its imports are not what more threads make faster.
            plan = make_plan(recipe, memory=memory, workers=workers)
            result = measure(lambda: execute_into(plan, [Nowhere() for _ in plan.variants]))
    Path(task["out"]).unlink(missing_ok=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
