"""Which row is right for a configuration, and what is said where none is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from multipruner.core.errors import UnsupportedModelError
from multipruner.core.families import FAMILIES, check_refused, spec_for


@pytest.mark.parametrize(
    ("settings", "parallel"), [({}, True), ({"use_parallel_residual": True}, True),
                               ({"use_parallel_residual": False}, False)]
)  # fmt: skip
def test_settings_choose_the_row(settings: dict[str, Any], parallel: bool) -> None:
    """A setting that a configuration does not say is the first row's."""
    for config in (SimpleNamespace(model_type="gpt_neox", **settings), {"model_type": "gpt_neox", **settings}):
        assert spec_for(config).block("mlp").parallel is parallel


def test_settings_without_a_row_are_named() -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        spec_for({"model_type": "stablelm", "qk_layernorm": True, "use_parallel_residual": False})
    said = str(caught.value)
    assert said.startswith("this stablelm model, with qk_layernorm = True, use_parallel_residual = False, is not supp")
    assert "there are rows for qk_layernorm = False, use_parallel_residual = False; for" in said
    assert "docs/adding-a-family.md" in said


def test_families_that_no_row_can_describe_say_why() -> None:
    for model_type, reason in (
        ("gemma3n", "num_kv_shared_layers"),
        ("gemma4_text", "num_kv_shared_layers"),
        ("mpt", "ALiBi"),
    ):
        with pytest.raises(UnsupportedModelError, match=rf"'{model_type}' cannot be pruned: .*{reason}"):
            spec_for({"model_type": model_type})


@pytest.mark.parametrize("value", [[], ["LlamaForCausalLM"], {"a": 1}, 3, None])
def test_a_model_type_that_is_no_word_is_no_familys(value: Any) -> None:
    check_refused(value)
    with pytest.raises(UnsupportedModelError, match="is not supported"):
        spec_for({"model_type": value})


def test_a_norm_that_blocks_share_leaves_with_neither() -> None:
    shared, apart = FAMILIES["cohere"], FAMILIES["gpt_neox"]
    assert [shared.leaving(block) for block in shared.blocks] == [(), ()]
    assert shared.shared_norms == ("input_layernorm",)
    assert [apart.leaving(block) for block in apart.blocks] == [("input_layernorm",), ("post_attention_layernorm",)]


def test_every_row_of_a_model_type_says_its_settings() -> None:
    """But one at most, which is right for what is left."""
    for family in FAMILIES.values():
        rows = (family, *family.others)
        assert all(row.model_type == family.model_type and row.prefix == family.prefix for row in rows)
        assert all(row.needs for row in rows[:-1])
        assert len(family.others) == 0 or not any(row.others for row in family.others)
