"""``multipruner apply`` from a GGUF file to a GGUF file: what the cut model says, in the dense file's own numbers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedModel

from multipruner.checkpoint.cut import apply_plan
from multipruner.checkpoint.save import save
from multipruner.commands.main import main
from multipruner.config.recipe import Recipe
from multipruner.core.families import anatomy_of
from multipruner.core.plan import PruningPlan, Ranking
from multipruner.core.structure import Structure
from multipruner.engine.fingerprint import fingerprint
from multipruner.engine.prunable import Prunable
from multipruner.export.from_gguf.source import open_source
from multipruner.export.gguf import export_gguf
from multipruner.importance.table import rank
from multipruner.jobs.apply.from_gguf import cut_gguf
from multipruner.recipes import mapping_for
from multipruner.sources.gguf import file_of_package, from_file
from tests.support import tiny
from tests.support.gguf_cases import MIXED, UNIFORM, VOCABULARY, byte_level
from tests.support.layers import structure_of
from tests.support.llama_cpp import log_probabilities, opened

TYPES = GGMLQuantizationType
WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
"""Sizes that blocks of 32 fit."""
CUT = structure_of((4, 2, 64), (2, 1, 128), (4, 2, 0), (0, 0, 32), (2, 2, 96))
"""Layers of such a model with whole attentions, half of one, without MLP, without attention, and fewer query heads."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MULTIPRUNER_CACHE", str(tmp_path / "cache"))


def dense_file(folder: Path, outtype: str = "f32", **options: Any) -> tuple[PreTrainedModel, Path]:
    """A tiny dense model, and its GGUF file as every converter makes it."""
    model = tiny.tiny_model(**{"family": "llama", "vocab_size": VOCABULARY, **options})
    model.save_pretrained(folder / "dense")
    byte_level().save_pretrained(folder / "dense")
    return model, export_gguf(folder / "dense", folder / "dense.gguf", outtype=outtype).path


def write_plan(path: Path, model: PreTrainedModel, structure: Structure, print_of: str | None = None) -> PruningPlan:
    anatomy = anatomy_of(model.config)
    plan = PruningPlan.from_structure(
        structure, tiny.random_ranking(anatomy, 1), anatomy, model="tiny", model_type=model.config.model_type,
        fingerprint=print_of,
    )  # fmt: skip
    path.write_text(plan.to_json())
    return plan


def stored_as(path: Path, target: Path, kind: TYPES, only: str = ".weight") -> Path:
    """The same file, with matrices in another type: of one that gguf cannot make, numbers are any."""
    reader, rng = GGUFReader(path), np.random.default_rng(0)
    writer = GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture" and len(field.data):
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1])
    for tensor in reader.tensors:
        block, size = GGML_QUANT_SIZES[kind]
        if len(tensor.shape) == 1 or tensor.shape[0] % block or only not in tensor.name:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
            continue
        try:
            data = quantize(dequantize(tensor.data, tensor.tensor_type), kind)
        except NotImplementedError:
            rows, columns = (int(side) for side in reversed(tensor.shape))
            blocks = rng.integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
            for at in {TYPES.Q4_K: (0, 2), TYPES.Q6_K: (208,)}[kind]:
                blocks[..., at : at + 2] = np.full(1, 1e-4, np.float16).view(np.uint8)
            data = blocks.reshape(rows, -1)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def apply(plan: Path, dense: Path, output: Path, *more: str) -> int:
    return main(["apply", str(plan), "--model", str(dense), "--output", str(output), *more])


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    reader = GGUFReader(path)
    return {key: field.contents() for key, field in reader.fields.items()}, {t.name: t for t in reader.tensors}


def load_numbers(model: PreTrainedModel, path: Path, plan: PruningPlan) -> None:
    """Give a model the very numbers that a file stores, in 32 bits."""
    source = open_source(path, plan)
    model.load_state_dict({name: torch.from_numpy(source.values(name)) for name in source.pieces}, strict=False)


def values(tensor: Any) -> np.ndarray:
    return dequantize(np.asarray(tensor.data), tensor.tensor_type)


