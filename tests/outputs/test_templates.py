"""Chat templates that a recipe asks for, and the vocabulary of the base."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.helpers.files import F32, read
from tests.helpers.models import save_folder
from tests.helpers.running import assert_done, assert_refused, call
from tests.helpers.scene import Scene
from tests.safety.test_vocab import save

TEMPLATE = "{% for message in messages %}[{{ message['content'] }}]ü{% endfor %}"
CHAT = [{"role": "user", "content": "hello"}, {"role": "user", "content": "you"}]


def run(path: Path, template: str, *args: str, method: str = "linear") -> None:
    """Merge ft1 and ft2 with a chat template."""
    data = {"method": method, "models": ["ft1", "ft2"], "base": "base", "chat_template": template}
    (path / "recipe.json").write_text(json.dumps(data))
    assert_done(call("run", "recipe.json", "-o", "out", "-f", *args, cwd=path))


def test_the_template_is_written(scene: Scene) -> None:
    """In place of the base's; the recipe of the output has it too."""
    run(scene.path, TEMPLATE)
    assert (scene.path / "out/chat_template.jinja").read_text(encoding="utf-8") == TEMPLATE
    assert_done(call("run", "out", "-o", "again", cwd=scene.path))
    again = (scene.path / "again/chat_template.jinja").read_text(encoding="utf-8")
    assert again == TEMPLATE


def test_transformers_uses_it(tmp_path: Path) -> None:
    """Also where the base has one in its tokenizer_config.json, which is taken out."""
    rows = {name: np.ones((4, 3), F32) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    for name in ("base", "ft1", "ft2"):
        save_folder(tmp_path / name, rows)
    words = Tokenizer(WordLevel({"<unk>": 0, "a": 1, "b": 2, "c": 3}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "base")
    config = tmp_path / "base/tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": "old"}))
    run(tmp_path, TEMPLATE)
    assert "chat_template" not in json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == "[hello]ü[you]ü"


@pytest.mark.parametrize(
    ("have", "expected"),
    [
        ({"base": "B", "ft1": "T", "ft2": "T"}, "T"),
        ({"base": "B", "ft1": "T"}, "B"),
        ({"ft2": "T"}, "T"),
    ],
)
def test_the_most_common_template(scene: Scene, have: dict[str, str], expected: str) -> None:
    """As a file or in tokenizer_config.json; of equally many the base's."""
    for name in ("base", "ft1", "ft2"):
        for file in ("chat_template.jinja", "tokenizer_config.json"):
            (scene.path / name / file).unlink(missing_ok=True)
        if name in have and name == "ft1":
            text = json.dumps({"chat_template": have[name]})
            (scene.path / name / "tokenizer_config.json").write_text(text)
        elif name in have:
            (scene.path / name / "chat_template.jinja").write_text(have[name])
    run(scene.path, "auto")
    assert (scene.path / "out/chat_template.jinja").read_text() == expected


def test_where_there_is_no_place_for_it(scene: Scene) -> None:
    """A single file, an adapter, and no template to choose."""
    (scene.path / "base/chat_template.jinja").unlink()
    (scene.path / "recipe.yaml").write_text("{models: [ft1, ft2], base: base, chat_template: auto}")
    assert_refused(call("run", "recipe.yaml", "-o", "out", cwd=scene.path), "no input has one")
    (scene.path / "recipe.yaml").write_text("{models: [ft1, ft2], base: base, chat_template: x}")
    ran = call("run", "recipe.yaml", "-o", "out.safetensors", cwd=scene.path)
    assert_refused(ran, "a chat template belongs to the folder of a model")


def test_the_base_vocabulary(tmp_path: Path) -> None:
    """Rows that one model lacks are merged too, as if that model had the base's."""
    tokens = {
        "base": ["<unk>", "a", "b", "c"],
        "ft1": ["<unk>", "c", "b"],
        "ft2": ["<unk>", "a", "b", "c", "d"],
    }
    values = {"<unk>": 0.0, "a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}
    for at, (name, own) in enumerate(tokens.items()):
        column = np.array([[10.0 * at + values[token]] * 3 for token in own], F32)
        save(tmp_path / name, {"model.embed_tokens.weight": column, "lm_head.weight": column}, own)
    args = ("merge", "ft1", "ft2", "--base", "base", "-m", "task_arithmetic", "--vocab")
    for policy, expected in (
        # ft1 moves all by 10 and lacks "a", ft2 moves all by 20.
        ("base", [30.0, 21.0, 32.0, 33.0]),
        ("intersect", [30.0, 1.0, 32.0, 33.0]),
    ):
        ran = call(*args, policy, "--allow-base-mismatch", "-o", f"to-{policy}", cwd=tmp_path)
        assert_done(ran)
        found = read(tmp_path / f"to-{policy}")["model.embed_tokens.weight"]
        np.testing.assert_array_equal(found, np.repeat(np.array(expected, F32)[:, None], 3, 1))
        assert (tmp_path / f"to-{policy}" / "tokenizer.json").exists()


def test_an_unknown_key_beside_it(scene: Scene) -> None:
    """Misspelt, it is refused."""
    save_folder(scene.path / "x", scene.base)
    (scene.path / "recipe.yaml").write_text("{models: [x], chat_templat: x}")
    assert_refused(call("run", "recipe.yaml", cwd=scene.path), "did you mean 'chat_template'?")
