"""What is particular to hybrids: caches of mixed kinds, mixers that are gone, padding that a state would remember."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers.cache_utils import DummyLayer

from multipruner.checkpoint.cut import apply_plan
from multipruner.checkpoint.load import load
from multipruner.checkpoint.save import save
from multipruner.commands.main import main
from multipruner.core.errors import ConfigError, UnsupportedModelError
from multipruner.core.families import FAMILIES, REFUSED, anatomy_of, spec_for
from multipruner.core.latency_table import Workload
from multipruner.core.structure import GONE, Anatomy, Structure, kept_in_words
from multipruner.engine.token_losses import drawn
from multipruner.latency.bench import Effort, measure_table
from multipruner.sources.sampled_text import sample
from tests.support import tiny
from tests.support.commands import paper_arguments
from tests.support.inputs import edit_json, edit_tensors, short_run, write_model

TOLERANCE = 1e-4
HYBRIDS = [name for name, options in tiny.MORE.items() if "mixer" in FAMILIES[options["family"]].kinds]
VARIANTS = [name for name in HYBRIDS if {"layer_types", "attn_layer_indices"} & set(tiny.MORE[name])]
"""With two blocks in every layer."""
ATTEND = (1, 3, 4)
"""Layers that attend, of six; the others mix tokens in another way."""
REMOVED = {
    "first mixer": {"mixer": (0,)},
    "first attention": {"attention": (1,)},
    "last of both": {"attention": (4,), "mixer": (5,)},
    "first of both": {"attention": (1,), "mixer": (0,)},
    "all mixers": {"mixer": (0, 2, 5)},
    "all attention": {"attention": ATTEND},
    "all but the last": {"attention": (1, 3), "mixer": (0, 2)},
    "whole layers": {"attention": (1,), "mixer": (0,), "mlp": (0, 1), "experts": (0, 1)},
}
FEW = ("first of both", "all attention", "whole layers")
CASES = [(variant, which) for variant in VARIANTS for which in (REMOVED if variant in ("lfm2", "qwen3_5") else FEW)]


def six_layers(variant: str) -> Any:
    """A tiny model whose layers 1, 3 and 4 attend."""
    options = dict(tiny.MORE[variant])
    if "attn_layer_indices" in options:
        options["attn_layer_indices"] = list(ATTEND)
    else:
        mixing = options["layer_types"][0]
        options["layer_types"] = ["full_attention" if layer in ATTEND else mixing for layer in range(6)]
    return tiny.tiny_model(**{**options, "layers": 6})


def _without(anatomy: Anatomy, removed: dict[str, tuple[int, ...]]) -> Structure:
    return Structure(tuple(GONE if place.layer in removed.get(place.kind, ()) else place.dense for place in anatomy))


@torch.no_grad()
def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, use_cache=False).logits


@torch.no_grad()
def _steps(model: Any, ids: torch.Tensor, mask: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens [sequences, steps] and the logits that they were chosen from [sequences, steps, vocabulary]."""
    state = model.generate(
        ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False, output_logits=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    return state.sequences[:, ids.shape[1] :], torch.stack(state.logits, dim=1)


@pytest.mark.parametrize(("variant", "which"), CASES)
def test_what_is_left_decodes_as_it_computes(variant: str, which: str, tmp_path: Path) -> None:
    """With either cache, alone and padded on the left, in memory and opened again."""
    model = six_layers(variant)
    plan = tiny.plan_for(model, _without(anatomy_of(model.config), REMOVED[which]))
    cut = apply_plan(model, plan)
    assert (type(cut) is type(model)) == (which == "whole layers")
    ids = tiny.random_ids(2, 7)
    assert (_logits(cut, ids) - _logits(tiny.masked_model(model, plan), ids)).abs().max() < TOLERANCE
    folder = save(tmp_path / "out", cut, tiny.tiny_tokenizer(), plan=plan, report={}, card="")
    opened: Any = load(folder)
    assert (_logits(opened, ids) - _logits(cut, ids)).abs().max() < tiny.ROUNDING
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[0, :3], mask[0, :3] = 0, 0
    for cache in ("dynamic", "static"):
        tokens, logits = _steps(opened, padded, mask, cache_implementation=cache)
        for row, own in enumerate((ids[:1, 3:], ids[1:])):
            whole = _logits(cut, torch.cat([own, tokens[row : row + 1]], dim=1))[0, own.shape[1] - 1 : -1]
            assert (logits[row] - whole).abs().max() < TOLERANCE, (cache, row)


def test_a_cache_has_no_slot_that_stays_empty() -> None:
    """So that what was proposed and is not taken can be taken out of it again."""
    model = six_layers("lfm2")
    ids = tiny.random_ids(1, 8).repeat(1, 3)  # there is something to look up
    for which in ("first of both", "all but the last"):
        cut: Any = apply_plan(model, tiny.plan_for(model, _without(anatomy_of(model.config), REMOVED[which])))
        slots = cut(ids, use_cache=True).past_key_values.layers
        left = sum(bool(size) for size in _without(anatomy_of(model.config), REMOVED[which])) - 6
        assert sum(not isinstance(slot, DummyLayer) for slot in slots) == left
        mask = torch.ones_like(ids)
        plain = _steps(cut, ids, mask)[0]
        assert torch.equal(_steps(cut, ids, mask, prompt_lookup_num_tokens=2)[0], plain)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["bamba", "lfm2", "mamba", "qwen3_5"])
