"""Filling a latency table: every block option timed where it will run, inside the forward pass of a smaller model.

A *probe* is a really pruned model whose layers hold a random draw of the options; time marks at the borders of its
blocks time all of them in one pass (:class:`~multipruner.latency.marks.Probe`). So weights stream from memory as in
use, every option stands in many places and among many neighbours, a drift of the machine hits all alike, and what is
measured adds up to the whole pass by construction. Passes without marks alternate with marked ones: from them come the
constant rest and what the marks themselves cost.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

from transformers import PreTrainedModel

from multipruner.checkpoint.cut import apply_plan
from multipruner.core.families import dense_structure, dimensions, spec_for
from multipruner.core.latency_table import LatencyTable, Shapes, Width, Workload, WorkloadTable, interpolate
from multipruner.core.plan import LayerRanking, PruningPlan, Ranking
from multipruner.core.structure import KINDS, BlockKind, LayerSize, Structure

from .deal import Deck, deal
from .environment import environment_of
from .marks import Probe
from .probe_journal import ProbeJournal, ProbeRecord
from .summarise import constant_rest, summarise
from .timing import Runner, compile_blocks, quiet_process, room_for_sizes

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


Report = Callable[[str, float], None]
"""Told what is being measured, and the share of everything that is done."""


def shapes_of(model: PreTrainedModel) -> Shapes:
    """What a model's block times depend on, besides the size of the block."""
    dims, full = dimensions(model.config), dense_structure(model.config)[0]
    per_kv = full.query_heads // full.kv_heads
    model_type = spec_for(model.config).model_type
    return Shapes(model_type, dims.hidden_size, dims.head_dim, per_kv, full.kv_heads, full.channels, dims.vocab_size)


def measure_table(
    model: PreTrainedModel,
    workloads: Sequence[Workload],
    *,
    channel_step: int = 128,
    compiled: bool = False,
    effort: Effort | None = None,
    progress: Report | None = None,
    resume_from: Path | None = None,
) -> LatencyTable:
    """Measure every option of a model's blocks on its own device.

    Attention: every number of KV groups, and none. MLP: multiples of the channel step, and none; first a coarse grid,
    then the middles between its widths, and finer wherever interpolation is off by more than :data:`TOLERANCE`.

    Args:
        model: the dense model; not modified.
        workloads: what to time.
        channel_step: the finest difference between two measured widths.
        compiled: compile every block by itself (``torch.compile``) before timing it.
        effort: how much is measured; default: :class:`Effort`'s.
        progress: told after every probe.
        resume_from: a file that keeps every probe as it is measured; what it already holds is not measured again.

    Raises:
        OutputError: when that file cannot be used, or is of another model, machine or setting.
        UnsupportedModelError: when the model's family has no row.
    """
    effort = effort or Effort()
    environment, shapes = environment_of(model, compiled=compiled), shapes_of(model)
    identity = {**asdict(shapes), **environment, **asdict(effort), "channel_step": channel_step}
    with ProbeJournal(resume_from, identity) as journal, room_for_sizes(compiled):
        rows: dict[str, WorkloadTable] = {}
        for number, workload in enumerate(workloads):

            def report(share: float, number: int = number, name: str = workload.name) -> None:
                if progress is not None:
                    progress(name, (number + share) / len(workloads))

            bench = _Bench(model, workload, effort, compiled, journal, report)
            rows[workload.name] = bench.table(channel_step)
    return LatencyTable(shapes, environment, datetime.now(UTC).isoformat(timespec="seconds"), rows)


