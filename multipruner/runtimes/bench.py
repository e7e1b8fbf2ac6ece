"""Filling a latency table in the program that will serve: whole exported models, of which one option is everywhere.

No marks can be set inside another program. So every option of a kind of block is given to all blocks of that kind at
once, the model is exported and opened beside the dense one, and both are timed in alternation: the difference, shared
by the blocks that were changed, is the option's. A model of half the layers tells what a layer costs beside its blocks,
and what is left is the constant rest. Predictions of mixed models are sums, as those of every table are.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from shutil import rmtree
from typing import Any, TypeAlias

from transformers import PreTrainedModel

from multipruner.checkpoint.cut import apply_plan
from multipruner.core.axes import BLOCK_KINDS
from multipruner.core.families import anatomy_of
from multipruner.core.latency_table import Entry, LatencyTable, Workload, WorkloadTable, interpolate
from multipruner.core.structure import GONE, Anatomy, Size, Structure
from multipruner.latency.bench import Report, leading_plan, shapes_of, stack_size
from multipruner.latency.grids import coarse_grid
from multipruner.latency.probe_journal import ProbeJournal, ProbeRecord
from multipruner.latency.summarise import relative_iqr
from multipruner.latency.timing import alternating
from multipruner.storage.files import scratch

from .served import Served, environment_in, exported, row_for, settings_for

REPEATS = 7
"""Samples of every model and workload, and as many of the dense one beside it."""
LEAST = 1e-6
"""Milliseconds that an entry has at least."""
_COUNTS = 5
"""Counts that are measured of an axis whose units have a width of their own, at most."""
Option: TypeAlias = tuple[str, Size]


@dataclass(frozen=True, slots=True)
class Probe:
    """A model that is timed beside the dense one.

    Attributes:
        structure: what it has.
        option: what all its blocks of a kind have; ``None`` for the one of half the layers.
        changed: blocks in which it differs from the dense one.
    """

    structure: Structure
    option: Option | None
    changed: tuple[int, ...]


def options_of(kind: str, full: Size, step: int, anatomy: Anatomy) -> list[Size]:
    """Return the sizes of a block that are measured beside the full one and none at all."""
    counts = [
        [most] if not axis.setting else
        _spread(anatomy.least(axis.name), most) if axis.active else
        sorted({1, (most + 1) // 2, most}) if axis.within else
        _spread(1, most) if axis.width else coarse_grid(most, step)
        for axis, most in zip(BLOCK_KINDS[kind].along(full), full, strict=True)
    ]  # fmt: skip
    return [size for size in product(*counts) if size != full]


def _spread(least: int, most: int) -> list[int]:
    """Return so many counts from the least to the most, or all of them."""
    return sorted({least + (most - least) * part // (_COUNTS - 1) for part in range(_COUNTS)})


def probes_of(anatomy: Anatomy, layers: int, step: int) -> list[Probe]:
    """Return what is exported and timed beside the dense model of so many layers.

    One attention stays where all others leave, so that there are keys and values to keep, and it is the first: what
    stands for a removed one in a file differs there.
    """
    dense = Structure(tuple(place.dense if place.layer < layers else GONE for place in anatomy))
    half = tuple(number for number, place in enumerate(anatomy) if layers // 2 <= place.layer < layers)
    probes = [Probe(_with(dense, half, GONE), None, half)] if layers > 1 else []
    for kind, full in _largest(anatomy, layers).items():
        places = tuple(n for n in anatomy.of_kind(kind) if anatomy[n].layer < layers and anatomy[n].dense == full)
        gone = places[1:] or places
        probes.append(Probe(_with(dense, gone, GONE), (kind, GONE), gone))
        if not BLOCK_KINDS[kind].whole:
            sizes = options_of(kind, full, step, anatomy)
            probes += [Probe(_with(dense, places, size), (kind, size), places) for size in sizes]
    return probes


def _largest(anatomy: Anatomy, layers: int) -> dict[str, Size]:
    """Return the largest dense block of every kind within so many layers."""
    found = {kind: [anatomy[n].dense for n in anatomy.of_kind(kind) if anatomy[n].layer < layers]
             for kind in anatomy.kinds}  # fmt: skip
    return {kind: max(sizes) for kind, sizes in found.items() if sizes}


def _with(structure: Structure, places: Sequence[int], size: Size) -> Structure:
    for place in places:
        structure = structure.replace(place, size)
    return structure


def measure_served(
    model: PreTrainedModel,
    tokenizer: Any,
    workloads: Sequence[Workload],
    runtime: str,
    *,
    place: Path,
    outtype: str | None = None,
    threads: int = 1,
    channel_step: int = 128,
    repeats: int = REPEATS,
    progress: Report | None = None,
    resume_from: Path | None = None,
) -> LatencyTable:
    """Measure the options of a model's blocks where it will be served, on the processor.

    Args:
        model: the dense model; not modified.
        tokenizer: its tokenizer.
        workloads: what to time.
        runtime: a row of :data:`~multipruner.config.choices.RUNTIMES` that takes exports.
        place: beside it two exported models at a time stand for a while.
        outtype: of the matrices; default: the first of the row.
        threads: of the processor.
        channel_step: the finest difference between two measured widths.
        repeats: samples of every model and workload.
        progress: told after every model.
        resume_from: a file that keeps every model's samples; what it already holds is not measured again.

    Raises:
        ConfigError: when the runtime is not installed, or does not know the type.
        OutputError: when a file cannot be used or written, or the runtime fails.
        UnsupportedModelError: when the format, or the runtime, does not know the model.
    """
    _, outtype = row_for(runtime, outtype)
    environment, shapes = environment_in(runtime, outtype, threads), shapes_of(model)
    anatomy, layers = anatomy_of(model.config), stack_size(model)
    probes = probes_of(anatomy, layers, channel_step)
    identity = {**shapes, **environment, "repeats": repeats, "channel_step": channel_step}
    settings = settings_for(workloads, model.config.vocab_size, threads)
    with ProbeJournal(resume_from, identity) as journal, scratch(place) as folder, ExitStack() as stack:
        bench = _Bench(model, tokenizer, folder, (runtime, outtype), settings, layers, stack)
        found: dict[str, list[ProbeRecord]] = {workload.name: [] for workload in workloads}
        for number, probe in enumerate(probes):
            known = {w.name: journal.find(w.name, probe.structure, 0, number) for w in workloads}
            missing = [workload for workload in workloads if known[workload.name] is None]
            for record in bench.records(probe, number, missing, repeats) if missing else ():
                journal.add(record)
                known[record.workload] = record
            for name, record in known.items():
                assert record is not None
                found[name].append(record)
            if progress is not None:
                progress(runtime, (number + 1) / len(probes))
    rows = {w.name: summarised(w, found[w.name], probes, anatomy, layers) for w in workloads}
    return LatencyTable(shapes, environment, datetime.now(UTC).isoformat(timespec="seconds"), rows)


class _Bench:
    """Exports models and times them beside the dense one, which is opened when it is first needed."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        place: Path,
        runtime: tuple[str, str],
        settings: Mapping[str, int],
        layers: int,
        stack: ExitStack,
    ) -> None:
        self._model, self._tokenizer, self._place = model, tokenizer, place
        self._runtime, self._settings, self._layers, self._stack = runtime, settings, layers, stack
        self._dense: Served | None = None

    def records(self, probe: Probe, number: int, workloads: Sequence[Workload], repeats: int) -> Iterator[ProbeRecord]:
        """Yield the samples of one model: its own as ``plain``, the dense one's beside them as ``marked``."""
        anatomy = anatomy_of(self._model.config)
        if self._dense is None:
            whole = Structure(tuple(p.dense if p.layer < self._layers else GONE for p in anatomy))
            self._dense = self._stack.enter_context(self._opened(whole, "dense"))
        dense = self._dense
        with self._opened(probe.structure, f"probe-{number}") as small:
            for workload in workloads:
                takes = {"plain": lambda w=workload: small.sample(w), "marked": lambda w=workload: dense.sample(w)}
                yield ProbeRecord(workload.name, 0, number, probe.structure, **alternating(takes, repeats), blocks=[])
        rmtree(self._place / f"probe-{number}", ignore_errors=True)

    def _opened(self, structure: Structure, name: str) -> Served:
        plan = leading_plan(self._model, structure)
        path = exported(apply_plan(self._model, plan).eval(), plan, self._tokenizer, self._place / name, *self._runtime)
        return Served.opened(self._runtime[0], path, self._settings)


