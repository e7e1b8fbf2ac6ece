"""Numbers that cannot be meant: one line that names the flag or key, exit 2, and nothing is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from multipruner.commands.main import main
from multipruner.config.recipe import Recipe
from multipruner.core.errors import ConfigError
from multipruner.core.latency_table import Workload
from tests.support.inputs import short_run, write_model

BIG, HUGE = str(2**64), "9" * 5000


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("dense") / "dense")


@pytest.fixture(scope="module")
def finished(dense: Path) -> Path:
    output = dense.parent / "run"
    assert main(short_run(dense, output)) == 0
    return output


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    code = main(arguments)
    said = capsys.readouterr().err
    assert code == 2 and said.count("\n") == 1 and len(said) < 1000, said
    return said


PRUNE = {
    "--rounds": [BIG, "1001", "-1", "nan", HUGE],
    "--channel-group": [BIG, "0", str(2**21), "1e3"],
    "--kv-group-step": [BIG, "0"],
    "--query-head-step": [BIG, "0"],
    "--align": [BIG, "0"],
    "--ridge": ["inf", "nan", "0"],
    "--refine": ["inf", "nan", "-1"],
    "--accumulate-ridge": ["inf", "nan", "much"],
    "--max-params": ["1e400", "0", "1e-400"],
    "--eval-batch-size": ["0", BIG, "many"],
}


@pytest.mark.parametrize(("flag", "value"), [(flag, value) for flag, values in PRUNE.items() for value in values])
def test_of_a_recipe(flag: str, value: str, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = short_run(dense, tmp_path / "out")
    said = refused(capsys, [*arguments, flag, value])
    name = "parameters" if flag == "--max-params" else flag.removeprefix("--").removeprefix("eval-")
    assert name in said.replace("_", "-") and "constrained" not in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["rounds", "ridge", "calibration.seed", "calibration.length", "ratio", "channel_group"])
def test_true_is_no_number(key: str) -> None:
    section, _, name = key.rpartition(".")
    with pytest.raises(ConfigError, match=f"{key} = True: give a value, not true or false"):
        Recipe.build({"model": "x"}, {section: {name: True}} if section else {key: True})


LATENCY = {
    "--batch": ["0", BIG, HUGE, str(2**40)],
    "--prompt": ["0", "129", BIG, HUGE],
    "--generate": ["0", "500", BIG],
    "--cached": ["0", "128", BIG],
    "--threads": ["0", "7777", BIG],
    "--channel-step": ["0", BIG],
    "--hidden-sizes": ["0", "40", "64", "32,x", BIG],
    "--hidden-step": ["0", BIG],
}


@pytest.mark.parametrize(("flag", "value"), [(flag, value) for flag, values in LATENCY.items() for value in values])
def test_of_a_latency_table(
    flag: str, value: str, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workload = ["--phase", "decode" if flag in ("--generate", "--cached") else "prefill"]
    more = [] if flag == "--prompt" else ["--prompt", "8"]
    refused(capsys, ["latency", "--model", str(dense), "--output", str(tmp_path / "t.json"), *workload, *more,
                     flag, value])  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_of_a_workload() -> None:
    with pytest.raises(ConfigError, match="at most"):
        Workload("prefill", 1, 2**31)


SEARCH = {
    "--population": ["0", "6", str(10**12), BIG],
    "--generations": ["-1", str(10**12), BIG],
    "--offspring": ["-1", str(10**12), BIG],
    "--search-seed": ["-1", BIG],
    "--screen": ["-1", BIG],
    "--channel-groups": ["0", BIG, "8,0"],
    "--tolerance": ["nan", "inf"],
}


@pytest.mark.parametrize(("flag", "value"), [(flag, value) for flag, values in SEARCH.items() for value in values])
def test_of_a_search(flag: str, value: str, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    genome = ["--genome", "schedule"] if flag == "--channel-groups" else []
    refused(capsys, ["search", *short_run(dense, tmp_path / "out"), *genome, flag, value])
    assert not list(tmp_path.iterdir())


TUNE = {
    "--steps": ["0", BIG],
    "--batch": ["0", str(10**12)],
    "--rank": ["0", str(2**63 - 1)],
    "--lr": ["0", "nan", "inf"],
    "--seed": ["-1", str(2**32)],
    "--save-every": ["0", BIG],
    "--length": ["1", BIG],
    "--eval-length": ["1", BIG],
    "--eval-tokens": ["1", BIG],
}


@pytest.mark.parametrize(("flag", "value"), [(flag, value) for flag, values in TUNE.items() for value in values])
def test_of_a_training(
    flag: str, value: str, finished: Path, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft")
    text = str(dense / "text.txt")
    refused(capsys, ["tune", str(finished), "--data", text, "--output", str(tmp_path / "out"), flag, value])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", ["0", "-1", BIG, "1.5"])
@pytest.mark.parametrize("flag", ["--limit", "--batch-size", "--eval-batch-size"])
def test_of_an_evaluation(
    flag: str, value: str, finished: Path, dense: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, ["eval", str(finished), "--eval-text", str(dense / "text.txt"), flag, value])
    assert "constrained" not in said