def coarse_grid(full: int, step: int) -> list[Width]:
    """Widths to start from: multiples of the step from one step to the full width, which always belongs to them."""
    widths = [*range(step, full, step), full]
    count = min(len(widths), max(5, min(9, len(widths) // 4)))
    if count == 1:
        return widths
    return sorted({widths[round(i * (len(widths) - 1) / (count - 1))] for i in range(count)})


def middle(low: Width, high: Width, step: int) -> Width | None:
    """The multiple of the step nearest to the middle between two widths; ``None`` when there is none between them."""
    width = round((low + high) / 2 / step) * step
    return next((w for w in (width, width - step, width + step) if low < w < high), None)


class _Bench:
    """The measurement of one workload."""

    def __init__(
        self,
        model: PreTrainedModel,
        workload: Workload,
        effort: Effort,
        compiled: bool,
        journal: ProbeJournal,
        report: Callable[[float], None],
    ) -> None:
        self._model, self._workload, self._effort = model, workload, effort
        self._compiled, self._journal, self._report = compiled, journal, report
        self._dense = dense_structure(model.config)
        self._records: list[ProbeRecord] = []
        self._stack = stack_size(model)

    def table(self, step: int) -> WorkloadTable:
        full = self._dense[0]
        widths = coarse_grid(full.channels, step)
        self._stage(0, [*range(full.kv_heads + 1)], [0, *widths])
        gaps, stage, worst = list(pairwise(widths)), 0, 0.0
        while middles := {gap: found for gap in gaps if (found := middle(*gap, step)) is not None}:
            stage += 1
            # the full widths again: what is measured later is seen beside what was measured before
            self._stage(stage, [full.kv_heads], [*middles.values(), full.channels])
            times = {width: entry.milliseconds for width, entry in summarise(self._records)["mlp"].items()}
            gaps = []
            for (low, high), found in middles.items():
                error = abs(interpolate({w: times[w] for w in (low, high)}, found) / times[found] - 1)
                if error <= TOLERANCE:
                    worst = max(worst, error)
                else:
                    gaps += [(low, found), (found, high)]
        self._report(1.0)
        entries = summarise(self._records)
        constant = constant_rest(self._records, entries)
        return WorkloadTable(self._workload, entries["attention"], entries["mlp"], constant, worst)

    def _stage(self, stage: int, attention: Sequence[Width], mlp: Sequence[Width]) -> None:
        """Probes that show each of these options in enough places."""
        needed = self._effort.placements * max(len(attention), len(mlp)) / self._stack
        probes = max(self._effort.probes, math.ceil(needed))
        rng = random.Random(f"{self._workload.name} {stage}")
        decks = {"attention": Deck(attention, rng), "mlp": Deck(mlp, rng)}
        for number in range(probes):
            sizes = deal(decks["attention"], decks["mlp"], self._stack, self._dense[0], rng)
            record = self._journal.find(self._workload.name, sizes, stage, number)
            if record is None:
                record = self._measure(sizes, stage, number)
                self._journal.add(record)
            self._records.append(record)
            done = (number + 1) / probes
            self._report(1 - 0.5 ** (stage + done))

    def _measure(self, sizes: Structure, stage: int, number: int) -> ProbeRecord:
        """Build one smaller model and time it, whole and block by block."""
        gone = (LayerSize(0, 0, 0),) * (len(self._dense) - len(sizes))
        model = apply_plan(self._model, _leading(self._model, Structure((*sizes.layers, *gone)))).eval()
        spec = spec_for(self._model.config)
        layers = f"{spec.decoder}.{spec.layers}"
        places: list[tuple[int, BlockKind]] = [(layer, kind) for layer in range(len(sizes)) for kind in KINDS]
        if self._compiled:
            compile_blocks(model)
        norms = [model.get_submodule(f"{layers}.{layer}.{spec.block(kind).norms[0]}") for layer, kind in places]
        norms.append(model.get_submodule(f"{spec.decoder}.{spec.final_norm}"))
        with quiet_process():
            runner = Runner(model, self._workload)
            probe = Probe(norms, runner.clock)
            for _ in range(self._effort.warmup):
                runner.sample()
            tries: list[ProbeRecord] = []
            while not tries or (not tries[-1].calm and len(tries) < self._effort.tries):
                plain, marked, blocks = self._samples(runner, probe)
                tries.append(ProbeRecord(self._workload.name, stage, number, sizes, plain, marked, blocks))
        return min(tries, key=lambda record: statistics.median(record.plain))

    def _samples(self, runner: Runner, probe: Probe) -> tuple[list[float], list[float], list[list[float]]]:
        """Passes without and with marks in alternation: the whole times of both, and the blocks' of the latter."""
        plain, marked, blocks = [], [], []
        for _ in range(self._effort.repeats):
            plain.append(round(runner.sample(), 6))  # to the nanosecond, as good as any clock
            with probe.attached():
                whole, parts = probe.sample(runner)
            marked.append(round(whole, 6))
            blocks.append([round(part, 6) for part in parts])
        return plain, marked, blocks


def stack_size(model: PreTrainedModel) -> int:
    """Decoder layers of a probe: all, or as many as no cache can hold."""
    spec, total = spec_for(model.config), len(dense_structure(model.config))
    layer = model.get_submodule(f"{spec.decoder}.{spec.layers}.0")
    size = sum(tensor.numel() * tensor.element_size() for tensor in layer.parameters())
    return min(total, max(8, math.ceil(STACK_BYTES / size)))


def _leading(model: PreTrainedModel, structure: Structure) -> PruningPlan:
    """The plan that keeps the first heads and channels: time does not depend on which."""
    dense = dense_structure(model.config)
    order = Ranking(tuple(LayerRanking(tuple(range(s.kv_heads)), tuple(range(s.channels))) for s in dense))
    model_type = spec_for(model.config).model_type
    return PruningPlan.from_structure(structure, order, dense, model="latency probe", model_type=model_type)