def summarised(
    workload: Workload, records: Sequence[ProbeRecord], probes: Sequence[Probe], anatomy: Anatomy, layers: int
) -> WorkloadTable:
    """Return the entries of one workload.

    Args:
        workload: what was timed.
        records: of the probes, in their order.
        probes: what was timed.
        anatomy: of the dense model.
        layers: of the probes.
    """
    dense = statistics.median(sample for record in records for sample in record.marked)
    samples = {id(probe): [dense * p / d for p, d in zip(record.plain, record.marked, strict=True)]
               for probe, record in zip(probes, records, strict=True)}  # fmt: skip
    blocks: dict[str, dict[Size, list[float]]] = {}
    for kind, full in _largest(anatomy, layers).items():
        own = {probe.option[1]: probe for probe in probes if probe.option and probe.option[0] == kind}
        without = own.pop(GONE)
        whole = [(dense - sample) / len(without.changed) for sample in samples[id(without)]]
        middle = statistics.median(whole)
        blocks[kind] = {GONE: [0.0], full: whole}
        for size, probe in own.items():
            blocks[kind][size] = [middle + (sample - dense) / len(probe.changed) for sample in samples[id(probe)]]
    middles = {kind: {size: statistics.median(each) for size, each in sizes.items()} for kind, sizes in blocks.items()}

    def together(places: Sequence[int]) -> float:
        return sum(interpolate(middles[anatomy[n].kind], anatomy[n].dense) for n in places)

    there = [number for number, place in enumerate(anatomy) if place.layer < layers]
    last = {anatomy[anatomy.of_layer(layer)[-1]].kind for layer in range(layers)}
    carriers = sum(anatomy[number].kind in last for number in there)
    overhead, rest = 0.0, dense - together(there)
    half = next((probe for probe in probes if probe.option is None), None)
    if half is not None:
        saved = dense - statistics.median(samples[id(half)])
        each = (saved - together(half.changed)) / len({anatomy[n].layer for n in half.changed})
        overhead = min(max(each, 0.0), max(rest, 0.0) / carriers)  # the layers' part of what no block takes
        rest -= overhead * carriers
    entries = {
        kind: {size: _entry([each + overhead * (kind in last) for each in values])
               for size, values in sorted(sizes.items())}
        for kind, sizes in blocks.items()
    }  # fmt: skip
    all_dense = [sample for record in records for sample in record.marked]
    constant = Entry(max(rest, 0.0), relative_iqr(all_dense), len(all_dense))
    return WorkloadTable(workload, entries, constant, _interpolation_error(entries))


def _entry(samples: Sequence[float]) -> Entry:
    """Return the median of samples of a block, whose spread is that of a small difference of large times."""
    middle = statistics.median(samples)
    return Entry(max(middle, LEAST), relative_iqr(samples), len(samples))


def _interpolation_error(entries: Mapping[str, Mapping[Size, Entry]]) -> float:
    """Return the largest relative error with which a width between two others would have been interpolated."""
    worst = 0.0
    for sizes in entries.values():
        times = {size: entry.milliseconds for size, entry in sorted(sizes.items()) if len(size) == 1}
        for size in list(times)[1:-1]:
            between = interpolate({other: time for other, time in times.items() if other != size}, size)
            worst = max(worst, abs(between / times[size] - 1))
    return worst
