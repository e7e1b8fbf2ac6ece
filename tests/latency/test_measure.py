"""Measuring on tiny models: which options are measured, that a stopped measurement goes on, what is left behind."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from multipruner.checkpoint.cut import apply_plan
from multipruner.commands import latency as command
from multipruner.core.errors import ConfigError, OutputError
from multipruner.core.families import anatomy_of
from multipruner.core.latency_table import LatencyTable, Workload
from multipruner.core.structure import GONE, Size
from multipruner.engine.prunable import Prunable
from multipruner.latency.bench import Effort, measure_table, shapes_of
from multipruner.latency.deal import Deck, deal
from multipruner.latency.environment import environment_of
from multipruner.latency.grids import coarse_grid, first_options, middle
from multipruner.latency.marks import Probe
from multipruner.latency.timing import Runner, quiet_process, room_for_sizes, time_model, time_side_by_side
from tests.support.layers import structure_of, uniform
from tests.support.tiny import (
    FAMILIES,
    MORE,
    plan_for,
    random_ids,
    random_plan,
    random_structure,
    tiny_model,
    tiny_tokenizer,
)

LITTLE = Effort(probes=2, placements=2, repeats=2, warmup=1, tries=1)
PREFILL, DECODE = Workload("prefill", 2, 6), Workload("decode", 1, 20)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_option_is_measured(family: str) -> None:
    model = tiny_model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    anatomy = anatomy_of(model.config)
    (kv_groups, each), (channels,) = anatomy[0].dense, anatomy[1].dense
    table = measure_table(model, [PREFILL, DECODE], channel_step=16, effort=LITTLE)
    assert table.workloads == (PREFILL.name, DECODE.name)
    assert table.shapes == shapes_of(model)
    for name in table.workloads:
        row = table.row(name)
        attention, mlp = row.blocks["attention"], row.blocks["mlp"]
        pairs = product(range(1, kv_groups + 1), sorted({1, each}))
        assert list(attention) == [GONE, *pairs], "every number of KV groups, with one query head and with all"
        assert {GONE, (16,), (channels,)} <= set(mlp)
        assert all(size in (GONE, (channels,)) or size[0] % 16 == 0 for size in mlp)
        assert all(entry.milliseconds > 0 and entry.samples >= 4 for entry in (*attention.values(), *mlp.values()))
        structure = random_structure(anatomy, 3, partial=True)
        assert table.milliseconds(structure, anatomy, name) > table.constant(name) >= 0
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("variant", ["cohere", "falcon-40b"])
def test_blocks_side_by_side_are_told_apart(variant: str) -> None:
    """On one norm, and on two that are called before both blocks."""
    long = Workload("prefill", 8, 64)  # a block takes longer than a busy machine to look at the clock
    table = measure_table(tiny_model(**MORE[variant]), [long], channel_step=32, effort=LITTLE)
    blocks = table.row(long.name).blocks
    for kind, whole in (("attention", (2, 2)), ("mlp", (40,))):
        assert blocks[kind][whole].milliseconds > blocks[kind][GONE].milliseconds > 0


def test_a_stopped_measurement_goes_on(tmp_path: Path) -> None:
    model, partial = tiny_model("llama"), tmp_path / "table.json.partial"

    def stop_after(count: int) -> None:
        seen: list[str] = []

        def progress(name: str, share: float) -> None:
            seen.append(name)
            if len(seen) == count:
                raise KeyboardInterrupt

        measure_table(model, [PREFILL, DECODE], channel_step=20, effort=LITTLE, progress=progress, resume_from=partial)

    with pytest.raises(KeyboardInterrupt):
        stop_after(4)
    kept = partial.read_text()
    assert len(kept.splitlines()) >= 4
    first = measure_table(model, [PREFILL, DECODE], channel_step=20, effort=LITTLE, resume_from=partial)
    assert partial.read_text().startswith(kept), "what was there is not measured again"
    whole = partial.read_text()
    second = measure_table(model, [PREFILL, DECODE], channel_step=20, effort=LITTLE, resume_from=partial)
    assert partial.read_text() == whole
    assert first.rows == second.rows
    with pytest.raises(OutputError, match="channel_step: 20 -> 10"):
        measure_table(model, [PREFILL], channel_step=10, effort=LITTLE, resume_from=partial)


def test_progress_only_rises_and_ends() -> None:
    shares: list[float] = []
    measure_table(
        tiny_model("qwen2"), [PREFILL, DECODE], effort=LITTLE, progress=lambda name, share: shares.append(share)
    )
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_the_command_writes_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, output = tmp_path / "model", tmp_path / "table.json"
    model = tiny_model("llama", layers=16)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    flags = ["--model", str(folder), "--output", str(output), "--device", "cpu", "--dtype", "float32"]
    work = ["--prompt", "8", "--cached", "9", "--channel-step", "40", "--attn-implementation", "eager"]
    assert command.run([*flags, *work]) == 0
    table = LatencyTable.read(output)
    assert table.workloads == ("prefill-b1-t8", "decode-b1-t9")
    assert table.environment["attn_implementation"] == "eager"
    assert table.environment["threads"] == torch.get_num_threads()
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["table.json"]
    assert "prefill-b1-t8" in capsys.readouterr().out
    model.set_attn_implementation("sdpa")
    warning = table.warning(environment_of(model))
    assert warning is not None
    assert "attn_implementation: eager -> sdpa" in warning
    with pytest.raises(ConfigError, match="--attn-implementation nonsense"):
        command.run([*flags, "--overwrite", "--attn-implementation", "nonsense"])


@pytest.mark.parametrize("workload", [PREFILL, DECODE], ids=lambda workload: workload.phase)
def test_blocks_and_rest_make_up_the_whole_pass(workload: Workload) -> None:
    model = tiny_model("llama")
    pruned = apply_plan(model, random_plan(model, 5))
    layers = pruned.get_submodule("model.layers").children()
    norms = [norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    norms.append(pruned.get_submodule("model.norm"))  # pyright: ignore[reportArgumentType]
    expected = pruned(random_ids()).logits
    with quiet_process():
        runner = Runner(pruned, workload)
        probe = Probe(norms, runner.clock)  # pyright: ignore[reportArgumentType]
        with probe.attached():
            for _ in range(20):
                whole, blocks = probe.sample(runner)
                assert len(blocks) == len(norms) - 1
                assert min(blocks) > 0
                assert sum(blocks) < whole
    assert not any(vars(norm)["_forward_pre_hooks"] for norm in norms)
    assert torch.equal(pruned(random_ids()).logits, expected)


def test_decoding_keeps_about_its_cache_length() -> None:
    model = tiny_model("llama")
    with quiet_process():
        runner = Runner(model, Workload("decode", 3, 30))
        text: Any = runner._pass
        lengths = []
        for _ in range(40):
            runner.sample()
            lengths.append(text._cache.get_seq_length() - 1)
    assert min(lengths) == 22
    assert max(lengths) == 37
    assert sum(lengths[:32]) / 32 == pytest.approx(30, abs=1)


def test_models_are_timed_side_by_side() -> None:
    model = tiny_model("llama", layers=2)
    tall = tiny_model("llama", layers=16)
    timings = time_side_by_side({"low": model, "tall": tall}, PREFILL, rounds=9)
    assert list(timings) == ["low", "tall"]
    assert timings["low"].samples == 9
    assert timings["low"].best_ms <= timings["low"].median_ms
    assert timings["low"].best_ms < timings["tall"].best_ms, "eight times the layers take longer"
    assert time_model(model, DECODE, rounds=3).samples == 3


@pytest.mark.parametrize(("room", "compiled"), [(False, 8), (True, 12)])
def test_every_size_is_compiled_where_there_is_room(room: bool, compiled: int) -> None:
    """The first line shows what would happen without."""
    model = tiny_model("llama", layers=12)
    pruned = apply_plan(model, plan_for(model, structure_of(*((4, 2, 10 + i) for i in range(12)))))
    graphs = []

    def backend(graph: torch.fx.GraphModule, example: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    for layer in pruned.get_submodule("model.layers").children():
        layer.get_submodule("mlp").compile(backend=backend)
    with room_for_sizes(room), torch.inference_mode():
        pruned(random_ids())
    assert len(graphs) == compiled


@given(st.integers(1, 4000), st.integers(1, 600))
def test_grids_reach_from_a_step_to_the_full_width(full: int, step: int) -> None:
    widths = coarse_grid(full, step)
    assert widths == sorted(set(widths))
    assert widths[0] == min(step, full)
    assert widths[-1] == full
    assert all(width % step == 0 for width in widths[:-1])
    assert len(widths) <= 9
    for low, high in pairwise(widths):
        found = middle(low, high, step)
        between = [width for width in range(step, full, step) if low < width < high]
        assert found in between if between else found is None


@given(st.integers(1, 12), st.integers(1, 9), st.integers(1, 4000), st.integers(1, 600))
def test_first_options_are_all_combinations_of_some_counts_of_every_axis(
    groups: int, queries: int, channels: int, step: int
) -> None:
    some = sorted({1, (queries + 1) // 2, queries})
    expected = [GONE, *((g, q) for g in range(1, groups + 1) for q in some)]
    anatomy = uniform(1, 1, 1, 1)
    assert first_options("attention", (groups, queries), step, anatomy) == expected
    assert first_options("mlp", (channels,), step, anatomy) == [
        GONE,
        *((width,) for width in coarse_grid(channels, step)),
    ]


@given(st.integers(1, 40), st.integers(1, 12), st.sets(st.integers(1, 50), min_size=1), st.integers(0, 99))
def test_dealt_layers_show_options_evenly_and_never_vanish(
    layers: int, groups: int, widths: set[int], seed: int
) -> None:
    rng = random.Random(seed)
    anatomy = uniform(layers + 2, 2 * groups, groups, 50)
    options: dict[str, list[Size]] = {
        "attention": [GONE, *((number, 2) for number in range(1, groups + 1))],
        "mlp": [GONE, *((width,) for width in sorted(widths))],
    }
    decks = {kind: Deck(sizes, rng) for kind, sizes in options.items()}
    structure = deal(decks, layers, anatomy, rng)
    assert structure.fits_in(anatomy.dense)
    assert anatomy.living_layers(structure) == list(range(layers)), "none of the probe vanishes, the others are gone"
    shown = [structure[number] for number in anatomy.of_kind("mlp")[:layers]]
    counts = [shown.count(size) for size in options["mlp"]]
    assert max(counts) - min(counts) <= 1


@pytest.mark.slow
def test_a_table_predicts_real_models() -> None:
    """Loose bounds: other programs may run beside. ``benchmarks/latency.py`` gives the numbers of a quiet machine."""
    from multipruner.config.recipe import Recipe
    from multipruner.engine.precision import Precision
    from multipruner.recipes import mapping_for
    from multipruner.sources.dense import load_dense
    from multipruner.sources.resolve import resolve

    recipe = Recipe.build(mapping_for("llama"))
    model, _ = load_dense(resolve(recipe, print), recipe)
    Precision.of(model).held(model)
    workload = Workload("prefill", 1, 128)
    table = measure_table(model, [workload])
    anatomy = Prunable.of(model).anatomy
    structure = random_structure(anatomy, 7)
    models = {"dense": model, "smaller": apply_plan(model, plan_for(model, structure))}
    timings = time_side_by_side(models, workload)
    smaller, dense = (table.milliseconds(one, anatomy, workload.name) for one in (structure, anatomy.dense))
    assert smaller / dense == pytest.approx(timings["smaller"].best_ms / timings["dense"].best_ms, rel=0.15)
