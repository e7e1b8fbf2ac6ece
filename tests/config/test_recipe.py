"""What a recipe says of what a file has under its keys."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from multipruner.config.choices import IMPORTANCES, METHODS
from multipruner.config.effort import EFFORTS
from multipruner.config.recipe import Recipe
from multipruner.core.errors import ConfigError

_PLAIN = some.none() | some.booleans() | some.integers() | some.floats() | some.text()
_JSON = some.recursive(_PLAIN, lambda inner: some.lists(inner) | some.dictionaries(some.text(), inner), max_leaves=5)


@given(some.sampled_from(sorted(Recipe.model_fields)), _JSON)
@settings(max_examples=300, deadline=None)
def test_anything_under_a_key_is_taken_or_named(key: str, value: object) -> None:
    with suppress(ConfigError):  # nothing else is for users to read
        Recipe.build({"model": "there", key: value})


@pytest.mark.parametrize(("key", "table"), [("effort", EFFORTS), ("method", METHODS), ("importance", IMPORTANCES)])
@pytest.mark.parametrize("value", [None, "", 3, ["fast"]])
def test_a_key_that_is_chosen_from_names_lists_them(key: str, table: dict[str, object], value: object) -> None:
    with pytest.raises(ConfigError, match=f"{key} = .*there are {', '.join(table)}"):
        Recipe.build({"model": "there", key: value})
