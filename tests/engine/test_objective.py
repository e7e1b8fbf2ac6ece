"""The fast objective gives the plain one's answers, in every family; costs are what is counted."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch

from multipruner.checkpoint.weights import pruned_weights
from multipruner.core.errors import NumericsError, UnsupportedModelError
from multipruner.core.plan import PruningPlan
from multipruner.core.structure import GONE
from multipruner.engine.objective import CalibrationObjective, PlainObjective
from multipruner.engine.prunable import Prunable
from multipruner.engine.token_losses import label_weights
from tests.support.layers import structure_of
from tests.support.tiny import VARIANTS, random_ids, random_ranking, random_structure, tiny_model

EOS = 2


def _ids() -> torch.Tensor:
    ids = random_ids(batch=5, length=14)
    ids[1, 4] = ids[3, 9] = ids[3, 10] = EOS
    return ids


@pytest.mark.parametrize("variant", VARIANTS)
def test_reusing_objective_equals_the_plain_one(variant: str) -> None:
    prunable = Prunable.of(tiny_model(**VARIANTS[variant]))
    with prunable.in_order(random_ranking(prunable.anatomy, 3)):
        plain = PlainObjective(prunable, _ids(), ignore_id=EOS)
        fast = CalibrationObjective(prunable, _ids(), ignore_id=EOS, batch_size=2)
        for seed in range(8):
            structure = random_structure(prunable.anatomy, seed)
            expected = plain(structure)
            assert fast(structure) == pytest.approx(expected, rel=1e-5)
            fast.commit(structure)
            assert fast(structure) == pytest.approx(expected, rel=1e-5), "after its states were moved"


@pytest.mark.parametrize("loss", ["nll", "kl"])
def test_logits_in_chunks_change_nothing(loss: Literal["nll", "kl"], monkeypatch: pytest.MonkeyPatch) -> None:
    """16 tokens at a time, the last time fewer, against all of a batch's at once."""
    prunable = Prunable.of(tiny_model("llama"))
    structures = [random_structure(prunable.anatomy, seed) for seed in range(4)]
    whole = CalibrationObjective(prunable, _ids(), ignore_id=EOS, batch_size=3, loss=loss)
    expected = [whole(structure) for structure in structures]
    if loss == "nll":
        plain = PlainObjective(prunable, _ids(), ignore_id=EOS)
        assert expected == pytest.approx([plain(structure) for structure in structures], rel=1e-5)
    monkeypatch.setattr("multipruner.engine.token_losses._LOGIT_BYTES", 0)
    chunks = CalibrationObjective(prunable, _ids(), ignore_id=EOS, batch_size=3, loss=loss)
    assert chunks._chunk == 16
    assert [chunks(structure) for structure in structures] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("state_bytes", [0, 1 << 30])
def test_argmin_abandons_without_changing_the_choice(state_bytes: int) -> None:
    prunable = Prunable.of(tiny_model("llama"))
    structures = [random_structure(prunable.anatomy, seed) for seed in range(24)]
    fast = CalibrationObjective(prunable, _ids(), batch_size=2, state_bytes=state_bytes)
    plain = PlainObjective(prunable, _ids())
    seen: list[tuple[int, int]] = []
    choice, expected = fast.argmin(structures, lambda *at: seen.append(at)), plain.argmin(structures)
    assert (choice.best, choice.runner_up) == (expected.best, expected.runner_up)
    assert choice.loss == pytest.approx(expected.loss, rel=1e-5)
    assert choice.runner_up_loss == pytest.approx(expected.runner_up_loss, rel=1e-5)
    assert seen[-1][0] == seen[-1][1] == len(seen)


def test_prefix_reuse_saves_work() -> None:
    prunable = Prunable.of(tiny_model("llama", layers=6))
    changed = prunable.dense.replace(prunable.anatomy.at(5, "mlp"), GONE)
    fast = CalibrationObjective(prunable, _ids())
    fast(prunable.dense)
    before = fast.work.token_blocks
    fast(changed)
    assert fast.work.token_blocks == before, "only the output head runs when the last block is what goes"


def test_dense_loss_is_the_stock_models() -> None:
    model = tiny_model("llama", tied=True)
    ids = random_ids(batch=3, length=10)
    with torch.no_grad():
        expected = float(model(input_ids=ids, labels=ids).loss)
    assert CalibrationObjective(Prunable.of(model), ids)(Prunable.of(model).dense) == pytest.approx(expected, rel=1e-5)


def test_labels_to_ignore_are_not_scored() -> None:
    ids = torch.tensor([[5, 6, EOS, 7], [5, EOS, EOS, EOS]])
    assert label_weights(ids, EOS).tolist() == [[0.5, 0.0, 0.5], [0.0, 0.0, 0.0]]
    assert label_weights(ids, None)[0].tolist() == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_computed_are_parameters_left(variant: str) -> None:
    model = tiny_model(**VARIANTS[variant])
    prunable = Prunable.of(model)
    assert prunable.costs.parameters(prunable.dense) == sum(p.numel() for p in model.parameters())
    parameters = dict(model.named_parameters())
    for seed in range(6):
        structure = random_structure(prunable.anatomy, seed)
        plan = PruningPlan.from_structure(
            structure, random_ranking(prunable.anatomy, seed), prunable.anatomy, model="tiny", model_type="x"
        )
        left = pruned_weights(parameters, plan, prunable.spec, prunable.anatomy.constants)
        assert sum(tensor.numel() for tensor in left.values()) == prunable.costs.parameters(structure)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_ranked_model_is_restored_to_the_bit(variant: str) -> None:
    model = tiny_model(**VARIANTS[variant])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prunable = Prunable.of(model)
    with pytest.raises(KeyboardInterrupt), prunable.in_order(random_ranking(prunable.anatomy, 5)):
        assert any(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        raise KeyboardInterrupt
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_model_is_restored_after_a_structure_was_applied() -> None:
    model = tiny_model("qwen2")
    prunable, ids = Prunable.of(model), random_ids()
    with torch.no_grad():
        before = model(input_ids=ids).logits
        with pytest.raises(ZeroDivisionError), prunable.applied(random_structure(prunable.anatomy, 2)):
            assert not torch.allclose(before, model(input_ids=ids).logits)
            raise ZeroDivisionError
        assert torch.equal(before, model(input_ids=ids).logits)


def test_nan_weights_are_an_error_that_names_the_mend() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter("model.embed_tokens.weight").fill_(math.nan)
    prunable = Prunable.of(model)
    with pytest.raises(NumericsError, match="not finite"):
        CalibrationObjective(prunable, _ids())(prunable.dense)


def test_unknown_family_lists_the_known() -> None:
    model = tiny_model("llama")
    vars(model.config)["model_type"] = "lama"
    with pytest.raises(UnsupportedModelError, match=r"did you mean 'llama'.*mistral.*qwen2"):
        Prunable.of(model)


def test_flops_and_bytes() -> None:
    prunable = Prunable.of(tiny_model("llama", layers=1))
    costs, dense = prunable.costs, prunable.dense
    half = structure_of((2, 1, 20))
    assert costs.kv_bytes_per_token(dense) == 2 * 2 * 16 * 4
    assert costs.kv_bytes_per_token(half) * 2 == costs.kv_bytes_per_token(dense)
    assert costs.weight_bytes(dense) == 4 * costs.parameters(dense)
    head = 2 * 48 * 97
    assert (costs.flops_per_token(dense) - head) == 2 * (costs.flops_per_token(half) - head)
    assert costs.flops_per_token(dense, context=10) - costs.flops_per_token(dense) == 2 * 2 * 10 * 4 * 16
