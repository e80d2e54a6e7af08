"""How files are best read and let go of here: figures for one folder, so for one file system.

``python benchmarks/reading.py --data FOLDER``. Three tables:

- reading alone, cached: ``preadv`` into a buffer beside touching a mapping, CPU seconds; and what
  happens to each when the file is cut meanwhile;
- a merge of files that are not cached, with the page cache left alone and with all of it let go,
  asked for ahead and not, where the system reads ahead by itself and where it does not
  (``POSIX_FADV_RANDOM``): CPU, and the seconds for which its reads were neither running nor waiting
  for a core;
- a merge of inputs behind a network of a given speed, asked for ahead and not.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))

from synthetic import make

from mergebench.checkpoints.sizes import parse_size

HERE = Path(__file__).parent
_BLOCK = 1 << 19


def take(data: memoryview) -> int:
    """Touch every byte, as a kernel would."""
    return int(np.frombuffer(data, np.uint64).max())


def by_pread(path: str, cut: bool) -> None:
    """Read a file block by block into one buffer."""
    fd, buffer = os.open(path, os.O_RDONLY), bytearray(_BLOCK)
    size = os.fstat(fd).st_size // _BLOCK * _BLOCK
    for start in range(0, size, _BLOCK):
        if cut and start == _BLOCK:
            os.truncate(path, 2 * _BLOCK)
        if os.preadv(fd, [buffer], start) < _BLOCK:
            raise SystemExit("the file ends too early, which is found and said")
        take(memoryview(buffer))
    os.close(fd)


def by_mapping(path: str, cut: bool) -> None:
    """Map a file and touch it block by block."""
    fd = os.open(path, os.O_RDONLY)
    mapping = mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ)
    mapping.madvise(mmap.MADV_SEQUENTIAL)
    size = len(mapping) // _BLOCK * _BLOCK
    for start in range(0, size, _BLOCK):
        if cut and start == _BLOCK:
            os.truncate(path, 2 * _BLOCK)
        take(memoryview(mapping)[start : start + _BLOCK])
    os.close(fd)


WAYS: dict[str, Callable[[str, bool], None]] = {"preadv": by_pread, "mapping": by_mapping}


def waited() -> float:
    """Seconds that this thread neither ran nor waited for a core, from some moment on."""
    ran, queued, _ = Path("/proc/thread-self/schedstat").read_text().split()
    return time.perf_counter() - (int(ran) + int(queued)) / 1e9


def merge(task: dict[str, Any]) -> dict[str, float]:
    """A merge in this process: CPU, wall, and seconds for which reads waited."""
    from mergebench.checkpoints import descriptors, pace
    from mergebench.merge import ahead
    from mergebench.merge.engine import execute
    from mergebench.merge.kernels import ready
    from mergebench.merge.planning import make_plan
    from mergebench.recipe.reading import recipe_from_dict

    total = 0.0
    network = task.get("network")
    handle: Any = descriptors.Handle
    true = handle.read_at

    def read_at(self: Any, view: memoryview, offset: int) -> int:
        nonlocal total
        if self._slot.flags == descriptors.READ and task.get("random"):
            with self.borrow() as fd:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        begun = waited()
        done = int(true(self, view, offset))
        total += waited() - begun
        return done

    if network is not None:
        behind(network)
    else:
        handle.read_at = read_at
    pace.ENOUGH = float("inf")
    if not task["asks"]:
        ahead.Ahead.comes = lambda *_: None  # type: ignore[method-assign]
    for name in task["drop"]:
        fd = os.open(name, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    ready.kernels()
    plan = make_plan(recipe_from_dict(task["recipe"]), workers=task["workers"])
    if network is not None:
        network["slow"] = 1.0
    wall, cpu = time.perf_counter(), time.process_time()
    execute(plan, force=True)
    Path(task["recipe"]["out"]).unlink()
    cpu = time.process_time() - cpu
    return {"wall": time.perf_counter() - wall, "cpu": cpu, "waited": total}


def behind(network: dict[str, float]) -> None:
    """Put every file behind a network: each request takes a time, and each byte another."""
    from mergebench.checkpoints import descriptors, reader, remote
    from mergebench.checkpoints.hub import parse_hub
    from mergebench.checkpoints.hub_files import RemoteFile
    from mergebench.core.tensor import nbytes

    def ask(self: Any, start: int, stop: int) -> bytes:
        # Samples that planning looks at are not what is measured.
        if network.get("slow"):
            time.sleep(network["seconds"] + (stop - start) / network["rate"])
        found = bytearray(stop - start)
        self.near.read_at(memoryview(found), start)
        return bytes(found)

    def opened(path: Path) -> Any:
        near = descriptors.Handle(path)
        size = near.stat().st_size
        file = RemoteFile(path.name, size, None, "0")
        handle: Any = remote.RemoteHandle(parse_hub("hf://org/far"), "0" * 40, file)
        handle.near = near
        found = reader.read_safetensors(path, handle, size, 0)
        ends = (each.offset + nbytes(each.dtype, each.shape) for each in found.tensors.values())
        handle.stop_at(sorted(ends))
        return found

    remote.RemoteHandle._ask = ask  # type: ignore[method-assign]
    true = reader.open_safetensors
    for module in list(sys.modules.values()):
        if getattr(module, "open_safetensors", None) is true:
            module.open_safetensors = opened  # type: ignore[attr-defined]


def child(task: dict[str, Any], **env: str) -> dict[str, float]:
    """The same in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--task", json.dumps(task)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, **env},
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def ends(way: str, path: Path) -> str:
    """How a process ends whose file is cut while it reads."""
    with path.open("wb") as file:
        file.truncate(16 * _BLOCK)
    task = json.dumps({"way": way, "path": str(path)})
    done = subprocess.run(
        [sys.executable, __file__, "--task", task], check=False, capture_output=True, text=True
    )
    path.unlink()
    last = (done.stderr.strip().splitlines() or [""])[-1]
    return f"killed by signal {-done.returncode}" if done.returncode < 0 else last


