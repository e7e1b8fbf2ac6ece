"""A pruned text tower put back into its model of several modalities, which transformers open as the dense one."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import constants
from transformers import AutoModelForImageTextToText

import multipruner
from multipruner.checkpoint.run_folder import read_run
from multipruner.commands.main import main
from multipruner.core.errors import UnsupportedModelError
from multipruner.core.families import anatomy_of, spec_for
from multipruner.core.plan import PruningPlan
from multipruner.core.structure import GONE, Anatomy, Structure
from multipruner.sources.towers import text_config
from multipruner.storage.tensor_bytes import parts_of
from tests.support import tiny
from tests.support.caches import cache_at
from tests.support.fake_hub import Blob, Repo, fake_hub
from tests.support.inputs import copied, edit_json, edit_tensors, short_run
from tests.support.wrappers import LAYERS, WRAPPERS, picture, row_of, write_wrapper

WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache_at(monkeypatch, tmp_path / "cache")


def apply(plan: Path, wrapper: Path, output: Path, *more: str) -> int:
    return main(["apply", str(plan), "--model", str(wrapper), "--output", str(output), *more])


def alike(anatomy: Anatomy, *, heads: bool, gone: int | None = 2) -> Structure:
    """A structure of layers that are alike, without one of them."""
    width = {"attention": (1, 2) if heads else None, "mlp": (24,)}
    return Structure(tuple(GONE if place.layer == gone else width[place.kind] or place.dense for place in anatomy))


def write_plan(wrapper: Path, path: Path, structure: Structure | None = None, **how: Any) -> PruningPlan:
    """A plan of random units of a wrapper's text tower."""
    _, config, spec = text_config(wrapper, "tiny")
    anatomy = anatomy_of(config)
    chosen = structure or alike(anatomy, **{"heads": True, **how})
    plan = PruningPlan.from_structure(
        chosen, tiny.random_ranking(anatomy, 0), anatomy, model="tiny", model_type=spec.model_type
    )
    path.write_text(plan.to_json())
    return plan


def contents(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a folder's files, with its bytes."""
    parts = {name: part for path in folder.glob("*.safetensors") for name, part in parts_of(path).items()}
    return {name: (part.dtype, part.shape, b"".join(part.chunks())) for name, part in parts.items()}


def whole_keeps_heads(kind: str) -> bool:
    """Whether a wrapper's text configuration has no word for the width of a head."""
    return kind in ("qwen2_vl", "qwen2_5_vl")


@pytest.mark.parametrize(
    ("kind", "as_held"),
    [*((kind, False) for kind in WRAPPERS), ("gemma3", True), ("llava", True), ("qwen2_5_vl", True)],
)
def test_the_whole_computes_what_the_pruned_text_model_does(kind: str, as_held: bool, tmp_path: Path) -> None:
    wrapper = write_wrapper(tmp_path / "whole", kind, as_held=as_held, dtype=torch.bfloat16)
    plan = write_plan(wrapper, tmp_path / "plan.json", heads=not whole_keeps_heads(kind))
    assert apply(tmp_path / "plan.json", wrapper, tmp_path / "small", "--any-weights") == 0
    assert apply(tmp_path / "plan.json", wrapper, tmp_path / "text", "--any-weights", "--text-only") == 0
    loaded: Any = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "small", output_loading_info=True, dtype=torch.float32
    )
    whole, told = loaded
    assert not any(told[key] for key in ("missing_keys", "mismatched_keys", "unexpected_keys")), told
    assert type(whole).__name__ == row_of(kind).class_name
    text = multipruner.load(tmp_path / "text", dtype=torch.float32)
    assert len(plan.layers) == LAYERS - 1 == text.config.num_hidden_layers
    with torch.no_grad():
        assert torch.equal(whole(input_ids=tiny.random_ids()).logits, text(tiny.random_ids()).logits)
        seen = picture(kind)
        logits = whole(**seen).logits
        blind = whole(**{**seen, "pixel_values": torch.zeros_like(seen["pixel_values"])}).logits
    assert logits.isfinite().all() and not torch.equal(logits, blind)
    dense, small = contents(wrapper), contents(tmp_path / "small")
    tower = row_of(kind).names(dense, spec_for(text.config))
    assert small.keys() <= dense.keys() and {name for name in dense if name not in tower} <= small.keys()
    assert all(small[name] == dense[name] for name in dense if name not in tower)
    assert {name for name in dense if name not in small} and all(name in tower for name in dense.keys() - small.keys())
    assert {path.name for path in (tmp_path / "small").glob("*.safetensors")} <= {p.name for p in wrapper.iterdir()}
    others = ("preprocessor_config.json", "chat_template.jinja", "LICENSE", "tokenizer.json", "generation_config.json")
    for name in others:
        assert (tmp_path / "small" / name).read_bytes() == (wrapper / name).read_bytes()
    before, after = (json.loads((each / "config.json").read_text()) for each in (wrapper, tmp_path / "small"))
    assert before.pop("text_config") != after.pop("text_config") and before == after
    assert "AutoModelForImageTextToText" in (tmp_path / "small" / "README.md").read_text()


