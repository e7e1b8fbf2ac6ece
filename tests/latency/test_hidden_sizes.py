"""Tables of several hidden sizes: a table of one is what it was, blocks of a narrower stream are really narrower."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multipruner.commands.main import main
from multipruner.config.counts import narrower_sizes
from multipruner.core.errors import ConfigError, UnsupportedModelError
from multipruner.core.families import anatomy_of
from multipruner.core.latency_table import Entry, LatencyTable, Workload, WorkloadTable
from multipruner.core.structure import GONE, Size, Structure
from multipruner.latency import bench
from multipruner.latency.asked import narrower_than
from multipruner.latency.bench import Effort, measure_table
from multipruner.latency.timing import Runner
from tests.support.layers import uniform
from tests.support.tiny import MORE, random_structure, tiny_model, tiny_tokenizer

LITTLE = Effort(probes=2, placements=2, repeats=2, warmup=1, tries=1)
PREFILL, DECODE = Workload("prefill", 2, 6), Workload("decode", 1, 20)
SHAPES: dict[str, Any] = {"model_type": "llama", "hidden": 48, "kv_groups": 2, "queries": 2, "channels": 40}
SIZES: dict[str, list[Size]] = {"attention": [GONE, (1, 2), (2, 2)], "mlp": [GONE, (8,), (40,)]}
ANATOMY = uniform(3, 4, 2, 40)
entries = st.builds(Entry, st.floats(0.001, 1e4), st.floats(0, 3), st.integers(1, 1000))


@st.composite
def tables(draw: st.DrawFn) -> LatencyTable:
    """Tables of two workloads at the model's own hidden size, 48, and some narrower ones."""
    rows: dict[int, dict[str, WorkloadTable]] = {}
    for hidden in (48, *draw(st.sets(st.integers(1, 47), max_size=3))):
        rows[hidden] = {}
        for workload in (PREFILL, DECODE):
            blocks = {kind: {size: draw(entries) for size in sizes} for kind, sizes in SIZES.items()}
            rows[hidden][workload.name] = WorkloadTable(workload, blocks, draw(entries), draw(st.floats(0, 1)))
    own = rows.pop(48)
    return LatencyTable(SHAPES, {"device": "cpu"}, "2026-01-02", own, rows)


@settings(max_examples=40)
@given(tables())
def test_narrower_streams_stand_behind_what_a_table_was(table: LatencyTable) -> None:
    text, alone = table.to_json(), replace(table, narrower={}).to_json()
    assert LatencyTable.from_json(text) == table and LatencyTable.from_json(text).to_json() == text
    record = json.loads(text)
    assert record["version"] == 2
    sizes = [each["hidden"] for each in record.pop("narrower", [])]
    assert (48, *sizes) == table.hidden_sizes == tuple(sorted(table.hidden_sizes, reverse=True))
    assert json.dumps(record, indent=1) + "\n" == alone, "what knows no hidden sizes reads the same bytes"
    assert (text == alone) == (not table.narrower)


@settings(max_examples=40)
@given(tables(), st.integers(0, 99))
def test_a_structure_takes_the_milliseconds_of_its_hidden_size(table: LatencyTable, seed: int) -> None:
    drawn = random_structure(ANATOMY, seed).blocks
    pairs = zip(ANATOMY, drawn, strict=True)
    blocks = tuple(size if size in SIZES[place.kind] else place.dense for place, size in pairs)
    for name in table.workloads:
        for hidden in (None, *table.hidden_sizes):
            row = table.rows[name] if hidden in (None, 48) else table.narrower[hidden][name]
            expected = row.constant.milliseconds
            for place, size in zip(ANATOMY, blocks, strict=True):
                if any(blocks[number] for number in ANATOMY.of_layer(place.layer)):
                    expected += row.blocks[place.kind][size].milliseconds
            assert table.milliseconds(Structure(blocks, hidden), ANATOMY, name) == pytest.approx(expected, rel=1e-12)


