"""``inspect``, ``diff`` and ``methods``: what they say, in words and in JSON."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mergebench import methods as known_methods
from mergebench import ops as known_ops
from mergebench.adapters_zoo.adapter import KINDS
from tests.helpers.adapters import factors, peft_tensors, save_kohya, save_peft
from tests.helpers.files import F32, write
from tests.helpers.running import assert_done, assert_refused, call
from tests.helpers.scene import Scene


def test_inspect_a_checkpoint(scene: Scene) -> None:
    """Kind, counts, dtypes, blocks, classes, architecture and side files, from headers."""
    data = assert_done(call("inspect", "base", "--json", cwd=scene.path)).json

    sizes = {name: array.size for name, array in scene.base.items()}
    assert data["kind"] == "checkpoint"
    assert data["path"] == "base"
    assert data["tensors"] == 10
    assert data["parameters"] == sum(sizes.values())
    assert data["bytes"] == sum(array.nbytes for array in scene.base.values())
    assert data["dtypes"] == {"F32": sum(sizes.values()) - 8, "I64": 8}
    assert data["blocks"] == {"model.layers": 2}
    assert data["architecture"] == "ToyForCausalLM"
    assert data["tied"] == {}
    assert "config.json" in data["side_files"]
    assert "tokenizer.json" in data["side_files"]
    assert [each["name"] for each in data["files"]] == ["model.safetensors"]
    assert len(data["fingerprint"]) == 32


def test_inspect_says_the_same_of_a_copy(scene: Scene) -> None:
    """The fingerprint is that of the content, wherever it lies."""
    prints = {
        name: assert_done(call("inspect", name, "--json", cwd=scene.path)).json["fingerprint"]
        for name in ("base", "base.safetensors", "ft1", "ft2")
    }

    assert prints["base"] == prints["base.safetensors"]
    assert len(set(prints.values())) == 3


def test_inspect_adapters(scene: Scene) -> None:
    """Adapters show family, modules, ranks and scales; a Kohya file too."""
    save_kohya(scene.path / "k.safetensors", factors(3, rank=2), alpha=1.0)
    for name, rank, scale in (
        ("lora1", 4, 2.0),
        ("a.safetensors", 4, 2.0),
        ("k.safetensors", 2, 0.5),
    ):
        data = assert_done(call("inspect", name, "--json", cwd=scene.path)).json
        assert data["kind"] == "adapter"
        assert data["update"]["adapter"] == "lora"
        assert data["update"]["modules"] == 4
        assert data["update"]["ranks"] == {str(rank): 4}
        assert data["update"]["scales"] == [scale]
        assert data["update"]["displaced_parameters"] == 2 * (16 * 16 + 24 * 16)


def test_inspect_tells_pairs_and_task_vectors(scene: Scene) -> None:
    """The other two kinds of input have their names."""
    kinds = {
        name: assert_done(call("inspect", name, "--json", cwd=scene.path)).json["kind"]
        for name in ("base+lora1", "tau1.safetensors")
    }

    assert kinds == {"base+lora1": "base+adapter", "tau1.safetensors": "task vector"}


def test_inspect_lists_tensors(scene: Scene) -> None:
    """--tensors adds a line per tensor with stored form and shape."""
    checkpoint = call("inspect", "base", "-t", "--json", cwd=scene.path).json["tensor_list"]
    adapter = call("inspect", "lora1", "-t", "--json", cwd=scene.path).json["tensor_list"]
    words = assert_done(call("inspect", "lora1", "-t", cwd=scene.path)).out.splitlines()

    shown = {each["tensor"]: (each["stored"], tuple(each["shape"])) for each in checkpoint}
    assert shown["model.norm.weight"] == ("F32", (16,))
    assert shown["model.position_ids"] == ("I64", (8,))
    assert {each["stored"] for each in adapter} == {"rank 4, scale 2"}
    name = "model.layers.0.mlp.up_proj.weight"
    line = next(line.split() for line in words if line.startswith(name))
    assert line[:-2] == [name, "rank", "4,", "scale", "2", "[24,", "16]"]
    (row,) = (each for each in adapter if each["tensor"] == name)
    assert line[-2:] == [row["alpha"], row["norm"]]
    assert row["alpha"] == "8"


def test_inspect_in_words(scene: Scene) -> None:
    """Without --json the same facts stand in two columns."""
    shown = dict(
        line.split(None, 1)
        for line in assert_done(call("inspect", "base", cwd=scene.path)).out.splitlines()
    )

    assert shown["kind"].strip() == "checkpoint"
    entries = sum(array.size for array in scene.base.values() if array.dtype == F32)
    assert shown["dtypes"].strip() == f"F32 {entries:,}, I64 8"
    assert shown["architecture"].strip() == "ToyForCausalLM"


@pytest.mark.parametrize("out", ["out", "out.safetensors"])
def test_inspect_says_who_made_it(scene: Scene, out: str) -> None:
    """An output names its method, from the file beside it or in its header."""
    assert_done(call("merge", "ft1", "ft2", "-b", "base", "-m", "ties", "-o", out, cwd=scene.path))

    made = assert_done(call("inspect", out, "--json", cwd=scene.path)).json["made_by"]
    assert made["recipe"]["method"] == "ties"
    assert "made by" in call("inspect", out, cwd=scene.path).out


def test_diff_of_equal_models(scene: Scene) -> None:
    """Equal values exit 0, whatever the files."""
    ran = assert_done(call("diff", "base", "base.safetensors", cwd=scene.path))

    assert ran.out == "equal: 10 tensors\n"
    data = assert_done(call("diff", "base", "base.safetensors", "--json", cwd=scene.path)).json
    assert data == {"equal": 10, "rows": []}


def test_diff_measures_every_tensor(scene: Scene) -> None:
    """Different values exit 1 with relative distance, largest gap and cosine of each."""
    ran = call("diff", "base", "ft1", "--json", cwd=scene.path)

    assert ran.code == 1
    assert ran.json["equal"] == 1
    rows = {row["name"]: row for row in ran.json["rows"]}
    assert sorted(rows) == sorted(scene.taus[0])
    for name, tau in scene.taus[0].items():
        one = scene.base[name].astype(np.float64).reshape(-1)
        two = scene.tuned[0][name].astype(np.float64).reshape(-1)
        norms = np.linalg.norm(one) * np.linalg.norm(two)
        assert rows[name]["status"] == "differs"
        assert rows[name]["entries"] == one.size
        assert rows[name]["relative"] == pytest.approx(np.linalg.norm(tau) / np.linalg.norm(one))
        assert rows[name]["largest"] == pytest.approx(np.abs(tau).max())
        assert rows[name]["cosine"] == pytest.approx(one @ two / norms)


def test_diff_shows_the_worst_first(scene: Scene) -> None:
    """In words the tensors that differ most come first, and --top limits them."""
    ran = call("diff", "base", "ft1", "--top", "2", cwd=scene.path)

    lines = ran.out.splitlines()
    order = sorted(
        scene.taus[0],
        key=lambda name: np.linalg.norm(scene.taus[0][name]) / np.linalg.norm(scene.base[name]),
    )
    assert ran.code == 1
    assert [line.split()[0] for line in lines[1:3]] == order[::-1][:2]
    assert lines[3] == "9 of 10 tensors differ, 7 more not shown (--top)"
    assert len(lines) == 4


def test_diff_tells_structure_from_values(scene: Scene) -> None:
    """A missing tensor, another shape and another dtype each have their word."""
    other = dict(scene.base)
    other["new.weight"] = other.pop("model.norm.weight")
    other["lm_head.weight"] = np.zeros((31, 16), F32)
    other["model.position_ids"] = np.arange(8, dtype=np.float32)
    other["model.embed_tokens.weight"] = other["model.embed_tokens.weight"].astype(np.float64)
    write(scene.path / "other.safetensors", other)

    ran = call("diff", "base", "other.safetensors", "--json", cwd=scene.path)

    assert ran.code == 1
    assert {row["name"]: row["status"] for row in ran.json["rows"]} == {
        "model.norm.weight": "only left",
        "new.weight": "only right",
        "lm_head.weight": "shape",
        "model.position_ids": "dtype",
    }


def test_diff_of_adapters_compares_updates(scene: Scene) -> None:
    """Adapters are compared by what they do, not by their factors."""
    assert_done(call("merge", "lora1", "-o", "same", cwd=scene.path))

    same = call("diff", "lora1", "same", "--json", cwd=scene.path)
    other = call("diff", "lora1", "lora2", "--json", cwd=scene.path)

    assert max((row["relative"] for row in same.json["rows"]), default=0) < 1e-6
    assert {row["name"]: row["relative"] for row in other.json["rows"]} == {
        name: pytest.approx(
            np.linalg.norm(scene.updates[1][name] - one) / np.linalg.norm(one), rel=1e-6
        )
        for name, one in scene.updates[0].items()
    }


def test_quiet_diff_only_has_an_exit_code(scene: Scene) -> None:
    """--quiet prints nothing; the code says whether something differs."""
    same = call("diff", "base", "base", "-q", cwd=scene.path)
    other = call("diff", "base", "ft1", "-q", cwd=scene.path)

    assert (same.code, same.out, same.err) == (0, "", "")
    assert (other.code, other.out, other.err) == (1, "", "")


def test_methods_are_listed(scene: Scene) -> None:
    """Every registered method and op is listed with a line about it."""
    listed = assert_done(call("methods", "--json", cwd=scene.path)).json
    ops = assert_done(call("methods", "--ops", "--json", cwd=scene.path)).json
    words = assert_done(call("methods", cwd=scene.path)).out

    assert [each["method"] for each in listed] == sorted(known_methods)
    assert [each["op"] for each in ops] == sorted(known_ops)
    assert all(each["what"] for each in (*listed, *ops))
    assert all(f"\n{name} " in words for name in known_methods)


@pytest.mark.parametrize("name", sorted(known_methods))
def test_every_method_is_described(scene: Scene, name: str) -> None:
    """A method's page has its source, every parameter with default and bounds, and deviations."""
    data = assert_done(call("methods", name, "--json", cwd=scene.path)).json
    words = assert_done(call("methods", name, cwd=scene.path)).out

    declared = known_methods[name].params
    assert data["name"] == name
    assert data["paper"].startswith(("arXiv:", "doi:", "https://"))
    assert {each["name"]: each["allowed"] for each in data["params"]} == {
        key: param.describe() for key, param in declared.items()
    }
    assert "Deviations" in data["doc"]
    assert data["doc"] in words
    for preset in data["compat"]:
        assert f"--compat {preset}: " in words


