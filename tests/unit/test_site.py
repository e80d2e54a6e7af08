"""Sites of tensors as real models name them."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path

import pytest

from mergebench.core.site import Site, kind_of, make_sites

HERE = Path(__file__).parent
#: Model -> lines that describe its tensors.
TABLES = re.compile(r"^\[(.+)\]\n((?:\S.*\n)+)", re.MULTILINE)
MODELS = dict(TABLES.findall((HERE / "sites.txt").read_text()))


def table(text: str) -> dict[str, Site]:
    """The sites that a table describes."""
    found = {}
    for line in text.strip().splitlines():
        name, *shape, stack, block, depth, kind = line.split()
        inside = block != "-"
        found[name] = Site(
            name,
            tuple(map(int, shape)),
            stack if inside else "",
            int(block) if inside else None,
            float(Fraction(depth)) if inside else None,
            kind,
        )
    return found


@pytest.mark.parametrize("model", MODELS)
def test_sites_of_real_models(model: str) -> None:
    """Stack, block, depth and class of tensors are those that a reader of the names would give."""
    expected = table(MODELS[model])
    got = make_sites({name: site.shape for name, site in expected.items()})
    wrong = {name: (got[name], site) for name, site in expected.items() if got[name] != site}
    assert not wrong


def test_a_single_block_is_the_last() -> None:
    """A stack of one block has depth 1."""
    assert make_sites({"layers.0.w": (2, 2)})["layers.0.w"].depth == 1.0


def test_patterns_can_be_given() -> None:
    """Another pattern finds other stacks; names outside it have no depth."""
    pattern = re.compile(r"^(?P<stack>stage)(?P<index>\d+)\.")
    sites = make_sites({"stage0.w": (2,), "stage4.w": (2,), "layers.0.w": (2,)}, pattern=pattern)
    assert [site.depth for site in sites.values()] == [0.0, 1.0, None]
    assert sites["stage4.w"].stack == "stage"


def test_shapes_and_orientation() -> None:
    """Size and row follow from the shape; weights stored input by output are those named."""
    sites = make_sites({"a": (), "b": (3, 4), "c": (2, 3, 0)}, transposed=["b"])
    assert [(site.size, site.row) for site in sites.values()] == [(1, 1), (12, 4), (0, 0)]
    assert [site.transposed for site in sites.values()] == [False, True, False]


def test_keys_depend_on_names_alone() -> None:
    """Keys are 64 bits, equal for equal names and different for others."""
    keys = {Site(f"layers.{i}.w", (i,)).key for i in range(1000)}
    assert len(keys) == 1000
    assert all(0 <= key < 2**64 for key in keys)
    assert Site("w", (1,)).key == Site("w", (9, 9), kind="norm").key == 0x9E6B28A282509220


def test_integers_are_buffers() -> None:
    """Whatever its name, a tensor that is not floating-point is a buffer."""
    assert kind_of("embeddings.position_ids", (1, 5), floating=False) == "buffer"
    assert kind_of("bn.num_batches_tracked", ()) == "buffer"
    assert kind_of("bn.running_var", (4,)) == "buffer"


def test_neighbours() -> None:
    """A tensor knows how many blocks its stack has, and the names in its own block."""
    names = ["layers.2.b", "layers.0.a", "layers.2.a", "other.layers.0.a", "norm"]
    sites = make_sites(dict.fromkeys(names, (2,)))
    assert [sites[name].layers for name in names] == [3, 3, 3, 1, 0]
    assert sites["layers.2.b"].beside == sites["layers.2.a"].beside == ("layers.2.a", "layers.2.b")
    assert sites["other.layers.0.a"].beside == ("other.layers.0.a",)
    assert sites["norm"].beside == ()
