"""``hf://org/name[@revision][/file]`` wherever a model is accepted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from mergebench.checkpoints.hub import HubRef, parse_hub
from mergebench.checkpoints.hub_files import escapes, needed
from mergebench.core.errors import MergebenchError
from tests.helpers.files import read
from tests.helpers.running import assert_done, assert_refused
from tests.helpers.scene import Scene
from tests.hub.commands import Run, files_of
from tests.hub.server import TOKEN, Fault, Hub

OFFLINE = {"HF_HUB_OFFLINE": "1"}


def assert_same(one: Path, two: Path) -> None:
    """Both hold the same tensors, bit for bit."""
    left, right = read(one), read(two)
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name].view(np.uint8), right[name].view(np.uint8))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf://org/name", HubRef("org/name")),
        ("hf://org/name@v1.0", HubRef("org/name", "v1.0")),
        (
            "hf://org/name@refs/pr/3/a/b.safetensors",
            HubRef("org/name", "refs/pr/3", "a/b.safetensors"),
        ),
        ("hf://org/name/unet/", HubRef("org/name", None, "unet")),
        ("hf://gpt2@main", HubRef("gpt2", "main")),
    ],
)
def test_references_are_taken_apart(text: str, expected: HubRef) -> None:
    """Repository, revision and file, pull requests included."""
    assert parse_hub(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "hf://",
        "hf://@main",
        "hf://org/name/../x",
        "hf://datasets/org/name",
        "hf://a//b",
        "hf://o/n\n",
    ],
)
def test_no_references(text: str) -> None:
    """What names no model of the Hub is refused."""
    with pytest.raises(MergebenchError):
        parse_hub(text)


@pytest.mark.parametrize(
    "name", ["../x", "/x", "a/../../x", "a\\b", "C:x", "", "a/./b", "a//b", "x\n", "..", "a/.."]
)
def test_names_that_escape(name: str) -> None:
    """Names that lead out of a folder are known, whatever the system's separators."""
    assert escapes(name)
    assert not escapes("a/b..c/.d.json")


SIDES = ["config.json", "tokenizer.json", "README.md", "modeling.py", "training_args.bin"]


@pytest.mark.parametrize(
    ("names", "path", "expected"),
    [
        (["model.safetensors", "pytorch_model.bin", "model.onnx"], "", ["model.safetensors"]),
        (["model.safetensors.index.json", "model-00001-of-00002.safetensors"], "",
         ["model.safetensors.index.json"]),
        (["model.safetensors", "model.fp16.safetensors"], "", ["model.safetensors"]),
        (["pytorch_model.bin"], "", ["pytorch_model.bin"]),
        (["adapter_config.json", "adapter_model.bin", "adapter_model.safetensors"], "",
         ["adapter_model.safetensors", "adapter_config.json"]),
        (["a.safetensors", "b.safetensors"], "b.safetensors", ["b.safetensors"]),
        (["delta.safetensors", "x.safetensors"], "", ["delta.safetensors"]),
    ],
)  # fmt: skip
def test_only_what_is_needed(names: list[str], path: str, expected: list[str]) -> None:
    """One format of the weights and what a loader reads beside them, no code and no page."""
    top, found = needed("hf://org/name", path, [*names, *SIDES])
    assert top == path
    assert sorted(found) == sorted([*expected, "config.json", "tokenizer.json"])


