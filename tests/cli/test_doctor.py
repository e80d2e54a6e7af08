"""doctor: what the machine and the installation offer, and what is missing."""

from __future__ import annotations

import errno
import os
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import requires, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mergebench import doctor, packages
from mergebench.checkpoints import replacing, trial
from mergebench.cli import checking
from mergebench.core.errors import MergebenchError
from tests.helpers.running import assert_done, assert_refused, call

REQUIRED = [
    "numpy>=2.1",
    "Some_Thing>=3",
    "gguf>=0.10; extra == 'gguf'",
    "rarely>=1; extra == 'gguf'",
    "never>=1; python_version < '3'",
    "mergebench[gguf]; extra == 'dev'",
    "ruff; extra == 'dev'",
]
HELD = {"numpy": "2.4.6", "Some_Thing": "2.9", "gguf": "0.19.0", "ruff": "0.1"}


def names(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """Whether each package fits."""
    return {row["name"]: row["fits"] for row in rows}


def test_versions_are_held_against_what_is_demanded() -> None:
    """Markers count; an extra adds what it asks for, and what it takes from another extra."""
    needed = packages.packages(REQUIRED, found=HELD.get)

    assert names(needed) == {"numpy": True, "Some_Thing": False}
    assert needed[1] == {"name": "Some_Thing", "wanted": ">=3", "found": "2.9", "fits": False}
    assert names(packages.packages(REQUIRED, "gguf", HELD.get)) == {"gguf": True, "rarely": False}
    expected = {"gguf": True, "rarely": False, "ruff": True}
    assert names(packages.packages(REQUIRED, "dev", HELD.get)) == expected
    assert packages.installed("numpy") == version("numpy")
    assert packages.installed("no-such-package") is None


def test_this_installation(tmp_path: Path) -> None:
    """Every runtime package with its version, every extra, and nothing wrong."""
    ran = assert_done(call("doctor", "--json", cwd=tmp_path))

    data = ran.json
    assert data["problems"] == []
    runtime = {each for each in requires("mergebench") or [] if "extra ==" not in each}
    assert len(data["packages"]) == len(runtime)
    for each in data["packages"]:
        assert each["found"] == version(each["name"])
        assert each["fits"] is True
    assert data["environment"]["python"].startswith(platform.python_version())
    assert 1 <= data["environment"]["usable_cores"] <= data["environment"]["cores"]
    assert data["environment"]["memory"]["total"] > 1 << 28
    assert any("openblas" in each["library"] for each in data["environment"]["blas"])
    assert data["extras"]["gguf"] == {"missing": [], "install": ""}
    assert "accelerators" not in data
    assert "disk" not in data
    shown = assert_done(call("doctor", cwd=tmp_path)).out
    assert shown.endswith("all that is needed is there\n")
    for each in data["packages"]:
        assert f"{each['name']} {each['found']}" in shown


def test_torch_is_asked_only_on_request(tmp_path: Path) -> None:
    """Then it says what it sees."""
    import torch

    data = call("doctor", "--torch", "--json", cwd=tmp_path).json

    assert data["accelerators"]["torch"] == torch.__version__
    assert len(data["accelerators"]["cuda"]) == torch.cuda.device_count()
    assert data["accelerators"]["mps"] is torch.backends.mps.is_available()


def fake_metadata(requirements: list[str]) -> Any:
    """Metadata of a package with these requirements."""
    extras = ["dev", "gguf"]
    found = {"Requires-Dist": requirements, "Provides-Extra": extras}
    return lambda name: SimpleNamespace(get_all=found.get)


def test_missing_and_old_packages_are_problems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 1, with the command that helps; extras are no problem."""
    wanted = ["numpy>=99", "no-such-package>=1", "xxhash", "no-such-extra>=1; extra == 'gguf'"]
    monkeypatch.setattr(doctor, "metadata", fake_metadata(wanted))

    ran = call("doctor", cwd=tmp_path)
    data = call("doctor", "--json", cwd=tmp_path).json

    assert ran.code == 1
    assert data["problems"] == [
        "no-such-package is not installed: pip install 'no-such-package>=1'",
        f"numpy is {version('numpy')}, >=99 is needed: pip install 'numpy>=99'",
    ]
    assert "problem: no-such-package is not installed" in ran.out
    assert "gguf: no-such-extra missing; pip install 'mergebench[gguf]'" in ran.out
    assert "xxhash" in ran.out


def test_broken_packages_are_problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed, and not importable; torch is not imported for it."""
    monkeypatch.setitem(sys.modules, "xxhash", None)
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(doctor, "metadata", fake_metadata(["xxhash", "numpy", "torch"]))

    data = doctor.examine({})

    (problem,) = data["problems"]
    assert problem.startswith(f"xxhash {version('xxhash')} cannot be imported: ModuleNotFoundError")
    assert "torch cannot be imported" in doctor.examine({}, torch=True)["problems"][1]


SECRETS = {
    "HF_TOKEN": "hf_secret",
    "HUGGING_FACE_HUB_TOKEN": "hf_secret",
    "HF_ENDPOINT": "https://me:se/cret@hub.example/path?token=secret",
    "HF_HUB_OFFLINE": "1",
    "HF_HOME": "/home/me/hf",
    "HF_HUB_USER_AGENT_ORIGIN": "secret",
    "HF_API_KEY": "secret",
    "HF_EMPTY_TOKEN": "",
    "MERGEBENCH_MEMORY": "1GiB",
    "MERGEBENCH_SECRET": "secret",
    "OTHER_TOKEN": "secret",
}


def test_tokens_are_never_shown(tmp_path: Path) -> None:
    """Only whether they are set; addresses lose their user and what follows the path."""
    found = doctor.variables(SECRETS)

    assert found == {
        "HF_API_KEY": "set",
        "HF_EMPTY_TOKEN": "empty",
        "HF_ENDPOINT": "https://…@hub.example/path",
        "HF_HOME": "/home/me/hf",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_USER_AGENT_ORIGIN": "set",
        "HF_TOKEN": "set",
        "HUGGING_FACE_HUB_TOKEN": "set",
        "MERGEBENCH_MEMORY": "1GiB",
        "MERGEBENCH_SECRET": "set",
    }
    kept = {name: value for name, value in SECRETS.items() if name != "MERGEBENCH_SECRET"}
    for arguments in ((), ("--json",)):
        ran = assert_done(call("doctor", *arguments, cwd=tmp_path, env=kept))
        assert "cret" not in ran.out + ran.err


def test_misspelt_variables_are_problems(tmp_path: Path) -> None:
    """Known are those of the options, and no others."""
    ran = call("doctor", "--json", cwd=tmp_path, env={"MERGEBENCH_MEMROY": "1GiB"})

    assert ran.code == 1
    assert ran.json["problems"] == [
        "MERGEBENCH_MEMROY is no variable of mergebench: did you mean 'MERGEBENCH_MEMORY'?"
    ]
    assert {"MERGEBENCH_WORKERS", "MERGEBENCH_QUIET", "MERGEBENCH_DEBUG"} <= {*checking.variables()}


def test_few_open_files_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model may have more shards than that."""
    monkeypatch.setattr(doctor, "limits", lambda: {"open_files": 20})

    assert doctor.examine({})["problems"] == [
        "at most 20 files may be open at once; raise it with `ulimit -n`"
    ]


def test_disk_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    """Speeds, space, and what outputs rely on."""
    (tmp_path / "mine").write_bytes(b"mine")
    size = ("--disk-size", "3MiB")

    data = assert_done(call("doctor", "--disk", ".", *size, "--json", cwd=tmp_path)).json["disk"]
    shown = assert_done(call("doctor", "--disk", ".", *size, cwd=tmp_path)).out

    assert data["bytes"] == 3 << 20
    assert data["write"] > 0
    assert data["read"] > 0
    assert data["free"] > 1 << 20
    assert data["file_system"]
    assert all(isinstance(data[what], bool) for what in ("preallocation", "exchange", "locks"))
    assert "3.1 MB written and synced at" in shown
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("place", "name", "value", "what"),
    [
        (replacing, "_exchange", lambda *_: False, "exchange"),
        (trial, "acquire", lambda *_: None, "locks"),
        (trial, "create", lambda path, *_: path.write_bytes(bytes(9)), "preallocation"),
    ],
)
def test_what_a_disk_cannot_do_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Any, name: str, value: Any, what: str
) -> None:
    """It does not fail for it."""
    monkeypatch.setattr(place, name, value)
    found: Mapping[str, Any] = trial.try_disk(tmp_path, 1 << 20)

    assert found[what] is False
    assert list(tmp_path.iterdir()) == []


def test_disks_that_cannot_be_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, and nothing remains."""
    assert_refused(call("doctor", "--disk", "nowhere", cwd=tmp_path), "nowhere: no such folder")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(trial, "flush", fail)
    with pytest.raises(MergebenchError, match="not enough space"):
        trial.try_disk(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_trial_takes_a_part_of_the_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of what is free, at least one block."""
    for free, expected in ((12 << 20, 3 << 20), (1, 1 << 20)):
        monkeypatch.setattr(trial, "free_bytes", lambda _, free=free: free)
        assert trial.try_disk(tmp_path)["bytes"] == expected