def test_heads_as_wide_as_before_are_said(tmp_path: Path) -> None:
    """Where the wrapper says no width, that would follow from how many are left."""
    wrapper = write_wrapper(tmp_path / "whole", "llava-square")
    assert "head_dim" not in WRAPPERS["llava-square"]["text_config"]
    record = json.loads((wrapper / "config.json").read_text())
    record["text_config"].pop("head_dim", None)
    (wrapper / "config.json").write_text(json.dumps(record))
    write_plan(wrapper, tmp_path / "plan.json")
    assert apply(tmp_path / "plan.json", wrapper, tmp_path / "small", "--any-weights") == 0
    assert json.loads((tmp_path / "small" / "config.json").read_text())["text_config"]["head_dim"] == 12


def test_sizes_among_the_wrappers_own_stay_there(tmp_path: Path) -> None:
    wrapper = write_wrapper(tmp_path / "whole", "qwen2_5_vl")
    record = json.loads((wrapper / "config.json").read_text())
    inner = record.pop("text_config")
    inner.pop("model_type")
    (wrapper / "config.json").write_text(json.dumps({**inner, **record}))
    write_plan(wrapper, tmp_path / "plan.json", heads=False)
    assert apply(tmp_path / "plan.json", wrapper, tmp_path / "small", "--any-weights") == 0
    said = json.loads((tmp_path / "small" / "config.json").read_text())
    assert "text_config" not in said and (said["num_hidden_layers"], said["intermediate_size"]) == (3, 24)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wrapper, and a run of its text tower, of layers that are alike."""
    folder = tmp_path_factory.mktemp("towers")
    with pytest.MonkeyPatch.context() as patch:
        cache_at(patch, folder / "cache")
        wrapper = write_wrapper(folder / "wrapper", "llava")
        (wrapper / "text.txt").write_text(" ".join(f"w{4 + (n * n + n // 7) % 85}" for n in range(2000)))
        assert main(short_run(wrapper, folder / "run", "--layout", "uniform")) == 0
    return folder


def test_a_run_goes_back_with_its_repair(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = copied(made / "run", tmp_path / "run")  # in which every output projection is another than the cut one
    edit_tensors(source, lambda w: {name: each * 1.1 if "o_proj" in name else each for name, each in w.items()})
    assert apply(source, made / "wrapper", tmp_path / "small") == 0
    assert f"the text tower is that of {source}" in (said := capsys.readouterr().out), said
    whole: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "small")
    text = multipruner.load(source)
    with torch.no_grad():
        assert torch.equal(whole(input_ids=tiny.random_ids()).logits, text(tiny.random_ids()).logits)
    assert apply(source / "plan.json", made / "wrapper", tmp_path / "cut") == 0
    cut: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "cut")
    with torch.no_grad():
        assert not torch.equal(cut(input_ids=tiny.random_ids()).logits, text(tiny.random_ids()).logits)
    report, run = (json.loads((each / "report.json").read_text()) for each in (tmp_path / "small", made / "run"))
    assert report["perplexity"] == run["perplexity"] and report["whole"]["model_type"] == "llava"
    assert (tmp_path / "small" / report["model"]["path_from_here"]).resolve() == made / "wrapper"


def test_a_run_of_a_wrapper_says_what_it_is(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*short_run(made / "wrapper", tmp_path / "run"), "--dry-run"]) == 0
    run = read_run(made / "run")
    assert run.config["model_type"] == "llama" and run.plan.model == "wrapper"
    assert "the text tower of local folder" in run.report["model"]["description"]


def test_what_follows_knows_the_whole(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert apply(made / "run", made / "wrapper", tmp_path / "small") == 0
    assert main(["push", str(tmp_path / "small"), "me/small", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "preprocessor_config.json" in said and "text.txt" not in said
    assert not read_run(tmp_path / "small").foreign
    with pytest.raises(UnsupportedModelError, match=r"open it with transformers\.AutoModelForImageTextToText"):
        multipruner.load(tmp_path / "small")
    (tmp_path / "small" / "text.txt").write_bytes((made / "wrapper" / "text.txt").read_bytes())
    assert main(short_run(tmp_path / "small", tmp_path / "again")) == 2
    assert "is pruned already" in capsys.readouterr().err
    assert "exists already" in _fails(capsys, made / "run", made / "wrapper", tmp_path / "small")
    (tmp_path / "small" / "notes.txt").write_text("mine")
    assert apply(made / "run", made / "wrapper", tmp_path / "small", "--overwrite") == 0
    assert (tmp_path / "small" / "notes.txt").read_text() == "mine"


def _fails(capsys: pytest.CaptureFixture[str], plan: Path, wrapper: Path, output: Path, *more: str) -> str:
    """What is said of a call that fails and leaves nothing behind."""
    before = {path.name for path in output.parent.iterdir()} | {"cache"}
    capsys.readouterr()
    assert apply(plan, wrapper, output, *more) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and {path.name for path in output.parent.iterdir()} <= before, said
    return said


def test_what_the_stock_class_cannot_say_is_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not even the text tower is taken out; the cure works."""
    wrapper, plan = write_wrapper(tmp_path / "whole", "qwen3_vl"), tmp_path / "plan.json"
    anatomy = anatomy_of(text_config(wrapper, "tiny")[1])
    write_plan(wrapper, plan, tiny.random_structure(anatomy, 3))
    said = _fails(capsys, plan, wrapper, tmp_path / "small", "--any-weights")
    assert "not alike in all layers" in said and "--layout uniform" in said and "--text-only" in said
    write_plan(wrapper, plan, alike(anatomy, heads=True, gone=0))
    said = _fails(capsys, plan, wrapper, tmp_path / "small", "--any-weights")
    assert "enters behind each of the first 1 layers" in said
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["rehearsals"]
    assert apply(plan, wrapper, tmp_path / "text", "--any-weights", "--text-only") == 0
    assert multipruner.load(tmp_path / "text").config.model_type == "qwen3"
    write_plan(wrapper, plan, Structure(tuple((2, 1) if p.kind == "attention" else p.dense for p in anatomy)))
    assert apply(plan, wrapper, tmp_path / "fewer", "--any-weights") == 0
    five = write_wrapper(tmp_path / "five", "llava-square")
    record = json.loads((five / "config.json").read_text())
    wide = {**record["text_config"], "num_attention_heads": 20, "num_key_value_heads": 10, "head_dim": 16}
    edit_json(five / "config.json", text_config={**wide, "hidden_size": 40})
    anatomy = anatomy_of(text_config(five, "tiny")[1])
    write_plan(five, plan, Structure(tuple((3, 2) if p.kind == "attention" else p.dense for p in anatomy)))
    said = _fails(capsys, plan, five, tmp_path / "small", "--any-weights")
    assert "a number of heads that divides the hidden size" in said and "--kv-group-step" in said
    other = write_wrapper(tmp_path / "other", "qwen2_5_vl")
    write_plan(other, plan)
    assert "has no words for the sizes" in _fails(capsys, plan, other, tmp_path / "small", "--any-weights")
    assert "the plan was made for a 'qwen2' model" in _fails(capsys, plan, wrapper, tmp_path / "small")


