"""The built-in task of perplexity: in memory and from folders, a file per split."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergebench.core.errors import ParameterError
from mergebench.loading.perplexity import perplexity
from mergebench.merge.fit.find import Setting, parse_task
from mergebench.merge.fit.scores import Scores
from tests.fit.support import make, recipe_of
from tests.helpers.libraries import llama, save_tuned
from tests.safety.test_perplexity import TEXT, save_tokenizer


def test_a_live_model_scores_as_a_folder_does(tmp_path: Path) -> None:
    """One model takes the values of each candidate, and no folder is written for it."""
    save_tuned(tmp_path, llama)
    for name in ("base", "ft1", "ft2"):
        save_tokenizer(tmp_path / name)
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "val.txt").write_text(TEXT)
    (texts / "test.txt").write_text(" ".join(reversed(TEXT.split())))
    live = parse_task(f"perplexity:{texts}", Setting(base=tmp_path / "base"))
    written = parse_task(f"perplexity:{texts}", Setting())
    seen = set()
    for names in (("ft1",), ("ft2",), ("ft1", "ft2")):
        for split in ("val", "test"):
            recipe = recipe_of(*(tmp_path / name for name in names), method="linear")
            with make(recipe, "x") as candidate:
                (found,) = Scores([live]).of(candidate, split)
                assert candidate._place is None
                expected = perplexity(candidate.folder(), texts / f"{split}.txt").perplexity
                (other,) = Scores([written]).of(candidate, split)
            assert found.scores == pytest.approx({"perplexity": expected}, rel=1e-5)
            assert other.scores == {"perplexity": expected}
            assert found.value == pytest.approx(-expected, rel=1e-5)
            seen.add(round(expected, 6))
    assert len(seen) == 6
    with (
        make(recipe_of(tmp_path / "ft1"), "x") as candidate,
        pytest.raises(ParameterError, match="no split 'train'"),
    ):
        live.scorer.score(candidate, "train")
