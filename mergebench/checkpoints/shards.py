"""Checkpoints in several files: the index, and what it may point to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath

from mergebench.checkpoints.containers import PICKLED, Container, open_weights
from mergebench.checkpoints.documents import is_file, read_object
from mergebench.checkpoints.reader import SafetensorsFile
from mergebench.core.errors import FormatError
from mergebench.core.tensor import nbytes

_SOUND = "download the whole model again"


#: Opens a file by its name, relative to the folder of the weights.
Opener = Callable[[str], SafetensorsFile]


def allowed_roots(folder: Path) -> tuple[Path, ...]:
    """Folders in which the files of a model folder may really lie, links followed.

    The folder itself; and for a snapshot in a Hugging Face cache
    (``models--org--name/snapshots/<sha>``), whose files are links, the ``models--*`` folder and
    the ``blobs`` that all repositories of the cache share.
    """
    roots = [folder.resolve()]
    for parts in (folder.absolute().parts, roots[0].parts):
        for at in range(len(parts) - 2):
            if parts[at].startswith("models--") and parts[at + 1] == "snapshots":
                roots += [Path(*parts[: at + 1]).resolve(), Path(*parts[:at], "blobs").resolve()]
    return tuple(roots)


def stays_inside(path: Path, roots: Iterable[Path]) -> bool:
    """Whether a path, links followed, lies in one of the (already resolved) roots."""
    try:
        real = path.resolve()
    except (OSError, RuntimeError):
        return False
    return any(real.is_relative_to(root) for root in roots)


def shard_path(index: Path, name: str) -> Path:
    """Where a file named by an index lies.

    Raises
    ------
    FormatError
        If the name is absolute, climbs with ``..``, holds a backslash, a NUL or a drive, or if
        it is a link to a file that does not belong to the model.
    """
    parts = PurePosixPath(name).parts
    escapes = (
        not parts
        or any(sign in name for sign in "\\\0")
        or ".." in parts
        or PurePosixPath(name).is_absolute()
        or bool(PureWindowsPath(name).drive)
    )
    path = index.parent / name
    if escapes or not stays_inside(path, allowed_roots(index.parent)):
        raise FormatError(
            f"{index}: names a file outside of the model folder",
            got=f"{name!r:.120}",
            expected="the name of a file beside the index",
            fix="do not use this checkpoint unless you trust and correct it",
        )
    return path


def open_shards(
    index: Path, opener: Opener | None = None
) -> tuple[Mapping[str, SafetensorsFile | Container], tuple[str, ...]]:
    """All shards of an index, by file name in sorted order, and notes for the user.

    An index named ``*.bin.index.json`` is one of PyTorch files, any other of safetensors files.

    Parameters
    ----------
    index : Path
    opener : callable, optional
        Opens a shard by its name, where they do not lie beside the index.

    Raises
    ------
    FormatError
        If the index is unsound, or index and shards do not hold exactly the same tensors, each
        once.
    """
    document = read_object(index, strict=True)
    weight_map = document.get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(file, str) for file in weight_map.values())
    ):
        raise FormatError(
            f"{index}: `weight_map` does not map tensor names to file names",
            got=f"{weight_map!r:.80}",
            fix=_SOUND,
        )
    declared: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        declared.setdefault(file, set()).add(tensor)
    paths = {file: shard_path(index, file) for file in sorted(declared)}
    shards: dict[str, SafetensorsFile | Container]
    if opener is None:
        _check_present(index, paths)
        shards = {file: open_weights(path) for file, path in paths.items()}
    else:
        shards = {file: opener(file) for file in paths}
    _check_names(index, declared, shards)
    sizes = {
        name: nbytes(tensor.dtype, tensor.shape)
        for shard in shards.values()
        for name, tensor in shard.tensors.items()
    }
    total = sum(sizes.values())
    shared = [n for each in shards.values() if isinstance(each, Container) for n in each.aliases]
    # Some writers count a shared tensor under each of its names, some once.
    counts = (total, total - sum(sizes[name] for name in shared))
    about = document.get("metadata")
    stated = about.get("total_size") if isinstance(about, dict) else None
    if stated is not None and stated not in counts:
        return shards, (f"{index.name} states total_size {stated}, its tensors take {total} bytes",)
    return shards, ()


def _check_present(index: Path, paths: Mapping[str, Path]) -> None:
    pickled = ".bin." in index.name
    suffixes = PICKLED if pickled else (".safetensors",)
    for file, path in paths.items():
        if is_file(path):
            continue
        if not file.endswith(suffixes):
            raise _foreign(index, file, pickled)
        missing = sum(not is_file(other) for other in paths.values())
        raise FormatError(
            f"{index}: shard {file} is missing",
            expected=f"{len(paths)} shards",
            got=f"{len(paths) - missing}",
            fix=_SOUND,
        )
    for file in paths:
        if not file.endswith(suffixes):
            raise _foreign(index, file, pickled)


def _foreign(index: Path, file: str, pickled: bool) -> FormatError:
    kind = "PyTorch" if pickled else "safetensors"
    return FormatError(
        f"{index}: names {file}, which is not a {kind} file",
        fix="convert the model to safetensors",
    )


def _check_names(
    index: Path,
    declared: Mapping[str, set[str]],
    shards: Mapping[str, SafetensorsFile | Container],
) -> None:
    holder: dict[str, str] = {}
    for file, shard in shards.items():
        for tensor in shard.tensors:
            if tensor in holder:
                raise FormatError(
                    f"{index}: tensor {tensor!r} is in two shards",
                    got=f"{holder[tensor]} and {file}",
                    fix=_SOUND,
                )
            holder[tensor] = file
    for file, shard in shards.items():
        if absent := sorted(declared[file] - shard.tensors.keys()):
            raise FormatError(
                f"{index}: places tensor {absent[0]!r} in {file}, which does not hold it",
                got=f"{len(absent)} such tensors",
                fix=_SOUND,
            )
        if extra := sorted(shard.tensors.keys() - declared[file]):
            raise FormatError(
                f"{index}: shard {file} holds tensor {extra[0]!r}, which the index does not name",
                got=f"{len(extra)} such tensors",
                fix=_SOUND,
            )