def test_text_that_a_hybrid_samples_is_drawn_from_what_it_computes(variant: str) -> None:
    """Also where its own code counts no positions in a cache, or calls that by another name."""
    model: Any = tiny.tiny_model(**tiny.MORE[variant])
    ids = sample(model, tiny.tiny_tokenizer(), 3, 9, seed=5)
    generator = torch.Generator().manual_seed(5)
    torch.randint(93, (3, 1), generator=generator)  # what the sequences begin with
    draws = torch.rand(3, 9, generator=generator)
    shares = _logits(model, ids).softmax(-1)
    assert torch.equal(drawn(shares[:, :-1].flatten(0, 1), draws[:, 1:].reshape(-1, 1)).view(3, 8), ids[:, 1:])


def test_narrower_mlps_alike_stay_a_stock_checkpoint() -> None:
    """LFM2 works the width of its MLPs out from what is said, unless that is said as it is."""
    for variant, key in (("lfm2", "intermediate_size"), ("granitemoehybrid", "shared_intermediate_size")):
        model = six_layers(variant)
        anatomy = anatomy_of(model.config)
        assert anatomy[1].dense == (40,)
        structure = Structure(tuple((24,) if place.kind == "mlp" else place.dense for place in anatomy))
        plan = tiny.plan_for(model, structure)
        cut = apply_plan(model, plan)
        assert type(cut) is type(model) and getattr(cut.config, key) == 24
        ids = tiny.random_ids()
        assert (_logits(cut, ids) - _logits(tiny.masked_model(model, plan), ids)).abs().max() < TOLERANCE


def test_a_mixer_is_there_or_gone() -> None:
    anatomy = anatomy_of(six_layers("lfm2").config)
    structure = _without(anatomy, REMOVED["first of both"])
    assert kept_in_words(structure, anatomy)[0] == "2 of 3 mixer blocks"
    first = anatomy.of_kind("mixer")[0]
    effort, workload = Effort(probes=1, placements=1, repeats=1, warmup=0, tries=1), Workload("decode", 1, 4)
    table = measure_table(tiny.tiny_model(**tiny.MORE["lfm2"]), [workload], channel_step=20, effort=effort)
    assert set(table.row(workload.name).blocks["mixer"]) == {GONE, anatomy[first].dense}


@pytest.mark.parametrize("model_type", ["falcon_h1", "jamba", "recurrent_gemma", "rwkv", "zamba", "zamba2"])
def test_families_that_no_row_describes_say_why(model_type: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"{model_type!r} cannot be pruned: .{{20}}"):
        spec_for({"model_type": model_type})
    assert model_type in REFUSED and model_type not in FAMILIES


def test_layers_that_no_row_describes_are_refused() -> None:
    config = tiny.tiny_model(**tiny.MORE["lfm2"]).config
    config.layer_types = ["conv", "sliding_attention", "conv"]
    with pytest.raises(ConfigError, match=r"layer_types of layer 1 is 'sliding_attention'.*conv, full_attention"):
        anatomy_of(config)


