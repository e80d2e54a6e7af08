"""An output compared with its manifest: every byte of it, and what it was made of."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import xxhash

from mergebench.checkpoints.descriptors import Handle
from mergebench.checkpoints.reader import FileTensor
from mergebench.checkpoints.shards import open_shards
from mergebench.checkpoints.sides import is_weights
from mergebench.compute.machine import cores
from mergebench.core.errors import MergebenchError
from mergebench.core.tensor import DTYPES, nbytes, size_of
from mergebench.manifest import CARD, MANIFEST, RECIPE
from mergebench.merge.inputs import check_inputs
from mergebench.merge.made import Finding, Made, read_made
from mergebench.sources import PULLED

T = TypeVar("T")
R = TypeVar("R")
_PIECE = 1 << 22

#: ``(what is being done, bytes done, bytes in all)``.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Verdict:
    """What :func:`verify` found.

    Attributes
    ----------
    path : Path
    kind : str
        model, lora or delta; empty where the manifest cannot be read.
    tensors, bytes : int
        Tensors whose bytes were read and compared, and how many bytes.
    findings : tuple of Finding
        What differs; empty if all is right.
    notes : tuple of str
        What could not be compared, or differs without harm.
    """

    path: Path
    kind: str
    tensors: int
    bytes: int
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            "tensors": self.tensors,
            "bytes": self.bytes,
            "findings": [each.to_json() for each in self.findings],
            "notes": list(self.notes),
        }


def verify(
    path: Path,
    *,
    inputs: Path | None = None,
    origins: bool = True,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Verdict:
    """Compare an output with its manifest.

    Headers, every tensor's bytes, dtype and shape, missing and extra tensors and files, the index,
    the files beside the weights, the recipe, and whether the inputs are still those it was made of.

    Parameters
    ----------
    path : Path
        A folder or a single file that mergebench has written.
    inputs : Path, optional
        Where to look for inputs that are not at their recorded place.
    origins : bool, default True
        Whether to look at the inputs at all.
    workers : int, optional
        Threads; each holds 4 MiB. The number of usable cores by default.
    progress : callable, optional

    Raises
    ------
    MergebenchError
        If there is no manifest, or the system refuses to read.
    """
    made = read_made(path)
    findings, notes = list(made.findings), list(made.notes)
    found, count, read = _check_tensors(made, workers or cores(), progress)
    findings += found
    if not made.single and made.manifest:
        found, more = _check_folder(made)
        findings += found
        notes += more
    found, more = check_inputs(made, inputs) if origins else ([], [])
    kind = str(made.manifest.get("kind", ""))
    return Verdict(made.path, kind, count, read, (*findings, *found), (*notes, *more))


def _check_tensors(
    made: Made, workers: int, progress: Progress | None
) -> tuple[list[Finding], int, int]:
    findings: list[Finding] = []
    held = made.tensors
    unread = {each.file for each in made.findings if each.file not in made.files}
    for name, expected in made.expected.items():
        # What a file that cannot be opened holds is said once.
        if name not in held and expected.file not in unread:
            findings.append(Finding("tensor", "is missing", expected.file, name))
    jobs = []
    for name, (file, tensor) in held.items():
        if name not in made.expected:
            if made.expected:
                findings.append(_at(file, tensor, "was not written by the merge"))
            continue
        expected = made.expected[name]
        described = expected.dtype, expected.shape
        if expected.dtype and described != (tensor.dtype, tensor.shape):
            what = (
                f"is {tensor.dtype} {list(tensor.shape)}, "
                f"written was {described[0]} {list(described[1])}"
            )
            findings.append(_at(file, tensor, what))
        elif expected.file not in ("", file):
            findings.append(_at(file, tensor, f"was written into {expected.file}"))
        jobs.append((file, tensor, expected.digest))
    total = sum(nbytes(tensor.dtype, tensor.shape) for _, tensor, _ in jobs)
    done = 0
    buffers = threading.local()

    def hashed(job: tuple[str, FileTensor, str]) -> str:
        return tensor_digest(job[1], buffers)

    for job, digest in in_order(hashed, jobs, workers):
        file, tensor, expected_digest = job
        done += nbytes(tensor.dtype, tensor.shape)
        if digest != expected_digest:
            findings.append(_at(file, tensor, "its bytes are not those that were written"))
        if progress is not None:
            progress("verifying", done, total)
    return findings, len(jobs), total


def _at(file: str, tensor: FileTensor, what: str) -> Finding:
    stop = tensor.offset + nbytes(tensor.dtype, tensor.shape)
    return Finding("tensor", what, file, tensor.name, tensor.offset, stop)


def tensor_digest(tensor: FileTensor, buffers: threading.local) -> str:
    """xxh3-128 of the stored bytes of a tensor, read piece by piece."""
    if not hasattr(buffers, "bytes"):
        buffers.bytes = np.empty(_PIECE, np.uint8)
    state = xxhash.xxh3_128()
    size, step = size_of(tensor.shape), _PIECE // DTYPES[tensor.dtype].itemsize
    for start in range(0, size, step):
        piece = tensor.read(start, min(start + step, size), buffers.bytes)
        state.update(piece.view(np.uint8).data)
    return state.hexdigest()


def in_order(work: Callable[[T], R], jobs: Iterable[T], workers: int) -> Iterator[tuple[T, R]]:
    """``(job, result)`` in the order of the jobs, a few of which are worked on at a time."""
    waiting: deque[tuple[T, Future[R]]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="mergebench") as pool:
        try:
            for job in jobs:
                waiting.append((job, pool.submit(work, job)))
                if len(waiting) > 2 * workers:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


def _check_folder(made: Made) -> tuple[list[Finding], list[str]]:
    findings: list[Finding] = []
    notes: list[str] = []
    for name, digest in made.beside.items():
        path = made.path / name
        if not path.is_file():
            findings.append(Finding("beside", "the file is missing", name))
            continue
        if _digest_of(path) == digest:
            continue
        if name == CARD:
            notes.append(f"{name} was edited since")
        elif name == RECIPE:
            findings.append(_recipe(path, made.manifest["recipe"]))
        elif name.endswith(".safetensors.index.json"):
            findings.append(_index(path))
        else:
            what = "is not the file that was written"
            findings.append(Finding("beside", what, name, start=0, stop=path.stat().st_size))
    known = {*made.beside, *made.manifest.get("files", ()), *made.files, MANIFEST, PULLED}
    listed = (entry.relative_to(made.path).as_posix() for entry in sorted(made.path.rglob("*")))
    for name in listed:
        hidden = any(part.startswith(".") for part in name.split("/"))
        if name in known or hidden or not (made.path / name).is_file():
            continue
        if is_weights(name) or name.endswith(".index.json"):
            findings.append(Finding("file", "was not written by the merge", name))
        elif "beside" in made.manifest:
            notes.append(f"{name} was added since")
    return findings, notes


def _digest_of(path: Path) -> str:
    handle, state = Handle(path), xxhash.xxh3_128()
    buffer = memoryview(bytearray(_PIECE))
    offset = 0
    while got := handle.read_at(buffer, offset):
        state.update(buffer[:got])
        offset += got
    return state.hexdigest()


def _index(path: Path) -> Finding:
    what = "is not the index that was written, but agrees with the shards"
    try:
        open_shards(path)
    except MergebenchError as error:
        what = str(error).removeprefix(f"{path}: ")
    return Finding("index", what, path.name, start=0, stop=path.stat().st_size)


def _recipe(path: Path, expected: Mapping[str, Any]) -> Finding:
    import yaml

    span = (path.name, "", 0, path.stat().st_size)
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return Finding("recipe", "is damaged: it is not YAML", *span)
    if not isinstance(found, dict):
        return Finding("recipe", "is damaged: it is no recipe", *span)
    names = sorted(str(key) for key in {*found, *expected} if found.get(key) != expected.get(key))
    what = "says the same as the manifest, in other words than were written"
    if names:
        what = f"is not the recipe of the manifest: {', '.join(names)} differ"
    return Finding("recipe", what, *span)
