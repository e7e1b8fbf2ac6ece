"""The search command on a tiny model: folder, budget, warm start, kill at any point, several processes, refusals."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import multipruner
from multipruner.commands.main import main
from multipruner.config.recipe import Recipe
from multipruner.core.latency_table import Entry, LatencyTable, Workload, WorkloadTable
from multipruner.core.plan import PruningPlan, Ranking
from multipruner.core.structure import GONE, Structure
from multipruner.engine.objective import CalibrationObjective
from multipruner.engine.processes import Team
from multipruner.engine.prunable import Prunable
from multipruner.engine.spread_objective import SpreadObjective
from multipruner.jobs.search.budget import budget_of
from multipruner.jobs.search.files import read_history
from multipruner.jobs.search.losses import Losses, by_prefix
from multipruner.jobs.search.options import SearchOptions
from multipruner.latency.bench import shapes_of
from multipruner.search import Grid, Memo, evolution
from multipruner.search.genome import StructureSpace
from multipruner.search.grid import candidates
from multipruner.search.scoring import Scorer
from multipruner.storage.files import write_atomically
from tests.support.caches import cache_at
from tests.support.layers import structure_of
from tests.support.tiny import random_ids, random_structure, tiny_model, tiny_tokenizer

FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_model("llama", layers=4).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "text.txt").write_text(" ".join(f"w{4 + (n * n + n // 7) % 93}" for n in range(4000)))
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test starts cold."""
    cache_at(monkeypatch, tmp_path / "cache")
    return tmp_path / "cache"


def arguments(dense: Path, output: Path, *more: str) -> list[str]:
    text = str(dense / "text.txt")
    return [
        "search", "--model", str(dense), "--ratio", "0.3", "--calibration", text, "--eval-text", text,
        "--sequences", "4", "--length", "16", "--moments-sequences", "8", "--channel-group", "8",
        "--population", "8", "--generations", "2", "--output", str(output), *more,
    ]  # fmt: skip


def decisions(folder: Path) -> tuple[Any, ...]:
    """All that two equal searches have in common."""
    _, records = read_history(folder / "search.jsonl")
    history = [{k: v for k, v in r.items() if k not in ("computed", "seconds")} for r in records[:-1]]
    plan, front = (folder / "plan.json").read_bytes(), json.loads((folder / "front.json").read_text())
    return plan, front, history


