"""Pushing: looked through, one commit, nothing twice."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from mergebench.ship import push as pushing
from mergebench.ship.planned import plan_push
from tests.helpers.files import write
from tests.helpers.running import Ran, assert_done, assert_refused
from tests.helpers.scene import Scene
from tests.hub.commands import Run, files_of
from tests.hub.server import LARGE, TOKEN, Fault, Hub

MERGE = ("merge", "ft1", "ft2", "-b", "base", "-m", "ties", "-o", "out")
PUSH = ("push", "out", "org/out", "--private")


@pytest.fixture
def out(run: Run, scene: Scene) -> Path:
    """A merged folder."""
    assert_done(run(*MERGE))
    return scene.path / "out"


def front(card: bytes) -> dict[str, Any]:
    """The front matter of a card."""
    return dict(yaml.safe_load(card.decode().split("---\n")[1]))


def assert_pushed(hub: Hub, folder: Path, name: str = "org/out", ref: str = "main") -> None:
    """The repository holds the files of a folder, whose card has been completed."""
    there = {n: c for n, c in hub.tree(name, ref).items() if n != ".gitattributes"}
    here = files_of(folder)
    assert there.keys() == here.keys() | {"README.md"}
    for each in here:
        if each != "README.md":
            assert there[each] == here[each]


def test_pushing_a_folder(hub: Hub, run: Run, out: Path) -> None:
    """All files in one commit of a private repository; address and commit are printed."""
    ran = assert_done(run(*PUSH, "--message", "as it is", "--json")).json

    assert_pushed(hub, out)
    repo = hub.repos["org/out"]
    assert repo.private
    assert repo.messages == ["initial commit", "as it is"]
    assert ran["commit"] == repo.refs["main"]
    assert ran["url"] == f"{hub.url}/org/out/commit/{ran['commit']}"
    assert ran["created"]
    assert ran["verified_tensors"] > 0
    assert {each["state"] for each in ran["files"]} == {"new"}
    assert [each["name"] for each in ran["files"]] == sorted(hub.tree("org/out"))[1:]
    assert_done(run("push", "out", "org/two", "--public"))
    assert not hub.repos["org/two"].private


def test_the_card(hub: Hub, run: Run, out: Path) -> None:
    """Base models, relation, library and tags are completed; what people wrote stays."""
    written = (out / "README.md").read_text()
    text = written.split("---\n", 2)[2]
    (out / "README.md").write_text(
        f"---\nlicense: mit\nbase_model: []\ntags: [mine]\n---\n{text}Hello!\n"
    )
    config = json.loads((out / "config.json").read_text())
    local = (out / "README.md").read_bytes()

    assert_done(run(*PUSH))

    card = hub.tree("org/out")["README.md"]
    assert front(card) == {
        "license": "mit", "tags": ["mine", "merge", "mergebench"], "library_name": "transformers"
    }  # fmt: skip
    assert b"Hello!" in card
    assert f'{config["architectures"][0]}.from_pretrained("org/out")'.encode() in card
    assert (out / "README.md").read_bytes() == local
    (out / "README.md").write_bytes(card)
    assert_done(run(*PUSH))
    assert hub.tree("org/out")["README.md"] == card
    (out / "README.md").write_text("---\n- a: [\n---\n")
    assert_refused(run(*PUSH), "README.md", "not YAML")


def test_cards_of_adapters(hub: Hub, run: Run, scene: Scene) -> None:
    """An adapter names its base, and how PEFT loads it on that; a bare file gets a card too."""
    place = scene.path / "lora1" / "adapter_config.json"
    config = json.loads(place.read_text())
    place.write_text(json.dumps({**config, "base_model_name_or_path": "org/base"}))
    ran = assert_done(run("push", "lora1", "org/lora", "--public", "--json")).json
    assert "no manifest" in ran["notes"][0]

    card = hub.tree("org/lora")["README.md"]

    assert front(card) == {
        "base_model": ["org/base"], "base_model_relation": "adapter", "library_name": "peft"
    }  # fmt: skip
    assert b'AutoModelForCausalLM.from_pretrained("org/base")' in card
    assert b'PeftModel.from_pretrained(model, "org/lora")' in card
    assert_done(run("merge", "a.safetensors", "b.safetensors", "-o", "one.safetensors"))
    hub.add("org/one", {"README.md": b"written on the site\n", "other.safetensors": b"x"})
    assert_done(run("push", "one.safetensors", "org/one"))
    assert set(hub.tree("org/one")) == {"README.md", "other.safetensors", "one.safetensors"}
    card = hub.tree("org/one")["README.md"]
    assert b"written on the site" in card
    assert b"mergebench merge hf://org/one" in card
    assert front(card)["tags"] == ["merge", "mergebench"]


def test_bases_from_the_hub(hub: Hub, run: Run, scene: Scene) -> None:
    """What was merged from the Hub is named as base model."""
    for name in ("base", "ft1"):
        hub.add(f"org/{name}", files_of(scene.path / name))
    assert_done(run("merge", "hf://org/ft1", "ft2", "-b", "hf://org/base", "-o", "out"))

    assert_done(run(*PUSH))

    found = front(hub.tree("org/out")["README.md"])
    assert found["base_model"] == ["org/base", "org/ft1"]
    assert found["base_model_relation"] == "merge"


def test_a_dry_run_writes_nothing(hub: Hub, run: Run, out: Path) -> None:
    """It lists files and card, and only asks."""
    before = files_of(out)

    shown = assert_done(run(*PUSH, "--dry-run")).out
    data = assert_done(run(*PUSH, "--dry-run", "--json")).json
    offline = assert_done(run("push", "out", "org/out", "-n", HF_HUB_OFFLINE="1")).out

    assert "would be made" in shown
    assert "the Hub was not asked" in offline
    for name in before:
        assert name in shown
        assert name in offline
    assert 'from_pretrained("org/out")' in shown
    assert 'from_pretrained("org/out")' in data["card"]
    assert not data["exists"]
    assert not hub.seen("^(POST|PUT|DELETE)")
    assert hub.repos == {}
    assert files_of(out) == before


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_packed_adapters_say_what_they_lose(hub: Hub, run: Run, scene: Scene, folder: bool) -> None:
    """Ratio and error as compressing measured them; and who merges it needs no unpacking."""
    place = scene.path / "packed"
    place.mkdir()
    path = place / "adapter.mbz.safetensors"
    made = assert_done(run("compress", "lora1", "-o", path, "--json")).json
    if folder:
        config = json.loads((scene.path / "lora1" / "adapter_config.json").read_text())
        named = json.dumps({**config, "base_model_name_or_path": "org/base"})
        (place / "adapter_config.json").write_text(named)
    push = ("push", "packed" if folder else path, "org/packed", "--public")

    data = assert_done(run(*push, "--dry-run", "--json")).json
    shown = assert_done(run(*push, "--dry-run")).out

    assert {each["name"] for each in data["files"]} == {
        "README.md", "adapter.mbz.safetensors", *(["adapter_config.json"] if folder else [])
    }  # fmt: skip
    cells = [line.strip("| ").split(" | ") for line in data["card"].splitlines()]
    table = dict(each for each in cells if len(each) == 2)
    assert table["packed by"] == "ternary"
    assert table["bytes"] == f"{path.stat().st_size:,}"
    assert table["bytes before"] == f"{made['input_bytes']:,}"
    assert table["times smaller"] == f"{made['ratio']:.1f}"
    assert float(table["relative error"]) == pytest.approx(made["relative_error"], rel=1e-3)
    assert float(table["cosine"]) == pytest.approx(made["cosine"], rel=1e-3)
    assert f"| relative error | {table['relative error']} |" in shown
    base = "hf://org/base" if folder else "BASE"
    assert f"mergebench merge hf://org/packed --base {base} --method task_arithmetic" in shown
    # PEFT does not read it, and the Hub would show how to load it with that.
    assert "library_name: peft" not in data["card"]
    assert hub.repos == {}

    assert_done(run(*push))
    hub.add("org/base", files_of(scene.path / "base"))
    merge = ("-m", "task_arithmetic", "-o")
    assert_done(run("merge", "hf://org/packed", "-b", "hf://org/base", *merge, "one"))
    assert_done(run("merge", path, "-b", "base", *merge, "two"))
    one, two = (files_of(scene.path / each)["model.safetensors"] for each in ("one", "two"))
    assert one == two


def test_who_may_see_it_is_asked(hub: Hub, run: Run, out: Path) -> None:
    """Never guessed for a new repository, never changed for an old one."""
    bare = ("push", "out", "org/out")

    assert_refused(run(*bare), "who may see it", "--private or --public")
    assert_refused(run(*bare, "--dry-run"), "who may see it", "--private or --public")
    assert_refused(run(*bare, "--private", "--public"), "one of them")
    hub.add("org/out", {"README.md": b""})
    assert_refused(run(*bare, "--private"), "is public", "--private was given", "settings")
    assert not hub.seen("^(POST|PUT)")
    assert_done(run(*bare))
    assert_done(run(*bare, "--public"))


def test_nothing_is_uploaded_twice(hub: Hub, run: Run, out: Path) -> None:
    """A second push makes no commit; a changed file alone is uploaded."""
    assert_done(run(*PUSH))
    commits = len(hub.repos["org/out"].commits)
    del hub.requests[:]

    ran = assert_done(run(*PUSH))

    assert "nothing had changed" in ran.out
    assert hub.repos["org/out"].refs["main"] in ran.out
    assert not hub.seen("^(POST|PUT)")
    assert len(hub.repos["org/out"].commits) == commits
    (out / "notes.txt").write_text("new")
    states = {e["name"]: e["state"] for e in assert_done(run(*PUSH, "--json")).json["files"]}
    assert states.pop("notes.txt") == "new"
    assert set(states.values()) == {"same"}
    assert not hub.seen("^PUT")
    assert hub.tree("org/out")["notes.txt"] == b"new"


@pytest.mark.parametrize("chunk", [None, 1000])
def test_large_files_in_parts(hub: Hub, run: Run, scene: Scene, chunk: int | None) -> None:
    """Whole, or in parts where the storage asks for them."""
    hub.chunk = chunk

    assert_done(run("push", "ft1", "org/m", "--private"))

    assert (
        hub.tree("org/m")["model.safetensors"]
        == (scene.path / "ft1" / "model.safetensors").read_bytes()
    )
    puts = hub.seen("^PUT")
    assert len(puts) > 3 if chunk else len(puts) == 1


def test_a_cut_push_goes_on(hub: Hub, run: Run, out: Path, scene: Scene) -> None:
    """Shards that were uploaded before a failure are not uploaded again; nothing half is shown."""
    assert_done(run(*MERGE[:-1], "many", "--shard-size", "4kB"))
    many = scene.path / "many"
    shards = [name for name in files_of(many) if name.endswith(LARGE)]
    assert len(shards) > 2
    hub.faults.append(Fault("^POST /api/models/org/many/commit", 400, 1))
    push = ("push", "many", "org/many", "--private")

    assert_refused(run(*push), "many to org/many", "refuses this", "as asked for")
    assert set(hub.tree("org/many")) == {".gitattributes"}
    assert len(hub.seen("^PUT")) == len(shards)
    del hub.requests[:]
    assert_done(run(*push))

    assert not hub.seen("^PUT")
    assert_pushed(hub, many, "org/many")


@pytest.mark.parametrize("after", [False, True])
def test_lost_answers(hub: Hub, run: Run, out: Path, after: bool) -> None:
    """A commit whose answer is lost is found again, not made twice."""
    hub.faults += [
        Fault("^POST /api/models/org/out/commit", 503, 1, after=after),
        Fault("^POST /api/repos/create", 500, 1, {"Retry-After": "0"}, after=after),
    ]

    ran = assert_done(run(*PUSH, "--json")).json

    assert_pushed(hub, out)
    assert hub.repos["org/out"].messages == ["initial commit", "Push out with mergebench"]
    assert ran["commit"] == hub.repos["org/out"].refs["main"]


def test_stale_weights_go(hub: Hub, run: Run, out: Path, scene: Scene) -> None:
    """Shards of what was there before, which loaders would find, go; other files stay."""
    assert_done(run(*MERGE[:-1], "many", "--shard-size", "4kB"))
    assert_done(run("push", "many", "org/out", "--private"))
    repo = hub.repos["org/out"]
    repo.commit("main", {**hub.tree("org/out"), "picture.png": b"1", "gguf/x.bin": b"2"}, "site")

    plan = assert_done(run("push", "out", "org/out", "--dry-run")).out
    ran = assert_done(run("push", "out", "org/out", "--json")).json

    assert set(hub.tree("org/out")) == {
        *files_of(out), ".gitattributes", "picture.png", "gguf/x.bin"
    }  # fmt: skip
    assert "model.safetensors.index.json" in ran["deleted"]
    assert "model-00001-of-" in plan
    assert re.search(r"^deleted +model\.safetensors\.index\.json$", plan, re.MULTILINE)


def test_branches_and_pull_requests(hub: Hub, run: Run, out: Path) -> None:
    """A branch that is missing is made; a pull request leaves the branch alone."""
    sha = hub.add("org/out", {"README.md": b"mine"})

    ran = assert_done(run("push", "out", "org/out", "--branch", "next", "--json")).json
    assert ran["revision"] == "next"
    assert_pushed(hub, out, ref="next")
    asked = assert_done(run("push", "out", "org/out", "--create-pr"))

    assert hub.repos["org/out"].refs["main"] == sha
    assert_pushed(hub, out, ref="refs/pr/1")
    assert asked.out.splitlines()[-1] == f"{hub.url}/org/out/discussions/1"
    assert_refused(run("push", "out", "org/out", "--revision", sha), "is a commit", "branch")


def test_damaged_outputs_are_not_pushed(hub: Hub, run: Run, out: Path) -> None:
    """A byte that is not as it was written stops it before the Hub is asked."""
    weights = out / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))

    assert_refused(run(*PUSH), "not as it was written", "1 findings", "mergebench verify out")
    assert hub.requests == []


def test_what_cannot_be_pushed(hub: Hub, run: Run, scene: Scene) -> None:
    """Nothing there, no weights, damaged headers, odd names."""
    (scene.path / "empty").mkdir()
    shutil.copytree(scene.path / "ft1", scene.path / "cut")
    weights = scene.path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])

    assert_refused(run("push", "gone", "org/x", "--private"), "gone", "no such file")
    assert_refused(run("push", "empty", "org/x", "--private"), "empty", "no weights")
    assert_refused(run("push", "cut", "org/x", "--private"), "cut/model.safetensors")
    for name in ("x", "org/x/y", "a b/c"):
        assert_refused(run("push", "ft1", name, "--private"), name, "org/name")
    assert not hub.seen("^POST")


def test_what_stays_at_home(hub: Hub, run: Run, scene: Scene) -> None:
    """Hidden files, links out of the folder and notes on its origin; pickles are told of."""
    folder = scene.path / "ft1"
    (folder / ".env").write_text("secret")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("secret")
    (scene.path / "secret").write_text("secret")
    (folder / "notes.txt").symlink_to(scene.path / "secret")
    (folder / "mergebench_origin.json").write_text("{}")
    (folder / "old.bin").write_bytes(b"\x80pickle")
    (folder / "plots").mkdir()
    (folder / "plots" / "a.svg").write_text("kept")

    notes = assert_done(run("push", "ft1", "org/m", "--private", "--json")).json["notes"]

    there = hub.tree("org/m")
    assert there["plots/a.svg"] == b"kept"
    assert not [name for name, data in there.items() if b"secret" in data]
    assert "mergebench_origin.json" not in there
    assert {"notes.txt is not pushed", ".env is not pushed"} <= set(notes)
    assert any("old.bin is a pickle" in note for note in notes)


def test_paths_of_this_machine_are_told_of(hub: Hub, run: Run, scene: Scene) -> None:
    """Manifest and recipe become public."""
    base = str(scene.path / "base")
    assert_done(run("merge", "ft1", "-b", base, "-m", "task_arithmetic", "-o", "out"))
    notes = assert_done(run(*PUSH, "--dry-run", "--json")).json["notes"]
    assert any("folders of this machine" in note for note in notes)


@pytest.mark.parametrize(
    ("token", "words"),
    [(None, ("needs a token", "hf auth login")), ("hf_other", ("does not know this token",))],
)
def test_pushing_without_rights(
    hub: Hub, run: Run, out: Path, token: str | None, words: tuple[str, ...]
) -> None:
    """One line, with what to do."""
    ran = run(*PUSH, token=token)
    assert_refused(ran, *words)
    assert "hf_other" not in ran.err


def test_the_token_is_never_shown(hub: Hub, run: Run, out: Path) -> None:
    """Not where servers quote it, nor in JSON, nor with MERGEBENCH_DEBUG."""
    hub.faults.append(Fault("^POST /api/models/org/out/commit", 400, 9))
    hub.quote = True

    shown: list[Ran] = [
        run(*PUSH),
        run(*PUSH, "--json"),
        run(*PUSH, MERGEBENCH_DEBUG="1"),
        run(*PUSH, HF_DEBUG="1"),
    ]

    for ran in shown:
        assert ran.code == 2
        assert "<token>" in ran.err
        assert TOKEN not in ran.out + ran.err


def test_a_repository_that_changes_meanwhile(hub: Hub, run: Run, out: Path) -> None:
    """A commit of somebody else between question and commit is not written over."""
    hub.add("org/out", {"README.md": b"mine"})
    hub.race = ("org/out", {"README.md": b"mine", "theirs.txt": b"1"})

    ran = run(*PUSH[:-1])

    assert_refused(ran, "refuses this", "A commit has happened since")
    assert set(hub.tree("org/out")) == {"README.md", "theirs.txt"}
    assert_done(run(*PUSH[:-1]))
    assert hub.tree("org/out")["theirs.txt"] == b"1"


def test_interrupts(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """No commit, and the message says that what was uploaded stays."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pushing, "_commit", interrupted)
    monkeypatch.setattr(pushing, "has_token", lambda: True)
    plan = plan_push(scene.path / "ft1", "org/m")
    remote = pushing.Remote(True, "0" * 40, {})
    monkeypatch.setattr(pushing, "compare", lambda plan, _: (plan, remote))
    with pytest.raises(KeyboardInterrupt) as caught:
        pushing.push(plan, private=True)

    assert "no commit was made" in caught.value.__notes__[0]


def test_odd_files(hub: Hub, run: Run, scene: Scene) -> None:
    """An empty README and an empty file are files."""
    folder = scene.path / "m"
    write(folder / "model.safetensors", scene.base)
    (folder / "README.md").write_text("")
    (folder / "empty.txt").write_text("")

    assert_done(run("push", "m", "org/m", "--public"))

    assert hub.tree("org/m")["empty.txt"] == b""
    assert b"mergebench pull org/m" in hub.tree("org/m")["README.md"]
