"""What is written tensor by tensor is what the model in memory would have been saved as, for every family."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from multipruner.checkpoint.cut import apply_plan
from multipruner.checkpoint.save import SHARD_SIZE, write_model
from multipruner.config.recipe import Recipe
from multipruner.core.errors import NumericsError, UnsupportedModelError
from multipruner.core.families import anatomy_of, spec_for
from multipruner.core.plan import PruningPlan, Ranking
from multipruner.core.structure import Structure
from multipruner.engine.fingerprint import fingerprint
from multipruner.sources.dense import accounted, load_dense
from multipruner.sources.resolve import ResolvedModel
from multipruner.stream.deferred import Deferred, Values, values_of
from multipruner.stream.dense import deferred_model, has_fingerprint
from multipruner.stream.write import saved_tensors, write_weights
from tests.support import tiny
from tests.support.inputs import edit_json

EVERY = {**tiny.VARIANTS, **tiny.MORE}
NARROWED = ("llama-tied", "qwen2-mixed", "gemma", "gemma3", "olmo2")
"""Whose residual streams become narrower too: tied heads, embeddings that are scaled, norms after blocks."""
ALIKE = ("mixtral", "qwen2_moe", "granitemoe", "llama")
"""Whose layers stay alike: a stock checkpoint, experts in the layout that they came in."""


def _folder(tmp_path: Path, **options: Any) -> Path:
    tiny.tiny_model(**options).save_pretrained(tmp_path / "dense")
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "dense")
    if options["family"] == "qwen2_moe":  # transformers save a window that they read as none
        edit_json(tmp_path / "dense" / "config.json", sliding_window=...)
    return tmp_path / "dense"


RECIPE = Recipe.build({"model": "tiny", "trust_remote_code": True, "device": "cpu"})


def _both(folder: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The dense model with its weights deferred, and in memory, each as runs load it."""
    source = ResolvedModel(str(folder), None, "", "tiny")
    return deferred_model(accounted(source, RECIPE), True), load_dense(source, RECIPE)[0]


def _files(folder: Path) -> dict[str, Any]:
    """What a folder holds: tensors of every file, and other files as they are."""
    return {
        path.name: load_file(path) if path.suffix == ".safetensors" else path.read_bytes() for path in folder.iterdir()
    }


def _check_same(tmp_path: Path, dense: Path, plan: PruningPlan, shard_size: str = SHARD_SIZE) -> None:
    source = ResolvedModel(str(dense), None, "", "tiny")
    deferred = deferred_model(accounted(source, RECIPE), True)
    loaded = type(deferred).from_pretrained(dense)
    streamed, saved = tmp_path / "streamed", tmp_path / "saved"
    for folder in (streamed, saved):
        folder.mkdir()
    model, reference = apply_plan(deferred, plan), apply_plan(loaded, plan)
    write_model(streamed, model, None, dense, state_dict={})
    written: list[int] = []
    write_weights(streamed, model, shard_size, written.append)
    if shard_size == SHARD_SIZE:
        write_model(saved, reference, None, dense)
    else:
        write_model(saved, reference, None, dense, state_dict={})
        reference.save_pretrained(tmp_path / "shards", max_shard_size=shard_size)
        for path in (tmp_path / "shards").glob("model*.safetensors*"):
            path.rename(saved / path.name)
    ours, theirs = _files(streamed), _files(saved)
    assert ours.keys() == theirs.keys()
    count = 0
    for name, file in theirs.items():
        if not isinstance(file, dict):
            assert ours[name] == file, name
            continue
        assert ours[name].keys() == file.keys(), name
        for key, tensor in file.items():
            count += tensor.nbytes
            assert ours[name][key].dtype == tensor.dtype and torch.equal(ours[name][key], tensor), key
    assert sum(written) == count


WRITTEN = {name for name in EVERY if EVERY[name]["family"] == "youtu"}
"""Where transformers write zeros into the row of the padding token while they load."""


@pytest.mark.parametrize("variant", sorted(WRITTEN))
def test_weights_that_change_while_they_are_loaded_are_refused(variant: str, tmp_path: Path) -> None:
    source = ResolvedModel(str(_folder(tmp_path, **EVERY[variant])), None, "", "tiny")
    with pytest.raises(UnsupportedModelError, match=r"tiny: the code of youtu changes weights while it loads them"):
        deferred_model(accounted(source, RECIPE), True)


@pytest.mark.parametrize("variant", [name for name in EVERY if name not in WRITTEN])
def test_every_family_is_written_as_from_memory(variant: str, tmp_path: Path) -> None:
    dense = _folder(tmp_path, **EVERY[variant], dtype=torch.bfloat16)
    model = tiny.tiny_model(**EVERY[variant])
    _check_same(tmp_path, dense, tiny.random_plan(model, 3))


@pytest.mark.parametrize("variant", ALIKE)
def test_layers_that_stay_alike_make_a_stock_checkpoint(variant: str, tmp_path: Path) -> None:
    dense = _folder(tmp_path, **EVERY[variant])
    model = tiny.tiny_model(**EVERY[variant])
    anatomy = anatomy_of(model.config)
    sizes = tuple(
        (place.dense[0] - 1, *place.dense[1:]) if place.kind == "experts" else place.dense for place in anatomy
    )
    _check_same(tmp_path, dense, tiny.plan_for(model, Structure(sizes), 1))
    assert "multipruner" not in (tmp_path / "streamed" / "config.json").read_text()


