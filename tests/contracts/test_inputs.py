"""Every tensor of the input is accounted for, or the model is refused in one line before any work."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

from multipruner.checkpoint.load import load
from multipruner.commands.main import _LESS_MEMORY, main
from multipruner.config.recipe import Recipe
from multipruner.core.errors import ConfigError, MemoryShortError, MultiprunerError, OutputError, UnsupportedModelError
from multipruner.export.gguf import export_gguf
from multipruner.recipes import read_file
from multipruner.sources.dense import load_dense
from multipruner.sources.intake.accounting import _check_sizes
from multipruner.sources.resolve import resolve
from multipruner.storage.cache import cache_folder
from multipruner.storage.memory import memory_shortage
from tests.support import loom
from tests.support.caches import cache_at
from tests.support.fake_hub import Blob, Repo, fake_hub
from tests.support.gguf_cases import MIXED, UNIFORM, pruned_folder
from tests.support.inputs import FILE, Weights, copied, edit_json, edit_tensors, short_run, write_model
from tests.support.tiny import random_ids, tiny_model, tiny_tokenizer

DOWN = "model.layers.1.mlp.down_proj.weight"
LM_HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache_at(monkeypatch, tmp_path / "cache")
    monkeypatch.delenv("MULTIPRUNER_TRUST_REMOTE_CODE", raising=False)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("plain") / "plain")


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    return copied(plain, tmp_path / "model")


def opened(model: Any, **settings: Any) -> Any:
    """The dense model that a name gives."""
    recipe = Recipe.build({"model": str(model), "device": "cpu"}, settings)
    return load_dense(resolve(recipe, lambda text: None), recipe)


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **changes)


def weights(change: Callable[[Weights], Weights]) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, change)


def written(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: void((folder / name).write_text(text))


def both(*edits: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda folder: void([edit(folder) for edit in edits])


def void(_: Any) -> None:
    """Nothing."""


def without(key: str) -> Callable[[Path], None]:
    return weights(lambda w: {name: weight for name, weight in w.items() if name != key})


def more(name: str, weight: torch.Tensor) -> Callable[[Path], None]:
    return weights(lambda w: {**w, name: weight})


def as_float8(w: Weights) -> Weights:
    return {name: v.to(torch.float8_e4m3fn) if name.endswith("proj.weight") else v for name, v in w.items()}


def untied_but_said_tied(folder: Path) -> None:
    config(tie_word_embeddings=True)(folder)


def more_tokens(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)


def reward(folder: Path) -> None:
    base = tiny_model("llama", layers=2).config
    LlamaForSequenceClassification(base).save_pretrained(folder)


ADAPTER = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "someone/base"})
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 10\n"
DEEP = "[" * 100_000 + "]" * 100_000
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "a tensor is missing": (without(DOWN), rf"lacks weights: {re.escape(DOWN)}"),
    "the head is missing": (without(LM_HEAD), "lacks weights: lm_head.weight; if head and embeddings are one matrix"),
    "a tensor too many": (more("model.layers.0.mlp.extra.weight", torch.ones(3)), "1 tensors without a place"),
    "a score head": (more("score.weight", torch.ones(1, 48)), "a head that is no language model's"),
    "a value head": (more("v_head.summary.weight", torch.ones(1, 48)), "a head that is no language model's"),
    "an adapter inside": (
        more("model.layers.0.q_proj.lora_A.weight", torch.ones(2, 48)),
        "an adapter that is not merged",
    ),
    "a bias that the configuration denies": (more(DOWN.replace("weight", "bias"), torch.ones(48)), "without a place"),
    "names of a wrapper": (weights(lambda w: {f"_orig_mod.{n}": v for n, v in w.items()}), "torch.compile's wrapper"),
    "another width": (config(intermediate_size=80), r"has shape \[48, 40\], the configuration asks for \[48, 80\]"),
    "fewer layers": (
        config(num_hidden_layers=1),
        r"without a place: layer 1 \(config.json says 1 layers, the files hold 2",
    ),
    "more layers": (config(num_hidden_layers=3), "lacks weights: model.layers.2"),
    "a billion layers": (config(num_hidden_layers=10**9), "is 1000000000; a whole number from 1 to 10000"),
    "thousands of layers": (config(num_hidden_layers=10**4), "lacks weights: model.layers.2"),
    "float8": (weights(as_float8), "is quantised: .* is stored as F8_E4M3"),
    "float8 with scales, said beside": (
        both(weights(as_float8), more(DOWN + "_scale", torch.ones(1)), written("hf_quant_config.json", "{}")),
        r"is quantised \(ModelOpt: hf_quant_config.json\)",
    ),
    "scales alone": (more(DOWN.replace("weight", "input_scale"), torch.ones(1)), "is quantised"),
    "8-bit integers": (weights(lambda w: {**w, DOWN: w[DOWN].to(torch.int8)}), "stored as I8"),
    "words of an MLX model": (
        both(more("x.scales", torch.ones(1)), config(quantization={"bits": 4})),
        r"quantised \(MLX\)",
    ),
    "quantised, said by a string": (config(quantization_config="fp8"), r"is quantised \(fp8\)"),
    "GPTQ's old form": (
        both(
            lambda f: void((f / FILE).rename(f / "gptq_model-4bit.safetensors")), written("quantize_config.json", "{}")
        ),
        "is quantised .GPTQ",
    ),
    "tied, but two matrices": (untied_but_said_tied, "set tie_word_embeddings to false"),
    "a reward model": (reward, "is a LlamaForSequenceClassification, not the causal language model"),
    "another class": (config(architectures=["TwiceForCausalLM"]), "not the causal language model LlamaForCausalLM"),
    "code of its own": (config(auto_map={"AutoModelForCausalLM": "own.Own"}), r"modelling code of its own \(own.Own\)"),
    "an adapter beside": (
        written("adapter_config.json", ADAPTER),
        r"an adapter \(LoRA of someone/base.*merge it first",
    ),
    "an adapter alone": (
        both(
            written("adapter_config.json", ADAPTER), lambda f: void([(f / n).unlink() for n in (FILE, "config.json")])
        ),
        r"is an adapter \(LoRA\) of someone/base, no model",
    ),
    "pickled weights": (lambda f: void((f / FILE).rename(f / "pytorch_model.bin")), "only pickled weights"),
    "ONNX weights": (lambda f: void((f / FILE).rename(f / "model.onnx")), "only ONNX weights"),
    "a clone without large files": (written(FILE, POINTER), "git lfs pull"),
    "a tokenizer not downloaded": (written("tokenizer.json", POINTER), "git lfs pull"),
    "a wrapper": (
        config(model_type="llava", text_config={"model_type": "llama"}),
        "a model of several modalities .llava",
    ),
    "no tokenizer": (lambda f: void([p.unlink() for p in f.glob("tokenizer*")]), "has no tokenizer"),
    "a damaged tokenizer": (written("tokenizer.json", "{"), "cannot load the tokenizer"),
    "tokens without rows": (
        more_tokens,
        "1 tokens of the tokenizer of model, such as '<extra>', lie beyond the 97 rows",
    ),
    "no model_type": (config(model_type=...), "has no model_type"),
    "a list": (written("config.json", "[]"), "must hold a JSON object, not list"),
    "no JSON": (written("config.json", "{"), "cannot read"),
    "deep JSON": (written("config.json", DEEP), "nested too deeply"),
    "deep JSON for the tokenizer": (written("tokenizer_config.json", DEEP), "nested too deeply"),
    "heads that do not divide": (
        config(num_attention_heads=5, num_key_value_heads=2),
        "num_attention_heads = 5 is no multiple of the rest",
    ),
    "a hidden size that does not divide": (config(head_dim=..., hidden_size=50), "50 does not divide into 4 heads"),
    "no hidden size": (config(hidden_size=None), "hidden_size is None; a whole number from 1"),
    "no heads": (config(num_attention_heads=0), "num_attention_heads is 0; a whole number from 1"),
    "a width in words": (config(hidden_size="many"), "hidden_size is 'many'; a whole number from 1"),
    "an unknown activation": (config(hidden_act="nonsense"), "config.json of model|no model can be built"),
    "an unknown rotary type": (config(rope_parameters={"rope_type": "own", "rope_theta": 1e4}), "config.json"),
    "padding beyond the rows": (config(pad_token_id=97), "config.json of model"),
    "not a number": (weights(lambda w: {**w, DOWN: w[DOWN] * torch.nan}), f"{re.escape(DOWN)} holds NaN or infinity"),
    "two sets of weights": (
        written("model.safetensors.index.json", json.dumps({"weight_map": {DOWN: "other.safetensors"}})),
        "lacks 1 of 1 files|two sets of weights",
    ),
    "half a file": (lambda f: os.truncate(f / FILE, 5000), "is no whole safetensors file"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_in_one_line_before_any_work(
    kind: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit, message = REFUSED[kind]
    edit(folder)
    capsys.readouterr()
    assert main(short_run(folder, tmp_path / "out")) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("multipruner: ") and re.search(message, said), said
    assert "Traceback" not in said and not (tmp_path / "out").exists()


def pad_beyond(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)


def in_shards(folder: Path) -> None:
    (folder / FILE).unlink()
    tiny_model("llama", layers=2).save_pretrained(folder, max_shard_size="20KB")


ACCEPTED: dict[str, Callable[[Path], None]] = {
    "old rotary buffers": more("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(8)),
    "how it was run": config(
        return_dict=False, output_attentions=True, output_hidden_states=True, attn_implementation="flash_attention_2"
    ),
    "padding beyond the rows": pad_beyond,
    "somebody's plan": written("plan.json", '{"note": "release plan"}'),
    "shards": in_shards,
    "no architectures": config(architectures=...),
    "the first spelling": config(architectures=["LLaMAForCausalLM"]),
    "a word of padding": config(pad_token_id=-1),
}


@pytest.mark.parametrize("kind", ACCEPTED)
def test_what_is_whole_computes_what_it_did(kind: str, folder: Path) -> None:
    ACCEPTED[kind](folder)
    model, _ = opened(folder)
    with torch.no_grad():
        assert torch.equal(model(random_ids()).logits, tiny_model("llama", layers=2)(random_ids()).logits)


@pytest.mark.parametrize(
    ("dead", "how"),
    [("self_attn", ("--effort", "thorough")), ("mlp", ()), ("o_proj", ()), ("self_attn", ("--method", "paper"))],
)
def test_what_was_set_to_zero_goes_first_and_stops_nothing(dead: str, how: tuple[str, ...], tmp_path: Path) -> None:
    """A block of zeros costs nothing to lose, and has no moments that anything could be repaired by."""
    folder = write_model(tmp_path / "dense", layers=4)
    edit_tensors(folder, lambda w: {k: 0 * v if "layers.2" in k and dead in k else v for k, v in w.items()})
    given = [one for one in short_run(folder, tmp_path / "out") if one not in ("--repair", "none", "--rounds", "0")]
    assert main([*given, *how, "--repair", "lstsq", "--importance", "second-order"]) == 0
    blocks = json.loads((tmp_path / "out" / "report.json").read_text())["structure"]["blocks"]
    assert "paper" in how or blocks[5 if dead == "mlp" else 4] == []  # losses of random weights fall without others


def test_tied_and_equal_is_one_matrix(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "tied", "qwen2", tied=True)
    edit_tensors(folder, lambda w: {**w, LM_HEAD: w[EMBEDDINGS].clone()})
    model, _ = opened(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_tokenizer_of_sentencepiece_alone_names_the_extra(folder: Path) -> None:
    """With the package the conversion is transformers' own; without it the extra is named."""
    for path in folder.glob("tokenizer*"):
        path.unlink()
    (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    edit = "import sys; sys.modules['sentencepiece'] = None\n"
    code = edit + "from multipruner.commands.main import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *short_run(folder, folder.parent / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "pip install 'multipruner[sentencepiece]'" in done.stderr


@pytest.mark.parametrize("flags", [["--model", ""], ["--model", " "], ["--model", "x" * 5000], ["--model", "a\0b"]])
def test_names_that_are_none(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*flags, "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("multipruner: ")


def test_a_device_without_numbers(folder: Path) -> None:
    with pytest.raises(ConfigError, match="device 'meta' cannot be used"):
        opened(folder, device="meta")


def test_a_deep_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("a: " + "[" * 5000 + "]" * 5000)
    with pytest.raises(ConfigError, match="nested too deeply"):
        read_file(tmp_path / "recipe.yaml")


# memory


def test_weights_that_do_not_fit_are_refused_by_their_headers(folder: Path) -> None:
    """The file is as long as its header says, and takes no room on the disk."""
    rows = 2**31 - 1
    header = {name: {"dtype": "F32", "shape": list(weight.shape)} for name, weight in load_file(folder / FILE).items()}
    for name in (LM_HEAD, EMBEDDINGS):
        header[name]["shape"][0] = rows
    end = 0
    for entry in header.values():
        size = 4 * torch.Size(entry["shape"]).numel()
        entry["data_offsets"] = [end, end := end + size]
    text = json.dumps(header).encode()
    with (folder / FILE).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    edit_json(folder / "config.json", vocab_size=rows)
    with pytest.raises(MemoryShortError, match=r"the weights of model need 768\.0 GiB in memory, .* are free"):
        opened(folder)


def test_an_allocation_that_fails_says_how_much() -> None:
    with pytest.raises(RuntimeError) as failed:
        torch.empty(1 << 50, dtype=torch.float32)
    shortage = memory_shortage(failed.value)
    assert shortage and re.search(r"4,194,304\.0 GiB more was needed, .* are free", str(shortage))
    assert memory_shortage(MemoryError()) and memory_shortage(RuntimeError("a shape is wrong")) is None


@pytest.mark.parametrize("command", _LESS_MEMORY)
def test_what_needs_less_memory_is_named_by_flags_that_the_command_has(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shortage = memory_shortage(MemoryError(), _LESS_MEMORY[command])
    assert shortage and str(shortage).endswith(f"{_LESS_MEMORY[command]}, or take a machine with more memory")
    with pytest.raises(SystemExit):
        main([command, "--help-all" if command in ("prune", "search") else "--help"])
    known = re.findall(r"--[a-z-]+", capsys.readouterr().out)
    assert set(re.findall(r"--[a-z-]+", _LESS_MEMORY[command])) <= set(known)


def test_an_overflow_is_said_before_the_search(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_tensors(folder, lambda w: {**w, LM_HEAD: w[LM_HEAD] * 1e38, "model.norm.weight": w["model.norm.weight"] * 1e9})
    assert main(short_run(folder, tmp_path / "out")) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the dense model on the calibration text" in said and "all weights are finite" in said


# whose word counts for code that comes with a model


@pytest.fixture(scope="module")
def baichuan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("own") / "baichuan", "baichuan")


def test_a_recipe_file_may_only_ask(baichuan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {baichuan}\ntrust_remote_code: true\n")
    flags = short_run(baichuan, tmp_path / "out")[2:]
    assert main(["--recipe", str(recipe), *flags]) == 2
    assert "pass --trust-remote-code" in capsys.readouterr().err
    assert main(["--recipe", str(recipe), *flags, "--trust-remote-code"]) == 0


def test_a_report_may_only_ask(
    baichuan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert main(short_run(baichuan, out, "--trust-remote-code")) == 0
    assert json.loads((out / "report.json").read_text())["recipe"]["trust_remote_code"] is True
    judged = ["eval", str(out), "--tasks", "ppl", "--eval-text", str(baichuan / "text.txt")]
    tuned = ["tune", str(out), "--data", "self", "--steps", "1", "--length", "16", "--batch", "1", "--rank", "2",
             "--eval-text", str(baichuan / "text.txt"), "--output", str(tmp_path / "tuned")]  # fmt: skip
    capsys.readouterr()
    for command in (judged, tuned):
        assert main(command) == 2
        assert re.search("trust.remote.code", capsys.readouterr().err)
    monkeypatch.setenv("MULTIPRUNER_TRUST_REMOTE_CODE", "1")
    assert main(judged) == 0


# GGUF


_TYPES: dict[type, gguf.GGUFValueType] = {
    str: gguf.GGUFValueType.STRING,
    float: gguf.GGUFValueType.FLOAT32,
    int: gguf.GGUFValueType.UINT16,
}


def exported(tmp_path: Path, **options: Any) -> Path:
    """A GGUF file of a model whose layers are alike."""
    pruned_folder(tmp_path / "whole", structure=UNIFORM, **options)
    export_gguf(tmp_path / "whole", tmp_path / "whole.gguf", outtype="f32", overwrite=True)
    return tmp_path / "whole.gguf"


def rewritten(
    source: Path, target: Path, keep: Callable[[str], bool], facts: dict[str, Any], extra: dict[str, Any]
) -> Path:
    """A GGUF file with some of the tensors of another, further facts (floats) and tensors."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for key, field in reader.fields.items():
        if not key.startswith("GGUF") and key != "general.architecture":
            kind, inner = field.types[0], field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), kind, inner)
    for key, value in facts.items():
        writer.add_key_value(key, value, _TYPES[type(value)])
    for tensor in reader.tensors:
        if keep(tensor.name):
            writer.add_tensor(tensor.name, extra.pop(tensor.name, tensor.data), raw_dtype=tensor.tensor_type)
    for name, values in extra.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_rotary_factors_of_a_file_become_the_configurations(tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "rope_theta": 50000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 48}  # fmt: skip
    path = exported(tmp_path, rope_parameters=scaling)
    found, _ = opened(path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.bfloat16)
    assert dict(found.config.rope_parameters) == scaling
    ids = random_ids(2, 100)
    with torch.no_grad():
        gap = (found.float()(ids).logits - stock.float()(ids).logits).abs().max()
    assert gap < 1e-4


def test_what_a_gguf_file_has_besides_is_refused_and_not_cached(tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "rope_theta": 50000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 48}  # fmt: skip
    path = exported(tmp_path, rope_parameters=scaling)
    factors = next(t.data for t in gguf.GGUFReader(path).tensors if t.name == "rope_freqs.weight")
    odd = factors.copy()
    odd[3] *= 1.01
    every, half = lambda name: True, lambda name: "blk.4" not in name and "blk.5" not in name
    yarn = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    no_hole = lambda name: "blk.2.ffn_down" not in name  # noqa: E731
    split = {"split.no": 0, "split.count": 2}

    def made(name: str, keep: Callable[[str], bool], facts: dict[str, Any], extra: dict[str, Any]) -> Path:
        return rewritten(path, tmp_path / name, keep, facts, extra)

    cases = {
        "cannot be read exactly .rope_freqs": made("odd.gguf", every, {}, {"rope_freqs.weight": odd}),
        "cannot be read exactly": made("yarn.gguf", lambda name: "rope" not in name, yarn, {}),
        "passes over: blk.0.attn_q.bias": made("bias.gguf", every, {}, {"blk.0.attn_q.bias": factors}),
        "says 6 layers .* and holds 4": made("half.gguf", half, {}, {}),
        "lacks weights: .*down_proj": made("hole.gguf", no_hole, {}, {}),
        "is part 1 of 2 of a model.*--merge": made("first.gguf", half, split, {}),
        "is part 2 of 3": path.rename(tmp_path / "x-00002-of-00003.gguf"),
    }
    (tmp_path / "pointer.gguf").write_text(POINTER)
    for message, file in {**cases, "git lfs pull": tmp_path / "pointer.gguf"}.items():
        with pytest.raises(MultiprunerError, match=message):
            opened(file)
        assert [path.name for path in cache_folder().iterdir()] == ["rehearsals"], message


def test_linear_scaling_of_a_file_is_read(tmp_path: Path) -> None:
    path = exported(tmp_path)
    facts = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    found, _ = opened(rewritten(path, tmp_path / "linear.gguf", lambda name: True, facts, {}))
    assert found.config.rope_parameters["rope_type"] == "linear" and found.config.rope_parameters["factor"] == 2.0


# the Hub


def test_a_hub_id_goes_through_the_same_step(plain: Path, tmp_path: Path) -> None:
    """What small files tell is refused before the weights are asked for; the rest is loaded as from a folder."""
    files = {path.name: path.read_bytes() for path in plain.iterdir()}
    own = json.loads(files["config.json"])
    bad = {**files, "config.json": json.dumps({**own, "auto_map": {"AutoModel": "own.Own"}}).encode()}
    short = {**files, "config.json": json.dumps({**own, "num_hidden_layers": 3}).encode()}
    adapter = {"adapter_config.json": ADAPTER.encode(), "adapter_model.safetensors": b""}
    code = (
        "import sys\nfrom multipruner.config.recipe import Recipe\nfrom multipruner.sources.dense import load_dense\n"
        "from multipruner.sources.resolve import resolve\n"
        "for name in sys.argv[1:]:\n"
        "    recipe = Recipe.build({'model': name, 'device': 'cpu'})\n"
        "    try:\n        model, _ = load_dense(resolve(recipe, lambda text: None), recipe)\n"
        "    except Exception as error:\n        print(name, type(error).__name__, error)\n"
        "    else:\n        print(name, 'loads', model.num_parameters())\n"
    )
    with fake_hub({}) as hub:
        for name, content in {"me/good": files, "me/bad": bad, "me/short": short, "me/adapter": adapter}.items():
            hub.repos[name] = Repo(False)
            hub.repos[name].add("all", {file: Blob(data, file == FILE) for file, data in content.items()})
            hub.objects.update({Blob(data, True).oid: data for data in content.values()})
        environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hub")}
        command = [sys.executable, "-c", code, *hub.repos]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        fetched = [line for line, _ in hub.requests if FILE in line]
    said = done.stdout.splitlines()
    assert said[0].startswith("me/good loads ")
    assert "me/bad UnsupportedModelError" in said[1] and "own.Own" in said[1]
    assert "me/short UnsupportedModelError" in said[2] and "lacks weights: model.layers.2" in said[2]
    assert "me/adapter UnsupportedModelError" in said[3] and "someone/base" in said[3]
    assert any("me/good" in line for line in fetched) and not any("me/bad" in line for line in fetched)


def test_the_loaded_class_is_the_stock_one(folder: Path) -> None:
    model, _ = opened(folder)
    stock = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is type(stock)
    save_file({}, folder / "adapter_model.safetensors")
    with pytest.raises(UnsupportedModelError, match="move the adapter_"):
        opened(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ffn_width": -3}, "ffn_width is -3; a whole number"),
        ({"n_layer": 10**9}, "n_layer is 1000000000; a whole number from 1 to 10000"),
        ({"n_head": 7, "n_group": 2}, "n_head = 7 is no multiple"),
        ({"head_width": None, "d_model": 50}, "50 does not divide into 4 heads"),
        ({"d_model": None}, "d_model is None"),
    ],
)
def test_sizes_are_checked_by_the_names_of_the_family_s_row(change: dict[str, Any], said: str) -> None:
    good = {"n_layer": 2, "vocab_size": 97, "d_model": 48, "head_width": 16, "n_head": 4, "n_group": 2, "ffn_width": 40}
    for fine in ({}, {"head_width": None}, {"n_group": None}):
        _check_sizes("a model", {**good, **fine}, loom.ROW)
    with pytest.raises(ConfigError, match=said):
        _check_sizes("a model", {**good, **change}, loom.ROW)


@pytest.mark.parametrize("equal", [True, False])
def test_a_result_that_is_tied_and_has_a_head_of_its_own(equal: bool, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    pruned_folder(run, tied=True, structure=UNIFORM)
    edit_tensors(run, lambda w: {**w, LM_HEAD: w[EMBEDDINGS] if equal else w[EMBEDDINGS] * 2})
    target = tmp_path / "model.gguf"
    code = main(["export", str(run), "--output", str(target)])
    said = capsys.readouterr().err
    if equal:
        assert code == 0 and target.exists(), said
        load(run)
        return
    assert code == 2 and said.count("\n") == 1 and "set tie_word_embeddings to false" in said and not target.exists()
    with pytest.raises(UnsupportedModelError, match="differ, and readers disagree"):
        load(run)


def test_a_result_with_tensors_that_have_no_place_is_damaged(tmp_path: Path) -> None:
    run = tmp_path / "run"
    pruned_folder(run, tied=True, structure=MIXED)
    edit_tensors(run, lambda w: {**w, "model.layers.0.extra.weight": w[EMBEDDINGS]})
    with pytest.raises(OutputError, match=r"unexpected weights, such as model\.layers\.0\.extra"):
        load(run)
