"""The law of every family, at its shortest: what is cut computes what is masked, wherever it is asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from multipruner.checkpoint.cut import apply_plan
from multipruner.checkpoint.load import load
from multipruner.checkpoint.save import save
from multipruner.commands.main import main
from multipruner.core.families import anatomy_of, spec_for
from multipruner.core.structure import GONE, Anatomy, Structure
from multipruner.engine.moments import gather
from multipruner.engine.objective import CalibrationObjective, PlainObjective
from multipruner.engine.prunable import Prunable
from multipruner.importance.table import rank
from multipruner.repair.scoring import Repair
from multipruner.repair.stream import accumulated
from multipruner.repair.write import write_outputs
from tests.support import tiny
from tests.support.commands import arguments
from tests.support.elsewhere import logits_elsewhere
from tests.support.gguf_cases import byte_level

TOLERANCE = 1e-4
families = pytest.mark.parametrize("variant", tiny.MORE)


def _first_attention_gone(anatomy: Anatomy) -> Structure:
    """No attention, or mixer, in the first layer, a narrower MLP in the second, no MLP in the third; or experts in the
    place of MLPs.
    """
    structure = anatomy.dense.replace(anatomy.of_layer(0)[0], GONE).replace(anatomy.of_layer(2)[-1], GONE)
    return structure if anatomy.kinds == ("mixer",) else _narrower(structure, anatomy, 1, 17)


def _narrower(structure: Structure, anatomy: Anatomy, layer: int, channels: int) -> Structure:
    """So many channels in the MLP of a layer, or one expert less than there are; a layer without either is gone."""
    second = anatomy.of_layer(layer)[-1]
    size = anatomy[second].dense
    if anatomy[second].kind == "mixer":
        return structure.replace(second, GONE)
    return structure.replace(second, (channels,) if anatomy[second].kind == "mlp" else (size[0] - 1, *size[1:]))


def _cut(variant: str, seed: int | None = None) -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedModel]:
    """A tiny model, the same masked, and the same cut."""
    model = tiny.tiny_model(**tiny.MORE[variant])
    anatomy = anatomy_of(model.config)
    structure = _first_attention_gone(anatomy) if seed is None else tiny.random_structure(anatomy, seed, partial=True)
    plan = tiny.plan_for(model, structure, seed or 0)
    return model, tiny.masked_model(model, plan), apply_plan(model, plan)


@torch.no_grad()
def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, use_cache=False).logits


@families
def test_cut_computes_what_masked_does_and_weighs_what_is_counted(variant: str) -> None:
    for seed in (None, 0, 1, 2):
        model, masked, cut = _cut(variant, seed)
        ids = tiny.random_ids()
        assert (_logits(cut, ids) - _logits(masked, ids)).abs().max() < TOLERANCE
        prunable, anatomy = Prunable.of(model), anatomy_of(model.config)
        structure = _first_attention_gone(anatomy) if seed is None else tiny.random_structure(
            anatomy, seed, partial=True)  # fmt: skip
        assert sum(weight.numel() for weight in cut.parameters()) == prunable.costs.parameters(structure)
        with prunable.in_order(tiny.random_ranking(anatomy, seed or 0)):
            losses = [kind(prunable, ids)(structure) for kind in (CalibrationObjective, PlainObjective)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@families
def test_a_written_model_is_what_it_was_and_decodes_as_it_computes(variant: str, tmp_path: Path) -> None:
    model, _, cut = _cut(variant)
    plan = tiny.plan_for(model, _first_attention_gone(anatomy_of(model.config)))
    save(tmp_path / "out", cut, tiny.tiny_tokenizer(), plan=plan, report={}, card="")
    ids = tiny.random_ids()
    wanted = _logits(cut, ids)
    again: Any = load(tmp_path / "out")
    assert (_logits(again, ids) - wanted).abs().max() < tiny.ROUNDING
    record = json.loads((tmp_path / "out" / "config.json").read_text())
    depth = record[spec_for(model.config).depth]
    assert all(len(record[key]) == depth for key in ("layer_types", "no_rope_layers") if record.get(key))
    for cache in ({}, {"cache_implementation": "static"})[: 1 if variant in tiny.NO_STATIC else 2]:
        state: Any = again.generate(
            ids[:, :4], max_new_tokens=4, min_new_tokens=4, do_sample=False, output_logits=True,
            return_dict_in_generate=True, **cache,
        )  # fmt: skip
        whole = _logits(again, state.sequences[:, :-1])[:, 3:]
        assert (torch.stack(state.logits, dim=1) - whole).abs().max() < TOLERANCE, cache


@families
def test_a_repair_lowers_the_loss_and_is_written_as_it_was_scored(variant: str) -> None:
    model = tiny.tiny_model(**tiny.MORE[variant])
    prunable, ids = Prunable.of(model), tiny.random_ids(8, 32)
    anatomy, moments = prunable.anatomy, gather(prunable, ids)
    structure = _narrower(_narrower(anatomy.dense, anatomy, 0, 20), anatomy, 2, 13)
    ranking = rank("second-order", prunable, moments)
    with prunable.in_order(ranking):
        bare = CalibrationObjective(prunable, ids, loss="nll")(structure)
    with prunable.in_order(ranking, Repair(prunable, moments, ranking)):
        outputs = accumulated(prunable, structure, ids)
        with prunable.with_outputs(outputs):
            scored = CalibrationObjective(prunable, ids)(structure)
    plan = type(tiny.plan_for(model, structure)).from_structure(
        structure, ranking, anatomy, model="tiny", model_type=prunable.spec.model_type
    )
    cut = apply_plan(model, plan)
    write_outputs(cut, prunable, plan, ranking, outputs)
    with torch.no_grad():
        logits = cut(ids, use_cache=False).logits[:, :-1]  # pyright: ignore[reportCallIssue]
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert float(nll) == pytest.approx(scored, abs=1e-4) and abs(scored - bare) > 1e-7


@pytest.mark.parametrize("variant", ["gpt2", "cohere", "granite_swa", "bloom"])
def test_a_run_goes_from_folder_to_folder(variant: str, dense: Path, tmp_path: Path) -> None:
    """Other names of classes and tokenizers, one norm for two blocks, no SDPA, blocks that add to the stream."""
    own = byte_level() if variant == "gpt2" else tiny.tiny_tokenizer()
    model = tiny.tiny_model(**{**tiny.MORE[variant], "vocab_size": len(own)})
    model.save_pretrained(tmp_path / "dense")
    own.save_pretrained(tmp_path / "dense")
    AutoTokenizer.from_pretrained(tmp_path / "dense").save_pretrained(tmp_path / "dense")  # in the family's own class
    (tmp_path / "dense" / "text.txt").write_text((dense / "text.txt").read_text())
    assert main(arguments(tmp_path / "dense", tmp_path / "out", "--rounds", "0")) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    count = sum(weight.numel() for weight in load(tmp_path / "out").parameters())
    assert report["parameters"]["after"] == count < 0.71 * sum(weight.numel() for weight in model.parameters())


def test_stock_transformers_open_them_all(tmp_path: Path) -> None:
    ids, wanted = tiny.random_ids(), {}
    torch.save(ids, tmp_path / "ids.pt")
    for variant in tiny.MORE:
        model, _, cut = _cut(variant)
        plan = tiny.plan_for(model, _first_attention_gone(anatomy_of(model.config)))
        save(tmp_path / variant, cut, tiny.tiny_tokenizer(), plan=plan, report={}, card="")
        wanted[str(tmp_path / variant)] = _logits(cut, ids)
    for folder, logits in logits_elsewhere(list(wanted), tmp_path / "ids.pt").items():
        assert (logits - wanted[folder]).abs().max() < tiny.ROUNDING, folder
