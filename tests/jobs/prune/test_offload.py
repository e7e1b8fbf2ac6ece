"""A run whose layers stay on disk ends with the very files of one in memory, and says what it cannot do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from multipruner.commands.main import main
from multipruner.config.recipe import Recipe
from multipruner.core.errors import MemoryShortError
from multipruner.engine.prunable import Prunable
from multipruner.jobs.forecast import walks
from multipruner.storage.layers_on_disk import LayersOnDisk
from tests.support.commands import arguments, paper_arguments
from tests.support.tiny import tiny_model

SAME = ("plan.json", "model.safetensors", "config.json")
WALKED = ("--tables", "energies", "--rounds", "0")


def _files(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in SAME]


@pytest.fixture(scope="module")
def walked(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "walked"
    assert main(arguments(dense, output, "--offload", "disk", "--dtype", "float32")) == 0  # it is the files' own
    return output


def test_a_run_ends_with_the_same_bytes(dense: Path, walked: Path, tmp_path: Path) -> None:
    assert main(arguments(dense, tmp_path / "none", *WALKED, "--offload", "none")) == 0
    assert _files(walked) == _files(tmp_path / "none")
    one, other = (json.loads((folder / "report.json").read_text()) for folder in (walked, tmp_path / "none"))
    assert one["search"]["loss"] == other["search"]["loss"] and "offload" not in other
    assert one["perplexity"]["text.txt"] == pytest.approx(other["perplexity"]["text.txt"], rel=1e-3)
    assert (one["recipe"]["tables"], one["recipe"]["moments"], one["recipe"]["rounds"]) == ("energies", "disk", 0)


def test_a_given_plan_is_made_the_same(dense: Path, walked: Path, tmp_path: Path) -> None:
    plan = ("--plan", str(walked / "plan.json"))
    for offload in ("none", "disk"):
        assert main(arguments(dense, tmp_path / offload, *plan, "--offload", offload)) == 0
    assert _files(tmp_path / "disk") == _files(tmp_path / "none")


def test_walks_are_foretold(dense: Path, walked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(dense, tmp_path / "run", "--offload", "disk", "--dry-run")) == 0
    said = capsys.readouterr().out
    assert "decoder layers stay on disk" in said
    told = int(next(line for line in said.splitlines() if line.startswith("all layers are read")).split()[4])
    taken = json.loads((walked / "report.json").read_text())["offload"]["walks"]
    gone = 8  # blocks of the model, each of which may be measured without
    assert told - 1 <= taken <= told + gone


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--hidden-size", "32"), "give no --hidden-size"),
        (("--repair", "none"), "--repair lstsq"),
        (("--dtype", "bfloat16"), "give no --dtype"),
        (("--calibration", "self"), "--calibration FILE"),
        (("--sweep", "0.9,0.8"), "--offload none"),
    ],
)
def test_what_cannot_be_is_refused(
    flags: tuple[str, ...], words: str, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = arguments(dense, tmp_path / "run", *flags, "--offload", "disk")
    if flags[0] == "--sweep":
        asked = [one for one in asked if one not in ("--ratio", "0.3")]
    assert main(asked) == 2
    said = capsys.readouterr()
    assert words in said.out + said.err and not (tmp_path / "run").exists()


def test_the_published_method_is_refused(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(paper_arguments(dense, tmp_path / "run", "--offload", "disk")) == 2
    said = capsys.readouterr()
    assert "--method program" in said.out + said.err


def _recipe(**settings: object) -> Recipe:
    return Recipe.build({"model": "x", "calibration": {"source": "text.txt"}, **settings})


def test_auto_goes_by_the_memory() -> None:
    prunable = Prunable.of(tiny_model("llama"))
    weights = 4 * prunable.costs.parameters(prunable.dense) / 2**30

    def layers(**settings: object) -> int:
        return len(walks.layers_on_disk(_recipe(**settings), prunable, torch.float32))

    assert layers() == 0 and layers(offload="disk") == 3
    assert layers(max_host_memory=1.7 * weights) == 0 and layers(max_host_memory=1.6 * weights) == 3
    assert layers(max_host_memory=1.6 * weights, offload="none") == 0
    assert layers(max_host_memory=1.6 * weights, method="greedy") == 0, "it fits, and can do nothing else"
    with pytest.raises(MemoryShortError, match="the weights need"):
        layers(max_host_memory=0.9 * weights, method="greedy")


def test_sequences_go_together_where_each_pass_reads_the_model() -> None:
    prunable = Prunable.of(tiny_model("llama"))
    assert walks.together_in(prunable, 128) == 1
    prunable.on_disk = LayersOnDisk(prunable.layers, torch.clone)
    assert walks.together_in(prunable, 128) == 32 and walks.together_in(prunable, 10_000) == 32, "cut to its context"


@pytest.mark.slow
def test_smollm2_comes_out_the_same_bytes(tmp_path: Path) -> None:
    pages = Path(__file__).parents[3] / "docs"
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(page.read_text() for page in sorted(pages.glob("*.md"))))
    for offload in ("none", "disk"):
        flags = ("--sequences", "2", "--width-sequences", "1", "--length", "64", "--moments-sequences", "8", "--effort",
                 "fast", "--offload", offload, "--eval-text", str(text), "--set", "evaluation.max_tokens=1024",
                 "--set", "evaluation.length=256", "--calibration", str(text))  # fmt: skip
        assert main(["--model", "llama", "--ratio", "0.2", "--output", str(tmp_path / offload), *flags]) == 0
    assert _files(tmp_path / "disk") == _files(tmp_path / "none")
