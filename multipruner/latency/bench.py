"""Filling a latency table: every block option timed where it will run, inside the forward pass of a smaller model.

A *probe* is a really pruned model whose layers hold a random draw of the options; time marks at the borders of its
blocks time all of them in one pass (:class:`~multipruner.latency.marks.Probe`). So weights stream from memory as in
use, every option stands in many places and among many neighbours, a drift of the machine hits all alike, and what is
measured adds up to the whole pass by construction. Passes without marks alternate with marked ones: from them come the
constant rest and what the marks themselves cost. Narrower residual streams have probes of their own, really narrower
ones, which take turns with those of the model's width.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

from transformers import PreTrainedModel

from multipruner.checkpoint.cut import apply_plan
from multipruner.core.axes import AXES, BLOCK_KINDS
from multipruner.core.families import anatomy_of, spec_for
from multipruner.core.latency_table import LatencyTable, Shapes, Workload, WorkloadTable, interpolate
from multipruner.core.plan import PruningPlan, Ranking
from multipruner.core.structure import Anatomy, Size, Structure, counts_of

from .deal import Deck, deal
from .environment import environment_of
from .grids import coarse_grid, first_options, middle
from .marks import Probe
from .probe_journal import ProbeJournal, ProbeRecord
from .summarise import constant_rest, summarise
from .timing import Runner, compile_blocks, quiet_process, room_for_sizes
from .turns import in_turn, parts_of

STACK_BYTES = 1 << 30
"""Weights that a probe's layers hold at least (where the model has them): far beyond every cache."""
TOLERANCE = 0.03
"""Largest relative error with which a width may be interpolated instead of measured."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured.

    Attributes:
        probes: smaller models per stage, at least.
        placements: places (probe and layer) of every option, at least.
        repeats: samples of every probe, marked and unmarked each.
        warmup: passes of every probe before them.
        tries: how often a probe is timed at most when others disturb it (:attr:`ProbeRecord.calm`).
    """

    probes: int = 4
    placements: int = 16
    repeats: int = 9
    warmup: int = 2
    tries: int = 5


Gap = tuple[int, int]
"""Two counts that were measured, with none between them."""
Report = Callable[[str, float], None]
"""Told what is being measured, and the share of everything that is done."""


def shapes_of(model: PreTrainedModel) -> Shapes:
    """Return what a model's block times depend on, besides the size of the block."""
    anatomy, spec = anatomy_of(model.config), spec_for(model.config)
    counts = {name: count for sizes in _largest(anatomy).items() for name, count in counts_of(*sizes).items()}
    constants = {name: count for name, count in anatomy.constants.items() if name not in AXES}
    outputs = spec.task.outputs
    return {"model_type": spec.model_type, **constants, **counts, outputs: getattr(model.config, outputs)}


def _largest(anatomy: Anatomy) -> dict[str, Size]:
    """Return the largest dense block of every kind."""
    return {kind: max(anatomy[number].dense for number in anatomy.of_kind(kind)) for kind in anatomy.kinds}


