"""The amounts of work of a recipe on a model, stage by stage, and what its budgets mean: counted, nothing measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

from multipruner.config.choices import IMPORTANCES
from multipruner.config.recipe import Recipe
from multipruner.core.structure import KINDS, BlockKind, LayerSize
from multipruner.engine.prunable import Prunable
from multipruner.eval.scoring import context_length
from multipruner.jobs.reachable import span
from multipruner.jobs.setting import problem_of, task_of
from multipruner.repair.final_norm import TOKENS as GAIN_TOKENS
from multipruner.search import expected_candidates, solve
from multipruner.search.allocation import PARTS, options_of_round
from multipruner.search.limits import alone
from multipruner.sources.sampled_text import side_by_side
from multipruner.storage.hub import hub_answers

from . import work
from .needs import sampled_parts
from .work import Base, Candidate, Shape, Texts, Work

_BYTES_PER_TOKEN = 4
"""Of a text for perplexity, about, before it is tokenised."""


def shape_of(prunable: Prunable) -> Shape:
    """What of a model its work depends on."""
    inputs: list[int] = []
    weights: list[float] = []
    for size in prunable.dense:
        for kind in KINDS:
            part = alone(size, kind)
            inputs.append(part.query_heads * prunable.head_dim if kind == "attention" else part.channels)
            weights.append(float(prunable.costs.layer.macs_per_token(part)))
    return Shape(tuple(inputs), tuple(weights), prunable.head_weight.shape[1], prunable.costs.head_macs)


def texts_for(recipe: Recipe, prunable: Prunable, unwritten: Callable[[int, int, int], int] | None = None) -> Texts:
    """The sizes of a recipe's texts.

    Args:
        recipe: says how much.
        prunable: the model, for its context.
        unwritten: tells of (sequences, length, seed) how many are still to be sampled; default: all.
    """
    spec, context = recipe.calibration, context_length(prunable.model.config)
    length, judge = min(spec.length, context), recipe.evaluation
    needed = recipe.compensation != "none" or IMPORTANCES[recipe.importance].moments
    calls = []
    for part, sequences, seed in sampled_parts(recipe):
        if part == "calibration" or needed:
            calls.append(sequences if unwritten is None else unwritten(sequences, length, seed))
    costs = prunable.costs
    kv = costs.kv_bytes_per_token(costs.dense) * prunable.head_weight.element_size() // costs.bytes_per_parameter
    found = Texts(
        length, spec.sequences, min(spec.width_sequences, spec.sequences), spec.statistics_sequences * needed,
        tuple(call for call in calls if call), side_by_side(max(1, kv), length),
    )  # fmt: skip
    if "ppl" not in judge.tasks:
        return found
    if judge.text is None and not hub_answers():  # held-out sequences take its place
        return replace(found, evaluated=spec.sequences, evaluated_length=length)
    most = judge.max_tokens or 1 << 40
    if judge.text is not None and (path := Path(judge.text).expanduser()).is_file():
        most = min(most, path.stat().st_size // _BYTES_PER_TOKEN)
    long = min(judge.length, context, most)
    return replace(found, evaluated=max(1, min(most, 300_000) // max(1, long)), evaluated_length=max(2, long))


@dataclass(frozen=True)
class Searched:
    """What a search will measure: candidates by round (of the program), or by dimension (of the path)."""

    base: Base
    left: float
    rounds: tuple[tuple[Candidate, ...], ...] = ()
    counts: Mapping[str, int] | None = None


def _searched(recipe: Recipe, prunable: Prunable) -> Searched:
    costs, dense = prunable.costs, prunable.dense
    if recipe.strategy != "milp":
        problem = problem_of(recipe, prunable)
        left = 1 - problem.ratio * costs.parameters(dense) / costs.backbone_parameters(dense)
        return Searched(Base((left,) * (len(KINDS) * len(dense))), left, counts={**expected_candidates(problem)})
    task = task_of(recipe, prunable)
    kept = {(b, size): _kept(prunable, b[0], b[1], size) for b in task.blocks() for size in task.levels(b)}
    # what a block loses grows with the square of what leaves, more in some blocks than in others: a structure such as
    # is found, some blocks gone, some narrower and some as they were
    table = {
        block: {size: (1 + 7919 * number % 13) * (1 - kept[block, size]) ** 2 for size in task.levels(block)}
        for number, block in enumerate(task.blocks())
    }
    found = solve(table, task.limits, uniform=task.uniform).structure
    place = {(layer, kind): len(KINDS) * layer + KINDS.index(kind) for layer, kind in task.blocks()}
    rounds = tuple(
        tuple(
            Candidate(place[block], _kept(prunable, *block, size))
            for block, sizes in options_of_round(task, found if number else dense, number).items()
            for size in sizes
        )
        for number in range(task.rounds + 1)
    )
    base = Base(tuple(_kept(prunable, n, kind, alone(size, kind)) for n, size in enumerate(found) for kind in KINDS))
    return Searched(base, 1 - costs.backbone_ratio(found), rounds)


def _kept(prunable: Prunable, layer: int, kind: BlockKind, size: LayerSize) -> float:
    """Share of a dense block's work that a size of it has."""
    count = prunable.costs.layer.macs_per_token
    return count(size) / max(1, count(alone(prunable.dense[layer], kind)))


