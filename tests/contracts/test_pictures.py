"""What holds for every image classifier with a row: masked equals sliced, disk equals memory, costs are counts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel

from multipruner.checkpoint.config import check_narrower, sizes_in
from multipruner.checkpoint.cut import apply_plan
from multipruner.checkpoint.load import load
from multipruner.checkpoint.rehearsal import Rehearsal
from multipruner.checkpoint.reopen import check_reopened
from multipruner.checkpoint.save import save
from multipruner.core.errors import OutputError, UnsupportedModelError
from multipruner.core.families import FAMILIES, Family, anatomy_of, first_row, spec_for
from multipruner.core.families.vision import CLASSIFIERS
from multipruner.core.structure import GONE, Anatomy, Structure
from multipruner.engine.layer_calls import State, gain_of, stream_of
from multipruner.engine.moments import gather, positions_of
from multipruner.engine.objective import CalibrationObjective
from multipruner.engine.prunable import Prunable
from multipruner.importance import energies
from multipruner.importance.energies import FACTOR, sensitivities
from multipruner.importance.table import rank
from multipruner.repair.scoring import Repair
from multipruner.repair.stream import accumulated
from tests.support import pictures
from tests.support.tiny import plan_for, random_ranking, random_structure

families = pytest.mark.parametrize("family", pictures.VARIANTS)


def _free(anatomy: Anatomy) -> Structure:
    """Layers that differ: heads and channels of their own, a block gone, a layer gone."""
    dense = anatomy.dense.replace(anatomy.at(0, "attention"), (2, 1)).replace(anatomy.at(0, "mlp"), (31,))
    for layer, kind in ((1, "attention"), (2, "attention"), (2, "mlp")):
        dense = dense.replace(anatomy.at(layer, kind), GONE)
    return dense


def _alike(anatomy: Anatomy) -> Structure:
    return Structure(tuple((3, 1) if place.kind == "attention" else (24,) for place in anatomy))


def _fewer_heads(anatomy: Anatomy) -> Structure:
    return Structure(tuple((3, 1) if place.kind == "attention" else place.dense for place in anatomy))


def _fewer_layers(anatomy: Anatomy) -> Structure:
    return Structure(tuple(GONE if place.layer == 1 else place.dense for place in anatomy))


STRUCTURES = {
    "layers differ": _free, "layers alike": _alike, "heads alike": _fewer_heads, "fewer layers": _fewer_layers,
}  # fmt: skip
structures = pytest.mark.parametrize("structure", STRUCTURES)


def _needs_own_code(spec: Family, structure: Structure, anatomy: Anatomy) -> bool:
    """Whether stock classes have no words for it: layers differ, or a constructor knows one size alone."""
    there = {place.layer for place, size in zip(anatomy, structure, strict=True) if size}
    pairs = [(p.kind, size, p.dense) for p, size in zip(anatomy, structure, strict=True) if p.layer in there]
    cut = any(spec.block(kind).resized and size != dense for kind, size, dense in pairs)
    return cut or len({(kind, size) for kind, size, _ in pairs}) > len(anatomy.kinds)


@torch.no_grad()
def _logits(model: PreTrainedModel) -> torch.Tensor:
    return model(pixel_values=pictures.pixels()).logits


def test_rows_of_text_and_of_pictures_are_apart() -> None:
    assert not set(CLASSIFIERS) & set(FAMILIES)
    assert {variant.partition("-")[0] for variant in pictures.VARIANTS} == set(CLASSIFIERS), "a row without a contract"
    met = {spec_for(pictures.config_of(variant)) for variant in pictures.VARIANTS}
    assert met == {row for first in CLASSIFIERS.values() for row in (first, *first.others)}
    assert {row.task.reads_text for row in FAMILIES.values()} == {True}
    assert {row.task.auto_class for row in CLASSIFIERS.values()} == {"AutoModelForImageClassification"}
    assert first_row("llama") is FAMILIES["llama"] and first_row("vit") is CLASSIFIERS["vit"]
    assert first_row(None) is None


def _last_state(prunable: Prunable, rows: torch.Tensor) -> torch.Tensor:
    """The residual stream behind the last block, block by block."""
    inputs = prunable.inputs(rows)
    state: State = inputs.hidden
    for block, size in enumerate(prunable.dense):
        state = prunable.block(state, inputs, block, size)
    return stream_of(state)


@families
def test_blocks_one_by_one_are_the_stock_model(family: str) -> None:
    model = pictures.tiny_classifier(family)
    prunable, rows = Prunable.of(model), pictures.pixels()
    with torch.no_grad():
        state = _last_state(prunable, rows)
        found = prunable.head(prunable.normed(state))
    assert torch.allclose(found, _logits(model), atol=1e-5)
    assert positions_of(prunable, rows) == state.shape[1] >= 16


@pytest.mark.parametrize(("family", "read"), [
    ("vit", lambda x: x[:, 0]), ("dinov2", lambda x: torch.cat([x[:, 0], x[:, 1:].mean(1)], -1)),
    ("siglip", lambda x: x.mean(1)),
])  # fmt: skip
def test_the_head_reads_the_positions_of_the_task(family: str, read: Callable[[torch.Tensor], torch.Tensor]) -> None:
    prunable = Prunable.of(pictures.tiny_classifier(family))
    hidden = torch.randn(5, 17, 48, generator=torch.Generator().manual_seed(2))
    norm = prunable.decoder.get_submodule(prunable.spec.final_norm)
    with torch.no_grad():
        assert torch.allclose(prunable.normed(hidden), read(norm(hidden)), atol=1e-6)
    assert prunable.head_weight.shape[1] == 48 * len(prunable.spec.task.pooled)


@families
def test_the_objective_is_the_divergence_of_whole_forwards(family: str) -> None:
    model = pictures.tiny_classifier(family)
    prunable, rows = Prunable.of(model), pictures.pixels(5)
    with torch.no_grad():
        dense = model(pixel_values=rows).logits.log_softmax(-1)
    with prunable.in_order(random_ranking(prunable.anatomy, 3)):
        objective = CalibrationObjective(prunable, rows, batch_size=2, loss="kl")
        for seed in range(4):
            structure = random_structure(prunable.anatomy, seed)
            with torch.no_grad(), prunable.applied(structure):
                own = model(pixel_values=rows).logits.log_softmax(-1)
            expected = float((dense.exp() * (dense - own)).sum(-1).mean())
            assert objective(structure) == pytest.approx(expected, rel=1e-4, abs=1e-6)
            objective.commit(structure)
            assert objective(structure) == pytest.approx(expected, rel=1e-4, abs=1e-6)
        with pytest.raises(UnsupportedModelError, match="--objective kl"):
            CalibrationObjective(prunable, rows, loss="nll")


@structures
@families
def test_masked_equals_sliced_equals_written(family: str, structure: str, tmp_path: Path) -> None:
    model = pictures.tiny_classifier(family)
    prunable = Prunable.of(model)
    wanted = STRUCTURES[structure](prunable.anatomy)
    plan = plan_for(model, wanted, seed=2)
    pruned = apply_plan(model, plan)
    before = _logits(pruned)
    own_code = _needs_own_code(spec_for(model.config), wanted, prunable.anatomy)
    assert own_code or structure != "layers differ"
    assert type(pruned).__name__ == f"{'Pruned' * own_code}{spec_for(model.config).class_name}"
    assert sum(weight.numel() for weight in pruned.parameters()) == prunable.costs.parameters(wanted)

    folder = save(tmp_path / "out", pruned, pictures.processor(), plan=plan, report={}, card="")
    theirs = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=own_code)
    assert torch.equal(_logits(load(folder)), before) and torch.equal(_logits(theirs), before)
    assert list(folder.glob("*.py")) == [folder / f"modeling_multipruner_{model.config.model_type}.py"] * own_code
    assert sizes_in(pruned.config.to_dict(), spec_for(model.config))[1].blocks  # what is written can be read
    assert AutoImageProcessor.from_pretrained(folder).size == pictures.processor().size
    check_reopened(folder, pruned, pictures.pixels(3))
    with torch.no_grad():
        pruned.get_parameter("classifier.weight").mul_(1.5)
    with pytest.raises(OutputError, match="differs"):
        check_reopened(folder, pruned, pictures.pixels(3))


@families
def test_leading_slices_are_what_a_plan_leaves(family: str) -> None:
    model = pictures.tiny_classifier(family)
    prunable = Prunable.of(model)
    wanted = _free(prunable.anatomy)
    plan = plan_for(model, wanted, seed=4)
    ranking = random_ranking(prunable.anatomy, 4)
    with prunable.in_order(ranking), prunable.applied(wanted):
        masked = _logits(model)
    assert torch.allclose(masked, _logits(apply_plan(model, plan)), atol=1e-5)


@families
def test_repair_lowers_the_loss(family: str) -> None:
    model = pictures.tiny_classifier(family)
    prunable, rows = Prunable.of(model), pictures.pixels(64, seed=5)
    statistics = gather(prunable, rows)
    assert statistics.tokens == 64 * positions_of(prunable, rows)
    ranking = rank("second-order", prunable, statistics)
    wanted = _alike(prunable.anatomy)
    losses = []
    for repair in (None, Repair(prunable, statistics, ranking)):
        with prunable.in_order(ranking, repair):
            losses.append(CalibrationObjective(prunable, pictures.pixels(32, seed=6), loss="kl")(wanted))
    assert losses[1] < losses[0]


@families
def test_sensitivities_are_those_of_the_positions_that_are_read(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They foretell what small errors at all positions behind the last block do to the divergence."""
    monkeypatch.setattr(energies, "QUANTILE", 1.0)  # what is cut off of few large ones is missed in the mean
    prunable, rows = Prunable.of(pictures.tiny_classifier(family)), pictures.pixels(256)
    found = sensitivities(prunable, rows)
    assert len(found) == len(prunable.anatomy) and min(found) > 0
    with torch.no_grad():
        state = _last_state(prunable, rows)
        state = state.repeat(8, 1, 1)
        error = 0.05 * torch.randn(state.shape, generator=torch.Generator().manual_seed(3))
        dense, own = (prunable.head(prunable.normed(each)).log_softmax(-1) for each in (state, state + error))
        divergence = float((dense.exp() * (dense - own)).sum(-1).mean())
        told = found[-1] * float(error.square().sum(-1).mean())
    assert told == pytest.approx(FACTOR * divergence, rel=0.15)


