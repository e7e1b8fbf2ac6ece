"""The shape of a model in characters."""

from __future__ import annotations

from multipruner.core.structure import bar, picture
from tests.support.layers import changed, uniform


def test_bars_never_hide_what_is_left() -> None:
    assert [bar(part, 64) for part in (0, 1, 32, 64)] == ["·", "▁", "▄", "█"]


def test_the_picture_has_a_column_per_layer() -> None:
    anatomy = uniform(12, 8, 4, 64)
    pruned = changed(changed(anatomy.dense, 0, (0, 0, 32)), 11, (4, 2, 0))
    layer, attention, mlp, *words = picture(pruned, anatomy).splitlines()
    assert layer == "layer      0         1"
    assert attention == "attention  ·██████████▄"
    assert mlp == "MLP        ▄██████████·"
    assert words[0] == "kept: 11 of 12 attention blocks (84 of 96 query heads)"
    assert words[1] == "      11 of 12 MLP blocks (672 of 768 MLP channels)"