def measure_table(
    model: PreTrainedModel,
    workloads: Sequence[Workload],
    *,
    channel_step: int = 128,
    compiled: bool = False,
    hidden_sizes: Sequence[int] = (),
    effort: Effort | None = None,
    progress: Report | None = None,
    resume_from: Path | None = None,
) -> LatencyTable:
    """Measure every option of a model's blocks on its own device.

    Of an axis whose units have a width of their own, such as KV groups, every number is measured; of one within
    another, such as query heads, the least, the middle and the most; of experts, nine from the least that a token goes
    through to all; of any other, such as channels, multiples of the
    step: first a coarse grid, then the middles between its sizes, and finer wherever interpolation is off by more than
    :data:`TOLERANCE`. A removed block is measured too.

    Args:
        model: the dense model; not modified.
        workloads: what to time.
        channel_step: the finest difference between two measured widths.
        compiled: compile every block by itself (``torch.compile``) before timing it.
        hidden_sizes: widths of the residual stream at which everything is measured besides the model's own.
        effort: how much is measured; default: :class:`Effort`'s.
        progress: told after every probe.
        resume_from: a file that keeps every probe as it is measured; what it already holds is not measured again.

    Raises:
        OutputError: when that file cannot be used, or is of another model, machine or setting.
        UnsupportedModelError: when the model's family has no row.
    """
    effort = effort or Effort()
    environment, shapes = environment_of(model, compiled=compiled), shapes_of(model)
    identity = {**shapes, **environment, **asdict(effort), "channel_step": channel_step}
    with ProbeJournal(resume_from, identity) as journal, room_for_sizes(compiled):
        widths = (None, *hidden_sizes)
        rows: dict[int | None, dict[str, WorkloadTable]] = {hidden: {} for hidden in widths}
        for number, workload in enumerate(workloads):

            def report(share: float, number: int = number, name: str = workload.name) -> None:
                if progress is not None:
                    progress(name, (number + share) / len(workloads))

            benches = [
                _Bench(model, workload, effort, compiled, journal, part, hidden)
                for hidden, part in zip(widths, parts_of(report, len(widths)), strict=True)
            ]
            found = in_turn([bench.table(channel_step) for bench in benches])
            for hidden, row in zip(widths, found, strict=True):
                rows[hidden][workload.name] = row
    own = rows.pop(None)
    narrower = {hidden: row for hidden, row in rows.items() if hidden is not None}
    return LatencyTable(shapes, environment, datetime.now(UTC).isoformat(timespec="seconds"), own, narrower)


