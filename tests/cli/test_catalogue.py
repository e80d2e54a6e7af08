"""The page of all methods is what the registry says."""

from __future__ import annotations

from pathlib import Path

from mergebench import methods
from mergebench.merge.op import OPS
from tests.helpers.running import assert_done, call

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"


def test_the_page_is_current(tmp_path: Path) -> None:
    """``mergebench methods --markdown > docs/methods.md`` after a method has changed."""
    assert assert_done(call("methods", "--markdown", cwd=tmp_path)).out == PAGE.read_text()


def test_every_method_has_a_row() -> None:
    """With its summary, passes and parameters."""
    page, _, of_ops = PAGE.read_text().partition("## Ops")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == list(methods)
    steps = [line for line in of_ops.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in steps] == list(OPS)
    assert len({row.count(" | ") for row in rows}) == len({row.count(" | ") for row in steps}) == 1
    ties = next(row for row in rows if row.startswith("| `ties` |"))
    assert "[2306.01708](https://arxiv.org/abs/2306.01708) | delta | base | 1+ | 3 |" in ties
    assert "`density=0.2`, `lam=1.0`, `scope=model`" in ties
    assert "`mergekit-0.1.5`" in ties
    assert ties.endswith(
        "| mergekit 0.1.5 (8 roundings), FusionBench 0.2.33 (1e-05), PEFT 0.21 (1e-04) |"
    )