def reading(files: Sequence[Path], rounds: int, folder: Path) -> Table:
    """Ways to read what is cached."""
    table = Table(title="reading alone, cached")
    for heading in ("", "CPU s per GB", "wall s per GB", "a file cut meanwhile"):
        table.add_column(heading)
    size = sum(path.stat().st_size for path in files) / 1e9
    best: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for name, way in WAYS.items():
            wall, cpu = time.perf_counter(), time.process_time()
            for path in files:
                way(str(path), False)
            best[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    for name, found in best.items():
        cpu, wall = (min(each[at] for each in found) / size for at in (0, 1))
        table.add_row(name, f"{cpu:.3f}", f"{wall:.3f}", ends(name, folder / "cut"))
    return table


def main() -> None:
    """Parse arguments, measure, print tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="0.4GB")
    parser.add_argument("--models", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--method", default="linear")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--latency", type=float, default=0.05, help="seconds of a request")
    parser.add_argument("--rate", type=float, default=2e8, help="bytes per second of one request")
    parser.add_argument("--data", type=Path, default=HERE / "data")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        task = json.loads(args.task)
        if "way" in task:
            WAYS[task["way"]](task["path"], True)
        else:
            print(json.dumps(merge(task)))
        return
    args.data = args.data / "reading"
    base, tuned = make(args.data, parse_size(args.size), args.models)
    files = [base, *tuned]
    Console().print(reading(files, args.rounds, args.data))
    recipe = {"method": args.method, "models": [str(path) for path in tuned]}
    recipe |= {"out": str(args.data / "out.safetensors")}
    recipe |= {} if args.method == "linear" else {"base": str(base)}
    names = [str(path) for path in files]
    cold = {"recipe": recipe, "workers": args.workers, "drop": names, "asks": False}
    network = {"seconds": args.latency, "rate": args.rate}
    far = {**cold, "drop": [], "asks": True, "network": network}
    cases: dict[str, tuple[dict[str, Any], str]] = {
        "system reads ahead, cache left alone": (cold, "1TB"),
        "system reads ahead, all let go": (cold, "1B"),
        "system reads ahead, all let go, asked for": ({**cold, "asks": True}, "1B"),
        "no reading ahead, cache left alone": ({**cold, "random": True}, "1TB"),
        "no reading ahead, all let go, asked for": ({**cold, "asks": True, "random": True}, "1B"),
        "network, not asked for ahead": ({**far, "asks": False}, "1TB"),
        "network, asked for ahead": (far, "1TB"),
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    for _ in range(args.rounds):
        for name, (task, limit) in cases.items():
            found[name].append(child(task, MERGEBENCH_PAGE_CACHE=limit))
    table = Table(title=f"{args.method}, {args.models} × {args.size}, {args.workers} worker(s)")
    for heading in ("", "wall s", "CPU s", "reads waited s"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, runs in found.items():
        least = {key: min(each[key] for each in runs) for key in runs[0]}
        waits = "" if name.startswith("network") else f"{max(least['waited'], 0):.2f}"
        table.add_row(name, f"{least['wall']:.2f}", f"{least['cpu']:.2f}", waits)
    Console(width=100).print(table)
    shutil.rmtree(args.data)


if __name__ == "__main__":
    main()