def work_of(recipe: Recipe, prunable: Prunable, texts: Texts) -> tuple[dict[str, Work], Searched]:
    """What every stage of a run computes."""
    shape, searched = shape_of(prunable), _searched(recipe, prunable)
    kl, repairs = recipe.objective == "kl", recipe.compensation == "lstsq"
    scored = repairs and recipe.compensate == "search"
    if searched.counts is None:
        few = 0 if recipe.layout == "uniform" else len({max(2, shape.blocks // part) for part in PARTS})
        search = work.tables(searched.rounds, searched.base, texts, shape, kl=kl, refit=scored, solutions=1 + few)
    else:
        search = work.path(searched.counts, texts, shape, kl=kl, left=searched.left)
    read = "ppl" in recipe.evaluation.tasks and recipe.evaluation.text is not None
    by_stage = {
        "text": work.text(texts, shape, checked=read),
        "statistics": work.statistics(texts, shape, eliminates=recipe.importance == "second-order"),
        "search": search,
    }
    if repairs and recipe.accumulate > 0:
        gain = recipe.final_norm == "refit"
        by_stage["repair"] = work.last_repair(
            texts, shape, left=searched.left, gain=gain, kl=kl, gain_tokens=GAIN_TOKENS
        )
    if texts.evaluated:
        dense, pruned = (work.evaluation(texts.evaluated, texts.evaluated_length, shape, share)
                         for share in (1.0, searched.left))  # fmt: skip
        by_stage["evaluation"] = dense + pruned
    costs = prunable.costs
    left = costs.constant + searched.left * costs.backbone_parameters(costs.dense)
    by_stage["writing"] = work.writing(left * costs.bytes_per_parameter)
    return by_stage, searched


def budgets_of(recipe: Recipe, prunable: Prunable) -> tuple[str, ...]:
    """What a recipe's budgets mean for a model."""
    costs, dense = prunable.costs, prunable.dense
    whole, backbone = costs.parameters(dense), costs.backbone_parameters(dense)
    facts = []
    if recipe.ratio is not None:
        gone = recipe.ratio * whole
        facts.append(
            f"ratio {recipe.ratio:g}: {gone / 1e6:,.1f} of {whole / 1e6:,.1f} million parameters go, "
            f"{gone / backbone:.1%} of the decoder layers' {backbone / 1e6:,.1f} million"
        )
    low, high = span(recipe, prunable)
    facts.append(f"ratios from {ceil(low * 1e5) / 1e5:.5f} to {int(high * 1e3) / 1e3:.3f} can be reached")
    facts += [f"{name}: at most {amount}" for name, amount in recipe.budgets.items()]
    return tuple(facts)
