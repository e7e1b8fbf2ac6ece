"""Quantised checkpoints are read as what their quantisers' own code makes of them, or refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.utils.quantization_config import Mxfp4Config

from multipruner.commands.main import main
from multipruner.config.recipe import Recipe
from multipruner.core.errors import UnsupportedModelError
from multipruner.sources.dense import load_dense
from multipruner.sources.intake.recognise import QUANTISED
from multipruner.sources.quantised.arithmetic import gptq, spread
from multipruner.sources.quantised.formats import FORMATS
from multipruner.sources.resolve import ResolvedModel, resolve
from multipruner.storage.cache import cache_folder
from tests.support.caches import cache_at
from tests.support.inputs import FILE, edit_json, edit_tensors, short_run, write_model
from tests.support.packed import CASES, SETTINGS, case, write_packed
from tests.support.tiny import random_ids

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 3}
OWN_OPTIONS: dict[str, dict[str, Any]] = {"mxfp4": {"family": "gpt_oss", **EXPERTS}}
with safe_open(CASES, "pt") as _file:
    CASE_NAMES = sorted({name.partition("/")[0] for name in _file.keys()})  # noqa: SIM118 (not a mapping)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache_at(monkeypatch, tmp_path / "cache")
    return tmp_path / "cache"


def packed_folder(folder: Path, method: str) -> Path:
    return write_packed(folder, method, **OWN_OPTIONS.get(method, {}))


def found(folder: Path, said: list[str] | None = None) -> ResolvedModel:
    return resolve(recipe(folder), (said if said is not None else []).append)


def recipe(folder: Path) -> Recipe:
    return Recipe.build({"model": str(folder), "device": "cpu"})


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.float()(input_ids=random_ids()).logits


def test_every_format_that_is_named_has_a_row() -> None:
    assert set(FORMATS) == set(QUANTISED) == set(SETTINGS)
    table = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
    assert all(f"| `{method}` |" in table for method in FORMATS)


@pytest.mark.parametrize("name", CASE_NAMES)
def test_weights_are_what_the_quantiser_makes_of_them(name: str, tmp_path: Path) -> None:
    stored, wanted = case(name, tmp_path / "case")
    method = next(method for method in FORMATS if name.startswith(method))
    settings = {"bits": int(name[-1])} if method == "gptq" else {}
    if name.endswith("-block"):
        settings = {"config_groups": {"group_0": {"weights": {"block_structure": [16, 32]}}}}
    rows = [(row, packed) for row in FORMATS[method] for packed in row.find(stored, settings)]
    row, packed = rows[0]
    assert packed.stem + row.result == "m.weight" and tuple(row.shape(packed)) == wanted.shape
    values = row.values(packed, None)
    assert values.dtype == torch.float32 and torch.equal(values.to(wanted.dtype), wanted)


@pytest.mark.parametrize("method", sorted(FORMATS))
def test_a_quantised_folder_is_an_ordinary_model(method: str, tmp_path: Path) -> None:
    folder = packed_folder(tmp_path / "packed", method)
    source = found(folder, said := [])
    assert source.packed == method and Path(source.path_or_id).is_relative_to(cache_folder())
    assert sum(f"packed is quantised ({method})" in line and "in bfloat16" in line for line in said) == 1, said
    model, tokenizer = load_dense(source, recipe(folder))
    assert model.dtype == torch.bfloat16 and len(tokenizer) == 97
    written = json.loads((Path(source.path_or_id) / "config.json").read_text())
    assert "quantization_config" not in written and written["dtype"] == "bfloat16"
    stock: Any = AutoModelForCausalLM.from_pretrained(source.path_or_id)
    assert torch.equal(logits(stock), logits(model)) and torch.isfinite(logits(model)).all()
    before = {path: path.stat().st_mtime_ns for path in cache_folder().rglob("*")}
    assert found(folder) == source and before == {path: path.stat().st_mtime_ns for path in cache_folder().rglob("*")}


@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_the_model_is_what_transformers_dequantise(method: str, tmp_path: Path) -> None:
    folder = write_packed(tmp_path / "packed", method, **OWN_OPTIONS.get(method, {}))
    if method == "fp8":  # transformers ask for whole blocks
        edit_json(folder / "config.json", quantization_config={**SETTINGS["fp8"], "weight_block_size": [32, 32]})
        edit_tensors(folder, lambda w: {k: v[:, :2] if k.endswith("inv") else v for k, v in w.items()})
    how = {"fp8": FineGrainedFP8Config(dequantize=True), "mxfp4": Mxfp4Config(dequantize=True)}[method]
    own: Any = AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, dtype=torch.bfloat16)
    model, _ = load_dense(found(folder), recipe(folder))
    theirs = own.state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, theirs[name]), name


def test_experts_in_eight_bits(tmp_path: Path) -> None:
    more = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [1]}
    folder = write_packed(tmp_path / "packed", "fp8", "qwen3_moe", **more)
    model, _ = load_dense(found(folder), recipe(folder))
    stored = load_file(folder / FILE)
    name = "model.layers.0.mlp.experts.3.down_proj.weight"
    scale = spread(stored[f"{name}_scale_inv"], stored[name].shape, (32, 48))
    wanted = (stored[name].float() * scale).bfloat16()
    assert torch.equal(model.state_dict()["model.layers.0.mlp.experts.down_proj"][3], wanted)


def test_blocks_at_the_end_may_be_cut() -> None:
    scale = torch.arange(1.0, 7.0).view(3, 2)
    wide = spread(scale, (70, 50), (32, 48))
    assert wide.shape == (70, 50) and wide[31, 47] == 1 and wide[32, 48] == 4 and wide[69, 49] == 6
    assert torch.equal(spread(torch.tensor(3.0), (2, 2)), torch.tensor([[3.0]]))
    with pytest.raises(ValueError, match="3 scales for 70 numbers"):
        spread(scale, (70, 50))


def test_columns_of_a_group_may_lie_apart() -> None:
    """GPTQ's ``desc_act``, and its second version, whose zeros are stored as they are."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(-(2**31), 2**31, (2, 8), generator=generator).int()  # 16 inputs, 8 outputs
    zeros, scales = torch.tensor([[0x76543210], [0x01234567]]).int(), torch.rand(2, 8, generator=generator)
    groups = torch.tensor([1, 0] * 8)
    found = gptq(words, zeros, scales, groups, 4, 0)
    with pytest.raises(ValueError, match="do not make"):
        gptq(words, zeros, scales, None, 4, 0, size=words.shape[0] * 8 // len(scales) + 8)
    for column in range(16):
        for row in range(8):
            number = (int(words[column // 8, row]) >> 4 * (column % 8)) & 15
            zero = (int(zeros[groups[column], 0]) >> 4 * row) & 15
            assert found[row, column] == (number - zero) * scales[groups[column], row]


def method(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", quantization_config={**SETTINGS["gptq"], **changes})


REFUSED: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "no row": ("gptq", method(quant_method="hqq"), r"quantised \(hqq\), which is not read .awq, .*model.dequantize"),
    "three bits": ("gptq", method(bits=3), "layers.0.*qweight cannot be read|weight cannot be read: numbers of 3 bits"),
    "another layout": ("awq", method(quant_method="awq", version="gemv"), "AWQ of version gemv with 4 bits"),
    "packed otherwise": (
        "fp8",
        lambda folder: edit_tensors(folder, lambda w: {k: v for k, v in w.items() if not k.endswith("_scale_inv")}),
        r"quantised \(fp8\) in a way that is not read: .* is stored as F8_E4M3",
    ),
    "nothing packed": (
        "fp8",
        lambda folder: edit_json(
            write_model(folder) / "config.json", quantization_config=SETTINGS["fp8"]
        ),
        "no weight in its files is; where they are unquantised",
    ),
    "a weight is lost": (
        "gptq",
        lambda folder: edit_tensors(folder, lambda w: {k: v for k, v in w.items() if "layers.1.mlp.up_proj" not in k}),
        "lacks weights: model.layers.1.mlp.up_proj.weight",
    ),
    "another family": (
        "fp8", lambda folder: edit_json(folder / "config.json", model_type="nobody"), "model type 'nobody'|nobody",
    ),
    "other blocks": (
        "fp8",
        lambda folder: edit_tensors(
            folder, lambda w: {k: v.repeat(5, 1)[:5] if k.endswith("_inv") else v for k, v in w.items()}
        ),
        "scales for",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_read_is_refused_in_one_line(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kind, edit, message = REFUSED[what]
    folder = packed_folder(tmp_path / "packed", kind)
    edit(folder)
    with pytest.raises(UnsupportedModelError, match=message):
        load_dense(found(folder), recipe(folder))
    assert main(short_run(folder, tmp_path / "out")) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("multipruner: ") and not (tmp_path / "out").exists()
    assert not list(cache_folder().glob("unquantised/*")) and not list(cache_folder().glob("work/*"))


def test_matrices_that_lie_the_other_way_are_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "packed", "gpt2", n_inner=64, dtype=torch.bfloat16)
    name = "transformer.h.0.attn.c_proj.weight"
    edit_tensors(folder, lambda w: {**w, name: w[name].to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1, 1)})
    edit_json(folder / "config.json", quantization_config={"quant_method": "fp8"})
    with pytest.raises(UnsupportedModelError, match="lie the other way"):
        found(folder)


def test_runs_apply_and_dry_runs_take_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = packed_folder(tmp_path / "packed", "fp8"), tmp_path / "out"
    assert main([*short_run(folder, out), "--dry-run"]) == 0
    assert "is quantised (fp8): 14 weights" in capsys.readouterr().out and not list(
        cache_folder().glob("unquantised/*")
    )
    on_disk = ["--offload", "disk", "--repair", "lstsq", "--repair-stage", "search"]
    assert main([*short_run(folder, out), *on_disk]) == 0
    said = capsys.readouterr().out
    assert "is quantised (fp8)" in said and "stay on disk" in said, said
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    plain = Path(found(folder).path_or_id)
    for name, model in (("packed", folder), ("plain", plain)):
        assert main(["apply", str(out), "--model", str(model), "--output", str(tmp_path / f"applied-{name}")]) == 0
    one, other = (load_file(tmp_path / f"applied-{name}" / FILE) for name in ("packed", "plain"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
