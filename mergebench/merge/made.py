"""An output on disk beside what its manifest says of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from mergebench.checkpoints.descriptors import cannot
from mergebench.checkpoints.documents import is_file, read_bounded
from mergebench.checkpoints.reader import FileTensor, SafetensorsFile, open_safetensors
from mergebench.core.errors import FormatError, MergebenchError
from mergebench.core.plain import parse_json
from mergebench.manifest import (
    DIGESTS,
    KEY,
    MANIFEST,
    digests_of,
    from_metadata,
    is_intact,
    is_sealed,
)

_START = 1 << 20
_NEW = frozenset({"tensors", "files", "beside", "digest"})


@dataclass(frozen=True)
class Finding:
    """Something that is not as it was written.

    Attributes
    ----------
    kind : manifest, file, header, tensor, index, beside, recipe, input or replay
    what : str
        One sentence, without the place.
    file, tensor : str
        The place; empty where there is none.
    start, stop : int or None
        Bytes of the file among which the difference lies.
    """

    kind: str
    what: str
    file: str = ""
    tensor: str = ""
    start: int | None = None
    stop: int | None = None

    def __str__(self) -> str:
        place = [self.file, f"tensor {self.tensor!r}" if self.tensor else ""]
        where = ": ".join(each for each in place if each)
        span = "" if self.start is None else f" (bytes {self.start} to {self.stop})"
        return f"{where}: {self.what}{span}" if where else f"{self.what}{span}"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Expected:
    """One tensor as it was written; ``dtype`` is empty where the manifest does not say."""

    digest: str
    dtype: str = ""
    shape: tuple[int, ...] = ()
    file: str = ""


@dataclass(frozen=True, eq=False)
class Made:
    """An output of mergebench, its headers read.

    Attributes
    ----------
    path : Path
        The file, or the folder.
    single : bool
    manifest : mapping
        Empty where it cannot be read.
    files : mapping of name to SafetensorsFile
        Those whose header is sound.
    expected : mapping of tensor name to Expected
    findings : tuple of Finding
        What manifest and headers alone show.
    notes : tuple of str
    """

    path: Path
    single: bool
    manifest: Mapping[str, Any]
    files: Mapping[str, SafetensorsFile]
    expected: Mapping[str, Expected]
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()
    beside: Mapping[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where the files lie."""
        return self.path.parent if self.single else self.path

    @property
    def tensors(self) -> dict[str, tuple[str, FileTensor]]:
        """``name -> (file name, tensor)`` of everything that can be read."""
        return {
            name: (file, tensor)
            for file, content in self.files.items()
            for name, tensor in content.tensors.items()
        }


def read_made(path: Path) -> Made:
    """Open an output: a folder, its weights file, or a single file.

    Raises
    ------
    MergebenchError
        If there is nothing, or nothing that carries a manifest.
    """
    path = Path(path)
    if not path.exists():
        raise MergebenchError(
            f"{path}: no such file or folder", fix="check the spelling of the path"
        )
    if not path.is_dir() and (path.parent / MANIFEST).is_file():
        beside = _parse(_read(path.parent / MANIFEST))
        if beside is not None and path.name in (beside.get("files") or {}):
            path = path.parent
    return _folder(path) if path.is_dir() else _single(path)


def _unknown(path: Path) -> MergebenchError:
    return MergebenchError(
        f"{path}: has no manifest, so nothing says what it should hold",
        expected=f"an output of `mergebench merge`: a folder with {MANIFEST}, or a single file",
        fix="`mergebench diff` compares it with another model, `mergebench check` tries to load it",
    )


def _read(place: Path) -> bytes:
    try:
        return read_bounded(place)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise cannot("read", place, error) from error


def _parse(text: bytes) -> dict[str, Any] | None:
    try:
        data = parse_json(text.decode("utf-8"))
    except ValueError:
        return None
    return data if isinstance(data, dict) and _is_sound(data) else None


def _is_sound(data: Mapping[str, Any]) -> bool:
    """Whether a manifest has the shape of one."""
    named = (data.get(key, {}) for key in ("outputs", "beside"))
    described = (data.get(key, {}) for key in ("tensors", "files"))
    inputs = data.get("inputs")
    return (
        isinstance(data.get("recipe"), dict)
        and isinstance(inputs, list)
        and all(isinstance(each, dict) and isinstance(each.get("path"), str) for each in inputs)
        and all(_maps(each, str) for each in named)
        and all(_maps(each, dict) for each in described)
        and all(
            isinstance(each.get("shape"), list) and isinstance(each.get("dtype"), str)
            for each in data.get("tensors", {}).values()
        )
    )


