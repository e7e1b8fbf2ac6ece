"""The text tower of a model of several modalities as an ordinary checkpoint in the cache."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from multipruner.config.recipe import Recipe
from multipruner.core.errors import UnknownModelError, UnsupportedModelError
from multipruner.core.families import spec_for
from multipruner.core.families.towers import NOW, TOWERS
from multipruner.sources.dense import load_dense
from multipruner.sources.resolve import ResolvedModel, resolve
from multipruner.storage.cache import cache_folder
from multipruner.storage.tensor_bytes import parts_of, write_parts
from multipruner.storage.tensor_headers import stored_tensors
from tests.support.inputs import edit_json
from tests.support.tiny import random_ids
from tests.support.wrappers import WRAPPERS, row_of, tiny_wrapper, write_wrapper


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MULTIPRUNER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def recipe(folder: Path) -> Recipe:
    return Recipe.build({"model": str(folder), "device": "cpu"})


def found(folder: Path, said: list[str] | None = None) -> ResolvedModel:
    return resolve(recipe(folder), (said if said is not None else []).append)


def test_every_row_has_a_tiny_wrapper() -> None:
    assert {row_of(kind).model_type for kind in WRAPPERS} == set(TOWERS)


@pytest.mark.parametrize("as_held", [False, True])
@pytest.mark.parametrize("kind", WRAPPERS)
def test_the_tower_computes_what_the_wrapper_does(kind: str, as_held: bool, tmp_path: Path) -> None:
    folder = write_wrapper(tmp_path / "whole", kind, as_held=as_held)
    source = found(folder, said := [])
    assert (
        source.wrapper == folder and source.name == "whole" and Path(source.path_or_id).is_relative_to(cache_folder())
    )
    assert any("its text tower alone is loaded" in line for line in said), said
    model, tokenizer = load_dense(source, recipe(folder))
    whole = tiny_wrapper(kind)
    with torch.no_grad():
        assert torch.equal(model(random_ids()).logits, whole(input_ids=random_ids()).logits)
    assert len(tokenizer) == 97 and spec_for(model.config).class_name == type(model).__name__
    text = sum(w.numel() for n, w in whole.named_parameters() if n.startswith(NOW))
    assert model.num_parameters() == text


def test_both_layouts_are_met() -> None:
    """What the tests write is what they say: not one layout twice."""
    assert NOW[0] != row_of("llava").earlier[0] and len({row.earlier[0] for row in TOWERS.values()}) == 2


def test_it_is_taken_out_once_and_anew_when_the_files_change(tmp_path: Path) -> None:
    folder = write_wrapper(tmp_path / "whole", "llava", as_held=True)
    first = found(folder, said := [])
    assert any("taking the text tower (llama," in line for line in said)
    assert found(folder, said := []).path_or_id == first.path_or_id
    assert not any("taking" in line for line in said)
    (Path(first.path_or_id) / "model.safetensors").write_bytes(b"cut")
    assert found(folder).path_or_id == first.path_or_id and stored_tensors(Path(first.path_or_id))
    weights = {name: tensor + 1 for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert found(folder).path_or_id != first.path_or_id


def test_values_are_the_files_own_bytes(tmp_path: Path) -> None:
    folder = write_wrapper(tmp_path / "whole", "llava", dtype=torch.bfloat16)
    assert len(list(folder.glob("*.safetensors"))) > 2
    made = Path(found(folder).path_or_id)
    theirs = {name: part for path in folder.glob("*.safetensors") for name, part in parts_of(path).items()}
    ours = {name: part for path in made.glob("*.safetensors") for name, part in parts_of(path).items()}
    names = TOWERS["llava"].names(theirs, spec_for({"model_type": "llama"}))
    assert set(names.values()) == set(ours) and len(ours) == 4 * 9 + 3
    for name, own in names.items():
        assert b"".join(ours[own].chunks()) == b"".join(theirs[name].chunks()), name
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (made / name).read_bytes() == (folder / name).read_bytes()


def test_two_matrices_where_one_is_said_are_two(tmp_path: Path) -> None:
    """As the stock class has it, whose configuration ties by default."""
    folder = write_wrapper(tmp_path / "whole", "mistral3", as_held=True)
    edit_json(folder / "config.json", tie_word_embeddings=True)
    model, _ = load_dense(found(folder), recipe(folder))
    assert not model.config.tie_word_embeddings
    with torch.no_grad():
        assert torch.equal(model(random_ids()).logits, tiny_wrapper("mistral3")(input_ids=random_ids()).logits)


def test_sizes_may_stand_among_the_wrappers_own(tmp_path: Path) -> None:
    folder = write_wrapper(tmp_path / "whole", "qwen2_5_vl")
    flat(folder)
    model, _ = load_dense(found(folder), recipe(folder))
    with torch.no_grad():
        assert torch.equal(model(random_ids()).logits, tiny_wrapper("qwen2_5_vl")(input_ids=random_ids()).logits)


def flat(folder: Path) -> None:
    """Have a configuration say what it says of text among its own keys, as older ones do."""
    record = json.loads((folder / "config.json").read_text())
    inner = record.pop("text_config")
    inner.pop("model_type")
    (folder / "config.json").write_text(json.dumps({**inner, **record}))


def _other_family(folder: Path) -> None:
    record = json.loads((folder / "config.json").read_text())
    edit_json(folder / "config.json", text_config={**record["text_config"], "model_type": "mpt"})


def _quantised(folder: Path) -> None:
    edit_json(folder / "config.json", quantization_config={"quant_method": "awq"})


def _no_tower(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({f"wrapped.{name}": tensor for name, tensor in weights.items()}, folder / "model.safetensors")


def _half(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 3000)


def _lacking(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in weights.items() if "3.mlp.up" not in name}, folder / "model.safetensors"
    )


def _pruned(folder: Path) -> None:
    (folder / "plan.json").write_text(json.dumps({"format": "multipruner-plan"}))


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "another family": (
        _other_family,
        UnsupportedModelError,
        r"several modalities \(llava\), and its text tower: .*mpt",
    ),
    "quantised": (_quantised, UnsupportedModelError, r"is quantised \(awq\)"),
    "no tower": (_no_tower, UnsupportedModelError, r"no tensor in its files is of a text tower"),
    "half a file": (_half, UnknownModelError, "no whole safetensors file"),
    "lacking": (_lacking, UnsupportedModelError, r"lacks weights: model\.layers\.3\.mlp\.up_proj\.weight"),
    "pruned": (_pruned, UnsupportedModelError, "is pruned already"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_taken_out_is_one_line(kind: str, tmp_path: Path) -> None:
    edit, error, message = REFUSED[kind]
    folder = write_wrapper(tmp_path / "whole", "llava", as_held=True)
    edit(folder)
    with pytest.raises(error) as caught:
        load_dense(found(folder), recipe(folder))
    assert re.search(message, str(caught.value)) and "\n" not in str(caught.value), caught.value
    assert not list(cache_folder().glob("towers/*")) or kind == "lacking"
    assert not [path for path in cache_folder().rglob("*.partial*") if path.name != "towers"]


def test_parts_are_written_as_they_were(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6, dtype=torch.int16).reshape(2, 3), "a": torch.randn(3, 5), "none": torch.ones(0, 4),
               "half": torch.randn(7).bfloat16()}  # fmt: skip
    save_file(tensors, tmp_path / "one.safetensors")
    done: list[int] = []
    write_parts(tmp_path / "two.safetensors", parts_of(tmp_path / "one.safetensors"), done.append)
    again = load_file(tmp_path / "two.safetensors")
    assert all(
        torch.equal(again[name], tensor) and again[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    assert again.keys() == tensors.keys() and sum(done) == sum(tensor.nbytes for tensor in tensors.values())
    for size in (4, 30, 150):
        (tmp_path / "cut.safetensors").write_bytes((tmp_path / "one.safetensors").read_bytes()[:size])
        with pytest.raises(UnknownModelError, match="no whole safetensors file"):
            parts_of(tmp_path / "cut.safetensors")
