"""Every recipe of the catalogue loads, is what was published, and bad ones are refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from multipruner import recipes
from multipruner.config.recipe import Recipe
from multipruner.core.errors import ConfigError, UnknownModelError
from multipruner.jobs.setting import grid_in
from tests.support.layers import uniform

FOLDER = Path(recipes.__file__).parent
PUBLISHED = {
    "baichuan2-13b": ("44:52:4", 1024, 24, "none", 6),
    "baichuan2-7b": ("44:52:4", 1024, 22, "magnitude", 14),
    "llama-2-13b": ("44:52:4", 1024, 25, "magnitude", 6),
    "llama-2-7b": ("44:52:4", 1024, 22, "magnitude", 6),
    "llama-3-8b": ("20:80:0", 1024, 20, "magnitude", 6),
    "llama-3.1-8b": ("30:70:0", 1024, 20, "magnitude", 6),
    "llama-3.2-3b": ("10:90:0", 768, 9, "magnitude", 6),
    "qwen1.5-14b": ("44:52:4", 2048, 24, "magnitude", 6),
    "qwen1.5-7b": ("44:52:4", 1024, 22, "magnitude", 6),
    "qwen2.5-7b": ("50:50:0", 1024, 20, "magnitude", 6),
}
"""Shares, channel group, ratio in per cent, channel order, width calibration: paper and official code."""


def test_the_catalogue_is_the_folder() -> None:
    files = sorted(path.stem if path.suffix == ".yaml" else path.name for path in FOLDER.glob("*.yaml"))
    assert recipes.names() == files == sorted([*PUBLISHED, "gemma-3-270m", "llama"])
    assert [recipe.name for recipe in recipes.catalogue()] == files


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_loads_and_says_how_it_is_run(name: str) -> None:
    recipe = Recipe.build(recipes.read(name))
    assert recipe.name == name
    assert recipe.description and "/" in recipe.model
    assert not recipe.trust_remote_code, "only the user may trust foreign code"
    command = (FOLDER / f"{name}.yaml").read_text().splitlines()[0]
    flag = " --trust-remote-code" if "--trust-remote-code" in recipe.description else ""
    assert command == f"# python -m multipruner --model {name}{flag}"


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(name: str) -> None:
    shares, group, percent, importance, width = PUBLISHED[name]
    recipe = Recipe.build(recipes.read(name))
    assert (recipe.shares_text(), recipe.channel_group, recipe.importance) == (shares, group, importance)
    assert recipe.ratio == pytest.approx(percent / 100)
    assert recipe.kv_group_step == 1 and recipe.stop == "reach" and recipe.stages == ("blocks", "mlp", "heads")
    calibration = recipe.calibration
    assert (calibration.source, calibration.packing, calibration.length) == ("alpaca", "concat", 2048)
    assert (calibration.sequences, calibration.width_sequences) == (14, width)


def test_a_fallback_may_be_in_pieces() -> None:
    source = Recipe.build(recipes.read("gemma-3-270m")).fallback
    assert source is not None and source.title == "gemma-3-270m-q4_k_m.gguf" and len(source.wheels) == 4
    assert [part.file[-2:] for part in source.wheels] == ["00", "01", "02", "03"]
    assert len({part.sha256 for part in source.wheels}) == 4


def test_the_small_recipe_has_a_fallback() -> None:
    recipe = Recipe.build(recipes.read("llama"))
    assert recipe.fallback is not None and recipe.fallback.file.endswith(".gguf")
    assert (recipe.ratio, recipe.shares_text(), recipe.channel_group, recipe.dtype) == (0.2, "44:52:4", 128, "bfloat16")


def test_yaml_keeps_shares_text_and_reads_numbers() -> None:
    text = "shares: 44:52:4\nratio: 2e-1\nchannel_group: 64\nmodel: a/b\nrevision: 1.2.3"
    mapping = recipes.parse(text, "test")
    assert mapping == {"shares": "44:52:4", "ratio": 0.2, "channel_group": 64, "model": "a/b", "revision": "1.2.3"}
    assert Recipe.build(mapping).shares_text() == "44:52:4"


BAD = {
    "ratio: 0.1\nratio: 0.2": "'ratio' is given twice",
    "calibration: {seed: 1, seed: 2}": "'seed' is given twice",
    "- a\n- b": "must be a mapping",
    "a: [": "no valid YAML",
    "a: !!python/object/apply:os.system [ls]": "no valid YAML",
    "": "must be a mapping",
}


@pytest.mark.parametrize("text", BAD)
def test_bad_yaml_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=BAD[text]) as caught:
        recipes.read_file(path)
    assert "mine.yaml" in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        recipes.read_file(tmp_path / "nowhere.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match=r"bytes\.yaml"):
        recipes.read_file(tmp_path / "bytes.yaml")


def test_unknown_keys_are_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'channel_group'"):
        Recipe.build(recipes.read("llama"), recipes.parse("chanel_group: 3", "test"))


def test_what_model_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Mine-1.5B").mkdir()
    (tmp_path / "small.gguf").touch()
    assert recipes.mapping_for("llama") == recipes.read("llama")
    assert recipes.mapping_for("owner/Model-7B") == {"model": "owner/Model-7B", "name": "Model-7B"}
    assert recipes.mapping_for("Mine-1.5B") == {"model": "Mine-1.5B", "name": "Mine-1.5B"}
    assert recipes.mapping_for("small.gguf") == {"model": "small.gguf", "name": "small"}
    assert recipes.mapping_for(".") == {"model": ".", "name": tmp_path.name}
    for call in (recipes.mapping_for, recipes.read):
        with pytest.raises(UnknownModelError, match=r"did you mean 'llama-2-7b'.*llama-3\.1-8b"):
            call("llama-2-7")


def test_the_catalogue_needs_no_torch() -> None:
    code = "import sys; from multipruner import recipes; recipes.catalogue(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    bare = subprocess.run(
        [sys.executable, "-c", "import recipes"],
        cwd=FOLDER.resolve().parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "import multipruner.recipes" in bare.stderr


# layers, query heads, KV heads, MLP channels, as in the models' published configurations
DENSE = {
    "baichuan2-13b": (40, 40, 40, 13696),
    "baichuan2-7b": (32, 32, 32, 11008),
    "gemma-3-270m": (18, 4, 1, 2048),
    "llama": (30, 9, 3, 1536),
    "llama-2-13b": (40, 40, 40, 13824),
    "llama-2-7b": (32, 32, 32, 11008),
    "llama-3-8b": (32, 32, 8, 14336),
    "llama-3.1-8b": (32, 32, 8, 14336),
    "llama-3.2-3b": (28, 24, 8, 8192),
    "qwen1.5-14b": (40, 40, 40, 13696),
    "qwen1.5-7b": (32, 32, 32, 11008),
    "qwen2.5-7b": (28, 28, 4, 18944),
}


@pytest.mark.parametrize(
    ("sources", "ratio"),
    [
        ([{"budgets": {"flops": "0.9x"}}], None),
        ([{"ratio": 0.3}, {"budgets": {"flops": "0.9x"}}], None),
        ([{"budgets": {"flops": "0.9x"}}, {"ratio": 0.3}], 0.3),
        ([{"ratio": 0.3, "budgets": {"flops": "0.9x"}}], 0.3),
        ([{"ratio": 0.3}, {"budgets": {}}], 0.3),
        ([{}], 0.2),
    ],
)
def test_budgets_without_a_ratio_replace_it(sources: list[dict[str, object]], ratio: float | None) -> None:
    built = Recipe.build({"model": "m"}, *sources)
    assert built.ratio == ratio
    assert Recipe.build(built.model_dump()) == built


@pytest.mark.parametrize("name", sorted(DENSE))
def test_groups_suit_the_model(name: str) -> None:
    recipe = Recipe.build(recipes.read(name))
    assert set(DENSE) == set(recipes.names())
    grid_in(recipe).check(uniform(*DENSE[name]))