@torch.no_grad()
def test_experts_and_the_mlp_beside_them_are_two_blocks() -> None:
    """Both read what their one norm makes of the stream; either stays without the other, and neither without both."""
    model: Any = six_layers("granitemoehybrid-experts")
    anatomy, ids = anatomy_of(model.config), tiny.random_ids()
    structure = anatomy.dense
    for layer, kinds in {0: ("mlp",), 1: ("experts",), 2: ("experts", "mlp")}.items():
        for kind in kinds:
            structure = structure.replace(anatomy.at(layer, kind), GONE)
    structure = structure.replace(anatomy.at(3, "experts"), (3,)).replace(anatomy.at(3, "mlp"), (17,))
    plan = tiny.plan_for(model, structure)
    cut: Any = apply_plan(model, plan)
    assert (_logits(cut, ids) - _logits(tiny.masked_model(model, plan), ids)).abs().max() < TOLERANCE
    assert len(cut.model.layers[3].block_sparse_moe.router.weight) == 3


def test_a_run_of_mixers_alone_and_what_is_refused_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also what is asked of a run beforehand, and a hidden size."""
    folder, output = write_model(tmp_path / "dense", **{"layers": 3, **tiny.MORE["mamba"]}), tmp_path / "out"
    assert main([*short_run(folder, output), "--dry-run"]) == 0
    assert main([*short_run(folder, output), "--hidden-size", "40"]) == 2
    assert "not repaired through mixers of tokens" in capsys.readouterr().err
    assert main(short_run(folder, output)) == 0
    assert 0.15 < _counted(output) < 0.3
    assert json.loads((output / "config.json").read_text())["num_hidden_layers"] == 2
    _check_refused(output, "mamba", capsys, "gguf", "onnx", "openvino")


def test_tensors_that_predict_further_tokens_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where they stand beside the decoder: stock classes of some families pass over them, those of others do not."""
    for variant, refused in (("qwen3_next", False), ("exaone_moe", False), ("mellum", False), ("lfm2", True)):
        folder, output = (
            write_model(tmp_path / variant, **{"layers": 3, **tiny.MORE[variant]}),
            tmp_path / f"{variant}-out",
        )
        edit_tensors(folder, lambda weights: {**weights, "mtp.fc.weight": torch.ones(48, 96)})
        assert main([*short_run(folder, output), "--dimensions", "mlp"]) == (2 if refused else 0)
        said = capsys.readouterr()
        if refused:
            assert "1 tensors without a place in Lfm2ForCausalLM: mtp.fc.weight" in said.err
            continue
        assert "layers that predict further tokens (mtp.*) are left out of the result" in said.out
        assert not any(name.startswith("mtp.") for name in load_file(output / "model.safetensors"))
        assert _counted(output) > 0.15


def test_a_window_of_nothing_is_none_where_no_window_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The configuration of Qwen 2 MoE writes 0 in its place."""
    folder = write_model(tmp_path / "dense", **{"layers": 3, **tiny.MORE["qwen2_moe"]})
    assert json.loads((folder / "config.json").read_text())["sliding_window"] == 0
    assert main(short_run(folder, tmp_path / "out")) == 0
    assert _counted(tmp_path / "out") > 0.15
    edit_json(folder / "config.json", use_sliding_window=True)
    assert main(short_run(folder, tmp_path / "more")) == 2
    assert "sliding_window is 0; a whole number from 1 to" in capsys.readouterr().err


def test_a_killed_run_of_a_hybrid_ends_with_the_same_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, output = write_model(tmp_path / "dense", **{"layers": 3, **tiny.MORE["lfm2"]}), tmp_path / "out"
    arguments = paper_arguments(folder, output, "--ratio", "0.2", "--repair", "none")
    assert main(arguments) == 0
    assert 0.15 < _counted(output) < 0.3
    _check_refused(output, "lfm2", capsys, "gguf", "openvino")
    lines = (output / "trajectory.jsonl").read_text().splitlines(keepends=True)
    plan = (output / "plan.json").read_bytes()
    shutil.rmtree(output)
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "trajectory.jsonl").write_text("".join(lines[:2]) + lines[2][:20])
    assert main(arguments) == 0
    assert (output / "plan.json").read_bytes() == plan


def _counted(output: Path) -> float:
    """The ratio that a run reports, after its parameters are counted."""
    report = json.loads((output / "report.json").read_text())
    assert report["parameters"]["after"] == sum(weight.numel() for weight in load(output).parameters())
    return report["ratio"]


def _check_refused(output: Path, family: str, capsys: pytest.CaptureFixture[str], *formats: str) -> None:
    for name in formats:
        assert main(["export", str(output), "--format", name, "--output", str(output.with_name(name))]) == 2
        assert family in capsys.readouterr().err and not output.with_name(name).exists()
