"""No method and no op is registered without answering every contract."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import pytest

from mergebench import merge_models
from mergebench.core.registry import Registry
from mergebench.merge.chains import chain
from mergebench.merge.method import METHODS, merge_method
from mergebench.merge.op import OPS, Chain
from mergebench.merge.ops.sum import sum_

from .exemptions import CONTRACTS, METHODS_EXEMPT, NEUTRAL, OPS_EXEMPT, neutral
from .support import names

HERE = Path(__file__).parent
#: Contracts that ops answer on their own; the others need a base, files or models around them.
OF_OPS = (
    "description",
    "double",
    "gradients",
    "homogeneous",
    "order",
    "parameters",
    "tiling",
    "torch",
    "untouched inputs",
)


def checked(argument: str) -> dict[str, set[str]]:
    """What the tests of this folder check, by contract: methods, or ops."""
    found: dict[str, set[str]] = {}
    for path in sorted(HERE.glob("test_*.py")):
        module = importlib.import_module(f"tests.contract.{path.stem}")
        for each in vars(module).values():
            contract, about, chosen = getattr(each, "checks", (None, None, ()))
            if about == argument:
                found.setdefault(contract, set()).update(chosen)
    return found


def test_every_method_answers_every_contract() -> None:
    """Each contract is checked on each registered method, or the exemption says why not."""
    answered = checked("method")
    assert set(answered) == set(CONTRACTS)
    for contract, methods in answered.items():
        exempt = {method for about, method in METHODS_EXEMPT if about == contract}
        assert methods | exempt == set(METHODS), contract
        assert not methods & exempt, contract


def test_every_op_answers_its_contracts() -> None:
    """Each contract of ops is checked on each registered op, or the exemption says why not."""
    answered = checked("name")
    assert sorted(answered) == sorted(OF_OPS)
    for contract, ops in answered.items():
        assert ops | {op for about, op in OPS_EXEMPT if about == contract} == set(OPS), contract


@pytest.mark.parametrize(
    ("exempt", "registry"), [(METHODS_EXEMPT, METHODS), (OPS_EXEMPT, OPS)], ids=["methods", "ops"]
)
def test_exemptions_are_of_something_and_say_why(
    exempt: Mapping[tuple[str, str], str], registry: Registry[Any]
) -> None:
    """An exemption names a contract and something registered, and gives its reason in words."""
    for (contract, name), reason in exempt.items():
        assert contract in CONTRACTS
        assert name in registry
        assert len(reason.split()) >= 5


def test_a_new_method_is_in_every_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that registers is drawn into every contract without anyone naming it."""
    monkeypatch.setattr(METHODS, "_entries", {**METHODS._entries})

    @merge_method(paper="arXiv:0000.00000")
    def newcomer(lam: float = 1.0) -> Chain:
        """A sum."""
        return chain(sum_())

    assert "newcomer" in METHODS
    for contract in CONTRACTS:
        assert "newcomer" in names(contract, METHODS, METHODS_EXEMPT)
    with pytest.raises(ValueError, match="is not a declared contract"):
        names("nonsense", METHODS, METHODS_EXEMPT)


def test_scales_and_shares_have_a_neutral_value() -> None:
    """Every number that a method takes has a value with which it changes nothing."""
    numbers = {
        param.name
        for method in METHODS
        for param in METHODS[method].params.values()
        if param.kind in (float, int) and not param.choices
    }
    assert numbers <= set(NEUTRAL)
    for method in METHODS:
        for name, value in neutral(method).items():
            if name in METHODS[method].params:
                assert METHODS[method].params[name].check(value, method) == value


def test_parameters_have_names_of_their_own() -> None:
    """In Python they stand beside the options of a merge."""
    options = set(signature(merge_models).parameters)
    for name in METHODS:
        assert not options & set(METHODS[name].params), name