@pytest.mark.parametrize("variant", NARROWED)
def test_narrower_residual_streams(variant: str, tmp_path: Path) -> None:
    """A plan of version 3: embeddings, norms and heads are cut, and some of them rescaled."""
    dense = _folder(tmp_path, **EVERY[variant])
    config = tiny.tiny_model(**EVERY[variant]).config
    anatomy, kept = anatomy_of(config), (*range(20), *range(28, 40))
    rest = tuple(number for number in range(48) if number not in kept)
    structure = replace(tiny.random_structure(anatomy, 5), hidden=len(kept))
    plan = PruningPlan.from_structure(
        structure, Ranking(tiny.random_ranking(anatomy, 0).blocks, (*kept, *rest)), anatomy, model="tiny",
        model_type=spec_for(config).model_type,
    )  # fmt: skip
    assert '"version": 3' in plan.to_json()
    _check_same(tmp_path, dense, plan)


def test_shards_and_their_index_are_those_of_transformers(tmp_path: Path) -> None:
    dense = _folder(tmp_path, **EVERY["qwen3"])
    _check_same(tmp_path, dense, tiny.random_plan(tiny.tiny_model(**EVERY["qwen3"]), 3), shard_size="30KB")
    assert len(list((tmp_path / "streamed").glob("model-*.safetensors"))) > 2


def test_files_of_the_decoder_alone_are_read(tmp_path: Path) -> None:
    """Their names lack the prefix that the language model's have."""
    whole = tiny.tiny_model(**EVERY["llama-tied"])
    folder = _folder(tmp_path, **EVERY["llama-tied"])
    whole.model.save_pretrained(folder)  # pyright: ignore
    edit_json(folder / "config.json", architectures=["LlamaForCausalLM"])
    _check_same(tmp_path, folder, tiny.random_plan(whole, 3))


def test_fingerprints_are_those_of_the_loaded_model(tmp_path: Path) -> None:
    """A plan may be of a run that loaded the weights in another type."""
    deferred, loaded = _both(_folder(tmp_path, **EVERY["qwen3-tied"], dtype=torch.bfloat16))
    read: list[int] = []
    assert has_fingerprint(deferred, fingerprint(loaded), read.append)
    assert sum(read) == sum(parameter.nbytes for parameter in loaded.parameters())
    assert has_fingerprint(deferred, fingerprint(loaded.float()), read.append)
    with torch.no_grad():
        loaded.get_parameter("model.layers.1.mlp.up_proj.weight")[3, 4] += 1
    assert not has_fingerprint(deferred, fingerprint(loaded), read.append)


def test_weights_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    model = tiny.tiny_model(**EVERY["llama"])
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.up_proj.weight")[0, 0] = torch.nan
    with pytest.raises(NumericsError, match=r"model\.layers\.0\.mlp\.up_proj\.weight holds NaN"):
        write_weights(tmp_path, model, "5GB", lambda done: None)


def _deferred(values: torch.Tensor, reads: list[int]) -> Deferred:
    from multipruner.stream.deferred import Read

    def read() -> torch.Tensor:
        reads.append(1)
        return values

    return Deferred(values.to("meta"), Read(read))


def test_operations_are_done_when_values_are_asked_for() -> None:
    reads: list[int] = []
    values = torch.arange(24.0).reshape(4, 6)
    tensor = _deferred(values, reads)
    made = torch.cat([tensor.T[[1, 0, 4]], torch.stack([tensor, tensor * 2])[1].T]).to(torch.bfloat16)
    halves = made.chunk(2, dim=1)
    assert not reads and halves[1].shape == (9, 2) and halves[1].dtype == torch.bfloat16
    wanted = torch.cat([values.T[[1, 0, 4]], (values * 2).T]).to(torch.bfloat16)[:, 2:]
    assert torch.equal(values_of(halves[1]), wanted)
    apart = tensor.reshape(4, 3, 2).transpose(1, 2).reshape(4, 6).contiguous().view(24)
    assert torch.equal(values_of(apart), values.reshape(4, 3, 2).transpose(1, 2).reshape(24))
    assert torch.equal(tensor, tensor.clone()) and not torch.equal(tensor, tensor * 2)


def test_what_several_are_made_of_is_read_once_and_let_go() -> None:
    reads: list[int] = []
    parts = _deferred(torch.arange(12.0).reshape(4, 3), reads).unbind()
    values = Values(parts)
    assert [values.of(part).tolist() for part in parts] == torch.arange(12.0).reshape(4, 3).tolist()
    assert len(reads) == 1 and not values._kept


def test_nothing_writes_into_a_file() -> None:
    with pytest.raises(TypeError, match="would write into a tensor that is in a file"):
        _deferred(torch.ones(2), []).add_(1)


def test_tied_weights_are_one_tensor(tmp_path: Path) -> None:
    deferred, _ = _both(_folder(tmp_path, **EVERY["llama-tied"]))
    pruned = apply_plan(deferred, tiny.random_plan(tiny.tiny_model(**EVERY["llama-tied"]), 1))
    assert "lm_head.weight" not in saved_tensors(pruned) and "model.embed_tokens.weight" in saved_tensors(pruned)
