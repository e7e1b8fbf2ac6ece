"""GGUF files say exactly what the checkpoint says."""

from __future__ import annotations

import errno
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, TokenType
from gguf.quants import dequantize
from transformers import PreTrainedModel

from multipruner.checkpoint import save as checkpoint
from multipruner.checkpoint.cut import apply_plan
from multipruner.checkpoint.save import save
from multipruner.commands.export import run
from multipruner.core.errors import ConfigError, NumericsError, OutputError, UnknownModelError, UnsupportedModelError
from multipruner.core.families import FAMILIES
from multipruner.export import gguf_tensors
from multipruner.export.gguf import export_gguf
from multipruner.export.gguf_model import GGUF_FAMILIES, read_model
from tests.support import tiny
from tests.support.gguf_cases import (
    CHAT,
    MIXED,
    SPECIAL,
    UNIFORM,
    VARIANTS,
    VOCABULARY,
    byte_level,
    pruned_folder,
    sentencepiece_like,
)
from tests.support.layers import layers_of, structure_of

HEAD = 16
WRITTEN = {"head_count": [1, 4, 2, 0, 4], "head_count_kv": [1, 2, 1, 0, 2], "feed_forward_length": [23, 32, 7, 32, 40]}
"""What ``deci`` is told of it: one zero head in layer 0, 32 zero channels where attention stands alone."""
variants = pytest.mark.parametrize("variant", VARIANTS)


def _fields(reader: GGUFReader) -> dict[str, Any]:
    return {key: field.contents() for key, field in reader.fields.items()}


def _values(tensor: Any) -> np.ndarray:
    return dequantize(tensor.data, tensor.tensor_type)