CASES: dict[str, tuple[dict[str, Any], Structure]] = {
    "llama": ({}, MIXED),
    "llama-tied": ({"tied": True}, MIXED),
    "llama-biased": ({"attention_bias": True, "mlp_bias": True}, MIXED),
    "llama-alike": ({}, UNIFORM),
    "mistral": ({"family": "mistral", "sliding_window": None}, MIXED),
    "qwen2": ({"family": "qwen2", "hidden_size": 64}, MIXED),
    "qwen2-alike": ({"family": "qwen2", "hidden_size": 64}, structure_of(*[(4, 2, 24)] * 6)),
    "qwen3-tied": ({"family": "qwen3", "tied": True}, MIXED),
    "qwen3-alike": ({"family": "qwen3"}, UNIFORM),
}


@pytest.mark.parametrize("case", CASES)
def test_the_file_is_that_of_the_pruned_model(case: str, tmp_path: Path) -> None:
    """In 32 bits: the same tensors, sizes and architecture as of a folder that is cut first and exported then."""
    options, structure = CASES[case]
    model, dense = dense_file(tmp_path, **{**options, "layers": len(structure) // 2})
    plan = write_plan(tmp_path / "plan.json", model, structure)
    assert apply(tmp_path / "plan.json", dense, tmp_path / "small.gguf") == 0
    save(tmp_path / "run", apply_plan(model, plan), byte_level(), plan=plan, report={}, card="")
    (ours, cut), (theirs, exported) = (
        read(tmp_path / "small.gguf"),
        read(export_gguf(tmp_path / "run", outtype="f32").path),
    )
    assert cut.keys() == exported.keys()
    for name, tensor in exported.items():
        assert np.array_equal(values(cut[name]), values(tensor)), name
    assert {k: v for k, v in ours.items() if not k.startswith(("general.", "GGUF."))} == {
        k: v for k, v in theirs.items() if not k.startswith(("general.", "GGUF."))
    }
    assert ours["general.architecture"] == theirs["general.architecture"]
    assert ours["general.name"] == "dense"


def test_a_narrower_residual_stream_is_cut_as_well(tmp_path: Path) -> None:
    model, dense = dense_file(tmp_path, layers=2)
    anatomy = anatomy_of(model.config)
    structure = Structure(anatomy.dense.blocks, 32)
    plan = PruningPlan.from_structure(
        structure, tiny.random_ranking(anatomy, 1), anatomy, model="tiny", model_type="llama"
    )
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert apply(tmp_path / "plan.json", dense, tmp_path / "small.gguf") == 0
    save(tmp_path / "run", apply_plan(model, plan), byte_level(), plan=plan, report={}, card="")
    (facts, cut), (_, exported) = read(tmp_path / "small.gguf"), read(export_gguf(tmp_path / "run", outtype="f32").path)
    assert facts["llama.embedding_length"] == 32
    assert all(np.array_equal(values(cut[name]), values(tensor)) for name, tensor in exported.items())


@pytest.mark.parametrize("kind", [TYPES.Q4_1, TYPES.Q8_0, TYPES.Q5_0], ids=lambda kind: kind.name)
def test_quantised_tensors_keep_their_numbers(kind: TYPES, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows and whole heads bit for bit; channels of the output projections within the type's own rounding."""
    model, exact = dense_file(tmp_path, layers=5, **WIDE)
    dense = stored_as(exact, tmp_path / "quantised.gguf", kind)
    plan = write_plan(tmp_path / "plan.json", model, CUT)
    assert apply(tmp_path / "plan.json", dense, tmp_path / "small.gguf") == 0
    said = capsys.readouterr().out
    (_, before), (_, after) = read(dense), read(tmp_path / "small.gguf")
    assert after["token_embd.weight"].data.tobytes() == before["token_embd.weight"].data.tobytes()
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):  # the first layer's attention is whole
        assert after[f"blk.0.{name}.weight"].data.tobytes() == before[f"blk.0.{name}.weight"].data.tobytes(), name
    assert after["blk.1.ffn_down.weight"].data.tobytes() == before["blk.1.ffn_down.weight"].data.tobytes()
    channels: list[Any] = [plan.kept(plan.anatomy.at(layer, "mlp")) for layer in (0, 3)]
    for layer, kept in zip((0, 3), channels, strict=True):
        (units,) = map(list, kept.values())
        gate, down = (f"blk.{layer}.{name}.weight" for name in ("ffn_gate", "ffn_down"))
        assert after[gate].data.tobytes() == np.ascontiguousarray(before[gate].data[units]).tobytes()
        assert after[down].tensor_type == kind
        exactly, found = values(before[down])[:, units], values(after[down])
        assert np.abs(found - exactly).max() < 0.15 * np.abs(exactly).max()
    assert after["blk.1.attn_output.weight"].tensor_type == kind
    down = sum("ffn_down" in line for line in said.splitlines())
    assert down == 1 and f"3 cut within blocks and rounded anew ({kind.name} again): blk.0.ffn_down.weight" in said
    assert "36 of 43 tensors keep their stored numbers, bit for bit" in said  # four are zeros


def test_half_an_attention_keeps_its_columns_bit_for_bit(tmp_path: Path) -> None:
    model, exact = dense_file(tmp_path, layers=5, **WIDE)
    dense = stored_as(exact, tmp_path / "quantised.gguf", TYPES.Q4_0)
    plan = write_plan(tmp_path / "plan.json", model, CUT)
    cut_gguf(str(tmp_path / "plan.json"), dense, tmp_path / "small.gguf")
    (_, before), (_, after) = read(dense), read(tmp_path / "small.gguf")
    kept: Any = plan.kept(plan.anatomy.at(1, "attention"))
    groups, queries = kept.values()
    heads = [2 * int(group) + int(query) for group, row in zip(groups, queries, strict=True) for query in row]
    columns = [head * 32 + number for head in heads for number in range(32)]
    found, dense_values = (values(tensors["blk.1.attn_output.weight"]) for tensors in (after, before))
    assert len(heads) == 2 and np.array_equal(found, dense_values[:, columns])


def test_types_that_cannot_be_made_are_widened_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    model, exact = dense_file(tmp_path, layers=3, **sizes)
    dense = stored_as(exact, tmp_path / "k.gguf", TYPES.Q4_K)
    write_plan(tmp_path / "plan.json", model, structure_of((4, 2, 256), (4, 2, 512), (2, 1, 300)))
    assert apply(tmp_path / "plan.json", dense, tmp_path / "small.gguf") == 0
    said = capsys.readouterr().out
    (_, before), (_, after) = read(dense), read(tmp_path / "small.gguf")
    assert after["blk.1.ffn_down.weight"].data.tobytes() == before["blk.1.ffn_down.weight"].data.tobytes()
    kinds = [after[f"blk.{layer}.ffn_down.weight"].tensor_type for layer in range(3)]
    assert kinds == [TYPES.Q8_0, TYPES.Q4_K, TYPES.F16]
    assert (
        "2 cut within blocks and rounded anew (Q4_K -> Q8_0): blk.0.ffn_down.weight, blk.2.attn_output.weight" in said
    )
    assert "1 cut within blocks and rounded anew (Q4_K -> F16): blk.2.ffn_down.weight" in said


def test_queries_keys_and_values_of_several_types_become_one(tmp_path: Path) -> None:
    """As in a Qwen 3 whose layers differ: the architecture has one tensor of them."""
    model, exact = dense_file(tmp_path, family="qwen3", tied=True, layers=3, **WIDE)
    dense = stored_as(exact, tmp_path / "mixed.gguf", TYPES.Q8_0)
    dense = stored_as(dense, tmp_path / "quantised.gguf", TYPES.Q4_0, "attn_v.weight")
    write_plan(tmp_path / "plan.json", model, structure_of((4, 2, 96), (2, 1, 128), (4, 2, 64)))
    assert apply(tmp_path / "plan.json", dense, tmp_path / "small.gguf") == 0
    (_, before), (facts, after) = read(dense), read(tmp_path / "small.gguf")
    assert facts["general.architecture"] == "openelm"
    fused = after["blk.0.attn_qkv.weight"]
    parts = [values(before[f"blk.0.attn_{part}.weight"]) for part in "qkv"]
    assert fused.tensor_type == TYPES.Q8_0
    assert np.abs(values(fused) - np.concatenate(parts)).max() < np.abs(np.concatenate(parts)).max() / 127


@pytest.mark.llama_cpp
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_llama_cpp_computes_the_cut_model(family: str, tmp_path: Path) -> None:
    """What llama.cpp computes from a cut Q8_0 file is what transformers compute from the dense file's numbers, cut."""
    sizes = {**WIDE, "hidden_size": 128}  # as wide as the queries
    model, exact = dense_file(tmp_path, family=family, tied=family == "qwen3", layers=5, **sizes)
    dense = stored_as(exact, tmp_path / "quantised.gguf", TYPES.Q8_0)
    plan = write_plan(tmp_path / "plan.json", model, CUT)
    assert apply(tmp_path / "plan.json", dense, tmp_path / "small.gguf") == 0
    load_numbers(model, dense, plan)
    ids = torch.randint(4, VOCABULARY, (1, 80), generator=torch.Generator().manual_seed(5))
    exactly = log_probabilities(apply_plan(model, plan), ids)
    with opened(tmp_path / "small.gguf") as llama:
        found = llama.everywhere(ids[0].tolist(), VOCABULARY, 60)
    assert np.abs(found - exactly[-len(found) :]).mean() / exactly.std() < 0.1


def test_weights_are_compared_with_those_of_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for variant, options in {"llama": {}, "qwen2": {"family": "qwen2", "hidden_size": 64}}.items():
        folder = tmp_path / variant
        model, dense = dense_file(folder, layers=2, **options)
        unpacked = type(model).from_pretrained(from_file(dense, print), dtype=torch.bfloat16)
        structure = structure_of((4, 2, 24), (0, 0, 40))
        for print_of in (fingerprint(model), fingerprint(unpacked)):
            write_plan(folder / "plan.json", model, structure, print_of)
            assert apply(folder / "plan.json", dense, folder / "small.gguf", "--overwrite") == 0
        write_plan(folder / "plan.json", model, structure, "0" * 64)
        capsys.readouterr()
        assert apply(folder / "plan.json", dense, folder / "other.gguf") == 2
        assert "pass --any-weights" in capsys.readouterr().err
        assert not (folder / "other.gguf").exists()
        assert apply(folder / "plan.json", dense, folder / "other.gguf", "--any-weights") == 0
        assert (folder / "other.gguf").read_bytes() == (folder / "small.gguf").read_bytes()


def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, dense = dense_file(tmp_path, layers=2)
    plan = tmp_path / "plan.json"
    write_plan(plan, model, structure_of((4, 2, 24), (0, 0, 40)))

    def refused(output: Path, *more: str, model: Path = dense) -> str:
        capsys.readouterr()
        assert apply(plan, model, output, *more) == 2
        return capsys.readouterr().err

    there = tmp_path / "there.gguf"
    there.write_text("mine")
    assert "exists already" in refused(there) and there.read_text() == "mine"
    assert "the dense model's own file" in refused(dense, "--overwrite")
    assert "--text-only, --revision: a .gguf file" in refused(tmp_path / "s.gguf", "--text-only", "--revision", "main")
    assert "there is no file" in refused(tmp_path / "small.gguf", model=tmp_path / "none.gguf")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(dense.read_bytes()[:4000])
    whole = plan.read_text()
    anatomy = anatomy_of(model.config, ("value_dim",))
    narrow = Structure(tuple((*size[:2], size[2] - 4) if len(size) > 2 else size for size in anatomy.dense))
    plan.write_text(PruningPlan.from_structure(
        narrow, Ranking.identity(anatomy), anatomy, model="m", model_type="llama").to_json())  # fmt: skip
    assert "heads of fewer value dimensions or RoPE pairs" in refused(tmp_path / "small.gguf")
    plan.write_text(whole)
    assert "cut.gguf" in refused(tmp_path / "small.gguf", model=cut)
    for options, said in (
        ({"layers": 3}, "a model of 3 layers; dense.gguf has 2"),
        ({"intermediate_size": 48}, "intermediate_size 48 in layer 0; dense.gguf has 40"),
        ({"family": "qwen2"}, "made for a qwen2 model; dense.gguf is of 'llama'"),
        ({"family": "gemma2"}, "no architecture with per-layer sizes for the family 'gemma2'"),
    ):
        other = tiny.tiny_model(**{"family": "llama", "layers": 2, **options})
        write_plan(plan, other, anatomy_of(other.config).dense)
        assert said in refused(tmp_path / "small.gguf")
    assert not (tmp_path / "small.gguf").exists()
    assert not [path.name for path in tmp_path.iterdir() if "partial" in path.name]


def _layer(number: int) -> tuple[int, int, int]:
    """Whole layers, narrower ones, ones without a block, and one that is gone: about a fifth of SmolLM2."""
    heads = {5: (6, 2), 9: (3, 1), 12: (6, 3), 20: (0, 0), 22: (0, 0), 25: (0, 0)}.get(number, (9, 3))
    channels = {20: 0, 24: 0}.get(number, 1152 if number % 2 else 1120 if not number % 4 else 1536)
    return (*heads, channels)


def _error(path: Path, model: Any, ids: torch.Tensor) -> float:
    """Mean difference of llama.cpp's log-probabilities of its best 200 tokens after a text, over their spread."""
    with opened(path) as llama:
        found = llama.after(ids[0].tolist(), 200, cache_prompt=False)
    expected = log_probabilities(model, ids)[-1][list(found)]
    return float(np.abs(np.array(list(found.values())) - expected).mean() / expected.std())


@pytest.mark.slow
def test_smollm2_is_cut_in_its_own_numbers(tmp_path: Path) -> None:
    """The real Q4_1 file: the cut one holds its numbers, for transformers and (widened, unrounded) llama.cpp."""
    recipe = Recipe.build(mapping_for("llama"))
    assert recipe.fallback is not None
    dense = file_of_package(recipe.fallback, tmp_path, print)
    folder = from_file(dense, print)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = "The capital of France is Paris, and the river that runs through it is"
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
    anatomy, ranking = anatomy_of(model.config), rank("magnitude", Prunable.of(model))
    unpacked: Any = copy.deepcopy(model)
    mark = fingerprint(unpacked.to(torch.bfloat16))
    structures = {
        "mixed": structure_of(*map(_layer, range(30))),
        "alike": structure_of(*[(0, 0, 0) if number in (20, 21) else (6, 2, 1280) for number in range(30)]),
    }
    errors: dict[str, float] = {}
    pruned: Any = None
    for name, structure in structures.items():
        plan = PruningPlan.from_structure(
            structure, ranking, anatomy, model="SmolLM2", model_type="llama", fingerprint=mark
        )
        (tmp_path / f"{name}.json").write_text(plan.to_json())
        assert apply(tmp_path / f"{name}.json", dense, tmp_path / f"{name}.gguf") == 0
        load_numbers(model, dense, plan)
        pruned = apply_plan(model, plan)
        rounded_anew(pruned, tmp_path / f"{name}.gguf")
        errors[name] = _error(stored_as(tmp_path / f"{name}.gguf", tmp_path / "wide.gguf", TYPES.F32), pruned, ids)
    again = LlamaForCausalLM.from_pretrained(from_file(tmp_path / "alike.gguf", print), dtype=torch.float32)
    found, expected = (log_probabilities(one, ids) for one in (again, pruned))
    errors["read again"] = float(np.abs(found - expected).mean() / expected.std())
    (_, before), (facts, after) = read(dense), read(tmp_path / "mixed.gguf")
    assert facts["general.architecture"] == "deci"
    for name in ("token_embd.weight", "output_norm.weight", "blk.2.ffn_down.weight", "blk.2.attn_q.weight"):
        assert after[name].data.tobytes() == before[name].data.tobytes(), name
    assert max(errors["mixed"], errors["alike"]) < 0.01 and errors["read again"] < 0.1, errors


def rounded_anew(model: Any, path: Path) -> None:
    """Give a cut model the output projections of MLPs as a file has them; they are what they were but for rounding."""
    tensors, weights = read(path)[1], model.state_dict()
    for name, weight in weights.items():
        if name.endswith("down_proj.weight"):
            found = torch.from_numpy(np.array(values(tensors[f"blk.{name.split('.')[2]}.ffn_down.weight"])))
            assert (found - weight).norm() < 0.08 * weight.norm(), name
            weight.copy_(found)
