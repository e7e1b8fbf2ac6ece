"""The amounts of work of a recipe on a model, stage by stage, and what its budgets mean: counted, nothing measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path

from multipruner.config.recipe import Recipe
from multipruner.core.structure import Size
from multipruner.engine.grouped_attention import grouped_attention, narrow_cache
from multipruner.engine.prunable import Prunable
from multipruner.eval.scoring import context_length
from multipruner.importance.energies import TOKENS as ENERGY_TOKENS
from multipruner.importance.errors_as_run import sizes_run
from multipruner.importance.rope_pairs import TOKENS as PAIR_TOKENS
from multipruner.jobs.narrow import as_bounded, sizes_tried
from multipruner.jobs.reachable import span
from multipruner.jobs.setting import problem_of, task_of
from multipruner.repair.final_norm import TOKENS as GAIN_TOKENS
from multipruner.search import expected_candidates, solve
from multipruner.search.allocation import PARTS, options_of_round
from multipruner.sources.sampled_text import side_by_side
from multipruner.storage.hub import hub_answers

from . import work
from .needs import sampled
from .work import Base, Candidate, Shape, Texts, Work

_BYTES_PER_TOKEN = 4
"""Of a text for perplexity, about, before it is tokenised."""


def shape_of(prunable: Prunable) -> Shape:
    """Return what of a model its work depends on."""
    blocks = range(len(prunable.anatomy))
    inputs = tuple(prunable.block_spec(block).width(prunable.counts(block)) for block in blocks)
    weights = tuple(float(prunable.costs.blocks[block](prunable.dense[block]).products) for block in blocks)
    return Shape(inputs, weights, prunable.head_weight.shape[1], prunable.costs.head_macs, prunable.anatomy.layers)


Unwritten = Callable[[int, int, int], int]
"""Tells of (sequences, length, seed) how many sequences are still to be sampled."""


def texts_for(recipe: Recipe, prunable: Prunable, unwritten: Unwritten | None = None) -> Texts:
    """Return the sizes of a recipe's texts.

    Args:
        recipe: says how much.
        prunable: the model, for its context.
        unwritten: see :data:`Unwritten`; default: all.
    """
    spec, context = recipe.text, context_length(prunable.model.config)
    length, judge = min(spec.length, context), recipe.evaluation
    written = sampled(recipe)
    if written and unwritten is not None:
        written = unwritten(written, length, spec.seed)
    costs = prunable.costs
    with grouped_attention(prunable.model):
        item = (narrow_cache(prunable.model) or prunable.head_weight.dtype).itemsize
    kv = costs.kv_bytes_per_token(costs.dense) * item // costs.bytes_per_parameter
    found = Texts(
        length, spec.sequences, min(spec.width_sequences, spec.sequences), spec.moments_sequences,
        written, side_by_side(max(1, kv), length), ordered=spec.order_sequences,
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
    """What a search will measure: candidates by round (of the program), or by dimension (of the path); and the shares
    of dense blocks that are run for their errors."""

    base: Base
    left: float
    rounds: tuple[tuple[Candidate, ...], ...] = ()
    counts: Mapping[str, int] | None = None
    ran: Mapping[int, Sequence[float]] = field(default_factory=dict)


def _searched(recipe: Recipe, prunable: Prunable) -> Searched:
    costs, dense = prunable.costs, prunable.dense
    if recipe.greedy:
        problem = problem_of(recipe, prunable)
        left = 1 - problem.ratio * costs.parameters(dense) / costs.backbone_parameters(dense)
        return Searched(Base((left,) * len(dense)), left, counts={**expected_candidates(problem, recipe.shortlist)})
    task = task_of(recipe, as_bounded(recipe, prunable))
    kept = {(b, size): _kept(prunable, b, size) for b in range(len(dense)) for size in task.levels(b)}
    # what a block loses grows with the square of what leaves, more in some blocks than in others: a structure such as
    # is found, some blocks gone, some narrower and some as they were
    table = {
        block: {size: (1 + 7919 * block % 13) * (1 - kept[block, size]) ** 2 for size in task.levels(block)}
        for block in range(len(dense))
    }
    found = solve(table, task.limits, task.anatomy, uniform=task.uniform).structure
    estimated = range(len(dense)) if recipe.estimated else ()
    rounds = tuple(
        tuple(
            Candidate(block, _kept(prunable, block, size))
            for block, sizes in options_of_round(task, found if number else dense, number, estimated).items()
            for size in sizes
        )
        for number in range(task.rounds + 1)
    )
    base = Base(tuple(_kept(prunable, block, size) for block, size in enumerate(found)))
    ran = {block: [_kept(prunable, block, size) for size in row] for block, row in sizes_run(task).items()}
    return Searched(base, 1 - costs.backbone_ratio(found), rounds, ran=ran)


def _kept(prunable: Prunable, block: int, size: Size) -> float:
    """Return the share of a dense block's work that a size of it has."""
    cost = prunable.costs.blocks[block]
    return cost(size).products / max(1, cost(prunable.dense[block]).products)