def _straight(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo the pairing of rows, row by row: pair (2i, 2i+1) of a head holds its rows i and i + half."""
    order = [head * HEAD + 2 * i + j for head in range(heads) for j in (0, 1) for i in range(HEAD // 2)]
    return rows[order]


def _expected(model: PreTrainedModel, layers: int) -> dict[str, np.ndarray]:
    """Tensors by GGUF name, from a model in memory; made-up ones by what they must do: nothing."""
    state = {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}
    parts = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if not model.config.tie_word_embeddings:
        names["lm_head.weight"] = "output.weight"
    for number in range(layers):
        for ours, theirs in parts.items():
            for kind in ("weight", "bias"):
                names[f"model.layers.{number}.{ours}.{kind}"] = f"blk.{number}.{theirs}.{kind}"
    return {names[name]: value for name, value in state.items() if name in names}


@variants
def test_every_tensor_and_array_is_that_of_the_checkpoint(variant: str, tmp_path: Path) -> None:
    model = pruned_folder(tmp_path / "run", variant)
    done = export_gguf(tmp_path / "run", tmp_path / "out.gguf", outtype="f32")
    reader = GGUFReader(done.path)
    fields = _fields(reader)
    assert done.architecture == fields["general.architecture"] == "deci"
    for key, values in WRITTEN.items():
        where = "deci." if key.startswith("feed") else "deci.attention."
        assert fields[where + key] == values, key
    assert fields["deci.block_count"] == done.layers == 5
    assert fields["deci.attention.key_length"] == fields["deci.attention.value_length"] == HEAD
    assert fields["deci.rope.dimension_count"] == HEAD and fields["deci.rope.freq_base"] == 50000.0
    assert fields["deci.embedding_length"] == 48 and fields["deci.vocab_size"] == VOCABULARY
    assert fields["deci.attention.layer_norm_rms_epsilon"] == pytest.approx(model.config.rms_norm_eps)

    sizes = [layer for layer in layers_of(MIXED) if any(layer)]
    expected = _expected(model, len(sizes))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for name, tensor in tensors.items():
        values = _values(tensor)
        assert tensor.tensor_type == GGMLQuantizationType.F32
        if name in expected:
            heads = {"attn_q": "query_heads", "attn_k": "kv_heads"}.get(name.split(".")[-2])
            if heads:
                values = _straight(values, getattr(sizes[int(name.split(".")[1])], heads))
            assert values.shape == expected[name].shape, name
            assert np.array_equal(values, expected[name]), name
    assert not set(expected) - set(tensors)

    made_up = {name: _values(tensors[name]) for name in set(tensors) - set(expected)}
    attention = {f"blk.0.attn_{part}.weight" for part in ("norm", "q", "k", "v", "output")}
    assert set(made_up) == attention | {f"blk.1.ffn_{part}.weight" for part in ("norm", "gate", "up", "down")}
    assert made_up["blk.0.attn_q.weight"].shape == (HEAD, 48) and made_up["blk.0.attn_output.weight"].shape == (
        48,
        HEAD,
    )
    assert made_up["blk.1.ffn_up.weight"].shape == (32, 48) and made_up["blk.1.ffn_down.weight"].shape == (48, 32)
    for name, values in made_up.items():
        assert (values == ("norm" in name)).all(), name


@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16", "q8_0"])
def test_types_of_the_tensors(outtype: str, tmp_path: Path) -> None:
    model = pruned_folder(tmp_path / "run", hidden_size=64)
    done = export_gguf(tmp_path / "run", tmp_path / "out.gguf", outtype=outtype)
    exact = _expected(model, sum(map(any, layers_of(MIXED))))
    wide, near = 0, {"f32": 0.0, "f16": 1e-3, "bf16": 8e-3, "q8_0": 2e-2}[outtype]
    for tensor in GGUFReader(done.path).tensors:
        if len(tensor.shape) == 1:
            assert tensor.tensor_type == GGMLQuantizationType.F32
            continue
        whole_blocks = outtype != "q8_0" or tensor.shape[0] % 32 == 0
        assert tensor.tensor_type.name == (outtype.upper() if whole_blocks else "F16")
        wide += not whole_blocks
        if tensor.name in exact and "attn_q" not in tensor.name and "attn_k" not in tensor.name:
            assert np.abs(_values(tensor) - exact[tensor.name]).max() <= near * np.abs(exact[tensor.name]).max()
    assert done.kept_wide == wide == (4 if outtype == "q8_0" else 0), "blk.0 23, blk.2 7, blk.4 40 channels; one head"
    assert _fields(GGUFReader(done.path))["general.file_type"] == {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}[outtype]


def test_uniform_results_take_the_family_s_own_architecture(tmp_path: Path) -> None:
    wide = structure_of(*[(4, 2, 24)] * 3)
    for number, (variant, structure, config, architecture) in enumerate(
        [
            ("llama", UNIFORM, {}, "llama"),
            (
                "llama",
                structure_of(*[(5, 5, 40)] * 2),
                {"num_attention_heads": 6, "num_key_value_heads": 6},
                "llama",
            ),
            ("mistral", UNIFORM, {}, "llama"),
            ("qwen2", wide, {"hidden_size": 64}, "qwen2"),
            ("qwen2", UNIFORM, {}, "deci"),  # llama.cpp's qwen2 wants queries as wide as the hidden state
        ]
    ):
        model = pruned_folder(tmp_path / str(number), variant, structure, **config)
        done = export_gguf(tmp_path / str(number), outtype="f32")
        assert done.path == tmp_path / f"{number}-f32.gguf"
        reader = GGUFReader(done.path)
        heads = _fields(reader)[f"{architecture}.attention.head_count"]
        size, *rest = layers_of(structure)
        assert done.architecture == architecture
        assert heads == ([size.query_heads] * (1 + len(rest)) if architecture == "deci" else size.query_heads)
        query = next(_values(tensor) for tensor in reader.tensors if tensor.name == "blk.1.attn_q.weight")
        rows = model.state_dict()["model.layers.1.self_attn.q_proj.weight"].numpy()
        assert np.array_equal(query if architecture == "qwen2" else _straight(query, size.query_heads), rows)


def test_names_and_origin_come_from_the_card(tmp_path: Path) -> None:
    pruned_folder(tmp_path / "small")
    fields = _fields(GGUFReader(export_gguf(tmp_path / "small").path))
    assert fields["general.name"] == "small" and fields["general.license"] == "mit"
    assert fields["general.base_model.0.name"] == "Tiny-1B" and fields["general.base_model.0.organization"] == "someone"
    assert fields["general.base_model.0.repo_url"] == "https://huggingface.co/someone/Tiny-1B"
    assert fields["general.tags"] == ["pruned"] and fields["general.languages"] == ["en"]


def test_byte_level_tokenizer(tmp_path: Path) -> None:
    tokenizer = byte_level("llama-bpe", bos=True)
    pruned_folder(tmp_path / "run", tokenizer=tokenizer)
    fields = _fields(GGUFReader(export_gguf(tmp_path / "run").path))
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert fields["tokenizer.ggml.model"] == "gpt2" and fields["tokenizer.ggml.pre"] == "llama-bpe"
    assert len(tokens) == len(types) == VOCABULARY
    assert {tokens[number]: number for number in range(len(tokenizer))} == tokenizer.get_vocab()
    assert types[:4] == [TokenType.CONTROL] * 4 and types[tokens.index("<tool>")] == TokenType.USER_DEFINED
    assert types[-1] == TokenType.UNUSED and tokens[-1] == f"[PAD{VOCABULARY - 1}]"
    assert set(types[4 : len(tokenizer) - 1]) == {TokenType.NORMAL}
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    assert fields["tokenizer.ggml.merges"] == [" ".join(pair) for pair in model["merges"]]
    assert fields["tokenizer.ggml.bos_token_id"] == 1 and fields["tokenizer.ggml.eos_token_id"] == 2
    assert fields["tokenizer.ggml.add_bos_token"] is True and fields["tokenizer.ggml.add_eos_token"] is False
    assert fields["tokenizer.chat_template"] == CHAT


def test_sentencepiece_like_tokenizer(tmp_path: Path) -> None:
    tokenizer = sentencepiece_like()
    pruned_folder(tmp_path / "run", tokenizer=tokenizer, vocab_size=len(tokenizer))
    fields = _fields(GGUFReader(export_gguf(tmp_path / "run").path))
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    scores = dict(zip(tokens, fields["tokenizer.ggml.scores"], strict=True))
    merged = ["".join(pair) for pair in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]
    assert fields["tokenizer.ggml.model"] == "llama" and fields["tokenizer.ggml.add_space_prefix"] is True
    assert types[:4] == [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, TokenType.BYTE]
    assert types.count(TokenType.BYTE) == 256 and types[-1] == TokenType.CONTROL
    assert sorted(merged, key=lambda token: -scores[token]) == merged, "what merges first scores highest"
    assert all(scores[token] < scores[merged[-1]] for token in SPECIAL)


def test_the_tokenizer_of_a_base_gguf_is_copied(tmp_path: Path) -> None:
    pruned_folder(tmp_path / "base", tokenizer=byte_level("qwen2", bos=True))
    base = export_gguf(tmp_path / "base").path
    tokenizer = byte_level("qwen2")
    tokenizer.chat_template = None
    pruned_folder(tmp_path / "run", tokenizer=tokenizer)
    (tmp_path / "run" / "README.md").unlink()
    done = export_gguf(tmp_path / "run", base_gguf=base)
    copied, original = _fields(GGUFReader(done.path)), _fields(GGUFReader(base))
    assert {k: v for k, v in copied.items() if "tokenizer" in k} == {
        k: v for k, v in original.items() if "tokenizer" in k
    }
    assert copied["general.license"] == "mit"
    for key, field in GGUFReader(done.path).fields.items():
        if key.startswith("tokenizer."):
            assert field.types == GGUFReader(base).fields[key].types, key
    pruned_folder(tmp_path / "other", tokenizer=byte_level("smollm"))
    with pytest.raises(ConfigError, match=r"token \d+ is .*, the folder's tokenizer says"):
        export_gguf(tmp_path / "other", base_gguf=base)
    pruned_folder(tmp_path / "larger", vocab_size=VOCABULARY + 8)
    with pytest.raises(ConfigError, match="has 360 tokens, the model 368"):
        export_gguf(tmp_path / "larger", base_gguf=base)
    with pytest.raises(ConfigError, match="cannot be read"):
        export_gguf(tmp_path / "run", base_gguf=tmp_path / "run" / "config.json", overwrite=True)
    assert sorted(path.name for path in tmp_path.glob("*.gguf")) == ["base-f16.gguf", "run-f16.gguf"]


def _other(tokenizer: Any, **parts: Any) -> Any:
    """A tokenizer with parts of its description exchanged."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    record = json.loads(tokenizer.backend_tokenizer.to_str()) | parts
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(record)), bos_token="<s>")


