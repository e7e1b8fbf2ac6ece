"""Laws of orders and closed-form repair, and that a repaired model is what its scores were of."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from multipruner.checkpoint.cut import apply_plan
from multipruner.config.choices import IMPORTANCES
from multipruner.core.errors import ConfigError, NumericsError, UnsupportedModelError
from multipruner.core.plan import PruningPlan
from multipruner.core.structure import GONE, Structure
from multipruner.engine.cutting import Projection
from multipruner.engine.layer_calls import stream_of
from multipruner.engine.moments import Moments, add_moments, gather, mirrored, stream
from multipruner.engine.objective import CalibrationObjective, PlainObjective
from multipruner.engine.prunable import Prunable
from multipruner.engine.token_losses import DivergenceFromDense, Scores
from multipruner.importance.second_order import elimination_order
from multipruner.importance.table import rank
from multipruner.repair.columns import repaired_columns
from multipruner.repair.scoring import Repair
from multipruner.repair.stream import RIDGES, Fit, _best_ridges, _Equations, accumulated
from multipruner.repair.write import repair_outputs, write_outputs
from tests.support.layers import halved
from tests.support.tiny import MORE, VARIANTS, random_ids, random_structure, tiny_model

seeds = st.integers(0, 10**6)


def _problem(seed: int, columns: int = 12, rows: int = 7, tokens: int = 40) -> tuple[torch.Tensor, ...]:
    chance = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=chance)
    x = torch.randn(tokens, columns, generator=chance) @ mixing
    weight = torch.randn(rows, columns, generator=chance)
    kept = torch.randperm(columns, generator=chance)[: int(torch.randint(1, columns, (1,), generator=chance))]
    return weight, x, kept.sort().values


def _error(weight: torch.Tensor, x: torch.Tensor, kept: torch.Tensor, columns: torch.Tensor) -> float:
    return float((x @ weight.T - x[:, kept] @ columns.T).square().sum())


def _nll(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """By the stock forward, full logits."""
    with torch.no_grad():
        logs = model(input_ids=ids).logits[:, :-1].flatten(0, 1).log_softmax(-1)
    return float(-logs.gather(1, ids[:, 1:].reshape(-1, 1)).mean())


@given(seeds)
def test_all_columns_kept_is_the_identity(seed: int) -> None:
    weight, x, _ = _problem(seed)
    everything = torch.arange(weight.shape[1])
    assert torch.equal(repaired_columns(weight, x.T @ x, everything, 1e-2), weight)


@given(seeds)
def test_a_large_ridge_is_plain_slicing(seed: int) -> None:
    weight, x, kept = _problem(seed)
    assert torch.allclose(repaired_columns(weight, x.T @ x / len(x), kept, 1e8), weight[:, kept], atol=1e-4)


@given(seeds, st.sampled_from([1e-3, 1e-2, 1e-1, 1.0]))
def test_the_error_on_calibration_text_never_grows(seed: int, ridge: float) -> None:
    weight, x, kept = _problem(seed)
    repaired = repaired_columns(weight, x.T @ x / len(x), kept, ridge)
    plain = _error(weight, x, kept, weight[:, kept])
    assert _error(weight, x, kept, repaired) <= plain * (1 + 1e-4)


@given(seeds)
def test_the_repair_is_the_least_squares_solution(seed: int) -> None:
    weight, x, kept = _problem(seed)
    gram = x.T @ x / len(x)
    r = 1e-2 * float(gram.diagonal().mean())
    moments = gram.double()
    among = moments[kept][:, kept] + r * torch.eye(len(kept)).double()
    by_formula = ((weight.double() @ moments)[:, kept] + r * weight[:, kept].double()) @ torch.linalg.inv(among)
    assert torch.allclose(repaired_columns(weight, gram, kept, 1e-2).double(), by_formula, rtol=1e-2, atol=1e-2)


def test_statistics_that_are_not_finite_are_refused() -> None:
    weight, x, kept = _problem(3)
    x[0, 0] = float("nan")
    with pytest.raises(NumericsError, match="NaN"):
        repaired_columns(weight, x.T @ x, kept, 1e-2)
    with pytest.raises(NumericsError, match="NaN"):
        elimination_order(weight, x.T @ x, groups=12)


@given(seeds, st.sampled_from([1, 2, 3]))
def test_orthogonal_inputs_give_the_order_of_the_norms(seed: int, size: int) -> None:
    weight = torch.randn(7, 12, generator=torch.Generator().manual_seed(seed))
    norms = weight.square().sum(dim=0).reshape(-1, size).sum(dim=1)
    order = elimination_order(weight, torch.eye(12), groups=12 // size)
    assert list(order) == norms.argsort(descending=True).tolist()


@pytest.mark.parametrize("name", IMPORTANCES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_importance_orders_everything_once(variant: str, name: str) -> None:
    prunable = Prunable.of(tiny_model(**VARIANTS[variant]))
    statistics = gather(prunable, random_ids(batch=6, length=20))
    ranking = rank(name, prunable, statistics)
    for block, place in zip(ranking.blocks, prunable.anatomy, strict=True):
        first, *inside = block.axes
        assert sorted(first) == list(range(place.dense[0]))
        for rows, most in zip(inside, place.dense[1:], strict=True):
            assert len(rows) == place.dense[0]
            assert all(sorted(row) == list(range(most)) for row in rows)  # type: ignore[arg-type]
    if name in ("activation", "second-order"):
        with pytest.raises(ConfigError, match="moments"):
            rank(name, prunable)


@pytest.mark.parametrize("batch_tokens", [4096, 32])
def test_streamed_statistics_are_the_moments_of_what_the_stock_model_computes(
    batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one batch, and in three of different sizes."""
    monkeypatch.setattr("multipruner.engine.moments.BATCH_TOKENS", batch_tokens)
    prunable = Prunable.of(tiny_model("llama"))
    ids, seen = random_ids(batch=5, length=16), []
    output = prunable.layers[2].get_submodule("mlp.down_proj")
    hook = output.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        prunable.model(input_ids=ids)
    hook.remove()
    x = torch.cat(seen)
    moments = {block: (found.second(), found.first()) for block, found in stream(prunable, ids)
               if isinstance(found, Moments)}  # fmt: skip
    gram, mean = moments[prunable.anatomy.at(2, "mlp")]
    assert torch.allclose(gram, x.T @ x / len(x), rtol=1e-4, atol=1e-7)
    assert torch.allclose(mean, x.mean(dim=0), rtol=1e-4, atol=1e-6)
    assert not output._forward_pre_hooks