class _Bench:
    """The measurement of one workload at one width of the residual stream (``None``: the model's)."""

    def __init__(
        self,
        model: PreTrainedModel,
        workload: Workload,
        effort: Effort,
        compiled: bool,
        journal: ProbeJournal,
        report: Callable[[float], None],
        hidden: int | None = None,
    ) -> None:
        self._model, self._workload, self._effort = model, workload, effort
        self._compiled, self._journal, self._report, self._hidden = compiled, journal, report, hidden
        self._anatomy = anatomy_of(model.config)
        self._full = _largest(self._anatomy)
        self._records: list[ProbeRecord] = []
        self._stack = stack_size(model)
        self._places = [place for place in self._anatomy if place.layer < self._stack]
        self._kinds = [place.kind for place in self._places]

    def table(self, step: int) -> Generator[None, None, WorkloadTable]:
        """Measure what is first, then between it where interpolation is off; yield after every probe."""
        first = {kind: first_options(kind, full, step, self._anatomy) for kind, full in self._full.items()}
        yield from self._stage(0, first)
        gaps = {
            kind: list(pairwise(coarse_grid(*full, step)))
            for kind, full in self._full.items()
            if not any(axis.width or axis.within for axis in BLOCK_KINDS[kind].along(full)) and len(full) == 1
        }
        stage, worst = 0, 0.0
        while middles := self._middles(gaps, step):
            stage += 1
            # the full sizes again: what is measured later is seen beside what was measured before
            again = {kind: [*((found,) for found in middles.get(kind, {}).values()), full]
                     for kind, full in self._full.items()}  # fmt: skip
            yield from self._stage(stage, again)
            entries = summarise(self._records, self._kinds)
            gaps = {kind: [] for kind in middles}
            for kind, found in middles.items():
                times = {size: entry.milliseconds for size, entry in entries[kind].items()}
                for (low, high), count in found.items():
                    between = interpolate({(c,): times[c,] for c in (low, high)}, (count,))
                    error = abs(between / times[count,] - 1)
                    if error <= TOLERANCE:
                        worst = max(worst, error)
                    else:
                        gaps[kind] += [(low, count), (count, high)]
        self._report(1.0)
        entries = summarise(self._records, self._kinds)
        constant = constant_rest(self._records, entries, self._kinds)
        return WorkloadTable(self._workload, entries, constant, worst)

    @staticmethod
    def _middles(gaps: Mapping[str, Sequence[Gap]], step: int) -> dict[str, dict[Gap, int]]:
        """Return what stands between the ends of gaps; kinds and gaps with nothing between are left out."""
        found = {
            kind: {gap: count for gap in rows if (count := middle(*gap, step)) is not None}
            for kind, rows in gaps.items()
        }
        return {kind: rows for kind, rows in found.items() if rows}

    def _stage(self, stage: int, options: Mapping[str, Sequence[Size]]) -> Iterator[None]:
        """Measure probes that show each of these options in enough places."""
        needed = max(len(sizes) / self._kinds.count(kind) for kind, sizes in options.items())
        probes = max(self._effort.probes, math.ceil(self._effort.placements * needed))
        rng = random.Random(f"{self._workload.name} {stage}")
        decks = {kind: Deck(options[kind], rng) for kind in self._anatomy.kinds}
        for number in range(probes):
            sizes = replace(deal(decks, self._stack, self._anatomy, rng), hidden=self._hidden)
            record = self._journal.find(self._workload.name, self._shown(sizes), stage, number)
            if record is None:
                record = self._measure(sizes, stage, number)
                self._journal.add(record)
            self._records.append(record)
            done = (number + 1) / probes
            self._report(1 - 0.5 ** (stage + done))
            yield

    def _shown(self, sizes: Structure) -> Structure:
        """Return the part of a structure that a probe has."""
        return Structure(sizes.blocks[: len(self._places)], sizes.hidden)

    def _measure(self, sizes: Structure, stage: int, number: int) -> ProbeRecord:
        """Build one smaller model and time it, whole and block by block."""
        model = apply_plan(self._model, leading_plan(self._model, sizes)).eval()
        spec = spec_for(self._model.config)
        layers = f"{spec.decoder}.{spec.layers}"
        shown = self._shown(sizes)
        if self._compiled:
            compile_blocks(model)
        first = [(place.layer, spec.block(place.kind)) for place in self._places]
        marked = [
            (layer, block.modules[0] if block.parallel else block.before or block.modules[0]) for layer, block in first
        ]
        norms = [model.get_submodule(f"{layers}.{layer}.{path}") for layer, path in marked]
        norms.append(model.get_submodule(f"{spec.decoder}.{spec.final_norm}"))
        with quiet_process():
            runner = Runner(model, self._workload)
            probe = Probe(norms, runner.clock)
            for _ in range(self._effort.warmup):
                runner.sample()
            tries: list[ProbeRecord] = []
            while not tries or (not tries[-1].calm and len(tries) < self._effort.tries):
                plain, marked, blocks = self._samples(runner, probe)
                tries.append(ProbeRecord(self._workload.name, stage, number, shown, plain, marked, blocks))
        return min(tries, key=lambda record: statistics.median(record.plain))

    def _samples(self, runner: Runner, probe: Probe) -> tuple[list[float], list[float], list[list[float]]]:
        """Return passes without and with marks in alternation: the whole times of both, and the blocks' of the
        latter.
        """
        plain, marked, blocks = [], [], []
        for _ in range(self._effort.repeats):
            plain.append(round(runner.sample(), 6))  # to the nanosecond, as good as any clock
            with probe.attached():
                whole, parts = probe.sample(runner)
            marked.append(round(whole, 6))
            blocks.append([round(part, 6) for part in parts])
        return plain, marked, blocks


def stack_size(model: PreTrainedModel) -> int:
    """Return decoder layers of a probe: all, or as many as no cache can hold."""
    spec, anatomy = spec_for(model.config), anatomy_of(model.config)
    layers = model.get_submodule(f"{spec.decoder}.{spec.layers}")
    size = sum(tensor.numel() * tensor.element_size() for tensor in layers.parameters()) / anatomy.layers
    all_kinds = 1 + max(anatomy[anatomy.of_kind(kind)[0]].layer for kind in anatomy.kinds)
    return min(anatomy.layers, max(8, all_kinds, math.ceil(STACK_BYTES / size)))


def leading_plan(model: PreTrainedModel, structure: Structure) -> PruningPlan:
    """Return the plan that keeps the first units of everything: time does not depend on which."""
    anatomy, model_type = anatomy_of(model.config), spec_for(model.config).model_type
    order = Ranking.identity(anatomy)
    return PruningPlan.from_structure(structure, order, anatomy, model="latency probe", model_type=model_type)
