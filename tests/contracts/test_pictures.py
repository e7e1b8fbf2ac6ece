"""What holds for every image classifier with a row: masked equals sliced, disk equals memory, costs are counts."""

from __future__ import annotations

from pathlib import Path

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
from multipruner.core.families import FAMILIES, anatomy_of, first_row, spec_for
from multipruner.core.families.vision import CLASSIFIERS
from multipruner.core.structure import GONE, Anatomy, Structure
from multipruner.engine.layer_calls import State, stream_of
from multipruner.engine.moments import gather, positions_of
from multipruner.engine.objective import CalibrationObjective
from multipruner.engine.prunable import Prunable
from multipruner.importance.energies import FACTOR, sensitivities
from multipruner.importance.table import rank
from multipruner.repair.scoring import Repair
from tests.support import pictures
from tests.support.tiny import plan_for, random_ranking, random_structure

families = pytest.mark.parametrize("family", CLASSIFIERS)


def _free(anatomy: Anatomy) -> Structure:
    """Layers that differ: heads and channels of their own, a block gone, a layer gone."""
    dense = anatomy.dense.replace(anatomy.at(0, "attention"), (2, 1)).replace(anatomy.at(0, "mlp"), (31,))
    for layer, kind in ((1, "attention"), (2, "attention"), (2, "mlp")):
        dense = dense.replace(anatomy.at(layer, kind), GONE)
    return dense


def _alike(anatomy: Anatomy) -> Structure:
    return Structure(tuple((3, 1) if place.kind == "attention" else (24,) for place in anatomy))


STRUCTURES = {"layers differ": _free, "layers alike": _alike}
structures = pytest.mark.parametrize("structure", STRUCTURES)


@torch.no_grad()
def _logits(model: PreTrainedModel) -> torch.Tensor:
    return model(pixel_values=pictures.pixels()).logits


def test_rows_of_text_and_of_pictures_are_apart() -> None:
    assert not set(CLASSIFIERS) & set(FAMILIES)
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
        found = prunable.head(prunable.normed(state[:, 0]))
    assert torch.allclose(found, _logits(model), atol=1e-5)
    assert positions_of(prunable, rows) == state.shape[1] > 16


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
    own_code = structure == "layers differ"
    assert type(pruned).__name__ == f"{'Pruned' * own_code}{spec_for(model.config).class_name}"
    assert sum(weight.numel() for weight in pruned.parameters()) == prunable.costs.parameters(wanted)

    folder = save(tmp_path / "out", pruned, pictures.processor(), plan=plan, report={}, card="")
    theirs = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=own_code)
    assert torch.equal(_logits(load(folder)), before) and torch.equal(_logits(theirs), before)
    assert list(folder.glob("*.py")) == [folder / f"modeling_multipruner_{family}.py"] * own_code
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
def test_sensitivities_are_those_of_the_position_that_is_scored(family: str) -> None:
    """They foretell what small errors at all positions behind the last block do to the divergence."""
    prunable, rows = Prunable.of(pictures.tiny_classifier(family)), pictures.pixels(48)
    found = sensitivities(prunable, rows)
    assert len(found) == len(prunable.anatomy) and min(found) > 0
    with torch.no_grad():
        state = _last_state(prunable, rows)
        state = state.repeat(40, 1, 1)
        error = 0.05 * torch.randn(state.shape, generator=torch.Generator().manual_seed(3))
        dense, own = (prunable.head(prunable.normed(each)[:, 0]).log_softmax(-1) for each in (state, state + error))
        divergence = float((dense.exp() * (dense - own)).sum(-1).mean())
        told = found[-1] * float(error.square().sum(-1).mean())
    assert told == pytest.approx(FACTOR * divergence, rel=0.25)


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
