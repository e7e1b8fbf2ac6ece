"""Repair where output projections have a bias: laws of the fit of columns and bias, and of the bias alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import multipruner
from multipruner.checkpoint.cut import apply_plan
from multipruner.commands.main import main
from multipruner.commands.search import options_of
from multipruner.config.recipe import Recipe
from multipruner.core.errors import ConfigError
from multipruner.core.plan import PruningPlan
from multipruner.engine.cutting import Projection
from multipruner.engine.layer_calls import stream_of
from multipruner.engine.moments import Statistics, gather
from multipruner.engine.objective import CalibrationObjective
from multipruner.engine.prunable import Prunable
from multipruner.importance.table import rank
from multipruner.repair.columns import How, repaired, repaired_columns
from multipruner.repair.scoring import Repair, unrepaired
from multipruner.repair.stream import accumulated
from multipruner.repair.write import repair_outputs, write_outputs
from multipruner.sources.calibration import load_calibration
from tests.support.commands import arguments
from tests.support.layers import halved
from tests.support.tiny import VARIANTS, random_ids, random_structure, tiny_model, tiny_tokenizer

seeds = st.integers(0, 10**6)
HOWS: tuple[How, ...] = ("lstsq", "bias")


def _problem(seed: int, columns: int = 12, rows: int = 7, tokens: int = 60) -> tuple[Projection, torch.Tensor]:
    """A projection with a bias, and inputs whose means are not zero."""
    chance = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=chance) @ torch.randn(columns, columns, generator=chance)
    x += 3 * torch.rand((), generator=chance) * torch.randn(columns, generator=chance)
    whole = Projection(torch.randn(rows, columns, generator=chance), torch.randn(rows, generator=chance))
    return whole, x


def _kept(seed: int, columns: int = 12) -> torch.Tensor:
    chance = torch.Generator().manual_seed(seed)
    return torch.randperm(columns, generator=chance)[: 1 + seed % (columns - 1)].sort().values


def _repaired(how: How, whole: Projection, x: torch.Tensor, kept: torch.Tensor, ridge: float = 1e-2) -> Projection:
    return repaired(how, whole, x.T @ x / len(x), x.mean(dim=0), kept, ridge)


def _error(whole: Projection, x: torch.Tensor, kept: torch.Tensor, output: Projection) -> float:
    assert whole.bias is not None and output.bias is not None
    return float((x @ whole.weight.T + whole.bias - x[:, kept] @ output.weight.T - output.bias).square().sum())


@given(seeds, st.sampled_from(HOWS))
def test_all_columns_kept_is_the_identity(seed: int, how: How) -> None:
    whole, x = _problem(seed)
    weight, bias = _repaired(how, whole, x, torch.arange(12))
    assert bias is not None and whole.bias is not None
    assert torch.equal(weight, whole.weight) and torch.equal(bias, whole.bias)


@pytest.mark.parametrize("mean", [0.0, 3.0, 100.0, 3000.0])
def test_means_far_larger_than_deviations_are_no_end(mean: float) -> None:
    """In float32 the covariance is then a difference of nearly equal numbers; what is lost stays near the optimum."""
    whole, x = _problem(1, columns=64, tokens=500)
    x, kept = (x / x.std() + mean).double(), torch.arange(0, 64, 2)
    moments, centre = (x.T @ x / len(x)).float(), x.mean(dim=0).float()
    weight, bias = repaired("lstsq", whole, moments, centre, kept, 1e-6)
    assert bool(weight.isfinite().all())
    sliced, shifted = repaired("bias", whole, moments, centre, kept)
    exact = Projection(*(tensor.double() for tensor in (whole.weight, whole.bias) if tensor is not None))
    errors = [_error(exact, x, kept, Projection(w.double(), b.double())) for w, b in ((weight, bias), (sliced, shifted))
              if b is not None]  # fmt: skip
    assert errors[0] <= 1.001 * errors[1], "no worse than the bias alone"


@given(seeds)
def test_a_large_ridge_slices_and_leaves_the_mean_of_what_left(seed: int) -> None:
    whole, x = _problem(seed)
    kept = _kept(seed)
    weight, bias = _repaired("lstsq", whole, x, kept, 1e8)
    sliced, mean = _repaired("bias", whole, x, kept)
    assert torch.equal(sliced, whole.weight[:, kept])
    assert torch.allclose(weight, sliced, atol=1e-4)
    assert bias is not None and mean is not None and torch.allclose(bias, mean, atol=1e-3)


@given(seeds)
def test_the_bias_takes_over_the_mean_of_what_left(seed: int) -> None:
    """So that the mean output is that of all columns; nothing else of the projection changes."""
    whole, x = _problem(seed)
    kept = _kept(seed)
    for how in HOWS:
        weight, bias = _repaired(how, whole, x, kept)
        assert bias is not None and whole.bias is not None
        after = (x[:, kept] @ weight.T + bias).mean(dim=0)
        assert torch.allclose(after, (x @ whole.weight.T + whole.bias).mean(dim=0), atol=1e-3)


@given(seeds, st.sampled_from([1e-3, 1e-2, 1e-1, 1.0]))
def test_columns_and_bias_do_no_worse_than_the_bias_and_that_than_nothing(seed: int, ridge: float) -> None:
    whole, x = _problem(seed)
    kept = _kept(seed)
    nothing = _error(whole, x, kept, Projection(whole.weight[:, kept], whole.bias))
    bias, both = (_error(whole, x, kept, _repaired(how, whole, x, kept, ridge)) for how in ("bias", "lstsq"))
    assert bias <= nothing * (1 + 1e-4)
    assert both <= bias * (1 + 1e-4)


@given(seeds)
def test_the_fit_is_the_least_squares_solution_with_an_intercept(seed: int) -> None:
    """Against the normal equations of ``[x, 1]``, in which the intercept alone is not held."""
    whole, x = _problem(seed)
    kept = _kept(seed)
    assert whole.bias is not None
    r = 1e-2 * float(x.double().var(dim=0, correction=0).mean())
    wide = torch.cat([x[:, kept], torch.ones(len(x), 1)], dim=1).double()
    start = torch.cat([whole.weight[:, kept], torch.zeros(7, 1)], dim=1).double()
    held = r * torch.diag(torch.tensor([1.0] * len(kept) + [0.0])).double()
    target = x.double() @ whole.weight.T.double() + whole.bias
    solved = torch.linalg.solve(wide.T @ wide / len(x) + held, wide.T @ target / len(x) + held @ start.T).T
    weight, bias = _repaired("lstsq", whole, x, kept)
    assert torch.allclose(weight.double(), solved[:, :-1], rtol=1e-2, atol=1e-2)
    assert bias is not None and torch.allclose(bias.double(), solved[:, -1], rtol=1e-2, atol=3e-2)


@given(seeds)
def test_with_a_bias_that_is_free_the_error_is_lower_than_without(seed: int) -> None:
    """A law where the ridge is next to nothing; at a larger one the two are held by different ridges."""
    whole, x = _problem(seed)
    kept = _kept(seed)
    columns = repaired_columns(whole.weight, x.T @ x / len(x), kept, 1e-6)
    without = _error(whole, x, kept, Projection(columns, whole.bias))
    assert _error(whole, x, kept, _repaired("lstsq", whole, x, kept, 1e-6)) <= without * (1 + 1e-3) + 1e-3


def test_without_bias_or_means_the_fit_is_the_one_of_the_columns() -> None:
    (weight, bias), x = _problem(5)
    kept, gram = _kept(5), x.T @ x / len(x)
    plain = repaired_columns(weight, gram, kept, 1e-2)
    for output in (
        repaired("lstsq", Projection(weight), gram, x.mean(dim=0), kept),
        repaired("lstsq", Projection(weight, bias), gram, None, kept),
    ):
        assert torch.equal(output.weight, plain)
    assert repaired("bias", Projection(weight), gram, x.mean(dim=0), kept).bias is None
    assert Statistics({1: gram}, 60, "hash").means == {}


def test_every_block_of_a_model_gains_from_its_bias() -> None:
    """Errors of all blocks' outputs on calibration text: sliced, bias alone, columns alone, both."""
    prunable = Prunable.of(tiny_model(**VARIANTS["llama-biased"]))
    text = random_ids(batch=24, length=20)
    statistics = gather(prunable, text)
    ranking = rank("second-order", prunable, statistics)
    without = Statistics(statistics.grams, statistics.tokens, statistics.hash)
    repairs = {
        "sliced": None,
        "bias": Repair(prunable, statistics, ranking, how="bias"),
        "columns": Repair(prunable, without, ranking),
        "both": Repair(prunable, statistics, ranking),
    }
    errors: dict[str, list[float]] = {}
    for name, repair in repairs.items():
        with prunable.in_order(ranking, repair), torch.no_grad():
            inputs = prunable.inputs(text)
            hidden, errors[name] = inputs.hidden, []
            for block, size in enumerate(halved(prunable.anatomy)):
                whole = prunable.block(hidden, inputs, block, prunable.dense[block])
                part = prunable.block(hidden, inputs, block, size)
                errors[name].append(float((stream_of(part) - stream_of(whole)).square().sum()))
                hidden = whole
    for sliced, bias, columns, both in zip(*errors.values(), strict=True):
        assert both < min(columns, bias) and max(columns, bias) < sliced


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("variant", ["llama-biased", "llama-half", "qwen3-half"])
def test_scores_with_a_repaired_bias_are_those_of_the_model_that_is_written(variant: str, how: How) -> None:
    half = {"llama-half": {"family": "llama", "attention_bias": True},
            "qwen3-half": {"family": "qwen3", "attention_bias": True}}  # fmt: skip
    model = tiny_model(**{**VARIANTS, **half}[variant])
    prunable = Prunable.of(model)
    text, ids = random_ids(batch=12, length=20), random_ids(batch=4, length=14, seed=1)
    statistics = gather(prunable, text)
    ranking = rank("second-order", prunable, statistics)
    structure, family = random_structure(prunable.anatomy, 4), prunable.spec.model_type
    with prunable.in_order(ranking):
        sliced = CalibrationObjective(prunable, ids)(structure)
    with prunable.in_order(ranking, Repair(prunable, statistics, ranking, how=how)):
        loss = CalibrationObjective(prunable, ids)(structure)
    plan = PruningPlan.from_structure(structure, ranking, prunable.anatomy, model="m", model_type=family)
    pruned = apply_plan(model, plan)
    before = {name: tensor.clone() for name, tensor in pruned.state_dict().items()}
    assert repair_outputs(pruned, prunable, plan, statistics, 1e-2, how) > 0
    with torch.no_grad():
        logs = pruned(input_ids=ids).logits[:, :-1].flatten(0, 1).log_softmax(-1)
    assert loss == pytest.approx(float(-logs.gather(1, ids[:, 1:].reshape(-1, 1)).mean()), rel=1e-4)
    assert loss != pytest.approx(sliced, rel=1e-6)
    changed = {n.split(".", 3)[3] for n, tensor in pruned.state_dict().items() if not torch.equal(tensor, before[n])}
    biases = {"self_attn.o_proj.bias", "mlp.down_proj.bias"} if variant == "llama-biased" else {"self_attn.o_proj.bias"}
    weights = set() if how == "bias" else {"self_attn.o_proj.weight", "mlp.down_proj.weight"}
    assert changed == biases | weights
    assert before.keys() == pruned.state_dict().keys(), "nothing is added"