@pytest.mark.parametrize("name", sorted(known_ops))
def test_every_op_is_described(scene: Scene, name: str) -> None:
    """An op's page has its text and its parameters."""
    data = assert_done(call("methods", name, "--ops", "--json", cwd=scene.path)).json
    words = assert_done(call("methods", name, "--ops", cwd=scene.path)).out

    assert {each["name"] for each in data["params"]} == set(known_ops[name].params)
    assert data["doc"] in words


def test_methods_of_no_such_name(scene: Scene) -> None:
    """A name that is nothing is refused with those that are near."""
    assert_refused(call("methods", "task_aritmetic", cwd=scene.path), "'task_arithmetic'?")


def test_adapters_are_listed(scene: Scene) -> None:
    """Every registered kind with its formula; one in full; what is refused with the reason."""
    kinds = {row["kind"]: row for row in call("adapters", "--json", cwd=scene.path).json}
    assert set(kinds) == set(KINDS)
    assert kinds["loha"]["formula"] == "ΔW = (α/r) · (B₁ A₁) ∘ (B₂ A₂)"
    assert kinds["lora"]["peft_type"] == "LORA"
    assert kinds["lora"]["computed_by"] == "own"
    assert kinds["hira"]["computed_by"] == "PEFT"
    out = assert_done(call("adapters", cwd=scene.path)).out
    assert all(f"\n{name} " in out for name in kinds)
    assert "ΔW[i, j] = D[j mod r, i]" in out
    one = assert_done(call("adapters", "vera", cwd=scene.path)).out
    assert "arXiv:2310.11454" in one
    assert_refused(call("adapters", "verra", cwd=scene.path), "no adapter kind", "'vera'")
    refused = call("adapters", "--refused", "--json", cwd=scene.path).json
    reasons = {row["what"]: row["why"] for row in refused}
    assert f"\n{len(reasons)} more are recognised and refused" in out
    assert "routed" in reasons["peft_type XLORA"]
    assert "peft_type LOHA" not in reasons
    assert "repeated layers" in reasons["config entry layer_replication"]


