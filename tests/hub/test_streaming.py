"""``--cache none``: weights on the Hub are read where they are."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from mergebench.checkpoints import remote
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