def test_the_repair_of_all_blocks_carries_the_repaired_biases() -> None:
    model = tiny_model(**VARIANTS["llama-biased"])
    prunable = Prunable.of(model)
    text, ids = random_ids(batch=24, length=20), random_ids(batch=4, length=14, seed=1)
    statistics = gather(prunable, text)
    ranking = rank("second-order", prunable, statistics)
    structure = random_structure(prunable.anatomy, 4)
    plan = PruningPlan.from_structure(structure, ranking, prunable.anatomy, model="m", model_type="llama")
    pruned = apply_plan(model, plan)
    with prunable.in_order(ranking, Repair(prunable, statistics, ranking)):
        outputs = accumulated(prunable, structure, text)
        with prunable.with_outputs(outputs):
            loss = CalibrationObjective(prunable, ids)(structure)
    write_outputs(pruned, prunable, plan, ranking, outputs)
    with torch.no_grad():
        logs = pruned(input_ids=ids).logits[:, :-1].flatten(0, 1).log_softmax(-1)
    assert loss == pytest.approx(float(-logs.gather(1, ids[:, 1:].reshape(-1, 1)).mean()), rel=1e-4)


def test_a_model_with_a_bias_in_one_kind_of_block_says_so() -> None:
    both = Prunable.of(tiny_model(**VARIANTS["llama-biased"]))
    one = Prunable.of(tiny_model("llama", attention_bias=True))
    assert unrepaired("bias", both) is None and unrepaired("lstsq", one) is None
    assert "down_proj" in str(unrepaired("bias", one)) and "o_proj" not in str(unrepaired("bias", one))


