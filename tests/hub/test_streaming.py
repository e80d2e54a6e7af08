"""``--cache none``: weights on the Hub are read where they are."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mergebench.checkpoints import remote
from mergebench.checkpoints.hub import parse_hub
from mergebench.checkpoints.hub_files import RemoteFile
from mergebench.core.errors import FormatError
from tests.helpers.models import save_folder
from tests.helpers.running import assert_done, assert_refused
from tests.helpers.scene import Scene
from tests.hub.commands import Run, files_of
from tests.hub.server import TOKEN, Fault, Hub

NONE = ("--cache", "none")


def kept(home: Path) -> list[str]:
    """Names of weights in the Hub's cache."""
    return [path.name for path in home.rglob("*.safetensors")]


def spans(hub: Hub) -> list[tuple[int, int]]:
    """What was asked for by range."""
    found = [re.fullmatch(r"bytes=(\d+)-(\d+)", each.get("range", "")) for each in hub.headers]
    return [(int(each[1]), int(each[2]) + 1) for each in found if each]


@pytest.mark.parametrize("shards", [False, True])
def test_merging_without_a_download(
    hub: Hub, run: Run, scene: Scene, tmp_path: Path, shards: bool
) -> None:
    """The same bytes as from files here, and no weights are kept."""
    many = ("--shard-size", "4kB") if shards else ()
    for name in ("base", "ft1"):
        assert_done(run("merge", name, "-m", "linear", *many, "-o", f"up-{name}"))
        hub.add(f"org/{name}", files_of(scene.path / f"up-{name}"), private=True)
    merge = ("-m", "ties", "-p", "density=0.3", "-o")
    assert_done(run("merge", "up-ft1", "ft2", "-b", "up-base", *merge, "here"))

    names = ("hf://org/ft1", "ft2", "-b", "hf://org/base")
    assert_done(run("merge", *names, *merge, "there", *NONE))

    here, there = files_of(scene.path / "here"), files_of(scene.path / "there")
    assert here["model.safetensors"] == there["model.safetensors"]
    assert here["config.json"] == there["config.json"]
    assert here["tokenizer.json"] == there["tokenizer.json"]
    assert kept(tmp_path) == [path.name for path in scene.path.rglob("*.safetensors")]
    assert spans(hub)
    sent = [each for each in hub.headers if each["host"].startswith("localhost")]
    assert sent
    assert TOKEN not in str(sent)


def test_looking_brings_headers_and_samples(
    hub: Hub, run: Run, scene: Scene, tmp_path: Path
) -> None:
    """Inspect and plan of a large model read a small part of it; diff reads all."""
    draw = np.random.default_rng(1)
    large = {f"w{n}": draw.standard_normal((1024, 1024)).astype(np.float32) for n in range(6)}
    save_folder(scene.path / "large", large)
    hub.add("org/large", files_of(scene.path / "large"))
    size = sum(each.nbytes for each in large.values())

    assert_done(run("inspect", "hf://org/large", *NONE))

    assert sum(stop - start for start, stop in spans(hub)) < size / 5
    assert_done(run("diff", "hf://org/large", "large", *NONE))
    assert sum(stop - start for start, stop in spans(hub)) >= size
    assert len(spans(hub)) < 200
    assert_done(run("inspect", "hf://org/large", MERGEBENCH_CACHE="none"))
    assert len(kept(tmp_path)) == len([*scene.path.rglob("*.safetensors")])


def test_large_models_are_brought_once_and_not_to_the_disk(
    hub: Hub, run: Run, scene: Scene, tmp_path: Path
) -> None:
    """What is asked for ahead is not asked for again; nothing but the output takes space."""
    draw = np.random.default_rng(1)
    for name in ("one", "two"):
        arrays = {f"w{n}": draw.standard_normal((1536, 1024)).astype(np.float32) for n in range(6)}
        save_folder(scene.path / name, arrays)
        hub.add(f"org/{name}", files_of(scene.path / name))
    size = 2 * sum(each.nbytes for each in arrays.values())
    before = {path for path in tmp_path.rglob("*") if path.is_file()}

    merge = ("merge", "hf://org/one", "hf://org/two", "-m", "linear", "--workers", 2)
    assert_done(run(*merge, "-o", "there", *NONE))
    assert_done(run("merge", "one", "two", "-m", "linear", "-o", "here"))

    assert size <= sum(stop - start for start, stop in spans(hub)) < 1.2 * size
    there, here = scene.path / "there", scene.path / "here"
    assert files_of(there)["model.safetensors"] == files_of(here)["model.safetensors"]
    new = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    beside = [path for path in new if there not in path.parents and here not in path.parents]
    # The compiled kernels are no part of the models.
    assert sum(path.stat().st_size for path in beside if path.suffix != ".nbi") < size / 100


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> tuple[remote.RemoteHandle, list[int]]:
    """A file of 100 kB elsewhere, and where the requests for it began."""
    content = np.random.default_rng(0).bytes(100_000)
    asked: list[int] = []

    def ask(self: remote.RemoteHandle, start: int, stop: int) -> bytes:
        asked.append(start)
        return content[start:stop]

    monkeypatch.setattr(remote.RemoteHandle, "_ask", ask)
    monkeypatch.setattr(remote, "_BLOCKS", remote._Blocks(1 << 20))
    file = RemoteFile("model.safetensors", len(content), None, "0")
    return remote.RemoteHandle(parse_hub("hf://org/far"), "0" * 40, file), asked


def here(handle: remote.RemoteHandle, offset: int) -> bool:
    """Whether a byte of a file has come."""
    return remote._BLOCKS.get(handle._key, offset) is not None


