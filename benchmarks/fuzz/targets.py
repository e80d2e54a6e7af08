"""What is fuzzed: one function per format, from bytes to a correct object or a MergebenchError.

Each takes the bytes that a stranger controls and an empty folder, lays out the files around them,
opens the result the way the command line does, and checks what comes out. A target returns
whether the bytes were accepted; any exception but ``MergebenchError`` is a finding, and so is an
error that does not name the file.
"""

from __future__ import annotations

import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from functools import cache
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any

from mergebench.core.errors import MergebenchError

_LORA = {
    "base_model.model.model.layers.0.q.lora_A.weight": [2, 4],
    "base_model.model.model.layers.0.q.lora_B.weight": [4, 2],
}
_OTHERS: tuple[Mapping[str, list[int]], ...] = (
    _LORA,
    {"base_model.model.model.layers.0.q.ia3_l": [4, 1]},
    {"base_model.model.model.layers.0.q.oft_R.weight": [2, 1]},
    {
        "base_model.model.model.layers.0.q.lokr_w1": [2, 2],
        "base_model.model.model.layers.0.q.lokr_w2": [2, 2],
    },
    {
        "base_model.model.model.layers.0.q.lora_A": [2, 4],
        "base_model.model.model.layers.0.q.lora_B": [4, 2],
        "base_model.model.model.layers.0.q.lora_E": [2, 1],
    },
    {"base_model.model.model.layers.0.q.miss_block": [2, 4]},
    {"base_model.model.model.layers.0.q.hra_u": [4, 2]},
    {**_LORA, "base_model.model.model.layers.0.q.lora_magnitude_vector": [4]},
)
_MOST = 1 << 22