@pytest.fixture(scope="module")
def biased(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("biased") / "tiny-llama"
    tiny_model(**VARIANTS["llama-biased"], layers=4).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "text.txt").write_text((dense / "text.txt").read_text())
    return folder


def test_a_run_with_the_bias_alone_changes_nothing_else(biased: Path, tmp_path: Path) -> None:
    """End to end: the loss of the report is that of the model on disk, whose weights are the plan's."""
    output = tmp_path / "bias"
    assert main(arguments(biased, output, "--repair", "bias", "--rounds", "0")) == 0
    report, original = json.loads((output / "report.json").read_text()), AutoModelForCausalLM.from_pretrained(biased)
    recipe = Recipe.build(report["recipe"])
    assert recipe.repair == "bias" and "repair" not in report["seconds"], "the last repair is one of columns"
    text, pruned = load_calibration(recipe.calibration, tiny_tokenizer(), original), multipruner.load(output)
    with torch.no_grad():
        p = original.eval()(input_ids=text.ids).logits[:, :-1].log_softmax(-1)
        q = pruned.eval()(input_ids=text.ids).logits[:, :-1].log_softmax(-1)
    assert report["search"]["loss"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    sliced = multipruner.apply_plan(original, PruningPlan.from_json((output / "plan.json").read_text())).state_dict()
    written = pruned.state_dict()
    assert sliced.keys() == written.keys()
    differing = {name.split(".", 3)[3] for name in sliced if not torch.equal(sliced[name], written[name])}
    assert differing and differing <= {"self_attn.o_proj.bias", "mlp.down_proj.bias"}


def test_a_model_without_output_biases_is_refused_before_anything_is_measured(
    dense: Path, tmp_path: Path, capsys
) -> None:
    output = tmp_path / "refused"
    assert main(arguments(dense, output, "--repair", "bias")) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and "o_proj" in printed and "lstsq" in printed
    assert not output.exists() and not output.with_name("refused.partial").exists()
    assert main(arguments(dense, output, "--repair", "mean")) == 2
    assert "bias" in capsys.readouterr().err, "the choices are listed"


def test_a_search_over_schedules_knows_one_repair_at_a_time() -> None:
    options = options_of({"repairs": "none,bias", "genome": "schedule"})
    assert options.repair(Recipe.build({"model": "m"})) == "bias"
    assert options_of({}).repair(Recipe.build({"model": "m", "repair": "bias"})) == "bias"
    assert options_of({"repairs": "none,lstsq"}).repair(Recipe.build({"model": "m"})) == "lstsq"
    with pytest.raises(ConfigError, match="one of them"):
        options_of({"repairs": "lstsq,bias"})


def test_a_schedule_with_the_repair_of_biases_is_walked_with_it(biased: Path, dense: Path, tmp_path: Path) -> None:
    output, engine = tmp_path / "schedule", ("--genome", "schedule", "--generations", "1", "--population", "4")
    flags = [*arguments(biased, output, *engine, "--repairs", "bias", "--seeds", "none")]
    assert main(["search", *flags]) == 0
    report = json.loads((output / "report.json").read_text())
    assert report["search"]["picked_candidate"]["compensation"] is True and report["recipe"]["repair"] == "bias"
    assert "repair" not in report["seconds"]
    refused = [*arguments(dense, tmp_path / "refused", *engine, "--repairs", "none,bias")]
    assert main(["search", *refused]) == 2