def _folded(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with its layer scales in the output projections."""
    folded = copy.deepcopy(model)
    prunable = Prunable.of(folded)
    with torch.no_grad():
        for block in range(len(prunable.anatomy)):
            scale: Any = gain_of(prunable.block_spec(block), prunable.layer_of(block))
            output: Any = prunable.dense_output(block)
            output.weight.mul_(scale[:, None])
            output.bias.mul_(scale)
            scale.fill_(1.0)
    return folded


@pytest.mark.parametrize("family", ["dinov2", "dinov2-gated"])
def test_layer_scales_count_as_if_they_were_in_the_projections(family: str) -> None:
    """Orders, errors, and the repair of what adds up are those of the model that has them there."""
    model = pictures.tiny_classifier(family)
    scale: Any = gain_of(Prunable.of(model).block_spec(0), Prunable.of(model).layer_of(0))
    with torch.no_grad():
        scale.mul_(torch.linspace(0.1, 3.0, len(scale)))
    rows, found = pictures.pixels(64, seed=5), []
    assert torch.allclose(_logits(model), _logits(_folded(model)), atol=1e-4)
    for each in (Prunable.of(model), Prunable.of(_folded(model))):
        statistics = gather(each, rows)
        ranking = rank("second-order", each, statistics)
        repair = Repair(each, statistics, ranking)
        with each.in_order(ranking, repair):
            errors = [repair.errors(block, [(1, 1), (3, 1)] if block % 2 == 0 else [(8,), (20,)]) for block in (0, 1)]
            outputs = accumulated(each, _alike(each.anatomy), rows)
            gains = [torch.as_tensor(gain_of(each.block_spec(b), each.layer_of(b))) for b in outputs]
            given = [gain.detach()[:, None] * outputs[b].weight for b, gain in zip(outputs, gains, strict=True)]
        found.append((ranking, torch.tensor(errors), given))
    (ranking, errors, given), (folded, others, theirs) = found
    assert ranking == folded and torch.allclose(errors, others, rtol=1e-3)
    assert len(given) == len(theirs) == 6
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(given, theirs, strict=True))


def test_where_a_layer_scale_is_zero_the_repair_is_finite() -> None:
    prunable, rows = Prunable.of(pictures.tiny_classifier("dinov2")), pictures.pixels(64)
    with torch.no_grad():
        for block in range(len(prunable.anatomy)):
            scale: Any = gain_of(prunable.block_spec(block), prunable.layer_of(block))
            scale[::5] = 0.0
    with prunable.in_order(random_ranking(prunable.anatomy, 3)):
        outputs = accumulated(prunable, _alike(prunable.anatomy), rows)
    assert all(bool(output.weight.isfinite().all()) for output in outputs.values())


@families
def test_a_rehearsal_finds_nothing_and_the_stream_stays(family: str, tmp_path: Path) -> None:
    folder = pictures.write_classifier(tmp_path / "dense", family)
    model = pictures.tiny_classifier(family)
    for uniform in (False, True):
        with Rehearsal(model, pictures.processor(), str(folder), None, uniform=uniform):
            pass
    with pytest.raises(UnsupportedModelError, match="pictures"):
        check_narrower(spec_for(model.config))
    assert anatomy_of(model.config).layers == 3