def _table(*narrower: int) -> LatencyTable:
    entry = Entry(1.0, 0.0, 1)
    row = WorkloadTable(PREFILL, {kind: dict.fromkeys(sizes, entry) for kind, sizes in SIZES.items()}, entry)
    rows = {PREFILL.name: row}
    return LatencyTable(SHAPES, {}, "2026", rows, dict.fromkeys(narrower, rows))


def test_a_hidden_size_that_was_not_measured_is_refused_with_those_that_were() -> None:
    for table, there in ((_table(16, 32), "48, 32, 16"), (_table(), "48")):
        with pytest.raises(ConfigError, match=rf"no hidden size 24; it has {there} \(multipruner latency --hidden-"):
            table.milliseconds(Structure(ANATOMY.dense.blocks, 24), ANATOMY, PREFILL.name)


@pytest.mark.parametrize(
    "narrower",
    [
        [{"hidden": 48}], [{"hidden": 64}], [{"hidden": 0}], [{"hidden": True}], [{"hidden": "32"}], [{"hidden": 32.0}],
        [{"hidden": 32}, {"hidden": 32}], [{"hidden": 32, "workloads": []}], [{}], {"32": []}, 5, [[]],
    ],
)  # fmt: skip
def test_hidden_sizes_that_cannot_be_make_no_table(narrower: Any) -> None:
    record = json.loads(_table(32).to_json())
    rows = record["workloads"]
    if isinstance(narrower, list):
        narrower = [{"workloads": rows, **each} if isinstance(each, dict) and each else each for each in narrower]
    with pytest.raises(ConfigError, match="not a latency table"):
        LatencyTable.from_json(json.dumps({**record, "narrower": narrower}))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_every_option_is_measured_in_really_narrower_models(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, built = tiny_model(family), list[tuple[int, ...]]()

    class Seen(Runner):
        def __init__(self, model: Any, workload: Workload) -> None:
            super().__init__(model, workload)
            layers = list(model.get_submodule("model.layers").named_modules())
            inputs = {part.weight.shape[1] for name, part in layers if name.endswith(("q_proj", "up_proj"))}
            outputs = {part.weight.shape[0] for name, part in layers if name.endswith(("o_proj", "down_proj"))}
            embedded, head = model.get_input_embeddings().weight.shape[1], model.get_output_embeddings().weight.shape[1]
            built.append(tuple({embedded, head, *inputs, *outputs}))

    monkeypatch.setattr(bench, "Runner", Seen)
    shares: list[float] = []
    table = measure_table(
        model, [PREFILL, DECODE], channel_step=16, hidden_sizes=(32, 16), effort=LITTLE,
        progress=lambda name, share: shares.append(share),
    )  # fmt: skip
    assert table.hidden_sizes == (48, 32, 16)
    assert built[:3] == [(48,), (32,), (16,)], "they take turns"
    assert {len(each) for each in built} == {1} and {each[0] for each in built} == {48, 32, 16}
    assert shares == sorted(shares) and shares[-1] == 1.0
    anatomy = anatomy_of(model.config)
    for name in table.workloads:
        for hidden in table.hidden_sizes:
            row = table.row(name, hidden)
            assert set(row.blocks["attention"]) == set(table.row(name).blocks["attention"])
            assert {GONE, (16,), (40,)} <= set(row.blocks["mlp"])
            structure = replace(random_structure(anatomy, 3), hidden=hidden)
            assert table.milliseconds(structure, anatomy, name) > table.constant(name, hidden) >= 0
    assert LatencyTable.from_json(table.to_json()) == table


def test_what_was_measured_at_one_hidden_size_is_the_same_beside_others(tmp_path: Path) -> None:
    """From the same probes: a table of the model's own hidden size alone is, byte for byte, what it was."""
    model, partial = tiny_model("llama"), tmp_path / "table.json.partial"
    alone = measure_table(model, [PREFILL], channel_step=20, effort=LITTLE, resume_from=partial)
    kept = partial.read_text()
    assert "hidden" not in kept.partition("\n")[2]
    both = measure_table(model, [PREFILL], channel_step=20, hidden_sizes=(32,), effort=LITTLE, resume_from=partial)
    whole = partial.read_text()
    assert whole.startswith(kept) and len(whole) > len(kept), "what was there is not measured again"
    assert replace(both, narrower={}, date=alone.date).to_json() == alone.to_json()
    again = measure_table(model, [PREFILL], channel_step=20, hidden_sizes=(32,), effort=LITTLE, resume_from=partial)
    assert partial.read_text() == whole and again.narrower == both.narrower


@pytest.mark.parametrize(
    ("asked", "step", "expected"),
    [
        (None, 32, ()), ("48", 32, ()), ("48,32", 32, (32,)), (" 16, 32 ,16", 16, (32, 16)), ("auto", 16, (32,)),
        ("auto", 4, (44, 40, 36, 32, 28)),
    ],
)  # fmt: skip
def test_hidden_sizes_are_read(asked: str | None, step: int, expected: tuple[int, ...]) -> None:
    assert narrower_than(tiny_model("llama").config, asked, step) == expected
    if asked == "auto":
        assert expected == narrower_sizes(48, step)


@given(st.integers(1, 2000), st.integers(1, 600))
def test_auto_tries_multiples_of_the_step_above_half(whole: int, step: int) -> None:
    assert narrower_sizes(whole, step) == tuple(n for n in range(whole - 1, whole // 2, -1) if n % step == 0)


@pytest.mark.parametrize("asked", ["", "40", "0", "-32", "64", "32,x", "32,", "3.2e1", "auto,32", "9" * 5000])
def test_hidden_sizes_that_no_run_can_ask_for_are_refused(asked: str) -> None:
    with pytest.raises(ConfigError, match="give multiples of --hidden-step 32 up to the model's 48"):
        narrower_than(tiny_model("llama").config, asked, 32)


def test_auto_without_a_narrower_size_is_refused_rather_than_measured_in_vain() -> None:
    assert narrower_sizes(48, 64) == ()
    with pytest.raises(ConfigError, match=r"no multiple of --hidden-step 64 .* smaller --hidden-step"):
        narrower_than(tiny_model("llama").config, "auto", 64)


@pytest.mark.parametrize(("hidden", "at"), [(32, ", hidden size 32"), (48, ""), (None, "")])
def test_a_size_that_is_missing_is_named_with_where_it_is_missing(hidden: int | None, at: str) -> None:
    table = _table(32)
    with pytest.raises(ConfigError, match=f"table, {PREFILL.name}{at}, MLP: size 4000 was not measured"):
        table.block_milliseconds("mlp", (4000,), PREFILL.name, hidden)


def test_a_family_whose_stream_cannot_be_narrower_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="give no --hidden-size"):
        narrower_than(tiny_model(**MORE["gpt2"]).config, "32", 32)


def test_the_command_measures_hidden_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, output = tmp_path / "model", tmp_path / "table.json"
    tiny_model("llama", layers=4).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    flags = ["latency", "--model", str(folder), "--output", str(output), "--channel-step", "40", "--prompt", "8",
             "--cached", "9", "--batch", "2"]  # fmt: skip
    assert main([*flags, "--hidden-sizes", "auto", "--hidden-step", "16"]) == 0
    table = LatencyTable.read(output)
    assert table.hidden_sizes == (48, 32) and table.workloads == ("prefill-b2-t8", "decode-b2-t9")
    assert "hidden size" in capsys.readouterr().out
    assert main([*flags, "--overwrite", "--hidden-sizes", "48"]) == 0
    assert LatencyTable.read(output).narrower == {} and "narrower" not in output.read_text()
    assert "hidden size" not in capsys.readouterr().out
    assert main([*flags, "--overwrite", "--hidden-sizes", "40"]) == 2
    assert "multiples of --hidden-step 32" in capsys.readouterr().err
    assert main([*flags, "--overwrite", "--hidden-sizes", "32", "--runtime", "openvino"]) == 2
    assert "--hidden-sizes: with --runtime transformers only" in capsys.readouterr().err
