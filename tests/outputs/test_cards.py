"""Model cards: front matter that the Hub reads, and the recipe in full."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.adapters import save_peft
from tests.helpers.running import assert_done, call
from tests.helpers.scene import Scene


def front_matter(folder: Path) -> tuple[dict[str, Any], str]:
    """The parsed front matter of a card, and the text below it."""
    empty, front, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(front), text


def name_it(folder: Path, name: str) -> None:
    """Write where a model comes from into its config."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_name_or_path": name}))


def test_local_inputs_are_not_named_as_bases(scene: Scene) -> None:
    """Paths on this machine are no repositories, so the card claims none."""
    name_it(scene.path / "ft1", "/home/someone/model")
    assert_done(call("merge", "ft1", "./ft2", "-b", "base", "-o", "out", cwd=scene.path))

    front, _ = front_matter(scene.path / "out")
    assert front == {"library_name": "transformers", "tags": ["merge", "mergebench"]}


def test_hub_ids_are_the_bases(scene: Scene) -> None:
    """Ids that configs name become base_model, each once, related by merging."""
    for folder, name in (("base", "org/Base-1.5B"), ("ft1", "me/tuned"), ("ft2", "org/Base-1.5B")):
        name_it(scene.path / folder, name)
    assert_done(call("merge", "ft1", "ft2", "-b", "base", "-m", "ties", "-o", "o", cwd=scene.path))

    front, _ = front_matter(scene.path / "o")
    assert sorted(front.pop("base_model")) == ["me/tuned", "org/Base-1.5B"]
    assert front == {
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "mergebench"],
    }


def test_paths_of_two_parts_are_not_hub_ids(scene: Scene) -> None:
    """A relative path that looks like an id is still a path."""
    (scene.path / "models").mkdir()
    for name in ("base", "ft1", "ft2"):
        (scene.path / name).rename(scene.path / "models" / name)
    names = ("models/ft1", "models/ft2", "-b", "models/base")
    assert_done(call("merge", *names, "-o", "out", cwd=scene.path))

    front, _ = front_matter(scene.path / "out")
    assert "base_model" not in front
    assert "base_model_relation" not in front


def test_adapters_name_their_base(scene: Scene) -> None:
    """The card of a merged adapter has PEFT's library name and the common base."""
    for number, made in enumerate(scene.loras, start=1):
        folder = scene.path / f"named{number}"
        save_peft(folder, made, base_model_name_or_path="org/base")
    assert_done(call("merge", "named1", "named2", "-o", "out", cwd=scene.path))

    front, text = front_matter(scene.path / "out")
    assert front == {
        "base_model": ["org/base"],
        "base_model_relation": "adapter",
        "library_name": "peft",
        "tags": ["merge", "mergebench"],
    }
    assert "LoRA adapter" in text


def test_card_tells_method_inputs_and_recipe(scene: Scene) -> None:
    """Method with its paper, inputs with weights, and the stored recipe stand in the text."""
    arguments = ("ft1:0.25", "ft2", "-b", "base", "-m", "breadcrumbs", "-o", "deep/mine")
    assert_done(call("merge", *arguments, cwd=scene.path))

    out = scene.path / "deep" / "mine"
    _, text = front_matter(out)
    assert text.startswith("\n# mine\n")
    assert "**breadcrumbs** ([arXiv:2312.06795](https://arxiv.org/abs/2312.06795))" in text
    for row in ("| base | `base` |  |", "| model | `ft1` | 0.25 |", "| model | `ft2` | 1.0 |"):
        assert f"\n{row}\n" in text
    assert f"```yaml\n{(out / 'mergebench_recipe.yaml').read_text()}```" in text


def test_one_model_twice_keeps_both_weights(scene: Scene) -> None:
    """A model given twice appears in card and manifest with each of its weights."""
    arguments = ("ft1:0.25", "ft1:0.5", "-b", "base", "-m", "task_arithmetic", "-o", "out")
    assert_done(call("merge", *arguments, cwd=scene.path))

    out = scene.path / "out"
    _, text = front_matter(out)
    manifest = json.loads((out / "mergebench_manifest.json").read_text())
    weights = [each["weight"] for each in manifest["inputs"] if each["role"] == "model"]
    assert sorted(weights) == [0.25, 0.5]
    assert "| model | `ft1` | 0.25 |" in text
    assert "| model | `ft1` | 0.5 |" in text


@pytest.mark.parametrize(
    ("method", "link"),
    [
        ("slerp", "[doi:10.1145/325334.325242](https://doi.org/10.1145/325334.325242)"),
        ("sce", "[arXiv:2408.07990](https://arxiv.org/abs/2408.07990)"),
        ("passthrough", "(https://github.com/arcee-ai/mergekit)"),
    ],
)
def test_methods_are_cited_by_what_they_have(scene: Scene, method: str, link: str) -> None:
    """A method without a preprint is cited by its doi or its address."""
    models = ("ft1",) if method == "passthrough" else ("ft1", "ft2")
    done = call("merge", *models, "-b", "base", "-m", method, "-o", "out", cwd=scene.path)
    assert_done(done)

    assert link in front_matter(scene.path / "out")[1]
