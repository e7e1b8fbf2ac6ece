"""The arithmetic of a forecast: more of anything never costs less, and what is off costs nothing."""

from __future__ import annotations

import math
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from multipruner.jobs.forecast import work
from multipruner.jobs.forecast.memory import Sizes, peaks
from multipruner.jobs.forecast.rates import Rates
from multipruner.jobs.forecast.work import Base, Candidate, Shape, Texts, Work

RATES = Rates(2e-5, 3e-5, 1e-4, 0.05, 0.003, 1e-11, 4e-11, 1e-9)
TEXTS = st.builds(
    Texts,
    length=st.integers(2, 600),
    scored=st.integers(4, 20),
    sketched=st.integers(1, 4),
    statistics=st.integers(1, 300),
    sampled=st.integers(0, 300),
    side_by_side=st.integers(1, 100),
    evaluated=st.integers(1, 30),
    evaluated_length=st.integers(2, 4096),
)
LAYERS = st.integers(1, 12)


def shape(layers: int) -> Shape:
    return Shape((64, 160) * layers, (1000.0, 3000.0) * layers, 48, 5000, layers)


def stages(texts: Texts, layers: int, rounds: int, left: float = 0.75) -> dict[str, Work]:
    """All stages; every block has three options in each round."""
    kind = shape(layers)
    each = tuple(Candidate(block, kept) for block in range(kind.blocks) for kept in (0.0, 0.5, 0.75))
    base = Base((left,) * kind.blocks)
    return {
        "text": work.text(texts, kind, checked=True),
        "moments": work.statistics(texts, kind, eliminates=True),
        "search": work.tables([each] * (1 + rounds), base, texts, kind, kl=True, refit=True),
        "path": work.path({"blocks": 9 * layers, "mlp": 30 * layers}, texts, kind, kl=False, left=left),
        "repair": work.last_repair(texts, kind, left=left, gain=True, kl=True, gain_tokens=8192),
        "evaluation": work.evaluation(texts.evaluated, texts.evaluated_length, kind, left),
    }


def seconds(texts: Texts, layers: int, rounds: int) -> dict[str, float]:
    return {name: RATES.seconds(one) for name, one in stages(texts, layers, rounds).items()}


@given(TEXTS, LAYERS, st.integers(0, 4), st.data())
def test_more_of_anything_never_costs_less(texts: Texts, layers: int, rounds: int, data: st.DataObject) -> None:
    before = seconds(texts, layers, rounds)
    name = data.draw(st.sampled_from(["length", "scored", "statistics", "evaluated", "evaluated_length"]))
    more = replace(texts, **{name: getattr(texts, name) + data.draw(st.integers(1, 50))})
    for after in (
        seconds(more, layers, rounds),
        seconds(texts, layers + 1, rounds),
        seconds(texts, layers, 1 + rounds),
    ):
        assert all(after[stage] >= before[stage] * (1 - 1e-12) for stage in before)
    grown = seconds(texts, layers + 1, rounds)
    assert all(grown[stage] > before[stage] for stage in before if stage != "path")
    assert seconds(texts, layers, rounds + 1)["search"] > before["search"]


@given(TEXTS, LAYERS)
def test_what_is_off_costs_nothing(texts: Texts, layers: int) -> None:
    none, kind = replace(texts, sampled=0, statistics=0, evaluated=0), shape(layers)
    assert not work.statistics(none, kind, eliminates=True)
    assert not work.evaluation(0, texts.evaluated_length, kind)
    assert not work.text(none, kind).steps, "given text is not sampled"
    assert not work.losses([], Base((1.0,) * kind.blocks), 100, kind, refit=True)
    assert RATES.seconds(Work()) == 0


@given(st.integers(1, 200), st.integers(1, 90), LAYERS)
def test_sampling_steps_once_for_every_token_of_every_batch(sequences: int, together: int, layers: int) -> None:
    texts = Texts(17, 1, 1, sampled=sequences, side_by_side=together)
    found = work.text(texts, shape(layers))
    assert sum(rows * steps for rows, steps in found.steps) == sequences * 16
    assert sum(steps for _, steps in found.steps) == math.ceil(sequences / together) * 16
    assert max(rows for rows, _ in found.steps) <= together
    assert found.token_layers == (sequences * 16 + 17) * layers


@given(st.lists(st.tuples(st.integers(0, 7), st.sampled_from([0.0, 0.25, 1.0])), max_size=12), st.data())
def test_a_candidate_costs_the_blocks_from_its_own_on(asked: list[tuple[int, float]], data: st.DataObject) -> None:
    kept = tuple(data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=8, max_size=8)))
    found = work.losses([Candidate(*one) for one in asked], Base(kept), 10, shape(4), refit=False)
    count = sum((share > 0) + sum(other > 0 for other in kept[block + 1 :]) for block, share in asked)
    assert found.token_layers == 10 * count / 2 and found.head_tokens == 10 * len(asked)
    assert found.dense_layers <= found.token_layers * 1.5, "in the time of layers of which blocks are unequal parts"


@given(TEXTS, LAYERS, st.booleans())
def test_memory_holds_the_weights_and_grows_with_text(texts: Texts, layers: int, moments: bool) -> None:
    kind, sizes = shape(layers), Sizes(1000, 400, 4, 64, 97, 1 << 30, moments)
    names = ["text", "moments", "search", "repair", "evaluation", "writing"]
    base, some = Base((0.5,) * kind.blocks), [Candidate(0, 0.5)]
    found = peaks(names, texts, kind, sizes, base, some)
    assert list(found) == names and min(found.values()) >= 1000
    more = peaks(
        names, replace(texts, statistics=2 * texts.statistics, scored=2 * texts.scored), kind, sizes, base, some
    )
    assert all(more[name] >= found[name] for name in names)
    disk = peaks(names, texts, kind, replace(sizes, moments=False), base, some)
    assert all(disk[name] <= found[name] for name in names)
