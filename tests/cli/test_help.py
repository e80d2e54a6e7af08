"""Help pages: every command has two examples, and each example runs."""

from __future__ import annotations

import re
import shlex
import shutil
from inspect import getdoc

import pytest

from mergebench.cli.main import app
from tests.helpers.libraries import llama, save_tuned
from tests.helpers.models import base_model
from tests.helpers.running import Ran, assert_done, call
from tests.helpers.scene import Scene
from tests.hub.commands import commander, files_of
from tests.hub.server import running

GROUPS = {group.name: group.typer_instance for group in app.registered_groups}
PAGES = {command.name: getdoc(command.callback) for command in app.registered_commands}
PAGES |= {
    f"{name} {command.name}": getdoc(command.callback)
    for name, group in GROUPS.items()
    for command in group.registered_commands
}
PAGES |= {name: group.info.help for name, group in GROUPS.items()}
#: A task as the examples of ``fit`` name it: a norm of the small model, looked at and learned.
TASK = """
class Task:
    def score(self, model, split):
        return {"norm": -float((model.arrays()["model.norm.weight"] ** 2).sum())}

    def module(self):
        import torch

        root, middle = torch.nn.Module(), torch.nn.Module()
        root.model, middle.norm = middle, torch.nn.LayerNorm(SIZE, bias=False)
        root.forward = lambda x: middle.norm.weight * x
        return root

    def batches(self, split):
        import torch

        return [{"x": torch.ones(())}]

    def loss(self, outputs, batch):
        return (outputs**2).sum()

    def logits(self, outputs, batch):
        return outputs[None]


def task():
    return Task()
"""
EXAMPLE = re.compile(r"^ +(mergebench .*)$", re.MULTILINE)
EXAMPLES = {page: EXAMPLE.findall(text) for page, text in PAGES.items()} | {
    "": EXAMPLE.findall(app.info.help)
}


@pytest.mark.parametrize("page", sorted(EXAMPLES))
def test_two_examples_on_every_page(scene: Scene, page: str) -> None:
    """Each help page shows two different examples of its command."""
    shown = " ".join(assert_done(call(*page.split(), "--help", cwd=scene.path)).out.split())

    assert len(set(EXAMPLES[page])) == 2
    for example in EXAMPLES[page]:
        assert example in shown
        assert example.startswith(f"mergebench {page}".strip())


@pytest.mark.parametrize("page", sorted(EXAMPLES))
def test_examples_run_as_printed(scene: Scene, page: str) -> None:
    """Each example works in a folder that holds what it names."""
    if page == "check":
        # Only there another library opens the models.
        save_tuned(scene.path, llama)
    assert_done(call("merge", "ft1", "ft2", "-b", "base", "-o", "merged", cwd=scene.path))
    shutil.copy(scene.path / "merged" / "mergebench_recipe.yaml", scene.path / "recipe.yaml")
    for number, name in ((1, "adapter"), (1, "adapter1"), (2, "adapter2")):
        shutil.copytree(scene.path / f"lora{number}", scene.path / name)
    kit = "{merge_method: slerp, base_model: base, models: [{model: ft1}], parameters: {t: 0.5}}"
    (scene.path / "mergekit.yml").write_text(kit)
    size = base_model()["model.norm.weight"].size
    (scene.path / "eval.py").write_text(TASK.replace("SIZE", str(size)))
    (scene.path / "score.py").write_text("print('{\"score\": 1.0}')")
    if page == "decompress":
        for model, more in (("adapter", ()), ("ft1", ("-b", "base"))):
            out = f"{model}.mbz.safetensors"
            assert_done(call("compress", model, *more, "-o", out, cwd=scene.path))
    different = ("mergebench diff",)
    if page.startswith("zoo"):
        for name in () if page in ("zoo", "zoo add") else ("one", "two", "three"):
            assert_done(call("zoo", "add", "lora1", "--as", name, cwd=scene.path))
    if page in ("push", "pull"):
        assert_hub_examples_run(scene, page)
        return

    for example in EXAMPLES[page]:
        words = shlex.split(example)[1:]
        if "-o" in words:
            shutil.rmtree(scene.path / words[words.index("-o") + 1], ignore_errors=True)
        ran = call(*words, cwd=scene.path, env={"XDG_CACHE_HOME": str(scene.path / "cache")})
        assert ran.code == (1 if example.startswith(different) else 0), ran
        assert ran.out
        assert ran.err == ""
        (scene.path / "merged").mkdir(exist_ok=True)


def assert_hub_examples_run(scene: Scene, page: str) -> None:
    """Examples that need a Hub, with one on this machine."""
    with running() as hub:
        run = commander(hub, scene.path, scene.path.parent / "home", fresh=True)
        for name in ("merged", "adapter") if page == "pull" else ():
            hub.add(f"org/{name}", files_of(scene.path / name))
        for example in EXAMPLES[page]:
            shutil.rmtree(scene.path / "pulled", ignore_errors=True)
            ran = assert_done(run(*shlex.split(example)[1:]))
            assert ran.out
            assert ran.err == ""


def test_help_without_words(scene: Scene) -> None:
    """The bare command shows its help, and its code says that nothing was done."""
    assert call(cwd=scene.path) == Ran(2, call("--help", cwd=scene.path).out, "")
    assert call("-h", cwd=scene.path).out == call("--help", cwd=scene.path).out


def test_commands_are_documented(scene: Scene) -> None:
    """The first page lists every command with a summary."""
    lines = call("--help", cwd=scene.path).out.splitlines()

    for page, text in PAGES.items():
        if " " in page:
            continue
        (line,) = [line for line in lines if line.startswith(f"  {page} ")]
        assert line.split(None, 1)[1][:30] == text[:30]


def test_version(scene: Scene) -> None:
    """--version prints name and number."""
    ran = assert_done(call("--version", cwd=scene.path))

    assert re.fullmatch(r"mergebench \d+\.\d+\.\d+\n", ran.out)