def test_tokenizers_without_a_name_in_llama_cpp_are_refused(tmp_path: Path) -> None:
    strange = {"type": "Split", "pattern": {"Regex": "[xyz]"}, "behavior": "Isolated", "invert": False}
    for number, (tokenizer, message) in enumerate(
        [
            (tiny.tiny_tokenizer(), "WordLevel"),
            (_other(byte_level(), pre_tokenizer=strange), r"pre-tokenizer \(\[xyz\]"),
            (_other(byte_level(), normalizer={"type": "Lowercase"}), "normalizer Lowercase"),
            (_other(sentencepiece_like(), pre_tokenizer={"type": "Digits", "individual_digits": True}), "no Digits"),
            (byte_level(size=VOCABULARY + 30), "only 360 embeddings"),
        ]
    ):
        pruned_folder(tmp_path / str(number), tokenizer=tokenizer, vocab_size=VOCABULARY + 40 * ("no " in message))
        with pytest.raises(UnsupportedModelError, match=message) as caught:
            export_gguf(tmp_path / str(number))
        assert "embeddings" in message or "--base-gguf" in str(caught.value)
    (tmp_path / "0" / "tokenizer.json").unlink()
    with pytest.raises(UnsupportedModelError, match="has no tokenizer; give the tokenizer of a GGUF file"):
        export_gguf(tmp_path / "0")


