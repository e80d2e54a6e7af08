"""Recipes, YAML and JSON: what is read is written and read again to the same."""

from __future__ import annotations

import yaml
from hypothesis import given

from .support import CHECKED, assert_holds, broken_bytes, broken_json, files

DOCUMENTS = [yaml.safe_load(data) for data in files("recipe")]


@CHECKED
@given(data=broken_json(DOCUMENTS))
def test_recipes_broken_field_by_field(data: bytes) -> None:
    """As JSON, and whatever YAML makes of what is no JSON any more."""
    assert_holds("recipe", data)


@CHECKED
@given(data=broken_bytes(files("recipe")))
def test_recipes_with_other_bytes(data: bytes) -> None:
    """Mostly YAML."""
    assert_holds("recipe", data)


CONFIGURATIONS = [yaml.safe_load(data) for data in files("mergekit")]


@CHECKED
@given(data=broken_json(CONFIGURATIONS))
def test_configurations_of_mergekit_broken_field_by_field(data: bytes) -> None:
    """Translated to a recipe that can be read, or refused with their line."""
    assert_holds("mergekit", data)


@CHECKED
@given(data=broken_bytes(files("mergekit")))
def test_configurations_of_mergekit_with_other_bytes(data: bytes) -> None:
    """Mostly YAML."""
    assert_holds("mergekit", data)