def test_products_in_blocks_are_the_product() -> None:
    chance = torch.Generator().manual_seed(0)
    parts, total = [torch.randn(rows, 700, generator=chance) for rows in (50, 3)], torch.zeros(700, 700)
    for rows in parts:
        add_moments(total, rows)
    x = torch.cat(parts)
    assert torch.allclose(mirrored(total), x.T @ x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ridge", [1e-2, 1.0])
@pytest.mark.parametrize("variant", VARIANTS)
def test_repair_finds_its_layer_where_whole_layers_are_gone(variant: str, ridge: float) -> None:
    """Scored, written by the repair of single blocks, and written by the one of all blocks."""
    model = tiny_model(**{**VARIANTS[variant], "layers": 4})
    prunable = Prunable.of(model)
    text, ids = random_ids(batch=24, length=20), random_ids(batch=4, length=14)
    statistics = gather(prunable, text)
    ranking = rank("second-order", prunable, statistics)
    structure, family = halved(prunable.anatomy), prunable.spec.model_type
    for block in prunable.anatomy.of_layer(1):
        structure = structure.replace(block, GONE)
    plan = PruningPlan.from_structure(structure, ranking, prunable.anatomy, model="m", model_type=family)

    with prunable.in_order(ranking, Repair(prunable, statistics, ranking, ridge)):
        scored = CalibrationObjective(prunable, ids)(structure)
        outputs = accumulated(prunable, structure, text)
        with prunable.with_outputs(outputs):
            scored_all = CalibrationObjective(prunable, ids)(structure)
    single, everything = apply_plan(model, plan), apply_plan(model, plan)
    assert repair_outputs(single, prunable, plan, statistics, ridge) == 6
    write_outputs(everything, prunable, plan, ranking, outputs)
    assert scored == pytest.approx(_nll(single, ids), rel=1e-4)
    assert scored_all == pytest.approx(_nll(everything, ids), rel=1e-4)
    other = apply_plan(model, plan)
    repair_outputs(other, prunable, plan, statistics, 10 * ridge)
    assert scored != pytest.approx(_nll(other, ids), rel=1e-5), "the ridge counts"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["nll", "kl"])