def test_other_families_are_refused_by_name(tmp_path: Path) -> None:
    model = tiny.tiny_model("baichuan")
    plan = tiny.random_plan(model, 1)
    save(tmp_path / "run", apply_plan(model, plan), byte_level(), plan=plan, report={}, card="")
    with pytest.raises(
        UnsupportedModelError, match=r"'baichuan' .*llama, mistral, qwen2.* instead: load the folder with"
    ):
        export_gguf(tmp_path / "run")
    config = {"model_type": "gemma2", "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 1}
    (tmp_path / "stock").mkdir()
    (tmp_path / "stock" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=r"'gemma2' .* instead: this folder is a stock checkpoint"):
        export_gguf(tmp_path / "stock")


def test_every_family_without_a_mapping_is_refused(tmp_path: Path) -> None:
    others = sorted(set(FAMILIES) - set(GGUF_FAMILIES))
    assert len(others) > 30
    for model_type in others:
        for said, instead in ((model_type, "this folder is a stock checkpoint"), (f"multipruner_{model_type}", "load")):
            record = {"model_type": said, **({"auto_map": {}} if said != model_type else {})}
            (tmp_path / "config.json").write_text(json.dumps(record))
            with pytest.raises(UnsupportedModelError, match=f"'{model_type}' .* What works instead: {instead}"):
                read_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rotary embeddings .*dynamic",
        ),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    pruned_folder(tmp_path / "run", structure=UNIFORM, **change)
    with pytest.raises(UnsupportedModelError, match=message):
        export_gguf(tmp_path / "run")