def test_merging_from_the_hub(hub: Hub, run: Run, scene: Scene) -> None:
    """The same bytes as from folders; manifest and recipe name the commits."""
    shas = {name: hub.add(f"org/{name}", files_of(scene.path / name)) for name in ("base", "ft1")}
    assert_done(run("merge", "ft1:0.5", "ft2", "-b", "base", "-m", "ties", "-o", "local"))

    names = ("hf://org/ft1@main:0.5", "ft2", "-b", "hf://org/base")
    assert_done(run("merge", *names, "-m", "ties", "-o", "out"))

    assert_same(scene.path / "local", scene.path / "out")
    recipe = yaml.safe_load((scene.path / "out" / "mergebench_recipe.yaml").read_text())
    assert recipe["revisions"] == {
        "hf://org/base": shas["base"], "hf://org/ft1@main": shas["ft1"]
    }  # fmt: skip
    assert recipe["base"] == "hf://org/base"
    made = json.loads((scene.path / "out" / "mergebench_manifest.json").read_text())
    assert made["inputs"][0]["files"][0]["commit"] == shas["base"]
    card = (scene.path / "out" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == ["org/base", "org/ft1"]
    assert (scene.path / "out" / "config.json").read_bytes() == hub.tree("org/base")["config.json"]
    assert "tokenizer.json" in files_of(scene.path / "out")
    assert_done(run("verify", "out", "--replay", "all"))


def test_recipes_keep_the_commit(hub: Hub, run: Run, scene: Scene) -> None:
    """A recipe gives the same model after the branch has moved; an idle commit is refused."""
    hub.add("org/a", {"a.safetensors": (scene.path / "a.safetensors").read_bytes()})
    assert_done(run("merge", "hf://org/a", "lora2", "-o", "out"))
    recipe = yaml.safe_load((scene.path / "out" / "mergebench_recipe.yaml").read_text())
    hub.repos["org/a"].commit(
        "main", {"a.safetensors": (scene.path / "b.safetensors").read_bytes()}, "another"
    )
    (scene.path / "pinned.yaml").write_text(yaml.safe_dump({**recipe, "out": "again"}))
    loose = {**recipe, "out": "loose"}
    del loose["revisions"]
    (scene.path / "loose.yaml").write_text(yaml.safe_dump(loose))

    assert_done(run("run", "pinned.yaml"))
    assert_done(run("run", "loose.yaml"))

    assert_same(scene.path / "out", scene.path / "again")
    with pytest.raises(AssertionError):
        assert_same(scene.path / "out", scene.path / "loose")
    idle = {**recipe, "revisions": {**recipe["revisions"], "hf://org/b": "0" * 40}, "out": "x"}
    (scene.path / "idle.yaml").write_text(yaml.safe_dump(idle))
    assert_refused(run("run", "idle.yaml"), "revisions: hf://org/b", "hf://org/a")
    idle["revisions"] = {"hf://org/a": "main"}
    (scene.path / "idle.yaml").write_text(yaml.safe_dump(idle))
    assert_refused(run("run", "idle.yaml"), "`revisions` of hf://org/a", "40 hexadecimal")


def test_everywhere_a_model_is_accepted(hub: Hub, run: Run, scene: Scene) -> None:
    """inspect, diff, plan, spectral, pairs, single files and subfolders."""
    files = files_of(scene.path / "lora1")
    bare = {"bare/a.safetensors": (scene.path / "a.safetensors").read_bytes()}
    hub.add("org/l", {**files, **{f"sub/{name}": data for name, data in files.items()}, **bare})
    hub.add("org/base", files_of(scene.path / "base"))

    shown = assert_done(run("inspect", "hf://org/l", "--json")).json
    assert shown["path"] == "hf://org/l"
    assert_done(run("diff", "hf://org/l", "lora1"))
    assert_done(run("diff", "hf://org/l/sub", "lora1"))
    assert_done(run("diff", "hf://org/l/bare/a.safetensors", "a.safetensors"))
    assert_done(run("diff", "hf://org/l/bare", "a.safetensors"))
    assert_done(run("diff", "hf://org/base+hf://org/l", "base+lora1"))
    assert_done(run("diff", "hf://org/base[0-1]", "base[0-1]"))
    assert_done(run("plan", "hf://org/base+hf://org/l", "ft1", "-b", "hf://org/base"))
    assert_done(run("spectral", "hf://org/l", "--json"))


def test_existing_paths_win(hub: Hub, run: Run, scene: Scene) -> None:
    """A folder that is called like a reference is that folder."""
    (scene.path / "hf:" / "org").mkdir(parents=True)
    shutil.copytree(scene.path / "lora1", scene.path / "hf:" / "org" / "name")

    assert_done(run("diff", "hf://org/name", "lora1"))

    assert hub.requests == []


def test_nothing_is_downloaded_twice(hub: Hub, run: Run, scene: Scene) -> None:
    """Only what is needed comes down, once; then the cache serves, also without a network."""
    files = files_of(scene.path / "ft1")
    hub.add("org/m", {**files, "pytorch_model.bin": b"no", "model.py": b"no", "big.onnx": b"no"})

    assert_refused(run("inspect", "hf://org/m", **OFFLINE), "not in the cache", "HF_HUB_OFFLINE")
    assert hub.requests == []
    assert_done(run("inspect", "hf://org/m"))
    got = {each.rsplit("/", 1)[1] for each in hub.seen("^GET .*(/resolve/|/storage-of/)")}
    assert got == set(files) - {"README.md"}
    del hub.requests[:]
    assert_done(run("inspect", "hf://org/m"))
    assert not hub.seen("resolve|storage-of")
    del hub.requests[:]
    assert_done(run("diff", "hf://org/m", "ft1", **OFFLINE))
    assert hub.requests == []


def test_shards_that_an_index_names(hub: Hub, run: Run, scene: Scene) -> None:
    """Index and shards of one variant, and not those of others."""
    assert_done(run("merge", "ft1", "-m", "linear", "--shard-size", "2kB", "-o", "many"))
    files = files_of(scene.path / "many")
    shards = [name for name in files if name.endswith(".safetensors")]
    assert len(shards) > 2
    hub.add("org/m", {**files, "other.fp16.safetensors": b"no"})

    assert_done(run("diff", "hf://org/m", "ft1"))

    assert len(hub.seen("^GET /storage-of/")) == len(shards)


@pytest.mark.parametrize(
    ("reference", "token", "words"),
    [
        ("hf://org/none", TOKEN, ("no such repository", "may not see it", "check 'org/none'")),
        ("hf://org/none", None, ("no such repository", "private", "hf auth login")),
        ("hf://org/secret", None, ("no such repository", "private", "HF_TOKEN")),
        ("hf://org/gated", None, ("granted on request", "/org/gated")),
        ("hf://org/m@gone", TOKEN, ("hf://org/m@gone", "no such revision")),
        ("hf://org/m/gone.safetensors", TOKEN, ("no such file", "model.safetensors")),
        ("hf://org/m", "hf_wrong", ("does not know this token", "hf auth login")),
        ("hf://org/readme", TOKEN, ("holds no weights",)),
        ("hf://org/pipe", TOKEN, ("diffusers pipeline", "hf://org/pipe/unet")),
        ("hf://a b/c d", TOKEN, ("is no name of a repository", "org/name")),
        ("hf://org/evil", TOKEN, ("outside of its folder", "'../evil.json'")),
    ],
)
def test_what_the_hub_refuses(
    hub: Hub, run: Run, scene: Scene, reference: str, token: str | None, words: tuple[str, ...]
) -> None:
    """One line that says what to do, and exit code 2."""
    files = files_of(scene.path / "ft1")
    hub.add("org/m", files)
    hub.add("org/secret", files, private=True)
    hub.add("org/gated", files, gated=True)
    hub.add("org/readme", {"README.md": b"hello"})
    hub.add("org/evil", {**files, "../evil.json": b"{}"})
    hub.add("org/pipe", {"model_index.json": b"{}", "unet/model.safetensors": b"x"})

    assert_refused(run("inspect", reference, token=token), *words)


@pytest.mark.parametrize("status", [429, 503])
def test_faults_that_pass(hub: Hub, run: Run, scene: Scene, status: int) -> None:
    """Calls are tried again, and the answer of the server says when."""
    hub.add("org/m", files_of(scene.path / "ft1"))
    soon = {"Retry-After": "0"}
    hub.faults += [
        Fault("^GET /api/models/org/m$", status, 2, soon),
        Fault("^GET /api/models/org/m/tree", status, 1, soon),
    ]

    ran = assert_done(run("diff", "hf://org/m", "ft1"))

    assert ran.err == ""
    assert all(fault.times == 0 for fault in hub.faults)


@pytest.mark.parametrize(
    ("status", "headers", "words"),
    [
        (429, {"Retry-After": "0"}, ("too many requests", "later")),
        (429, {"Retry-After": "4000"}, ("too many requests", "later")),
        (503, {"Retry-After": "0"}, ("has a fault", "503")),
        (403, {}, ("forbids reading", "settings/tokens")),
    ],
)
def test_faults_that_stay(
    hub: Hub, run: Run, scene: Scene, status: int, headers: dict[str, str], words: tuple[str, ...]
) -> None:
    """After some tries it is one line; whoever asks for an hour is not waited for."""
    hub.add("org/m", files_of(scene.path / "ft1"))
    hub.faults.append(Fault("/api/models/org/m", status, 100, headers))

    assert_refused(run("inspect", "hf://org/m"), "hf://org/m", *words)

    tries = {"4000": 1, "0": 5}.get(headers.get("Retry-After", "4000"))
    assert len(hub.requests) == tries


def test_nobody_there(run: Run) -> None:
    """A Hub that cannot be reached is named."""
    ran = run("inspect", "hf://org/m@" + "0" * 40, HF_ENDPOINT="http://127.0.0.1:9")
    assert_refused(ran, "http://127.0.0.1:9 cannot be reached", "HF_ENDPOINT")


def test_token_with_a_space_stays_secret(run: Run) -> None:
    """Libraries quote a header that they refuse; the message does not."""
    ran = run("inspect", "hf://org/m", token="hf_not\x01Allowed")
    assert ran.code == 2
    assert "hf_not" not in ran.err
    assert len(ran.err.splitlines()) == 1


def test_cut_downloads_go_on(hub: Hub, run: Run, scene: Scene) -> None:
    """A connection that breaks in the middle is taken up where it broke."""
    sha = hub.add("org/m", files_of(scene.path / "ft1"))
    hub.cut[f"/storage-of/org/m/{sha}/model.safetensors"] = 100

    assert_done(run("diff", "hf://org/m", "ft1"))

    assert len(hub.seen("^GET /storage-of/")) == 2