def work_of(recipe: Recipe, prunable: Prunable, texts: Texts) -> tuple[dict[str, Work], Searched]:
    """Return what every stage of a run computes."""
    shape, searched = shape_of(prunable), _searched(recipe, prunable)
    kl, repairs = recipe.objective == "kl", recipe.repair == "lstsq"
    scored = repairs and recipe.repair_stage == "search"
    if searched.counts is None:
        few = 0 if recipe.layout == "uniform" else len({max(2, shape.blocks // part) for part in PARTS})
        search = work.tables(searched.rounds, searched.base, texts, shape, kl=kl, refit=scored, solutions=1 + few)
        if recipe.estimated:
            sequences = min(texts.statistics, max(1, ENERGY_TOKENS // texts.length))
            search += work.energies(sequences * texts.length, shape, searched.ran)
    else:
        finished = work.ABANDONED if recipe.shortlist is None else 1.0
        search = work.path(searched.counts, texts, shape, kl=kl, left=searched.left, finished=finished)
    read = "ppl" in recipe.evaluation.tasks and recipe.evaluation.text is not None
    by_stage = {
        "text": work.text(texts, shape, checked=read),
        "moments": work.statistics(texts, shape, eliminates=recipe.importance == "second-order"),
        "search": search,
    }
    if recipe.rope_pair_step is not None:  # their order, and what attention gives without them
        by_stage["moments"] += work.passes(2 * min(texts.statistics * texts.length, PAIR_TOKENS), shape)
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
    """Return what a recipe's budgets mean for a model."""
    costs, dense = prunable.costs, prunable.dense
    whole, backbone = costs.parameters(dense), costs.backbone_parameters(dense)
    facts = []
    if recipe.ratio is not None:
        gone = recipe.ratio * whole
        fact = f"ratio {recipe.ratio:g}: {gone / 1e6:,.1f} of {whole / 1e6:,.1f} million parameters go"
        if recipe.hidden_size is None:  # a narrower residual stream takes embeddings and head along
            fact += f", {gone / backbone:.1%} of the decoder layers' {backbone / 1e6:,.1f} million"
        facts.append(fact)
    bounded = as_bounded(recipe, prunable)
    low, high = span(recipe, bounded)
    at = "" if recipe.hidden_size is None else f" at hidden size {bounded.anatomy.constants['hidden']}"
    facts.append(f"ratios from {ceil(low * 1e5) / 1e5:.5f} to {int(high * 1e3) / 1e3:.3f} can be reached{at}")
    tried = len(sizes_tried(recipe, prunable)) if recipe.hidden_size == "auto" else 1
    if tried > 1:
        facts.append(f"--hidden-size auto: up to {tried} hidden sizes are searched; the time of search is that of one")
    facts += [f"{name}: at most {amount}" for name, amount in recipe.budgets.items()]
    return tuple(facts)