def test_context_ends_with_the_sliding_window(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, length in (("mistral", 128), ("mistral-sliding", 3)):
        pruned_folder(tmp_path / name, name)
        run([str(tmp_path / name), "--format", "gguf"])
        fields = _fields(GGUFReader(tmp_path / f"{name}-f16.gguf"))
        assert fields["deci.context_length"] == length
        assert ("sliding window" in capsys.readouterr().out) == (length == 3)


def test_the_command_says_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pruned_folder(tmp_path / "run", hidden_size=64)
    target = tmp_path / "new" / "out.gguf"
    arguments = [str(tmp_path / "run"), "--format", "gguf", "--outtype", "q8_0", "--output", str(target)]
    assert run(arguments) == 0
    said = capsys.readouterr().out
    assert f"{target}: architecture deci, 5 layers, " in said and "4 matrices stay f16" in said
    with pytest.raises(OutputError, match="--overwrite"):
        run(arguments)
    assert run([*arguments, "--overwrite"]) == 0
    assert [path.name for path in target.parent.iterdir()] == ["out.gguf"]
    with pytest.raises(ConfigError, match="--format"):
        run([str(tmp_path / "run"), "--format", "ggml"])
    with pytest.raises(UnknownModelError, match=r"config\.json cannot be read"):
        run([str(tmp_path / "nothing"), "--format", "gguf"])


def test_sharded_weights_give_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pruned_folder(tmp_path / "a" / "run")
    monkeypatch.setattr(checkpoint, "SHARD_SIZE", "50KB")
    pruned_folder(tmp_path / "b" / "run")
    assert len(list((tmp_path / "b" / "run").glob("*.safetensors"))) > 1
    one, other = export_gguf(tmp_path / "a" / "run").path, export_gguf(tmp_path / "b" / "run").path
    assert one.read_bytes() == other.read_bytes()


def test_weights_that_contradict_the_configuration_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = tmp_path / "run" / "model.safetensors"
    pruned_folder(tmp_path / "run")
    weights = load_file(path)
    name = "model.layers.1.self_attn.q_proj.weight"
    for changed, message in (
        ({k: v for k, v in weights.items() if k != name}, f"1 missing, such as {name}"),
        ({**weights, "extra": torch.ones(1)}, "1 unexpected, such as extra"),
        ({**weights, name: weights[name][:16].clone()}, f"1 of another shape, such as {name}"),
    ):
        save_file(changed, path)
        with pytest.raises(ConfigError, match=message):
            export_gguf(tmp_path / "run")
    weights[name][0, 0] = 1e6
    save_file(weights, path)
    with pytest.raises(NumericsError, match=r"blk\.1\.attn_q\.weight .*bf16 or f32"):
        export_gguf(tmp_path / "run")
    path.write_bytes(b"no")
    with pytest.raises(UnknownModelError, match="cannot be read"):
        export_gguf(tmp_path / "run")
    path.unlink()
    with pytest.raises(UnknownModelError, match=r"no model\.safetensors"):
        export_gguf(tmp_path / "run")
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"], "nothing half-written stays"


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pruned_folder(tmp_path / "run")
    encode = gguf_tensors.TensorJob.encode

    def fail(self: Any, *arguments: Any) -> Any:
        if self.name == "output_norm.weight":
            raise OSError(errno.ENOSPC, "No space left on device")
        return encode(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(gguf_tensors.TensorJob, "encode", fail)
        with pytest.raises(OutputError, match="the disk is full"):
            export_gguf(tmp_path / "run")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))  # pyright: ignore
    with pytest.raises(OutputError, match=r"needs .* GB"):
        export_gguf(tmp_path / "run")
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


def test_only_one_tensor_is_read_at_a_time(tmp_path: Path) -> None:
    import tracemalloc

    pruned_folder(tmp_path / "run", vocab_size=20000, structure=structure_of(*[(4, 2, 40)] * 2), tied=False)
    export_gguf(tmp_path / "run", tmp_path / "first.gguf", outtype="f32")
    table = 20000 * 48 * 4
    tracemalloc.start()
    done = export_gguf(tmp_path / "run", tmp_path / "out.gguf", outtype="f32")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert done.nbytes > 2 * table
    assert peak < 8 * table, "names of 20,000 tokens and one table, not everything"


def test_k_quants_need_a_quantiser_and_stand_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pruned_folder(tmp_path / "run")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(ConfigError, match="put llama-quantize on the PATH"):
        export_gguf(tmp_path / "run", quant="q4_k_m")
    with pytest.raises(ConfigError, match=r"'q4_k_x' is unknown; choose f32, .* q6_k"):
        export_gguf(tmp_path / "run", quant="q4_k_x")
    for more in (["--outtype", "f16"], ["--format", "onnx"]):
        with pytest.raises(ConfigError, match="in place of --outtype"):
            run([str(tmp_path / "run"), "--quant", "q4_k_m", *more])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
