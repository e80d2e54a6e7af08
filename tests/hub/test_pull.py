"""Pulling: what is needed, checked, whole or not at all."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from mergebench.checkpoints.hub_files import RemoteFile
from mergebench.ship import pull as pulling
from tests.helpers.files import listing
from tests.helpers.running import assert_done, assert_refused
from tests.helpers.scene import Scene
from tests.hub.commands import Run, files_of
from tests.hub.server import TOKEN, Fault, Hub

ORIGIN = "mergebench_origin.json"


def merged(run: Run, scene: Scene, *more: str) -> dict[str, bytes]:
    """The files of a merged folder."""
    done = run("merge", "ft1", "ft2", "-b", "base", "-m", "ties", "-o", "out", *more)
    assert_done(done)
    return files_of(scene.path / "out")


def hidden(folder: Path) -> list[str]:
    """What pulls have left beside their outputs."""
    return [name for name in listing(folder) if name.startswith(".")]


def test_pushed_and_pulled(hub: Hub, run: Run, scene: Scene) -> None:
    """The same bytes come back, and a file that says which commit they are of."""
    merged(run, scene)
    pushed = assert_done(run("push", "out", "org/out", "--private", "--json")).json

    ran = assert_done(run("pull", "org/out", "-o", "back", "--json")).json

    here, back = files_of(scene.path / "out"), files_of(scene.path / "back")
    origin = json.loads(back.pop(ORIGIN))
    del here["README.md"]
    assert back.pop("README.md") == hub.tree("org/out")["README.md"]
    assert back == here
    assert ran["commit"] == origin["commit"] == pushed["commit"]
    assert (origin["repo"], origin["revision"], origin["endpoint"]) == ("org/out", "main", hub.url)
    assert ran["verified_tensors"] > 0
    assert ran["left_out"] == []
    assert hidden(scene.path) == []
    verified = assert_done(run("verify", "back"))
    assert ORIGIN not in verified.err
    assert_refused(run("pull", "org/out", "-o", "back"), "exists already", "--force")
    assert_done(run("pull", "hf://org/out@main", "-o", "back", "--force"))
    assert_refused(run("pull", "org/out", token=None), "no such repository", "private")


def test_only_what_is_needed(hub: Hub, run: Run, scene: Scene) -> None:
    """One format of the weights, no code; what is left is told."""
    files = files_of(scene.path / "ft1")
    more = {"pytorch_model.bin": b"1", "model.py": b"2", "flax_model.msgpack": b"3"}
    hub.add("org/m", {**files, **more, "README.md": b"hello", "LICENSE": b"MIT", "a.png": b"4"})

    ran = assert_done(run("pull", "org/m"))

    there = files_of(scene.path / "m")
    assert there.keys() == files.keys() | {"README.md", "LICENSE", ORIGIN}
    assert "4 files are not needed" in ran.err
    assert "pytorch_model.bin" in ran.err
    assert not hub.seen("^GET .*(msgpack|model.py|a.png|bin)")


def test_shards_and_pipelines(hub: Hub, run: Run, scene: Scene) -> None:
    """An index brings its shards; a pipeline comes with all its models, in one format each."""
    files = merged(run, scene, "--shard-size", "4kB")
    hub.add("org/m", {**files, "model.fp16.safetensors": b"1"})
    weights = files_of(scene.path / "ft1")["model.safetensors"]
    pipe = {
        "model_index.json": b"{}",
        "unet/config.json": b"{}",
        "unet/diffusion_pytorch_model.safetensors": weights,
        "vae/diffusion_pytorch_model.bin": b"only this",
        "scheduler/scheduler_config.json": b"{}",
    }
    more = {
        "unet/diffusion_pytorch_model.bin": b"1",
        "unet/diffusion_pytorch_model.fp16.safetensors": b"2",
        "all-in-one.safetensors": b"3",
        "unet/code.py": b"4",
    }
    hub.add("org/pipe", {**pipe, **more})

    assert_done(run("pull", "org/m"))
    assert_done(run("pull", "org/pipe"))

    assert files_of(scene.path / "m").keys() == {*files, ORIGIN}
    assert files_of(scene.path / "pipe").keys() == {*pipe, ORIGIN}


def test_revisions(hub: Hub, run: Run, scene: Scene) -> None:
    """A tag, a commit; the commit is kept, whatever the branch becomes."""
    old = files_of(scene.path / "lora1")
    sha = hub.add("org/l", old)
    hub.repos["org/l"].refs["v1"] = sha
    hub.repos["org/l"].commit("main", files_of(scene.path / "lora2"), "another")

    assert_done(run("pull", "org/l@v1", "-o", "one"))
    assert_done(run("pull", "org/l", "--revision", sha, "-o", "two"))
    assert_done(run("pull", "org/l", "-o", "three"))

    for name, equal in (("one", True), ("two", True), ("three", False)):
        there = files_of(scene.path / name)
        assert (json.loads(there.pop(ORIGIN))["commit"] == sha) is equal
        assert (there == old) is equal
    assert_refused(run("pull", "org/l@v1", "--revision", "main"), "has a revision")
    assert_refused(run("pull", "org/l@gone", "-o", "x"), "no such revision")


def test_origins_reach_manifests(hub: Hub, run: Run, scene: Scene) -> None:
    """What is merged of a pulled model says where that was from."""
    sha = hub.add("org/base", files_of(scene.path / "base"))
    assert_done(run("pull", "org/base", "-o", "pulled"))

    assert_done(run("merge", "ft1", "-b", "pulled", "-m", "task_arithmetic", "-o", "out"))

    out = files_of(scene.path / "out")
    base = json.loads(out["mergebench_manifest.json"])["inputs"][0]
    assert base["origin"] == {"repo": "org/base", "commit": sha}
    front = yaml.safe_load(out["README.md"].decode().split("---\n")[1])
    assert front["base_model"] == ["org/base"]
    assert ORIGIN not in out


def test_digests_are_compared(hub: Hub, run: Run, scene: Scene) -> None:
    """Bytes that change on the way, of large and small files, are refused; nothing is left."""
    hub.add("org/m", files_of(scene.path / "ft1"))
    before = listing(scene.path)

    for name in ("model.safetensors", "config.json"):
        hub.corrupt = {name}
        assert_refused(run("pull", "org/m"), name, "did not come as the Hub lists it")
        assert listing(scene.path) == before
    hub.corrupt = set()
    assert_done(run("pull", "org/m"))


def test_manifests_are_compared(hub: Hub, run: Run, scene: Scene) -> None:
    """What was pushed by another tool after a change is not what the manifest says."""
    files = merged(run, scene)
    data = bytearray(files["model.safetensors"])
    data[-1] ^= 1
    hub.add("org/m", {**files, "model.safetensors": bytes(data)})
    before = listing(scene.path)

    assert_refused(run("pull", "org/m"), "not what its manifest says", "model.safetensors")

    assert listing(scene.path) == before


@pytest.mark.parametrize("name", ["../x.json", "/etc/x.json", "a/../../x.json", "a\\x.json"])
def test_names_that_escape(hub: Hub, run: Run, scene: Scene, name: str) -> None:
    """A repository that names files outside of its folder is refused before anything comes."""
    hub.add("org/m", {**files_of(scene.path / "ft1"), name: b"{}"})
    before = listing(scene.path)

    assert_refused(run("pull", "org/m"), "outside of its folder")

    assert listing(scene.path) == before
    assert not hub.seen("resolve")


def test_a_cut_pull_goes_on(hub: Hub, run: Run, scene: Scene) -> None:
    """Files that came before a failure are not downloaded again."""
    files = merged(run, scene, "--shard-size", "4kB")
    hub.add("org/m", files)
    shards = sorted(name for name in files if name.endswith(".safetensors"))
    hub.faults.append(Fault(f"^GET /storage-of/.*{re.escape(shards[-1])}", 403, 1))

    assert_refused(run("pull", "org/m"), "hf://org/m")
    assert "m" not in listing(scene.path)
    assert hidden(scene.path) != []
    first = len(hub.seen("^GET /storage-of/"))
    assert_done(run("pull", "org/m"))

    assert len(hub.seen("^GET /storage-of/")) - first < len(shards)
    assert files_of(scene.path / "m").keys() == {*files, ORIGIN}
    assert hidden(scene.path) == []


def test_interrupts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has come stays for the next pull, and the message says so."""
    file = RemoteFile("model.safetensors", 8, None, "0" * 40)
    monkeypatch.setattr(pulling, "list_files", lambda ref: ("0" * 40, {file.name: file}))

    def interrupted(*args: object) -> None:
        (args[-1] / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(pulling, "download", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        pulling.pull("org/m", tmp_path / "m")

    assert "the same pull goes on" in caught.value.__notes__[0]
    assert (tmp_path / ".m.mergebench-part" / "model.safetensors").read_bytes() == b"half"
    assert not (tmp_path / "m").exists()


def test_pull_of_nothing(hub: Hub, run: Run, scene: Scene) -> None:
    """No weights, no repository, no network: one line each."""
    hub.add("org/readme", {"README.md": b"hello"})
    before = listing(scene.path)

    assert_refused(run("pull", "org/readme"), "holds no weights")
    assert_refused(run("pull", "org/none", token=TOKEN), "no such repository")
    assert_refused(run("pull", "org/readme", HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE")
    assert_refused(run("pull", "../etc"), "is no name of a repository")

    assert listing(scene.path) == before