def wait_for(what: Callable[[], bool]) -> None:
    """Until something is so, which it must be soon."""
    for _ in range(2000):
        if what():
            return
        time.sleep(0.005)
    raise AssertionError("it never was")


def test_what_is_asked_for_comes_by_itself(
    far: tuple[remote.RemoteHandle, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read later waits for no request; what is let go is brought again when it is read."""
    handle, asked = far
    assert not here(handle, 50_000)
    handle.advise(40_000, 30_000, "willneed")
    wait_for(lambda: here(handle, 69_999))
    count = len(asked)

    first, second = bytearray(30_000), bytearray(30_000)
    assert handle.read_at(memoryview(first), 40_000) == 30_000
    assert len(asked) == count
    handle.advise(0, 100_000, "dontneed")
    assert not here(handle, 50_000)
    handle.read_at(memoryview(second), 40_000)
    assert len(asked) > count
    assert first == second
    # Behind the end there is nothing to bring.
    handle.advise(100_000, 5, "willneed")


def test_a_fault_is_told_to_whoever_reads(
    far: tuple[remote.RemoteHandle, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What went wrong ahead of time is asked for once more, and heard then."""
    handle, asked = far

    def broken(self: remote.RemoteHandle, start: int, stop: int) -> bytes:
        asked.append(start)
        raise FormatError("did not come")

    monkeypatch.setattr(remote.RemoteHandle, "_ask", broken)
    handle.advise(0, 10, "willneed")
    wait_for(lambda: bool(asked))
    with pytest.raises(FormatError, match="did not come"):
        handle.read_at(memoryview(bytearray(10)), 0)
    assert asked == [0, 0]


def test_adapters_are_downloaded(hub: Hub, run: Run, scene: Scene) -> None:
    """They are small, and other formats cannot be read in part."""
    hub.add("org/lora", files_of(scene.path / "lora1"))
    hub.add("org/bare", {"a.safetensors": (scene.path / "a.safetensors").read_bytes()})

    assert_done(run("diff", "hf://org/lora", "lora1", *NONE))
    assert_done(run("diff", "hf://org/bare", "a.safetensors", *NONE))

    assert spans(hub) == []


def test_faults_on_the_way(hub: Hub, run: Run, scene: Scene) -> None:
    """Addresses that expire are renewed; 503 and 429 are tried again; what stays is one line."""
    hub.add("org/m", files_of(scene.path / "ft1"))
    soon = {"Retry-After": "0"}
    storage = "^GET /storage-of/org/m"
    hub.faults += [
        Fault(storage, 403, 1),
        Fault(storage, 503, 2, soon),
        Fault(storage, 429, 1, soon),
    ]

    assert_done(run("diff", "hf://org/m", "ft1", *NONE))
    assert all(fault.times == 0 for fault in hub.faults)
    hub.faults.append(Fault(storage, 403, 100))
    assert_refused(run("inspect", "hf://org/m", *NONE), "model.safetensors", "forbids reading")
    hub.faults[-1] = Fault(storage, 500, 100, soon)
    assert_refused(run("inspect", "hf://org/m", *NONE), "has a fault", "500")


def test_servers_without_ranges(hub: Hub, run: Run, scene: Scene) -> None:
    """A server that sends everything, or less than was asked for, is not taken at its word."""
    hub.add("org/m", files_of(scene.path / "ft1"))
    hub.whole = True

    assert_refused(run("inspect", "hf://org/m", *NONE), "did not come", "--cache keep")
    assert_refused(run("inspect", "hf://org/m", "--cache", "some"), "--cache", "keep or none")
    assert_done(run("diff", "hf://org/m", "ft1"))


def test_damaged_headers(hub: Hub, run: Run, scene: Scene) -> None:
    """They are refused as they would be here."""
    files = files_of(scene.path / "ft1")
    hub.add("org/cut", {**files, "model.safetensors": files["model.safetensors"][:-1]})
    hub.add("org/page", {**files, "model.safetensors": b"<!doctype html>"})
    index = b'{"weight_map": {"w": "model-00001-of-00001.safetensors"}}'
    del files["model.safetensors"]
    hub.add("org/gone", {**files, "model.safetensors.index.json": index})

    assert_refused(run("inspect", "hf://org/cut", *NONE), "org/cut@", "model.safetensors")
    assert_refused(run("inspect", "hf://org/page", *NONE), "is a web page")
    assert_refused(run("inspect", "hf://org/gone", *NONE), "model-00001-of-00001", "not in the rep")


def test_what_is_kept_in_memory_is_bounded() -> None:
    """The oldest blocks go first."""
    blocks = remote._Blocks(100)
    for at in range(5):
        blocks.put("a", at * 40, bytes(40))

    assert blocks.get("a", 0) is None
    assert blocks.get("a", 119) is None
    assert blocks.get("a", 121) == (120, bytes(40))
    assert blocks.get("b", 121) is None
    assert blocks.ends_at("a", 200)
    assert not blocks.ends_at("a", 199)


def test_what_has_come_is_not_asked_for_again(
    far: tuple[remote.RemoteHandle, list[int]],
) -> None:
    """A request ends where a long block begins, such as other threads bring, not at a spot."""
    handle, asked = far
    content = np.random.default_rng(0).bytes(100_000)
    handle.read_at(memoryview(bytearray(40_000)), 50_000)
    handle.read_at(memoryview(bytearray(10)), 20_000)
    whole = bytearray(100_000)

    assert handle.read_at(memoryview(whole), 0) == 100_000
    assert whole == content
    assert asked == [50_000, 20_000, 0, 90_000]
