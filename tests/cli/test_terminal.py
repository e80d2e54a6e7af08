"""What names in files may show on a terminal: their letters, and nothing that it would act on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mergebench.cli.console import cell, printable
from tests.helpers.files import write
from tests.helpers.running import assert_done, assert_refused, assert_safe, call

NAME = "\x1b]0;owned\x07\x9b2J\u202eright\r\n.weight"
SHOWN = r"\x1b]0;owned\x07\x9b2J\u202eright\x0d\x0a.weight"


def test_names_are_shown_and_not_obeyed(tmp_path: Path) -> None:
    """In tables, differences, errors and JSON, where programs get the name itself."""
    for file, shape in (("a", [2, 2]), ("b", [2, 3]), ("c", [2, 2])):
        write(tmp_path / f"{file}.safetensors", {NAME: np.zeros(shape, np.float32)})

    shown = assert_done(call("inspect", "a.safetensors", "--tensors", cwd=tmp_path))
    differ = call("diff", "a.safetensors", "b.safetensors", cwd=tmp_path)
    refused = call("merge", "a.safetensors", "-b", "b.safetensors", "-o", "o", cwd=tmp_path)
    plan = call("plan", "a.safetensors", "c.safetensors", "-o", "o", cwd=tmp_path)
    as_json = assert_done(call("inspect", "a.safetensors", "--tensors", "--json", cwd=tmp_path))

    for ran in (shown, differ, refused, plan, as_json):
        assert_safe(ran)
    assert SHOWN in shown.out
    assert SHOWN in differ.out
    assert_refused(refused, r"\x1b]0;owned\x07")
    assert as_json.json["tensor_list"][0]["tensor"] == NAME


def test_paths_that_are_no_text(tmp_path: Path) -> None:
    """Bytes of a file name that are no UTF-8 are printed too."""
    path = tmp_path / "a\udcff.safetensors"
    write(path, {"a": np.zeros(1, np.float32)})

    for options in ((), ("--json",)):
        ran = assert_done(call("inspect", path, *options, cwd=tmp_path))
        assert_safe(ran)
        assert r"a\udcff.safetensors" in ran.out


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain é 漢 😀 👩‍💻 ‖τ‖", "plain é 漢 😀 👩‍💻 ‖τ‖"),
        ("\x1b[31m", r"\x1b[31m"),
        ("a\tb\0\x7f\x85", r"a\x09b\x00\x7f\x85"),
        ("\u2028\u2066\ud800", r"\u2028\u2066\ud800"),
    ],
)
def test_what_is_spelt_out(text: str, expected: str) -> None:
    """Text stays; what acts on a terminal does not."""
    assert printable(text) == cell(text) == expected
    assert printable("a\nb") == "a\nb"
    assert cell("a\nb") == r"a\x0ab"


def test_long_names_do_not_flood_the_terminal(tmp_path: Path) -> None:
    """The middle of an endless value is left out."""
    header = {"a" * 100_000: {"dtype": "x" * 100_000, "shape": [], "data_offsets": [0, 0]}}
    text = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)

    ran = call("inspect", "a.safetensors", cwd=tmp_path)

    assert_refused(ran, "characters left out", "unknown dtype")
    assert len(ran.err) < 10_000