@pytest.fixture(scope="module")
def finished(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        cache_at(patch, output.parent / "cache")
        assert main(arguments(dense, output)) == 0
    return output


def start(
    arguments: list[str],
    log: Path,
    environment: Mapping[str, str] | None = None,
    before: Callable[[], None] = lambda: None,
) -> Any:
    """The command in a process of its own, where something may be done before; what it prints goes to a file."""

    def work() -> None:
        os.environ.update(environment or {})
        before()
        stream = log.open("w", buffering=1)
        sys.stdout = sys.stderr = stream
        os._exit(main(arguments))  # without the parent's clean-up

    process = FORK.Process(target=work)
    process.start()
    return process


def rank_environments(size: int) -> list[dict[str, str]]:
    """What a launcher tells each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def signalled(owner: Any, name: str, count: int, number: signal.Signals = signal.SIGKILL) -> Callable[[], None]:
    """Have this process get a signal just after so many calls of a function."""

    def prepare() -> None:
        function, calls = getattr(owner, name), []

        def counted(*args: Any, **keywords: Any) -> Any:
            result = function(*args, **keywords)
            calls.append(1)
            if len(calls) == count:
                os.kill(os.getpid(), number)
            return result

        setattr(owner, name, counted)

    return prepare


def test_the_folder_is_a_run_within_the_budget_and_never_worse_than_its_seed(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names >= {"plan.json", "report.json", "front.json", "search.jsonl", "convergence.png", "model.safetensors"}
    assert not finished.with_name("finished.partial").exists()
    report = json.loads((finished / "report.json").read_text())
    plan = PruningPlan.from_json((finished / "plan.json").read_text())
    counted = sum(parameter.numel() for parameter in multipruner.load(finished).parameters())
    assert counted == report["parameters"]["after"] <= 0.7 * report["parameters"]["before"]
    front, found = json.loads((finished / "front.json").read_text()), report["search"]
    assert front["points"][front["picked"]]["structure"] == plan.structure.to_json()
    assert found["method"] == "evolution"
    assert found["losses"]["picked"]["choice"] <= found["losses"]["program"]["choice"]
    assert (found["loss_before_repair_of_all"] or found["loss"]) == found["losses"]["picked"]["calibration"]
    assert found["loss_held_out"] == found["losses"]["picked"]["held_out"]
    assert found["tokens"] == {"calibration": 64, "choice": 32, "held_out": 32}
    assert (finished / "convergence.png").read_bytes().startswith(b"\x89PNG")


def test_the_reported_losses_are_those_of_the_three_texts(finished: Path, dense: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    losses = report["search"]["losses"]["picked"]
    assert len({losses["calibration"], losses["choice"], losses["held_out"]}) == 3
    front = json.loads((finished / "front.json").read_text())
    assert front["points"][front["picked"]]["values"]["loss"] == losses["choice"], "the final is on held-out text"


def test_a_second_search_on_the_same_model_starts_warm(dense: Path, tmp_path: Path, capsys) -> None:
    assert main(arguments(dense, tmp_path / "first")) == 0
    assert main(arguments(dense, tmp_path / "second", "--generations", "3")) == 0
    assert "were evaluated before" in capsys.readouterr().out
    cold = read_history(tmp_path / "first" / "search.jsonl")[1]
    warm = read_history(tmp_path / "second" / "search.jsonl")[1]
    assert all(record["computed"] == 0 for record in warm[:3])
    assert [r["front"] for r in warm[:3]] == [r["front"] for r in cold[:3]]
    assert main(arguments(dense, tmp_path / "first")) == 0, "and the same command in the same folder"
    assert decisions(tmp_path / "first")[2] == [
        {k: v for k, v in r.items() if k not in ("computed", "seconds")} for r in cold[:-1]
    ]


def test_a_search_killed_at_any_moment_ends_with_the_same_decisions(
    finished: Path, dense: Path, tmp_path: Path
) -> None:
    output, log = tmp_path / "killed", tmp_path / "log"
    moments = [(Memo, "add", 6), (evolution, "save", 1), (Scorer, "_ask", 2), (evolution, "save", 1)]
    for owner, name, count in moments:  # among the seeds, after a generation, within one, after another
        process = start(arguments(dense, output), log, before=signalled(owner, name, count))
        process.join(120)
        assert process.exitcode == -signal.SIGKILL, log.read_text()
        assert not output.exists()
    assert main(arguments(dense, output)) == 0
    assert decisions(output) == decisions(finished)


def test_ctrl_c_says_how_to_go_on(dense: Path, tmp_path: Path) -> None:
    output, log = tmp_path / "stopped", tmp_path / "log"
    process = start(arguments(dense, output), log, before=signalled(evolution, "save", 1, signal.SIGINT))
    process.join(120)
    assert process.exitcode == 130
    assert log.read_text().endswith("multipruner: stopped; the same command goes on from here\n")
    assert not output.exists()
    assert (output.with_name("stopped.partial") / "nsga2.json").exists()


def test_two_processes_find_the_same_front_as_one(finished: Path, dense: Path, tmp_path: Path) -> None:
    output = tmp_path / "two"
    environments = rank_environments(2)
    processes = [start(arguments(dense, output), tmp_path / e["RANK"], e) for e in environments]
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0], (tmp_path / "0").read_text()
    assert decisions(output) == decisions(finished)
    assert (tmp_path / "1").read_text().strip() == "", "only rank 0 prints"
    assert json.loads((output / "report.json").read_text())["search"]["processes"] == 2


def test_a_process_that_dies_ends_the_job_with_a_message_and_a_resumable_state(
    finished: Path, dense: Path, tmp_path: Path
) -> None:
    output = tmp_path / "dying"
    environments = rank_environments(2)
    dies = signalled(Team, "_receive", 6)
    processes = [
        start(arguments(dense, output), tmp_path / e["RANK"], e, before)
        for e, before in zip(environments, (lambda: None, dies), strict=True)
    ]
    for process in processes:
        process.join(60)
    assert processes[1].exitcode == -signal.SIGKILL
    assert processes[0].exitcode == 2
    said = (tmp_path / "0").read_text().splitlines()[-1]
    assert "a process of this job has ended or does not answer" in said
    assert "the same command goes on from here" in said
    assert not output.exists()
    assert output.with_name("dying.partial").exists()
    assert main(arguments(dense, output)) == 0
    assert decisions(output) == decisions(finished)


def test_a_failure_in_another_process_is_said_by_the_first(dense: Path, tmp_path: Path) -> None:
    output = tmp_path / "other"
    environments = rank_environments(2)
    broken = arguments(dense, output)
    broken[broken.index("--sequences") + 1] = "3"  # another text than process 0 has
    processes = [
        start(command, tmp_path / e["RANK"], e)
        for command, e in zip((arguments(dense, output), broken), environments, strict=True)
    ]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [2, 2]
    assert "prepared another model or text" in (tmp_path / "0").read_text()
    assert not output.exists()


def test_several_objectives_give_a_front_within_the_range(dense: Path, tmp_path: Path) -> None:
    output = tmp_path / "front"
    more = ["--objectives", "params,loss,kv_bytes", "--ratio-range", "0.1:0.5", "--pick", "0"]
    assert main(arguments(dense, output, *more)) == 0
    front = json.loads((output / "front.json").read_text())
    assert front["objectives"] == ["loss", "parameters", "kv_bytes"]
    report = json.loads((output / "report.json").read_text())
    before = report["parameters"]["before"]
    sizes = [point["values"]["parameters"] for point in front["points"]]
    assert len(sizes) > 3
    assert all(0.5 * before <= size <= 0.9 * before for size in sizes)
    assert report["parameters"]["after"] == sizes[0]
    assert (output / "front.png").exists()
    for one in front["points"]:
        beaten = [all(o["values"][k] <= v for k, v in one["values"].items()) for o in front["points"] if o is not one]
        assert not any(beaten)


def test_structures_of_other_runs_are_started_from(finished: Path, dense: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "seeded"
    more = ["--seeds", "none", "--seeds-from", str(finished), "--generations", "0", "--search-seed", "7"]
    assert main(arguments(dense, output, *more)) == 0
    report = json.loads((output / "report.json").read_text())["search"]["losses"]
    assert report["picked"]["choice"] <= report["finished"]["choice"]
    other = tmp_path / "other"
    tiny_model("llama", layers=4, seed=1).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    assert main([*arguments(dense, tmp_path / "none", *more), "--model", str(other)]) == 2
    assert "runs of the same dense model" in capsys.readouterr().err


def test_a_schedule_is_found_that_the_greedy_path_repeats(dense: Path, tmp_path: Path) -> None:
    output = tmp_path / "schedule"
    more = ["--genome", "schedule", "--channel-groups", "8,20", "--importances", "magnitude,second-order"]
    assert main(arguments(dense, output, *more, "--repairs", "none,lstsq", "--generations", "1")) == 0
    report = json.loads((output / "report.json").read_text())
    chosen = report["search"]["picked_candidate"]
    again = tmp_path / "again"
    flags = arguments(dense, again, "--method", "greedy", "--stages", ",".join(chosen["order"]))[1:]
    for name in ("--population", "--generations"):
        del flags[flags.index(name) : flags.index(name) + 2]
    flags += ["--shares", ":".join(map(str, chosen["shares"])), "--channel-group", str(chosen["channel_group"])]
    flags += ["--importance", chosen["importance"], "--repair", "lstsq" if chosen["compensation"] else "none"]
    assert main(flags) == 0
    assert (again / "plan.json").read_bytes() == (output / "plan.json").read_bytes()


def test_random_search_runs_beside_it_at_equal_evaluations(dense: Path, tmp_path: Path) -> None:
    output = tmp_path / "both"
    assert main(arguments(dense, output, "--compare-random", "--screen", "2")) == 0
    _, records = read_history(output / "search.jsonl")
    scored = {r["algorithm"]: r["scored"] for r in records if r.get("stage") == "generation"}
    assert scored["nsga2"] == scored["random"]
    losses = json.loads((output / "report.json").read_text())["search"]["losses"]
    assert set(losses) == {"picked", "program", "random search"}


def test_a_task_is_an_objective_by_consent_and_the_report_says_so(dense: Path, tmp_path: Path, capsys) -> None:
    output, sentence = tmp_path / "consent", "I know this is test data"
    (tmp_path / "short.txt").write_text(" ".join(f"w{4 + n % 90}" for n in range(150)))
    more = ["--objectives", "loss,ppl", "--seeds", "none", "--generations", "0"]
    more += ["--eval-text", str(tmp_path / "short.txt")]
    assert main([*arguments(dense, output, *more), "--consent", "yes"]) == 2
    assert "ppl is an evaluation task" in capsys.readouterr().err
    assert main([*arguments(dense, output, *more), "--consent", sentence]) == 0
    report = json.loads((output / "report.json").read_text())
    assert report["search"]["consent"] == sentence
    assert set(report["search"]["picked_values"]) == {"loss", "ppl"}


@pytest.mark.parametrize("seeds", ["milp", "none"])
def test_query_heads_leave_inside_groups_where_that_is_best(seeds: str, dense: Path, tmp_path: Path) -> None:
    """Every second query head does nothing, every channel something: nothing is lost without those heads."""
    model: Any = AutoModelForCausalLM.from_pretrained(dense)
    for layer in model.model.layers:
        for head in (1, 3):
            layer.self_attn.q_proj.weight.data[16 * head : 16 * (head + 1)] = 0
            layer.self_attn.o_proj.weight.data[:, 16 * head : 16 * (head + 1)] = 0
    model.save_pretrained(tmp_path / "idle")
    tiny_tokenizer().save_pretrained(tmp_path / "idle")
    output = tmp_path / "out"
    more = ["--model", str(tmp_path / "idle"), "--ratio", "0.15", "--channel-group", "40", "--query-head-step", "1"]
    generations = "2" if seeds == "milp" else "12"
    assert main([*arguments(dense, output, *more), "--seeds", seeds, "--generations", generations]) == 0
    report = json.loads((output / "report.json").read_text())
    plan = PruningPlan.from_json((output / "plan.json").read_text())
    assert plan.structure == structure_of(*[(2, 2, 40)] * 4)
    assert all(plan.blocks[n].axes[1] == ((0,), (0,)) for n in plan.anatomy.of_kind("attention"))
    assert report["search"]["loss"] == pytest.approx(0, abs=1e-5) and report["ratio"] >= 0.15
    counted = sum(parameter.numel() for parameter in multipruner.load(output).parameters())
    assert counted == report["parameters"]["after"]
    front = json.loads((output / "front.json").read_text())
    assert front["points"][front["picked"]]["structure"] == {"blocks": [[2, 1], [40]] * 4}


BAD = {
    "a task as objective": (["--objectives", "loss,piqa"], "--consent 'I know this is test data'"),
    "an unknown objective": (["--objectives", "loss,paramz"], "did you mean"),
    "no loss at all": (["--objectives", "params"], "loss must be among"),
    "an odd population": (["--population", "6"], "a multiple of 4"),
    "latency without a table": (["--objectives", "loss,latency"], "--latency-table"),
    "a place that is not there": (["--pick", "99", "--generations", "0"], "numbers"),
    "a digit that is no number": (["--pick", "²"], "knee"),
    "a word that is no pick": (["--pick", "worst"], "knee"),
    "a range for one objective": (["--ratio-range", "0.1:0.3"], "several objectives"),
    "a range upside down": (["--objectives", "loss,params", "--ratio-range", "0.3:0.1"], "LOW:HIGH"),
    "an unknown flag": (["--populaton", "8"], "--populaton"),
    "a run that is none": (["--seeds-from", "nowhere"], "there is no folder nowhere"),
    "parts of KV groups that do not fit": (["--query-head-step", "2"], "query head step 2 does not fit the 2 query"),
    "a group that does not divide": (["--channel-group", "7"], "these do"),
    "budgets for a schedule": (["--genome", "schedule", "--max-params", "0.7x"], "a ratio only"),
    "no room": (["--ratio", "0.99"], "the nearest that can be kept"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(case: str, dense: Path, tmp_path: Path, capsys) -> None:
    flags, expected = BAD[case]
    output = tmp_path / "out"
    assert main([*arguments(dense, output), *flags]) == 2
    printed = capsys.readouterr().err
    if case != "a place that is not there":
        assert expected in printed
    assert printed.count("\n") == 1, printed
    assert not output.exists()


@pytest.fixture(scope="module")
def table(dense: Path) -> Path:
    """Made-up times: every channel and every KV group takes some."""
    entry = lambda milliseconds: Entry(milliseconds, 0.01, 9)  # noqa: E731
    attention = {GONE: entry(0.01)} | {(groups, 2): entry(0.01 + groups) for groups in (1, 2)}
    mlp = {GONE: entry(0.01)} | {(width,): entry(0.01 + width / 10) for width in range(8, 41, 8)}
    row = WorkloadTable(Workload("prefill", 1, 16), {"attention": attention, "mlp": mlp}, entry(1.0))
    shapes = shapes_of(AutoModelForCausalLM.from_pretrained(dense))
    table = LatencyTable(shapes, {"device": "cpu"}, "2026-01-01", {row.workload.name: row})
    write_atomically(dense / "t.json", table.to_json())
    return dense / "t.json"


@pytest.mark.parametrize("where", ["typed", "recipe", "recipe with a budget"])
def test_latency_as_an_objective_leaves_ratio_and_budgets_alone(
    where: str, dense: Path, table: Path, tmp_path: Path
) -> None:
    more = ["--objectives", "loss,latency", "--generations", "0", "--seeds", "none"]
    if where == "typed":
        more += ["--latency-table", str(table)]
    else:
        recipe: dict[str, Any] = {"model": str(dense), "latency_table": str(table), "ratio": 0.3}
        recipe |= {"budgets": {"latency": "0.9x"}} if "budget" in where else {}
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
        more += ["--recipe", str(tmp_path / "recipe.yaml")]
    assert main(arguments(dense, tmp_path / "out", *more)) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["recipe"]["ratio"] == 0.3 and report["ratio"] >= 0.3
    assert report["recipe"]["budgets"] == ({"latency": "0.9x"} if "budget" in where else {})
    front = json.loads((tmp_path / "out" / "front.json").read_text())["points"]
    assert all(point["values"]["latency"] > 0 for point in front)


def test_a_schedule_may_be_timed(dense: Path, table: Path, tmp_path: Path) -> None:
    more = ["--genome", "schedule", "--objectives", "loss,latency", "--generations", "0", "--population", "4"]
    more += ["--latency-table", str(table), "--width-sequences", "2"]
    assert main(arguments(dense, tmp_path / "out", *more)) == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["recipe"]["ratio"] == 0.3


def test_a_search_in_the_wrong_folder_leaves_an_interrupted_run_there(dense: Path, tmp_path: Path, capsys) -> None:
    partial = tmp_path / "out.partial"
    kinds = {
        "measurements.jsonl": '{"format": "multipruner-measurements", "identity": {}}\n{}\n',
        "trajectory.jsonl": '{"format": "multipruner-trajectory"}\n',
    }
    for name, text in kinds.items():
        partial.mkdir()
        (partial / name).write_text(text)
        assert main(arguments(dense, tmp_path / "out")) == 2
        assert "another run, no search" in capsys.readouterr().err
        assert (partial / name).read_text() == text
        shutil.rmtree(partial)


def test_a_run_in_the_wrong_folder_leaves_an_interrupted_search_there(dense: Path, tmp_path: Path, capsys) -> None:
    partial, command = tmp_path / "out.partial", arguments(dense, tmp_path / "out")[1:]
    partial.mkdir()
    files = {"search.jsonl": '{"format": "multipruner-search"}\n', "nsga2.json": '{"format": "multipruner-evolution"}'}
    for name, text in files.items():
        (partial / name).write_text(text)
    prune = [*command[: command.index("--population")], "--output", str(tmp_path / "out"), "--rounds", "0"]
    for more in ((), ("--method", "paper", "--width-sequences", "2")):
        assert main([*prune, *more]) == 2
        assert "another kind of run" in capsys.readouterr().err
        assert {path.name: path.read_text() for path in partial.iterdir() if path.name in files} == files
    assert main([*prune, "--overwrite"]) == 0
    assert not (tmp_path / "out" / "search.jsonl").exists() and not partial.exists()


def test_a_finished_search_gives_up_the_state_of_another(finished: Path, dense: Path, tmp_path: Path) -> None:
    output, partial = tmp_path / "out", tmp_path / "out.partial"
    shutil.copytree(finished, output)
    partial.mkdir()
    header = json.loads((finished / "search.jsonl").read_text().splitlines()[0])
    header["identity"]["search_seed"] = 5
    (partial / "search.jsonl").write_text(json.dumps(header) + "\n")
    (partial / "nsga2.json").write_text('{"format": "multipruner-evolution", "of": "another search"}')
    assert main(arguments(dense, output)) == 2
    assert main(arguments(dense, output, "--overwrite")) == 0
    assert (output / "plan.json").read_bytes() == (finished / "plan.json").read_bytes()


def test_a_rank_alone_does_not_silence_errors(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert main(arguments(dense, tmp_path / "out", "--population", "6")) == 2
    assert "a multiple of 4" in capsys.readouterr().err


def test_runs_of_the_same_name_are_seeds_of_their_own(finished: Path, dense: Path, tmp_path: Path) -> None:
    for name in ("a/program", "b/program"):
        shutil.copytree(finished, tmp_path / name)
    more = [
        "--seeds",
        "none",
        "--seeds-from",
        str(tmp_path / "a/program"),
        str(tmp_path / "b/program"),
        "--generations",
        "0",
    ]
    assert main(arguments(dense, tmp_path / "out", *more)) == 0
    losses = json.loads((tmp_path / "out" / "report.json").read_text())["search"]["losses"]
    assert {str(tmp_path / "a/program"), str(tmp_path / "b/program")} <= set(losses)


def test_other_settings_do_not_touch_a_finished_folder(finished: Path, dense: Path, capsys) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in finished.iterdir()}
    assert main(arguments(dense, finished, "--search-seed", "3")) == 2
    assert "search_seed: 0 -> 3" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in finished.iterdir()} == before


def tiny_prunable() -> Prunable:
    return Prunable.of(tiny_model("llama", layers=4))


def test_losses_do_not_depend_on_company_or_order() -> None:
    """Structures that share prefixes are computed from one another, and score as each would alone, to the bit."""
    prunable, ids = tiny_prunable(), random_ids(3, 12)
    structures = [random_structure(prunable.anatomy, seed) for seed in range(12)]
    setting: Any = type("S", (), {})()
    setting.prunable = prunable
    setting.calibration = type("C", (), {"ignore_id": None})
    setting.recipe = type("R", (), {"objective": "kl", "calibration": type("B", (), {"batch_size": 2})})
    with prunable.in_order(Ranking.identity(prunable.anatomy)):
        together = Losses(setting, [ids])(structures, 0)
        alone = [CalibrationObjective(prunable, ids, batch_size=2, loss="kl")(s) for s in structures]
        first = Losses(setting, [ids])
        first(structures, 0)
    assert together == alone
    whole = 12 * 8 * ids.numel()
    assert first.work.token_blocks < whole
    assert sorted(by_prefix(structures)) == list(range(12))


def test_a_greedy_step_spread_over_processes_decides_as_one(tmp_path: Path) -> None:
    prunable, ids = tiny_prunable(), random_ids(3, 12)
    grid = Grid({"channels": 8, "kv_groups": 1})

    def walk(objective: Any) -> list[Any]:
        found, structure = [], prunable.dense
        for dimension in ("blocks", "mlp", "heads"):
            for _ in range(2):
                objective.commit(structure)
                choice = objective.argmin(
                    [structure.replace(*move) for move in candidates(dimension, structure, prunable.anatomy, grid)]
                )
                structure = choice.best
                runner_up = choice.runner_up.to_json() if choice.runner_up else None
                found.append([choice.best.to_json(), choice.loss, runner_up, choice.runner_up_loss])
        return found

    def work(environment: dict[str, str]) -> None:
        os.environ.update(environment)
        team = Team.from_environment()
        with prunable.in_order(Ranking.identity(prunable.anatomy)):
            spread = SpreadObjective(team, "any", CalibrationObjective(prunable, ids))
            if team.rank:
                team.serve()
            else:
                (tmp_path / "found.json").write_text(json.dumps(walk(spread)))
                team.stop()
        os._exit(0)

    processes = [FORK.Process(target=work, args=(environment,)) for environment in rank_environments(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    with prunable.in_order(Ranking.identity(prunable.anatomy)):
        alone = walk(CalibrationObjective(prunable, ids))
    assert json.loads((tmp_path / "found.json").read_text()) == alone


def test_a_structure_space_of_a_range_keeps_to_it() -> None:
    prunable = tiny_prunable()
    recipe = Recipe.build({"model": "x", "ratio": 0.3, "channel_group": 8})
    for objectives, low, high in ((("loss",), 0.3, 0.35), (("loss", "params"), 0.15, 0.45)):
        budget = budget_of(recipe, prunable, SearchOptions(objectives=objectives, tolerance=0.05))
        space = StructureSpace(prunable.anatomy, Grid({"channels": 8, "kv_groups": 1}), budget)
        rng = random.Random(0)
        for _ in range(20):
            structure: Structure = space.random(rng)
            assert low <= prunable.costs.ratio(structure) <= high


def test_a_gpu_of_its_own_for_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert Team(3, 4, 3).device("auto") == "cuda:1"
    assert Team(3, 4, 3).device("cpu") == "cpu"
    assert Team().device("auto") == "auto"