def file_of(shapes: Mapping[str, list[int]], metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file of small float32 numbers, made without mergebench."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    position = 0
    for name, shape in shapes.items():
        size = 4 * prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + struct.pack("<f", 0.5) * (position // 4)


def header(data: bytes, folder: Path) -> bool:
    """The header of a safetensors file; its first two bytes say how many follow it."""
    path = folder / "model.safetensors"
    text, available = data[2:], int.from_bytes(data[:2], "little")
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(available))
    return _opened(path)


def whole(data: bytes, folder: Path) -> bool:
    """A safetensors file as it is."""
    path = folder / "model.safetensors"
    path.write_bytes(data)
    return _opened(path)


def _opened(path: Path) -> bool:
    from safetensors import deserialize

    from mergebench.checkpoints.reader import open_safetensors

    try:
        ours = open_safetensors(path)
    except MergebenchError as error:
        return _refused(error, path)
    theirs = dict(deserialize(path.read_bytes()))
    assert theirs.keys() == ours.tensors.keys()
    for name, tensor in ours.tensors.items():
        assert list(tensor.shape) == theirs[name]["shape"]
        size = prod(tensor.shape)
        assert tensor.read(0, size).tobytes() == bytes(theirs[name]["data"])
    return True


def index(data: bytes, folder: Path) -> bool:
    """``model.safetensors.index.json`` beside two shards."""
    for at in (1, 2):
        shard = folder / f"model-0000{at}-of-00002.safetensors"
        shard.write_bytes(file_of({"abc"[at]: [2], f"{at}": [0, 3]}))
    (folder / "model.safetensors.index.json").write_bytes(data)
    return _source(folder)


def config(data: bytes, folder: Path) -> bool:
    """``config.json`` of a model folder."""
    (folder / "model.safetensors").write_bytes(file_of({"lm_head.weight": [2, 2], "embed": [2, 2]}))
    (folder / "config.json").write_bytes(data)
    return _source(folder)


def tokenizer(data: bytes, folder: Path) -> bool:
    """``tokenizer.json``, or with a first byte of 1 ``vocab.json``, of 2 ``vocab.txt``."""
    from mergebench.checkpoints.tokenizers import read_vocabulary

    name = {b"\1": "vocab.json", b"\2": "vocab.txt"}.get(data[:1], "tokenizer.json")
    (folder / name).write_bytes(data if name == "tokenizer.json" else data[1:])
    try:
        found = read_vocabulary(folder)
    except MergebenchError as error:
        return _refused(error, folder)
    return found is not None and len(found.by_row()) <= len(found.ids)


def adapter(data: bytes, folder: Path) -> bool:
    """``adapter_config.json``, after a byte that chooses the tensors beside it."""
    (folder / "adapter_config.json").write_bytes(data[1:])
    shapes = _OTHERS[(data[0] if data else 0) % len(_OTHERS)]
    (folder / "adapter_model.safetensors").write_bytes(file_of(shapes))
    return _source(folder, based=True)


def keys(data: bytes, folder: Path) -> bool:
    """Names of the tensors of an adapter file, one per line, each a 2 x 2 matrix."""
    names = dict.fromkeys(data.decode("utf-8", "ignore").split("\n"))
    shapes = {name: [2, 2] for name in names if name != "__metadata__"}
    (folder / "adapter.safetensors").write_bytes(file_of(shapes, {"r": "2", "lora_alpha": "2"}))
    return _source(folder / "adapter.safetensors")


def metadata(data: bytes, folder: Path) -> bool:
    """The entry ``mergebench`` of ``__metadata__``: manifests and saved task vectors.

    With a first byte of 1 or 2 another entry: that of diffusers, or a copied adapter config.
    """
    entries = {b"\1": "lora_adapter_metadata", b"\2": "mergebench_adapter_config"}
    entry = entries.get(data[:1], "mergebench")
    text = data.lstrip(b"\1\2").decode("utf-8", "ignore")
    shapes = {"a.weight": [2, 2]} if entry == "mergebench" else _LORA
    (folder / "delta.safetensors").write_bytes(file_of(shapes, {entry: text}))
    return _source(folder / "delta.safetensors")


def manifest(data: bytes, folder: Path) -> bool:
    """``mergebench_manifest.json`` beside a model."""
    (folder / "model.safetensors").write_bytes(file_of({"a.weight": [2, 2]}))
    (folder / "mergebench_manifest.json").write_bytes(data)
    return _source(folder)


def made(data: bytes, folder: Path) -> bool:
    """The manifest of an output, which is compared with what stands beside it."""
    from mergebench.merge.verify import verify

    (folder / "model.safetensors").write_bytes(file_of({"a.weight": [2, 2]}))
    (folder / "config.json").write_bytes(b"{}")
    (folder / "mergebench_manifest.json").write_bytes(data)
    try:
        found = verify(folder, workers=1)
    except MergebenchError as error:
        return _refused(error, folder)
    json.dumps(found.to_json())
    return not found.findings


def recipe(data: bytes, folder: Path) -> bool:
    """A recipe, YAML or JSON; what is read is written and read again."""
    from itertools import islice

    from mergebench.recipe.reading import read_recipe

    path = folder / "recipe.yaml"
    path.write_bytes(data)
    try:
        found = read_recipe(path)
    except MergebenchError as error:
        return _refused(error, path)
    for _, variant in islice(found.variants(), 8):
        json.dumps(variant.to_dict())
    (folder / "again.yaml").write_text(found.to_yaml(), encoding="utf-8")
    again = read_recipe(folder / "again.yaml")
    assert again.to_yaml() == found.to_yaml()
    return True


def mergekit(data: bytes, folder: Path) -> bool:
    """A configuration of mergekit; the recipe that is made of it is written and read again."""
    from mergebench.merge.method import METHODS
    from mergebench.mergekit import read_either
    from mergebench.recipe.reading import read_recipe

    path = folder / "mergekit.yaml"
    path.write_bytes(data)
    try:
        found = read_either(path, METHODS).recipe
    except MergebenchError as error:
        return _refused(error, path)
    (folder / "again.yaml").write_text(found.to_yaml(), encoding="utf-8")
    assert read_recipe(folder / "again.yaml").to_yaml() == found.to_yaml()
    return True


def journal(data: bytes, folder: Path) -> bool:
    """A journal whose lines have sound checksums, after a first byte that is odd, or not."""
    from mergebench.checkpoints.journal import read_journal

    path = folder / ".out.mergebench-journal"
    if data[:1] and data[0] % 2:
        lines = data[1:].split(b"\n")
        data = b"".join(b"%08x %s\n" % (zlib.crc32(line), line) for line in lines)
    path.write_bytes(data)
    past = read_journal(path)
    if past is None:
        return False
    assert past.length <= len(data)
    assert isinstance(past.head.key, str)
    assert all(isinstance(digest, str) for digest in past.finished.values())
    return True


def gguf(data: bytes, folder: Path) -> bool:
    """A GGUF file, after its four first bytes."""
    path = folder / "model.gguf"
    path.write_bytes(b"GGUF" + data)
    return _source(path, read=True)


def pickled(data: bytes, folder: Path) -> bool:
    """The pickle of a PyTorch file; in a zip archive, or alone with a first byte that is odd."""
    path = folder / "pytorch_model.bin"
    if data[:1] and data[0] % 2:
        path.write_bytes(data[1:])
        return _source(path, read=True)
    raw = BytesIO()
    with zipfile.ZipFile(raw, "w") as archive:
        archive.writestr("a/data.pkl", data[1:])
        archive.writestr("a/byteorder", b"little")
        archive.writestr("a/data/0", bytes(64))
        archive.writestr("a/version", b"3\n")
    path.write_bytes(raw.getvalue())
    return _source(path, read=True)


def sparse(data: bytes, folder: Path) -> bool:
    """The pickle of a published sparse fine-tuning, beside 64 bytes of numbers."""
    raw = BytesIO()
    with zipfile.ZipFile(raw, "w") as archive:
        archive.writestr("a/data.pkl", data)
        archive.writestr("a/byteorder", b"little")
        archive.writestr("a/data/0", bytes(64))
    path = folder / "pytorch_diff.bin"
    path.write_bytes(raw.getvalue())
    return _source(path, read=True)


def archive(data: bytes, folder: Path) -> bool:
    """A zip archive as it is, named as a PyTorch file."""
    path = folder / "pytorch_model.bin"
    path.write_bytes(data)
    return _source(path, read=True)


@cache
def chunk() -> bytes:
    """A chunk of DCP: a tensor of 2 x 2 as ``torch.save`` writes it."""
    import torch

    raw = BytesIO()
    torch.save(torch.ones(2, 2), raw)
    return raw.getvalue()


def dcp(data: bytes, folder: Path) -> bool:
    """``.metadata`` of a folder of torch.distributed.checkpoint, beside one chunk."""
    (folder / "__0_0.distcp").write_bytes(chunk())
    (folder / ".metadata").write_bytes(data)
    return _source(folder, read=True)


def packed(data: bytes, folder: Path) -> bool:
    """A packed tensor, whose checksums are made sound, in a packed task vector; read whole."""
    import numpy as np

    from mergebench.adapters_zoo.kinds.delta import delta_metadata
    from mergebench.adapters_zoo.packed_file import packed_metadata
    from mergebench.core.delta import Dense
    from mergebench.sources.opening import load

    data = sealed(data, "a.weight")
    entries = packed_metadata(delta_metadata(None), ["a.weight"], {"scheme": "ternary"})
    about = {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}
    text = json.dumps({"__metadata__": entries, "a.weight": about}).encode()
    path = folder / "a.mbz.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    if not _source(path):
        return False
    delta = load(path)["a.weight"]  # type: ignore[index]
    assert isinstance(delta, Dense)
    size = prod(delta.shape)
    for start in range(0, min(size, _MOST), 1 << 16):
        stop = min(start + (1 << 16), size)
        try:
            values = delta.values.read(start, stop)
        except MergebenchError as error:
            return _refused(error, path)
        assert values.shape == (stop - start,)
        assert values.dtype != np.dtype(object)
    return True


def sealed(data: bytes, name: str) -> bytes:
    """A packed tensor with the checksums of its head and of the blocks that its table names."""
    import xxhash

    raw = bytearray(data)
    if len(raw) < 8:
        return data
    after = 8 + 8 * raw[6] + 4 * raw[7]
    if len(raw) < after + 8:
        return data
    shape = struct.unpack(f"<{raw[6]}Q", raw[8 : 8 + 8 * raw[6]])
    rows = min(-(-prod(shape) // (1 << 18)), (len(raw) - after - 8) // 12)
    at = after + 8 + 12 * rows
    for row in range(rows):
        place = after + 8 + 12 * row
        (length,) = struct.unpack_from("<I", raw, place)
        struct.pack_into("<Q", raw, place + 4, xxhash.xxh3_64_intdigest(raw[at : at + length]))
        at += length
    table = bytes(raw[after + 8 : after + 8 + 12 * rows])
    head = bytes(raw[:after]) + table + name.encode()
    struct.pack_into("<Q", raw, after, xxhash.xxh3_64_intdigest(head))
    return bytes(raw)


def _source(path: Path, *, read: bool = False, based: bool = False) -> bool:
    """Open as ``mergebench inspect`` does, ``based`` on a model with one matrix."""
    import numpy as np

    from mergebench.adapters_zoo.adapter import ReadOptions
    from mergebench.core.tensor import ArrayTensor
    from mergebench.describe import describe
    from mergebench.sources.opening import open_source

    options = ReadOptions()
    if based:
        base = {"model.layers.0.q.weight": ArrayTensor(np.ones((4, 4), np.float32))}
        shapes = {name: tensor.shape for name, tensor in base.items()}
        options = ReadOptions(base_shapes=shapes, base=base)
    try:
        source = open_source(str(path), options)
    except MergebenchError as error:
        return _refused(error, path)
    text = json.dumps(describe(source))
    assert source.label in json.loads(text)["path"]
    if read and source.checkpoint is not None:
        for tensor in source.checkpoint.tensors.values():
            size = prod(tensor.shape)
            if size <= _MOST:
                try:
                    values = tensor.read(0, size)
                except MergebenchError as error:
                    return _refused(error, path)
                assert values.shape == (size,)
    return True


def _refused(error: MergebenchError, path: Path) -> bool:
    place = path if path.is_dir() else path.parent
    assert str(place) in str(error), f"does not name the file: {error}"
    return False


TARGETS: Mapping[str, Callable[[bytes, Path], bool]] = {
    each.__name__: each
    for each in (
        header, whole, index, config, tokenizer, adapter, keys, metadata, manifest, made, recipe,
        mergekit, journal, gguf, pickled, sparse, archive, dcp, packed,
    )
}  # fmt: skip
