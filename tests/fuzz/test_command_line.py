"""The command over files of strangers: exit code 2, one line, nothing a terminal would act on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.running import assert_done, assert_refused, assert_safe, call

from .support import seeds, targets

OPENED = ("header", "index", "config", "adapter", "keys", "metadata", "manifest", "gguf", "pickled",
          "sparse", "archive", "dcp")  # fmt: skip
CASES = [(t, name) for t in OPENED for name in seeds.regressions()[t]]


def laid_out(target: str, data: bytes, folder: Path) -> Path:
    """The files of a case, and what is given to the command."""
    folder.mkdir()
    targets.TARGETS[target](data, folder)
    single = {"header": "model.safetensors", "keys": "adapter.safetensors",
              "metadata": "delta.safetensors", "gguf": "model.gguf", "pickled": "pytorch_model.bin",
              "archive": "pytorch_model.bin"}  # fmt: skip
    return folder / single[target] if target in single else folder


@pytest.mark.parametrize(("target", "name"), CASES)
def test_inspect(tmp_path: Path, target: str, name: str) -> None:
    """Refused in one line that names the file, or shown."""
    place = laid_out(target, seeds.regressions()[target][name], tmp_path / "model")

    ran = call("inspect", place, "--tensors", cwd=tmp_path)

    assert_safe(ran)
    if ran.code == 0:
        assert ran.out
        assert not ran.err
        as_json = assert_done(call("inspect", place, "--tensors", "--json", cwd=tmp_path))
        assert_safe(as_json)
        assert isinstance(as_json.json, dict)
    else:
        assert_refused(ran, str(tmp_path / "model"))


@pytest.mark.parametrize("name", seeds.regressions()["recipe"])
def test_run(tmp_path: Path, name: str) -> None:
    """Recipes, each refused in one line that names it."""
    (tmp_path / "recipe.yaml").write_bytes(seeds.regressions()["recipe"][name])

    ran = call("run", "recipe.yaml", cwd=tmp_path)

    assert_safe(ran)
    assert_refused(ran, "recipe.yaml")