def test_inspect_without_an_alpha(tmp_path: Path) -> None:
    """A bare file is shown with what it says; its scale is not guessed."""
    write(tmp_path / "bare.safetensors", peft_tensors(factors(1, rank=3)))
    shown = assert_done(call("inspect", "bare.safetensors", "-t", "--json", cwd=tmp_path)).json

    assert shown["kind"] == "adapter"
    assert shown["unknown"].startswith("α and the scale")
    assert shown["update"]["adapter"] == "lora"
    assert shown["update"]["ranks"] == {"3": 4}
    assert "scales" not in shown["update"]
    assert len(shown["tensor_list"]) == shown["tensors"] == 8
    given = call("inspect", "bare.safetensors", "--lora-alpha", "6", "--json", cwd=tmp_path)
    assert given.json["update"]["scales"] == [2]
    assert "--lora-alpha" in assert_done(call("inspect", "bare.safetensors", cwd=tmp_path)).out


def test_inspect_without_the_base(scene: Scene) -> None:
    """DoRA needs the base for its update, not for its kind, rank, α and what servers say."""
    made = factors(1)
    sizes = {f"{m}.lora_magnitude_vector": np.ones(len(B), F32) for m, (B, _) in made.items()}
    save_peft(scene.path / "dora", made, extra=sizes, use_dora=True, modules_to_save=None)
    shown = assert_done(call("inspect", "dora", "--json", cwd=scene.path)).json

    assert shown["unknown"].startswith("the displacements")
    assert shown["update"]["adapter"] == "dora"
    assert shown["update"]["ranks"] == {"4": 4}
    assert shown["update"]["config"]["lora_alpha"] == 8
    assert "DoRA" in shown["update"]["servers"]["vllm"]
    known = assert_done(call("inspect", "dora", "-b", "base", "--json", cwd=scene.path)).json
    assert "unknown" not in known
    assert known["update"]["modules"] == 4


def test_inspect_of_what_is_refused(tmp_path: Path) -> None:
    """An adapter that is wrong in itself stays an error, base or not."""
    broken = peft_tensors(factors(1))
    broken.pop(min(broken))
    write(tmp_path / "bad.safetensors", broken)
    assert_refused(call("inspect", "bad.safetensors", cwd=tmp_path), "only one of the factors")