def test_scores_with_repair_are_those_of_the_model_that_is_written(variant: str, name: str) -> None:
    model = tiny_model(**VARIANTS[variant])
    prunable = Prunable.of(model)
    ids = random_ids(batch=4, length=14)
    statistics = gather(prunable, random_ids(batch=6, length=20))
    ranking = rank("second-order", prunable, statistics)
    structure = random_structure(prunable.anatomy, 4)
    with torch.no_grad():
        dense = model(input_ids=ids).logits[:, :-1].flatten(0, 1).log_softmax(-1)
    with prunable.in_order(ranking, Repair(prunable, statistics, ranking)):
        if name == "kl" and type(prunable.head) is not torch.nn.Linear:
            with pytest.raises(UnsupportedModelError, match="nll"):
                CalibrationObjective(prunable, ids, loss="kl")
            return
        objective = CalibrationObjective(prunable, ids, batch_size=3, loss="nll" if name == "nll" else "kl")
        loss = objective(structure)
    plan = PruningPlan.from_structure(
        structure, ranking, prunable.anatomy, model="m", model_type=prunable.spec.model_type
    )
    pruned = apply_plan(model, plan)
    assert repair_outputs(pruned, prunable, plan, statistics, 1e-2) > 0
    with torch.no_grad():
        logs = pruned(input_ids=ids).logits[:, :-1].flatten(0, 1).log_softmax(-1)
    expected = -logs.gather(1, ids[:, 1:].reshape(-1, 1)).mean()
    if name == "kl":
        expected = (dense.exp() * (dense - logs)).sum(dim=1).mean()
    assert loss == pytest.approx(float(expected), rel=1e-3, abs=1e-5)


def test_repair_lowers_the_divergence_from_the_dense_model() -> None:
    prunable = Prunable.of(tiny_model("llama"))
    ids = random_ids(batch=16, length=24)
    statistics = gather(prunable, ids)
    ranking = rank("second-order", prunable, statistics)
    structure = halved(prunable.anatomy, "mlp")
    with prunable.in_order(ranking):
        plain = CalibrationObjective(prunable, ids, loss="kl")(structure)
    with prunable.in_order(ranking, Repair(prunable, statistics, ranking)):
        repaired = CalibrationObjective(prunable, ids, loss="kl")(structure)
    assert 0 < repaired < plain


def test_the_divergence_of_the_dense_model_from_itself_is_nothing() -> None:
    prunable = Prunable.of(tiny_model("llama"))
    ids = random_ids(batch=4, length=14)
    objective = CalibrationObjective(prunable, ids, loss="kl", batch_size=2, state_bytes=0)
    assert objective(prunable.dense) == pytest.approx(0, abs=1e-6)
    assert PlainObjective(prunable, ids)(prunable.dense) > 0