def _maps(value: Any, kind: type) -> bool:
    return isinstance(value, dict) and all(isinstance(each, kind) for each in value.values())


def _folder(path: Path) -> Made:
    place = path / MANIFEST
    try:
        text = _read(place)
    except FileNotFoundError:
        raise _unknown(path) from None
    data = _parse(text)
    if data is None:
        what = "the manifest is damaged, so nothing else can be compared with it"
        found = Finding("manifest", what, MANIFEST, start=0, stop=len(text))
        return Made(path, False, {}, {}, {}, (found,))
    findings: list[Finding] = []
    notes: list[str] = []
    if not _NEW & data.keys():
        notes.append("the manifest is of an earlier version: only values of tensors are compared")
    elif not is_intact(text):
        what = "the manifest is not as it was written: it was edited or is damaged"
        findings.append(Finding("manifest", what, MANIFEST, start=0, stop=len(text)))
    described: Mapping[str, Mapping[str, Any]] = data.get("tensors", {})
    expected = {
        name: Expected(digest, *_about(described.get(name)))
        for name, digest in data.get("outputs", {}).items()
    }
    files, more = _open_files(path, data.get("files") or _weights(path))
    return Made(
        path, False, data, files, expected, (*findings, *more), tuple(notes), data.get("beside", {})
    )


def _about(data: Mapping[str, Any] | None) -> tuple[str, tuple[int, ...], str]:
    if data is None:
        return "", (), ""
    return data["dtype"], tuple(data["shape"]), str(data.get("file", ""))


def _weights(path: Path) -> dict[str, dict[str, Any]]:
    return {each.name: {} for each in sorted(path.glob("*.safetensors"))}


def _open_files(
    folder: Path, described: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, SafetensorsFile], list[Finding]]:
    files: dict[str, SafetensorsFile] = {}
    findings: list[Finding] = []
    for name, about in described.items():
        path = folder / name
        if Path(name).name != name or not is_file(path):
            findings.append(Finding("file", "the file is missing", name))
            continue
        try:
            files[name] = open_safetensors(path)
        except FormatError as error:
            findings.append(_damaged(path, str(error)))
            continue
        head = _head(files[name])
        wanted = about.get("header")
        if wanted is not None and xxhash.xxh3_128_hexdigest(head) != wanted:
            what = "the header is not the one that was written"
            findings.append(Finding("header", what, name, start=0, stop=len(head)))
        if about.get("bytes", files[name].size) != files[name].size:
            what = f"has {files[name].size} bytes, {about['bytes']} were written"
            findings.append(Finding("file", what, name))
    return files, findings


def _damaged(path: Path, what: str) -> Finding:
    """A header that cannot be read, with as many bytes as it may have."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    what = what.removeprefix(f"{path}: ")
    return Finding("header", what, path.name, start=0, stop=min(8 + length, size))


def _head(file: SafetensorsFile) -> bytes:
    """The bytes before the data."""
    with file.path.open("rb") as opened:
        start = opened.read(8)
        return start + opened.read(int.from_bytes(start, "little"))


def _single(path: Path) -> Made:
    try:
        file = open_safetensors(path)
    except FormatError as error:
        with path.open("rb") as opened:
            ours = f'"{KEY}'.encode() in opened.read(_START)
        if not ours:
            raise
        return Made(path, True, {}, {}, {}, (_damaged(path, str(error)),))
    data = from_metadata(file.metadata)
    if data is not None and not _is_sound({**data, "outputs": {}}):
        data = None
    sealed_here = DIGESTS in file.metadata
    stated = data is not None and data.get("outputs") == DIGESTS
    if not sealed_here and not stated:
        if data is None:
            raise _unknown(path)
        raise MergebenchError(
            f"{path}: was written by an earlier version, which kept no digests in single files",
            fix="`mergebench run` its recipe again and compare with `mergebench diff`",
        )
    head = _head(file)
    findings = []
    if data is None or not is_sealed(head, file.metadata):
        what = "the header is not as it was written: it was edited or is damaged"
        findings.append(Finding("header", what, path.name, start=0, stop=len(head)))
    digests = digests_of(file.metadata, list(file.tensors))
    notes: Sequence[str] = ()
    if digests is None:
        notes = ("the digests in the header are damaged: no tensor can be compared",)
    expected = {name: Expected(digest, file=path.name) for name, digest in (digests or {}).items()}
    return Made(path, True, data or {}, {path.name: file}, expected, tuple(findings), tuple(notes))
