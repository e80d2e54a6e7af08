"""The corpus of the fuzzer: as its script makes it, and every file read as promised."""

from __future__ import annotations

import pytest

from .support import FUZZ, assert_holds, seeds, targets

VALID, HOSTILE = seeds.valid(), seeds.regressions()
#: Sound files that say something which is refused.
REFUSED = {("config", "quantized"), ("metadata", "diffusers")}
#: Made to harm, and harmless once they are read.
TAKEN: set[tuple[str, str]] = set(seeds.TAKEN)


def test_every_target_has_sound_seeds() -> None:
    """And no folder stands there without a target."""
    assert VALID.keys() == targets.TARGETS.keys()
    assert {path.name for path in (FUZZ / "corpus").iterdir()} == targets.TARGETS.keys()


@pytest.mark.parametrize("target", VALID)
def test_files_are_those_of_the_script(target: str) -> None:
    """Committed, so that a fuzzer may start from them; pickles differ between versions of torch."""
    made = VALID[target] | HOSTILE.get(target, {})
    kept = {path.name: path.read_bytes() for path in (FUZZ / "corpus" / target).iterdir()}

    assert kept.keys() == made.keys()
    if target not in ("pickled", "archive", "dcp"):
        assert kept == made


@pytest.mark.parametrize(
    ("target", "name"), [(target, name) for target, cases in VALID.items() for name in cases]
)
def test_sound_seeds_are_taken(target: str, name: str) -> None:
    """A fuzzer that starts from what is refused would explore refusals only."""
    assert assert_holds(target, VALID[target][name]) is ((target, name) not in REFUSED)


@pytest.mark.parametrize(
    ("target", "name"), [(target, name) for target, cases in HOSTILE.items() for name in cases]
)
def test_hostile_files_do_no_harm(target: str, name: str) -> None:
    """Refused by name of the file, in bounded time and memory."""
    assert assert_holds(target, HOSTILE[target][name]) is ((target, name) in TAKEN)
