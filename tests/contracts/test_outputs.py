"""What a command writes opens where the dense model did, is what was in memory, and costs nobody a file of theirs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from multipruner.checkpoint.cut import apply_plan
from multipruner.checkpoint.load import load
from multipruner.checkpoint.rehearsal import Rehearsal
from multipruner.checkpoint.reopen import check_reopened
from multipruner.checkpoint.save import save
from multipruner.commands.main import main
from multipruner.core.errors import ConfigError, OutputError
from multipruner.core.plan import PruningPlan
from multipruner.report.card import addressed, model_card
from multipruner.storage.partial import MARK
from tests.support import tiny
from tests.support.commands import arguments
from tests.support.inputs import short_run, write_model

SHORT = ("--rounds", "0")


@pytest.fixture(scope="module")
def finished(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("outputs") / "finished"
    assert main(arguments(dense, output, *SHORT)) == 0
    return output


def _copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# before the search


def test_a_configuration_that_no_smaller_model_can_have_is_named_before_the_search(tmp_path: Path) -> None:
    model, tokenizer = tiny.tiny_model("llama"), tiny.tiny_tokenizer()
    model.config.hidden_act = "nothing"
    with (
        pytest.raises(ConfigError, match=r"hidden_act = \"nothing\".*nothing was measured"),
        Rehearsal(model, tokenizer, str(tmp_path), None, uniform=False),
    ):
        pytest.fail("the search began")


def _saved(folder: Path, family: str = "llama", layers: int = 3) -> Any:
    """A dense folder: its model, its tokenizer, and where it is."""
    model = tiny.tiny_model(family, layers=layers)
    model.save_pretrained(folder)
    tiny.tiny_tokenizer().save_pretrained(folder)
    return model, AutoTokenizer.from_pretrained(folder), str(folder), None


def test_a_configuration_that_only_equal_layers_can_have_is_named_with_the_way_out(tmp_path: Path, capsys: Any) -> None:
    """What fails when the written folder is opened is blamed on the key without which it opens, not on the first."""
    half = [1.0 + 0.1 * number for number in range(8)]
    scaled = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    rotary = {**scaled, "short_factor": half, "long_factor": half}
    folder = write_model(tmp_path / "dense", rope_parameters=rotary, layers=4)
    assert main(short_run(folder, tmp_path / "out")) == 2
    said = capsys.readouterr().err
    assert "config.json: rope_parameters = " in said and "--layout uniform (equal layers) goes with it" in said
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
    assert main([*short_run(folder, tmp_path / "out", "--layout", "uniform"), "--ratio", "0.1"]) == 0


@pytest.mark.parametrize(("family", "uniform"), [("llama", False), ("qwen2", True)])
def test_a_kind_of_model_is_opened_in_a_new_process_once(
    family: str, uniform: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MULTIPRUNER_CACHE", str(tmp_path / "cache"))
    for layers in (3, 4):  # sizes do not make a kind
        dense = _saved(tmp_path / f"dense-{layers}", family, layers)
        with Rehearsal(*dense, uniform=uniform) as rehearsal:
            assert rehearsal.elsewhere == (layers == 3)
    assert len(list((tmp_path / "cache" / "rehearsals").iterdir())) == 1


def test_what_a_new_process_cannot_open_is_said_and_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MULTIPRUNER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "torch.py").write_text("raise RuntimeError('an old torch')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))
    with (
        pytest.raises(
            ConfigError, match=r"a new process cannot open the smaller model.*\(RuntimeError: an old torch\)"
        ),
        Rehearsal(*_saved(tmp_path / "dense"), uniform=False),
    ):
        pass
    assert not (tmp_path / "cache" / "rehearsals").exists()


def test_a_module_cache_that_cannot_be_written_is_said_before_the_search(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "modules").write_text("a file")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "multipruner", *arguments(dense, tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "HF_MODULES_CACHE" in done.stderr and done.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["modules"]


def test_a_cache_that_is_a_file_is_said(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("MULTIPRUNER_CACHE", str(tmp_path / "cache"))
    assert main(arguments(dense, tmp_path / "out")) == 2
    assert "cannot be the cache folder: it is a file" in capsys.readouterr().err


# what is written


@pytest.mark.parametrize("layout", ["uniform", "blocks-free"])
def test_tokenizer_and_generation_settings_are_the_dense_model_s_byte_by_byte(
    layout: str, dense: Path, tmp_path: Path
) -> None:
    old = Path(shutil.copytree(dense, tmp_path / "old"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "padding_side": "left"}
    settings |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "model_max_length": 77}
    (old / "tokenizer_config.json").write_text(json.dumps(settings))  # as transformers 4 wrote it
    (old / "generation_config.json").write_text('{"eos_token_id": 2, "temperature": 0.9, "top_p": 0.6}')  # and greedy
    output = tmp_path / "out"
    assert main(arguments(old, output, "--layout", layout, *SHORT)) == 0
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (output / name).read_bytes() == (old / name).read_bytes(), name
    assert not load(output).generation_config.do_sample
    (old / "generation_config.json").unlink()
    _edit(old / "config.json", pad_token_id=-1)  # as the first conversions of LLaMA had it
    assert main(arguments(old, output, "--layout", layout, *SHORT, "--overwrite")) == 0
    assert not (output / "generation_config.json").exists()
    assert json.loads((output / "config.json").read_text())["pad_token_id"] == -1


def _byte_level() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    raw.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)  # pyright: ignore[reportCallIssue]
    raw.train_from_iterator(["the quiet river don't stop 2048"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


def test_a_tokenizer_that_transformers_choose_by_the_model_s_type_stays_the_same(tmp_path: Path) -> None:
    dense, tokenizer = tiny.tiny_model("qwen2", vocab_size=400), _byte_level()
    dense.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    _edit(tmp_path / "dense" / "tokenizer_config.json", tokenizer_class="LlamaTokenizerFast")
    theirs, plan = AutoTokenizer.from_pretrained(tmp_path / "dense"), tiny.random_plan(dense, 1)
    save(tmp_path / "out", apply_plan(dense, plan), theirs, plan=plan, report={}, card="", source=tmp_path / "dense")
    ours = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=False)
    for text in ("the quiet river", "naïve über 雨\n\tTab", "def f(x):\n    return 2048"):
        assert ours(text).input_ids == theirs(text).input_ids
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "dense" / "tokenizer.json").read_bytes()


def test_everybody_may_read_what_the_umask_allows(finished: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in finished.iterdir() if path.is_file()} == {0o666 & ~mask}


def test_nothing_of_this_machine_is_in_configuration_plan_and_card(finished: Path, dense: Path) -> None:
    assert str(dense) in (finished / "report.json").read_text(), "the record says where the model was"
    for name in ("config.json", "plan.json", "README.md", "generation_config.json", "tokenizer_config.json"):
        assert str(dense.parent) not in (finished / name).read_text(), name
        assert str(finished.parent) not in (finished / name).read_text(), name


def test_what_differs_from_the_model_in_memory_is_kept_under_another_name(tmp_path: Path) -> None:
    dense = tiny.tiny_model("llama")
    plan = tiny.random_plan(dense, 1)
    written, other = apply_plan(dense, plan), apply_plan(dense, tiny.random_plan(dense, 2))
    ids = tiny.random_ids()
    save(
        tmp_path / "right",
        written,
        None,
        plan=plan,
        report={},
        card="",
        check=lambda at: check_reopened(at, written, ids),
    )
    for name in ("out.differs", "out.differs-2"):
        with pytest.raises(OutputError, match=f"a loss of .* instead of .*{name}"):
            save(
                tmp_path / "out", written, None, plan=plan, report={}, card="",
                check=lambda at: check_reopened(at, other, ids),
            )  # fmt: skip
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "out.differs")(ids).logits, written(ids).logits)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.differs", "out.differs-2", "right"]


def test_the_dense_model_is_found_from_another_folder(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(dense, tmp_path / "models" / "tiny")
    monkeypatch.chdir(tmp_path)
    assert main([*arguments(dense, Path("run"), *SHORT), "--model", "models/tiny"]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    text = str(dense / "text.txt")
    assert main(["eval", "../run", "--eval-text", text, "--output", "result.json"]) == 0
    assert main(["eval", "../run", "--eval-text", text, "--output", "result.json"]) == 0, "its own result is replaced"
    assert json.loads((tmp_path / "elsewhere" / "result.json").read_text())["format"] == "multipruner-evaluation"


# files of others


COMMANDS: dict[str, Callable[[Path, Path, Path], list[str]]] = {
    "prune": lambda dense, finished, output: arguments(dense, output, "--overwrite"),
    "sweep": lambda dense, finished, output: [*arguments(dense, output, "--overwrite"), "--sweep", "0.9,0.8"],
    "search": lambda dense, finished, output: ["search", *arguments(dense, output, "--overwrite")],
    "tune": lambda dense, finished, output: [
        "tune", str(finished), "--data", str(dense / "text.txt"), "--output", str(output), "--overwrite"
    ],
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("linked", [False, True])
def test_somebody_s_folder_beside_the_output_stays(
    command: str, linked: bool, finished: Path, dense: Path, tmp_path: Path, capsys
) -> None:
    pytest.importorskip("peft")
    mine = tmp_path / ("mine" if linked else "out.partial")
    mine.mkdir()
    (mine / "state.json").write_text("years of work")
    if linked:
        (tmp_path / "out.partial").symlink_to(mine)
    assert main(COMMANDS[command](dense, finished, tmp_path / "out")) == 2
    said = capsys.readouterr().err
    assert "out.partial" in said and "choose another --output" in said and said.count("\n") == 1
    assert [path.read_text() for path in mine.iterdir()] == ["years of work"]


def test_a_marked_folder_loses_only_what_a_run_wrote_there(dense: Path, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    bad = [*arguments(dense, tmp_path / "out", *SHORT), "--calibration", "nowhere.txt"]
    assert main(bad) == 2 and not partial.exists()
    partial.mkdir()
    (partial / MARK).write_text('{"format": "multipruner-partial", "version": 1, "token": "0"}\n')
    (partial / "notes.txt").write_text("mine")
    assert main(arguments(dense, tmp_path / "out", *SHORT)) == 0
    assert sorted(path.name for path in partial.iterdir()) == [MARK, "notes.txt"]


def test_what_is_refused_leaves_no_folder_behind(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bad = [*arguments(dense, Path("runs/deep/out")), "--calibration", "nowhere.txt"]
    assert main(bad) == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_inside_the_model_s_folder_is_refused(command: str, finished: Path, dense: Path, capsys) -> None:
    pytest.importorskip("peft")
    source = finished if command == "tune" else dense
    before = sorted(source.iterdir())
    assert main(COMMANDS[command](dense, finished, source / "inner" / "out")) == 2
    assert "inside the model's own folder" in capsys.readouterr().err
    assert sorted(source.iterdir()) == before


def test_a_run_into_an_old_one_s_folder_keeps_what_that_did_not_write(
    finished: Path, dense: Path, tmp_path: Path, capsys
) -> None:
    output = _copy(finished, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    for name in ("train.py", "adapter.safetensors", "other.index.json"):
        (output / name).write_text("mine")
    (output / "empty").mkdir()
    (output / "link.txt").symlink_to("../notes.txt")
    (output / "nowhere").symlink_to("../gone")
    (output / "README.md").write_text("# my own card\n")
    assert main(arguments(dense, output, *SHORT, "--overwrite")) == 0
    for name in ("train.py", "adapter.safetensors", "other.index.json"):
        assert (output / name).read_text() == "mine"
    assert (output / "empty").is_dir() and (output / "nowhere").is_symlink()
    assert (output / "link.txt").is_symlink() and (output / "link.txt").read_text() == "mine"
    assert (output / "README.old.md").read_text() == "# my own card\n"
    (output / "vocab.txt").write_text("mine")
    assert main(arguments(dense, output, *SHORT, "--overwrite")) == 2
    assert "holds vocab.txt, which no run wrote" in capsys.readouterr().err
    assert (output / "vocab.txt").read_text() == "mine"


def test_only_results_of_a_command_are_replaced_by_it(finished: Path, dense: Path, tmp_path: Path, capsys) -> None:
    pytest.importorskip("peft")
    precious = tmp_path / "precious.json"
    precious.write_text('{"years": "of work"}')
    text, model = str(dense / "text.txt"), str(dense)
    (tmp_path / "table.json.partial").write_text("mine")
    commands = {
        "no results of eval": ["eval", str(finished), "--eval-text", text, "--output", str(precious)],
        "no latency table": ["latency", "--model", model, "--output", str(precious), "--overwrite"],
        "no latency measurement": [
            "latency", "--model", model, "--output", str(tmp_path / "table.json"), "--overwrite"
        ],
        "not a folder that multipruner wrote": [
            "tune", str(finished), "--data", text, "--output", model, "--overwrite"
        ],
    }  # fmt: skip
    before = {path.name: path.read_bytes() for path in dense.iterdir()}
    for said, command in commands.items():
        assert main(command) == 2
        assert said in (printed := capsys.readouterr().err) and "another" in printed and printed.count("\n") == 1
    assert precious.read_text() == '{"years": "of work"}' and (tmp_path / "table.json.partial").read_text() == "mine"
    assert {path.name: path.read_bytes() for path in dense.iterdir()} == before
    (dense / "plan.json").write_text('{"note": "release plan"}')
    try:
        assert main(commands["not a folder that multipruner wrote"]) == 2, "a plan of somebody's own is no run"
    finally:
        (dense / "plan.json").unlink()


# damaged folders


def _rewritten(run: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(run / "model.safetensors")
    change(weights)
    save_file(weights, run / "model.safetensors", metadata={"format": "pt"})


def _index(run: Path, name: str) -> None:
    (run / "model.safetensors").rename(run.parent / "outside.safetensors")
    (run / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head": name}}))


HUGE = {"layer": 0, "kind": "mlp", "dense": {"channels": 40}, "kept": {"channels": "0-99999999999"}}
DAMAGE: dict[str, Callable[[Path], Any]] = {
    "NaN": lambda run: _rewritten(run, lambda weights: weights["model.norm.weight"].fill_(float("nan"))),
    "a weight missing": lambda run: _rewritten(run, lambda weights: weights.pop("model.norm.weight")),
    "torn weights": lambda run: (run / "model.safetensors").write_bytes(b"\x09" * 100),
    "an index that leads outside": lambda run: _index(run, "../outside.safetensors"),
    "an index with a long name": lambda run: _index(run, "a" * 300 + ".safetensors"),
    "an index with NUL": lambda run: _index(run, "a\0.safetensors"),
    "no report": lambda run: (run / "report.json").write_bytes(b"\xff\xfe"),
    "a deep report": lambda run: (run / "report.json").write_text("[" * 100000),
    "evaluations": lambda run: _edit(run / "report.json", evaluations={"a": 1}),
    "a ratio that is no number": lambda run: _edit(run / "report.json", ratio=float("nan")),
    "a loss without end": lambda run: _edit(run / "report.json", search={"loss": float("inf")}),
    "an accuracy that is no number": lambda run: _edit(
        run / "report.json", tasks={"arc": {"acc": {"dense": 0.5, "pruned": float("nan")}}}
    ),
    "a configuration": lambda run: (run / "config.json").write_text("[]"),
    "a plan": lambda run: (run / "plan.json").write_bytes(b"\xff\xfe"),
    "a huge plan": lambda run: _edit(run / "plan.json", blocks=[HUGE]),
    "a huge plan of version 1": lambda run: _edit(
        run / "plan.json", version=1, dense=[[4, 2, 40]] * 4,
        layers=[{"query_heads": "0-99999999999", "kv_heads": "0", "channels": "0"}] * 4,
    ),
}  # fmt: skip
UNREAD = {
    "eval": {"a plan", "a huge plan", "a huge plan of version 1"},
    "push": set(),
    "tune": {"evaluations"},
    "report": {name for name in DAMAGE if "weight" in name or "index" in name or name == "NaN"} | {"a configuration"},
}
"""What a command does not look at."""


@pytest.mark.parametrize(("command", "damage"), [(c, d) for c in UNREAD for d in DAMAGE if d not in UNREAD[c]])
def test_a_damaged_folder_is_one_line(
    command: str, damage: str, finished: Path, dense: Path, tmp_path: Path, capsys
) -> None:
    pytest.importorskip("peft")
    run, text = _copy(finished, tmp_path), str(dense / "text.txt")
    DAMAGE[damage](run)
    more = {
        "eval": ["--against", str(dense), "--eval-text", text],
        "push": ["me/small", "--dry-run"],
        "tune": ["--data", text, "--output", str(tmp_path / "tuned")],
        "report": ["--output", str(tmp_path / "page")],
    }
    assert main([command, str(run), *more[command]]) == 2
    said = capsys.readouterr().err
    assert [line for line in said.splitlines() if line.startswith("multipruner: ")] and "Traceback" not in said
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "outside.safetensors") == ["run"]


@pytest.mark.parametrize("command", UNREAD)
@pytest.mark.parametrize("name", ["x" * 300, "a\0b"], ids=["long", "NUL"])
def test_a_name_that_no_folder_can_have_is_one_line(command: str, name: str, capsys) -> None:
    pytest.importorskip("peft")
    more = {"push": ["me/small", "--dry-run"], "eval": ["--against", "llama"]}.get(command, [])
    assert main([command, name, *more]) == 2
    assert "cannot be read" in (said := capsys.readouterr().err) and said.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["x" * 300, "a\0b"], ids=["long", "NUL"])
def test_an_output_that_no_folder_can_have_is_one_line(
    command: str, name: str, finished: Path, dense: Path, tmp_path: Path, capsys
) -> None:
    pytest.importorskip("peft")
    assert main(COMMANDS[command](dense, finished, tmp_path / name)) == 2
    assert "cannot be read" in (said := capsys.readouterr().err) and said.count("\n") == 1


# names of others


NAMES = ("<b>bold</b>", 'a "quoted" name', "line\nbreak", "x\n---\nlicense: mine", "--- ", "`tick` | [link](http://x)")


@pytest.mark.parametrize("name", NAMES)
def test_names_with_markup_are_only_text_in_a_card(name: str, dense: Path, finished: Path) -> None:
    plan = PruningPlan.from_json((finished / "plan.json").read_text())
    record = json.loads(plan.to_json())
    record["base_model"]["name"] = f"owner/{name}"
    plan = PruningPlan.from_json(json.dumps(record))
    score = {"dense": 1.0, "pruned": 2.0}
    report = {"calibration": {"name": name}, "perplexity": {name: score}, "command": f"prune --model {name!r}"}
    card = model_card(report, plan, name="me/small")
    for text in (card, addressed(f"{card}\nmine", card, "me/small")):
        _, front, body = text.split("---\n", 2) if "---" not in name else ("", *_parts(text))
        metadata = yaml.safe_load(front)
        assert "license" not in metadata and metadata["library_name"] == "transformers"
        (entry,) = metadata["model-index"][0]["results"]
        assert entry["dataset"]["name"] == " ".join(name.split())
        assert body.lstrip().startswith("# small\n") and "<b>" not in body.replace("`<b>bold</b>`", "").replace(
            "'<b>bold</b>'", ""
        )
        (row,) = [line for line in body.splitlines() if line.endswith("| 1.000 | 2.000 |")]
        assert row.replace("\\|", "").count("|") == 4


def _parts(card: str) -> tuple[str, str]:
    """Front matter and the rest, by lines, as the Hub reads them."""
    lines = card.split("\n")
    end = lines.index("---", 1)
    return "\n".join(lines[1:end]), "\n".join(lines[end + 1 :])