@given(seeds)
def test_divergence_without_vocabulary_sized_memory_is_the_divergence(seed: int) -> None:
    torch.manual_seed(seed)
    head = torch.nn.Linear(6, 30)
    dense, other = torch.randn(9, 6), torch.randn(9, 6)
    with torch.no_grad():
        loss = DivergenceFromDense.of(head, dense, chunk=4)(Scores(head), other, slice(0, 9))
        p, q = head(dense).log_softmax(-1), head(other).log_softmax(-1)
    assert torch.allclose(loss, (p.exp() * (p - q)).sum(dim=1), atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_repair_of_all_blocks_is_what_the_written_model_computes(variant: str) -> None:
    model = tiny_model(**VARIANTS[variant])
    prunable = Prunable.of(model)
    text, ids = random_ids(batch=24, length=20), random_ids(batch=4, length=14)
    statistics = gather(prunable, text)
    ranking = rank("second-order", prunable, statistics)
    structure, family = random_structure(prunable.anatomy, 4), prunable.spec.model_type
    plan = PruningPlan.from_structure(structure, ranking, prunable.anatomy, model="m", model_type=family)
    pruned = apply_plan(model, plan)
    with prunable.in_order(ranking, Repair(prunable, statistics, ranking)):
        outputs = accumulated(prunable, structure, text)
        with prunable.with_outputs(outputs):
            loss = CalibrationObjective(prunable, ids)(structure)
        plain = CalibrationObjective(prunable, ids)(structure)
    write_outputs(pruned, prunable, plan, ranking, outputs)
    with torch.no_grad():
        logs = pruned(input_ids=ids).logits[:, :-1].flatten(0, 1).log_softmax(-1)
    assert loss == pytest.approx(float(-logs.gather(1, ids[:, 1:].reshape(-1, 1)).mean()), rel=1e-4)
    assert loss != pytest.approx(plain, rel=1e-6)


def test_every_row_takes_the_ridge_that_held_out_text_prefers(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first narrowed block, whose inputs do not depend on other choices."""
    monkeypatch.setattr("multipruner.engine.moments.BATCH_TOKENS", 40)
    prunable = Prunable.of(tiny_model("llama"))
    text, mlp = random_ids(batch=24, length=20), prunable.anatomy.at(0, "mlp")
    ranking = rank("second-order", prunable, gather(prunable, text))
    structure = prunable.dense.replace(mlp, (20,))
    with prunable.in_order(ranking):
        fixed = [accumulated(prunable, structure, text, ridge=ridge)[mlp].weight for ridge in RIDGES]
        sliced = Projection.of(prunable.output_of(mlp, structure[mlp])).weight
        chosen = accumulated(prunable, structure, text, ridge=None)[mlp].weight
        near = torch.stack([(chosen - one).abs().amax(dim=1) for one in (*fixed, sliced)])
    assert bool((near.min(dim=0).values < 1e-5).all())
    assert len(set(near.argmin(dim=0).tolist())) > 1, "rows differ in what they prefer"


def test_rows_without_anything_to_learn_stay_as_they_are() -> None:
    torch.manual_seed(0)
    x, noise, weight = torch.randn(400, 6), torch.randn(400, 3), torch.zeros(3, 6)
    target = noise + x @ torch.tensor([[1.0] * 6, [0.0] * 6, [0.0] * 6]).T
    parts = [_Equations(rows.T @ rows, rows.T @ wanted) for rows, wanted in
             ((x[:20], target[:20]), (x[20:], target[20:]))]  # fmt: skip
    first, *others = _best_ridges(parts[0], parts[1], weight, RIDGES).tolist()
    assert first < len(RIDGES) and others == [len(RIDGES)] * 2


@pytest.mark.parametrize("variant", ["llama", "llama-biased"])
def test_the_repair_of_all_blocks_leaves_what_has_lost_nothing_as_it_is(variant: str) -> None:
    """A channel that gave nothing leaves the second layer; everything after it has nothing to make good."""
    model = tiny_model(**VARIANTS[variant])
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[:, 5] = 0
    prunable = Prunable.of(model)
    text = random_ids(batch=24, length=20)
    ranking = rank("second-order", prunable, gather(prunable, text))
    mlp = prunable.anatomy.at(1, "mlp")
    assert ranking.blocks[mlp].axes[0][-1] == 5
    structure = prunable.dense.replace(mlp, (39,))
    with prunable.in_order(ranking):
        assert accumulated(prunable, prunable.dense, text) == {}, "nothing is refitted before anything is lost"
        outputs = accumulated(prunable, structure, text)
        assert min(outputs) == mlp
        for block, output in outputs.items():
            whole = Projection.of(prunable.output_of(block, structure[block]))
            assert torch.allclose(output.weight, whole.weight, atol=1e-4)
            assert (output.bias is None) == (whole.bias is None)
            if output.bias is not None and whole.bias is not None:
                assert torch.allclose(output.bias, whole.bias, atol=1e-4)


@pytest.mark.parametrize("variant", ["llama", "cohere"])
def test_the_repair_of_all_blocks_brings_the_stream_back(variant: str) -> None:
    """On the text it is fitted to, the last hidden states come nearer to the dense model's, side by side or not."""
    model = tiny_model(**{**VARIANTS, **MORE}[variant])
    prunable = Prunable.of(model)
    text = random_ids(batch=24, length=20)
    ranking = rank("second-order", prunable, gather(prunable, text))
    structure = halved(prunable.anatomy, "mlp")

    def through(structure: Structure) -> torch.Tensor:
        inputs = prunable.inputs(text)
        hidden = inputs.hidden
        for block, size in enumerate(structure):
            hidden = prunable.block(hidden, inputs, block, size)
        return stream_of(hidden)

    ends: list[tuple[torch.Tensor, torch.Tensor]] = []
    with prunable.in_order(ranking), torch.no_grad():
        dense, before = through(prunable.dense), through(structure)
        outputs = accumulated(prunable, structure, text, ridge=1e-3, ends=lambda *states: ends.append(states))
        with prunable.with_outputs(outputs):
            after = through(structure)
    assert torch.allclose(torch.cat([one for one, _ in ends]), dense, atol=1e-4)
    assert torch.allclose(torch.cat([one for _, one in ends]), after, atol=1e-3)
    assert (after - dense).square().sum() < 0.9 * (before - dense).square().sum()


def test_every_block_takes_on_its_share_of_what_was_lost_before() -> None:
    """The second refitted block's equations are linear in the share; the first has nothing to take on."""
    prunable = Prunable.of(tiny_model("llama"))
    text = random_ids(batch=24, length=20)
    ranking = rank("second-order", prunable, gather(prunable, text))
    first, second = prunable.anatomy.at(0, "mlp"), prunable.anatomy.at(1, "attention")
    structure = prunable.dense.replace(first, (20,))
    with prunable.in_order(ranking):
        none, half, whole = (accumulated(prunable, structure, text, share=share) for share in (0.0, 0.5, 1.0))
    assert torch.equal(none[first].weight, whole[first].weight)
    low, middle, high = (outputs[second].weight for outputs in (none, half, whole))
    assert (high - low).abs().max() > 1e-2
    assert torch.allclose(middle, (low + high) / 2, atol=1e-4)


def _text(seed: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [1, tokens, 6] and what they should give, [1, tokens, 5], some rows noisier than others."""
    chance = torch.Generator().manual_seed(seed)
    x = torch.randn(1, tokens, 6, generator=chance)
    noise = torch.randn(1, tokens, 5, generator=chance) * torch.tensor([0.01, 0.3, 1.0, 3.0, 10.0])
    return x, x @ torch.ones(6, 5) * 0.5 + noise


@given(seeds)
def test_rows_are_refitted_with_the_ridge_that_tells_held_out_text_best(seed: int) -> None:
    """Against errors that are computed token by token."""
    fit, weight = Fit(), torch.zeros(5, 6)
    parts = [_text(seed + number, 8) for number in range(8)]
    for number, (x, target) in enumerate(parts):
        fit.add(x, target, held_out=number % 4 == 3)

    def solved(numbers: list[int], ridge: float) -> torch.Tensor:
        x = torch.cat([parts[number][0][0] for number in numbers]).double()
        target = torch.cat([parts[number][1][0] for number in numbers]).double()
        gram = x.T @ x
        return torch.linalg.solve(gram + ridge * gram.diagonal().mean() * torch.eye(6), x.T @ target).T

    fitted, judge = [0, 1, 2, 4, 5, 6], [3, 7]
    x = torch.cat([parts[number][0][0] for number in judge]).double()
    target = torch.cat([parts[number][1][0] for number in judge]).double()
    candidates = [*(solved(fitted, ridge) for ridge in RIDGES), weight.double()]
    errors = torch.stack([(target - x @ one.T).square().sum(dim=0) for one in candidates])
    finals = [*(solved(list(range(8)), ridge) for ridge in RIDGES), weight.double()]
    found, close = fit.solve(weight, None).double(), errors <= errors.min(dim=0).values * (1 + 1e-4)
    for row in range(5):
        near = [torch.allclose(found[row], finals[number][row], atol=1e-4) for number in range(len(finals))]
        assert any(near[number] for number in range(len(finals)) if close[number, row])


@pytest.mark.parametrize("ridge", [0.03, 3.0])
def test_a_ridge_is_relative_to_the_inputs(ridge: float) -> None:
    x, target = (part[0] for part in _text(0, 40))
    once = _Equations(x.T @ x, x.T @ target)
    scaled = _Equations(100 * once.moments, 100 * once.target)
    weight = torch.ones(5, 6)
    change = once.change(once.missing(weight), ridge)
    assert torch.allclose(scaled.change(scaled.missing(weight), ridge), change, atol=1e-5)
    assert not torch.allclose(once.change(once.missing(weight), 2 * ridge), change, atol=1e-3)
