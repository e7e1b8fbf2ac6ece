"""Tables measured in the programs that serve: sums recover known times, what is exported computes the same."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from multipruner.checkpoint.cut import apply_plan
from multipruner.commands import latency as command
from multipruner.commands.main import main
from multipruner.core.errors import ConfigError, OutputError, UnsupportedModelError
from multipruner.core.families import anatomy_of
from multipruner.core.latency_table import LatencyTable, Workload
from multipruner.core.structure import GONE, Anatomy, Structure
from multipruner.jobs.record import latency_record
from multipruner.jobs.setting import Setting
from multipruner.latency.bench import shapes_of
from multipruner.latency.probe_journal import ProbeRecord
from multipruner.runtimes import bench
from multipruner.runtimes.bench import measure_served, options_of, probes_of, summarised
from multipruner.runtimes.served import Served, exported, row_for, settings_for
from tests.support import tiny
from tests.support.gguf_cases import VOCABULARY, byte_level
from tests.support.layers import structure_of, uniform
from tests.support.served import SERVED

PREFILL, DECODE = Workload("prefill", 1, 12), Workload("decode", 3, 20)
PER_LAYER, CONSTANT = 0.25, 3.0


def true_time(structure: Structure, anatomy: Anatomy) -> float:
    """Milliseconds of a machine on which every size has its own, and every layer costs something."""
    groups = {GONE: 0.0, **{(g, q): 0.5 + g + 0.125 * q for g in range(1, 5) for q in range(1, 3)}}
    blocks = (groups[s] if p.kind == "attention" else 1.0 + s[0] / 16 if s else 0.0
              for p, s in zip(anatomy, structure, strict=True))  # fmt: skip
    return CONSTANT + sum(blocks) + PER_LAYER * len(anatomy.living_layers(structure))


@pytest.mark.parametrize("layers", [6, 5, 2])
def test_differences_of_whole_models_give_back_the_times_of_blocks(layers: int) -> None:
    anatomy = uniform(6, 8, 4, 64)
    probes = probes_of(anatomy, layers, 16)
    stack = probes[0].structure
    for n, place in enumerate(anatomy):
        stack = stack.replace(n, place.dense if place.layer < layers else GONE)
    whole, slow = true_time(stack, anatomy), [1.0, 1.5, 0.75]
    records = [
        ProbeRecord("w", 0, number, probe.structure, [true_time(probe.structure, anatomy) * each for each in slow],
                    [whole * each for each in slow], [])
        for number, probe in enumerate(probes)
    ]  # fmt: skip
    table = LatencyTable({}, {}, "", {PREFILL.name: summarised(PREFILL, records, probes, anatomy, layers)})
    assert all(entry.spread < 1e-9 for kind in table.row(PREFILL.name).blocks.values() for entry in kind.values())
    assert table.row(PREFILL.name).check < 1e-9, "these times are linear"
    for structure in (anatomy.dense, structure_of((0, 0, 0), (2, 1, 0), (8, 4, 64), (0, 0, 16), (0, 0, 0), (4, 2, 40))):
        predicted = table.milliseconds(structure, anatomy, PREFILL.name)
        assert predicted == pytest.approx(true_time(structure, anatomy), rel=1e-5)


def test_every_option_is_in_all_blocks_of_a_probe_and_one_attention_stays() -> None:
    anatomy = uniform(5, 8, 4, 64)
    probes = probes_of(anatomy, 4, 16)
    halves = [probe for probe in probes if probe.option is None]
    assert [anatomy.living_layers(probe.structure) for probe in halves] == [[0, 1]]
    options = [probe.option for probe in probes if probe.option]
    expected = [("attention", size) for size in (GONE, *options_of("attention", (4, 2), 16, anatomy))]
    assert options == [*expected, ("mlp", GONE), ("mlp", (16,)), ("mlp", (32,)), ("mlp", (48,))]
    assert len(expected) == 8 and ("attention", (4, 2)) not in expected
    for probe in probes[1:]:
        assert probe.option is not None
        changed = [n for n in range(len(anatomy)) if anatomy[n].layer < 4 and probe.structure[n] != anatomy[n].dense]
        assert changed == list(probe.changed) and len(changed) == (3 if probe.option[1] == GONE else 4)
        assert {probe.structure[n] for n in changed} == {probe.option[1]}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.tiny_model("llama", layers=3, vocab_size=VOCABULARY, hidden_size=64)


@pytest.mark.parametrize("rows", [((4, 2, 7), (0, 0, 40), (2, 1, 0)), ((2, 1, 24),) * 3], ids=["mixed", "alike"])
@pytest.mark.parametrize("runtime", SERVED)
def test_what_is_served_computes_what_transformers_do(
    runtime: str, rows: tuple[tuple[int, int, int], ...], model: Any, tmp_path: Path
) -> None:
    plan = tiny.plan_for(model, structure_of(*rows))
    small = apply_plan(model, plan).eval()
    path = exported(small, plan, byte_level(), tmp_path / "small", runtime, "f32")
    assert [each.name for each in (tmp_path / "small").iterdir()] == ["exported"], "weights stand there once"
    ids = torch.randint(4, 300, (1, 24), generator=torch.Generator().manual_seed(0))
    with Served.opened(runtime, path, settings_for([PREFILL, DECODE], VOCABULARY, 1, exact=True)) as served:
        assert all(0 < served.sample(workload) < 5e3 for workload in (PREFILL, DECODE, PREFILL))
        found = served.choices(ids[0].tolist(), 8)
    with torch.no_grad():
        logs = small(ids).logits[0, 7:].double().log_softmax(-1)
    assert [token for token, _ in found] == logs.argmax(-1).tolist()
    assert np.abs([value for _, value in found] - logs.amax(-1).numpy()).max() < 2e-2, "keys and values of 16 bits"


@pytest.mark.parametrize("runtime", SERVED)
def test_a_program_that_fails_is_one_line(runtime: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError) as error:
        Served.opened(runtime, tmp_path / "none", settings_for([PREFILL], VOCABULARY, 1))
    assert re.fullmatch(rf"{runtime} failed on this model \(exit code -?\d+\): .+", str(error.value))


def test_a_program_that_ends_is_one_line(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text("import sys\nprint('\"ready\"', flush=True)\nsys.stdin.readline()\nsys.exit('out of\\nmemory')\n")
    with (
        Served([sys.executable, str(script), "mine"], tmp_path, {}) as served,
        pytest.raises(OutputError, match=r"mine failed on this model \(exit code 1\): out of memory"),
    ):
        served.sample(PREFILL)


@pytest.mark.parametrize(
    "runtime", [pytest.param(*one.values, marks=[*one.marks, pytest.mark.slow]) for one in SERVED[:-1]] + SERVED[-1:]
)
def test_a_stopped_measurement_goes_on(
    runtime: str, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, partial, shares = tmp_path / "table", tmp_path / "table.partial", []

    def measured(most: int) -> LatencyTable:
        def progress(name: str, share: float) -> None:
            shares.append(share)
            if len(shares) == most:
                raise KeyboardInterrupt

        return measure_served(model, byte_level(), [PREFILL, DECODE], runtime, place=place, outtype="f32",
                              channel_step=20, repeats=2, progress=progress, resume_from=partial)  # fmt: skip

    with pytest.raises(KeyboardInterrupt):
        measured(3)
    kept = partial.read_text()
    table = measured(99)
    assert partial.read_text().startswith(kept) and shares[-1] == 1.0
    assert table.runtime == runtime and table.environment["dtype"] == "f32"
    anatomy = anatomy_of(model.config)
    for name in (PREFILL.name, DECODE.name):
        row = table.row(name)
        assert list(row.blocks["attention"]) == [GONE, (1, 1), (1, 2), (2, 1), (2, 2)]
        assert list(row.blocks["mlp"]) == [GONE, (20,), (40,)]
        assert table.milliseconds(anatomy.dense, anatomy, name) > 0
    assert list(tmp_path.iterdir()) == [partial], "no model is left"
    monkeypatch.setattr(bench.Served, "opened", None)
    assert measured(99).rows == table.rows, "nothing is measured again"


@pytest.mark.parametrize("runtime", SERVED[-1:])
def test_the_command_writes_a_table_that_a_run_reports_by(
    runtime: str, model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = tmp_path / "model", tmp_path / "tables" / "table.json"
    model.save_pretrained(folder)
    byte_level().save_pretrained(folder)
    line = ["latency", "--model", str(folder), "--output", str(output), "--runtime", runtime]
    work = ["--phase", "prefill", "--prompt", "12", "--channel-step", "40", "--repeats", "1"]
    assert main([*line, *work]) == 0
    table = LatencyTable.read(output)
    assert table.shapes == shapes_of(model) and table.environment["runtime"] == runtime
    assert f", f16, in {runtime}" in " ".join(capsys.readouterr().out.split())
    assert [path.name for path in output.parent.iterdir()] == ["table.json"]
    told: list[str] = []
    plan, setting = tiny.random_plan(model, 3), SimpleNamespace(latency=(table, "prefill-b1-t12"))
    latency = latency_record(cast("Setting", setting), plan, None, told.append)
    (row,) = latency["phases"].values()
    assert (latency["runtime"], latency["outtype"]) == (runtime, "f16") and set(row) == {
        "predicted_ms",
        "predicted_dense_ms",
    }
    assert f"the table of {runtime} predicts" in told[0], "nothing was timed in transformers"


def test_what_does_not_go_together_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    line = ["--model", "llama", "--output", str(tmp_path / "table.json")]
    for flags, said in (
        (["--outtype", "q8_0", "--repeats", "3"], "--outtype and --repeats: with --runtime openvino or llama.cpp only"),
        (["--runtime", "llama.cpp", "--compile"], "--compile: with --runtime transformers only"),
        (["--runtime", "openvino", "--device", "cuda"], "--device: with --runtime transformers only"),
    ):
        with pytest.raises(ConfigError, match=said):
            command.run([*line, *flags])
    monkeypatch.setattr("multipruner.runtimes.served.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install xllamacpp$"):
        command.run([*line, "--runtime", "llama.cpp"])
    monkeypatch.setattr("multipruner.runtimes.served.find_spec", lambda name: name)
    with pytest.raises(ConfigError, match="types f16, f32, bf16, q8_0, not int8"):
        row_for("llama.cpp", "int8")
    assert list(tmp_path.iterdir()) == []