def test_weights_of_another_wrapper_are_refused(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_wrapper(tmp_path / "other", "llava", dtype=torch.bfloat16)
    said = _fails(capsys, made / "run", other, tmp_path / "small")
    assert "the plan was made for wrapper" in said and "--any-weights" in said


def test_a_model_on_the_hub_is_refused_before_its_weights_are_fetched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapper = write_wrapper(tmp_path / "whole", "llava", as_held=True)
    anatomy = anatomy_of(text_config(wrapper, "tiny")[1])
    write_plan(wrapper, tmp_path / "differ.json", tiny.random_structure(anatomy, 3))
    write_plan(wrapper, tmp_path / "alike.json")
    with fake_hub({}) as hub:
        files = {path.name: path.read_bytes() for path in wrapper.iterdir()}
        hub.repos["me/whole"] = Repo(False)
        hub.repos["me/whole"].add("all", {name: Blob(data, name == WEIGHTS) for name, data in files.items()})
        hub.objects.update({Blob(data, True).oid: data for data in files.values()})
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        settings = {"ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": False,
                    "HF_HUB_DISABLE_XET": True, "HF_HUB_CACHE": str(tmp_path / "hub")}  # fmt: skip
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        common = ["--model", "me/whole", "--output", str(tmp_path / "small"), "--any-weights"]
        assert main(["apply", str(tmp_path / "differ.json"), *common]) == 2
        assert "not alike in all layers" in capsys.readouterr().err
        assert not any(line.endswith(WEIGHTS) for line, _ in hub.requests)
        assert main(["apply", str(tmp_path / "alike.json"), *common]) == 0
        assert any(line.endswith(WEIGHTS) for line, _ in hub.requests)
    assert (tmp_path / "small" / "preprocessor_config.json").read_bytes() == files["preprocessor_config.json"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offline = ("--overwrite", "--revision", hub.repos["me/whole"].head)
    assert main(["apply", str(tmp_path / "alike.json"), *common, *offline]) == 0
    report = json.loads((tmp_path / "small" / "report.json").read_text())
    assert report["model"]["revision"] == hub.repos["me/whole"].head


KILLED = """
import os, signal, sys
from multipruner.commands.main import main
from multipruner.stream import whole
write, count = whole.write_parts, []
def killed(*arguments):
    write(*arguments)
    count.append(1)
    if len(count) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
whole.write_parts = killed
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_command_leaves_no_folder(made: Path, tmp_path: Path) -> None:
    command = ["apply", str(made / "run"), "--model", str(made / "wrapper"), "--output", str(tmp_path / "small")]
    environment = {**os.environ, "MULTIPRUNER_CACHE": str(made / "cache")}
    done = subprocess.run([sys.executable, "-c", KILLED, *command], env=environment, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "small").exists() and list(tmp_path.glob(".small.partial-*"))
    assert apply(made / "run", made / "wrapper", tmp_path / "small") == 0
    assert transformers.AutoConfig.from_pretrained(tmp_path / "small").model_type == "llava"


def test_what_is_damaged_is_named(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = copied(made / "run", tmp_path / "run")
    os.truncate(run / "model.safetensors", 3000)
    assert "whole safetensors file" in _fails(capsys, run, made / "wrapper", tmp_path / "small")
    (run / "model.safetensors").write_bytes(next((made / "wrapper").glob("*.safetensors")).read_bytes())
    assert "is not what its plan leaves" in _fails(capsys, run, made / "wrapper", tmp_path / "small")
    edit_json(run / "report.json", format="another")
    assert "is not the report" in _fails(capsys, run, made / "wrapper", tmp_path / "small")


MEASURED = """
import sys
from multipruner.commands.main import main
if main(sys.argv[1:]):
    raise SystemExit(1)
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print("peak", int(peak.split()[1]) // 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A tower twelve times as deep takes hardly more, taken out and put back: its tensors are as large."""
    peaks: dict[int, int] = {}
    for layers in (2, 24):
        about = copy.deepcopy(WRAPPERS["llava"])
        about["text_config"] |= {"hidden_size": 1024, "intermediate_size": 6144, "head_dim": 64, "num_hidden_layers":
                                 layers, "num_attention_heads": 16, "num_key_value_heads": 4}  # fmt: skip
        with torch.device("meta"):
            empty: Any = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**about, dtype="bfloat16"))
        model = empty.to(torch.bfloat16).to_empty(device="cpu")
        for tensor in model.state_dict().values():
            tensor.fill_(0.01)
        folder = tmp_path / f"whole-{layers}"
        model.save_pretrained(folder, max_shard_size="200MB")
        tiny.tiny_tokenizer().save_pretrained(folder)
        anatomy = anatomy_of(text_config(folder, "tiny")[1])
        sizes = tuple((2, 4) if place.kind == "attention" else (5000,) for place in anatomy)
        write_plan(folder, tmp_path / "plan.json", Structure(sizes))
        del model, empty
        command = [sys.executable, "-c", MEASURED, "apply", str(tmp_path / "plan.json"), "--model", str(folder),
                   "--output", str(tmp_path / f"small-{layers}"), "--no-reopen", "--any-weights"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[layers] = int(done.stdout.split("peak ")[-1])
    print(peaks)
    assert peaks[24] - peaks[2] < 64
