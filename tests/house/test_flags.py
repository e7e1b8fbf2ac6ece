"""Flags are read off the recipe's fields; a short help shows the everyday ones; --set reaches every key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from multipruner.commands.main import main
from multipruner.commands.recipe_flags import recipe_of
from multipruner.config.fields import flags_of, keys_of
from multipruner.config.recipe import Recipe
from multipruner.core import __version__
from multipruner.core.errors import ConfigError


def _printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main([*words])
    assert stop.value.code == 0
    return capsys.readouterr().out


def _flags(text: str) -> set[str]:
    return set(re.findall(r"^  (?:-h, )?(--[\w-]+)", text, re.MULTILINE))


@pytest.mark.parametrize(("command", "most"), [([], 18), (["search"], 18)])
def test_the_short_help_is_short_and_the_whole_one_whole(command: list[str], most: int, capsys) -> None:
    short, everything = _printed(capsys, *command, "--help"), _printed(capsys, *command, "--help-all")
    assert _flags(short) < _flags(everything) and 10 <= len(_flags(short)) <= most
    assert short.count("\n  python -m multipruner") == 1 < everything.count("\n  python -m multipruner")
    assert "--help-all" in short and "--seed N" in everything and "--max-params N" in everything
    assert not re.search(r"[A-Z]+\.[A-Z]", everything), "placeholders are words, not keys"


def test_every_flag_says_what_it_is_for(capsys) -> None:
    everything = _printed(capsys, "--help-all")
    for flag in flags_of(Recipe):
        assert flag.flag in _flags(everything)
        assert len(flag.help.split()) >= 2 and not flag.help.startswith("of "), f"{flag.flag}: {flag.help}"
        assert flag.choices or flag.metavar or flag.kind is bool, f"{flag.flag} has a placeholder"
    assert {flag.key for flag in flags_of(Recipe) if "." not in flag.key} < set(keys_of(Recipe))


def test_the_version(capsys) -> None:
    assert _printed(capsys, "--version") == f"multipruner {__version__}\n"


def test_set_reaches_what_has_no_flag_with_values_of_yaml() -> None:
    said = [
        "evaluation.length=64",
        "order=[mlp, heads, blocks]",
        "shares=30:70:0",
        "ratio=null",
        "budgets.kv_bytes=0.5x",
        "fallback={name: a, version: '1', sha256: b, file: c.gguf}",
        "calibration.source=alpaca:1+self:3",
    ]
    recipe = recipe_of({"model": "llama", "set": said, "calibration.seed": 3})
    assert (recipe.evaluation.length, recipe.order, recipe.shares_text()) == (64, ("mlp", "heads", "blocks"), "30:70:0")
    assert recipe.ratio is None and recipe.budgets == {"kv_bytes": "0.5x"}
    assert recipe.fallback is not None and recipe.fallback.file == "c.gguf"
    assert (recipe.calibration.source, recipe.calibration.seed) == ("alpaca:1+self:3", 3)


def test_set_goes_over_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("model: a/b\nridge: 0.3\nrounds: 7\n")
    recipe = recipe_of({"recipe": tmp_path / "mine.yaml", "set": ["ridge=0.5"]})
    assert (recipe.ridge, recipe.rounds) == (0.5, 7)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (["calibration.sed=3"], r"did you mean 'calibration\.seed'"),
        (["calibration.seed"], "give KEY=VALUE"),
        (["calibration.seed=4"], r"calibration\.seed is said twice"),
        (["calibration={seed: 4}"], r"calibration\.seed is said twice"),
        (["ridge=1", "ridge=2"], "ridge is said twice"),
        (["model=x"], "model is said twice"),
        (["ridge=["], "no valid YAML"),
        (["ridge=much"], "ridge = 'much'"),
    ],
)
def test_what_set_cannot_mean_is_refused(said: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        recipe_of({"model": "llama", "calibration.seed": 3, "set": said})
