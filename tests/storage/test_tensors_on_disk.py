"""Matrices on disk instead of in memory: the same to the bit, nothing left behind, a full disk named."""

from __future__ import annotations

import gc
import resource
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from multipruner.commands.main import main
from multipruner.core.errors import OutputError
from multipruner.engine.cutting import Projection
from multipruner.engine.moments import gather
from multipruner.engine.prunable import Prunable
from multipruner.importance.table import rank
from multipruner.repair.scoring import Repair
from multipruner.storage.tensors_on_disk import OnDisk
from tests.support.commands import arguments
from tests.support.tiny import random_ids, tiny_model

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("MULTIPRUNER_CACHE", str(folder))
    return folder


@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), min_size=1, max_size=3)), max_size=6))
def test_what_comes_back_is_what_went_in(kinds: list[tuple[torch.dtype, list[int]]]) -> None:
    shelf = OnDisk[int]()
    tensors = [(torch.randn(shape) * 100).to(dtype) for dtype, shape in kinds]
    for number, tensor in enumerate(tensors):
        shelf[number] = tensor.mT if tensor.dim() > 1 else tensor
    for number, tensor in reversed(list(enumerate(tensors))):
        back = shelf[number]
        assert back.dtype == tensor.dtype and torch.equal(back, tensor.mT if tensor.dim() > 1 else tensor)
        back.fill_(1)  # a copy: what is kept stays
        assert torch.equal(shelf[number], tensor.mT if tensor.dim() > 1 else tensor)
    assert list(shelf) == list(range(len(tensors))) and len(shelf) == len(tensors)


def test_a_key_can_be_given_another_tensor_and_removed() -> None:
    shelf = OnDisk[str]()
    shelf["a"], shelf["b"] = torch.arange(3), torch.ones(2)
    shelf["a"] = torch.zeros(5)
    assert torch.equal(shelf["a"], torch.zeros(5)) and torch.equal(shelf["b"], torch.ones(2))
    del shelf["a"]
    assert "a" not in shelf and list(shelf) == ["b"]
    with pytest.raises(KeyError):
        shelf["a"]


def test_the_file_has_no_name(own_cache: Path) -> None:
    shelf = OnDisk[str]()
    shelf["a"] = torch.ones(1000)
    assert not list(own_cache.iterdir())
    del shelf
    gc.collect()
    assert not list(own_cache.iterdir())


def test_a_full_disk_says_where_and_loses_nothing(own_cache: Path) -> None:
    shelf = OnDisk[str]()
    shelf["a"] = torch.arange(1000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OutputError, match="MULTIPRUNER_CACHE") as caught:
            shelf["b"] = torch.ones(1 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(own_cache) in str(caught.value) and "4 MiB" in str(caught.value)
    assert torch.equal(shelf["a"], torch.arange(1000)) and "b" not in shelf
    shelf["b"] = torch.ones(4)
    assert torch.equal(shelf["b"], torch.ones(4))


@pytest.mark.parametrize("how", ["lstsq", "bias"])
def test_order_and_repair_from_disk_are_those_from_memory(how: str) -> None:
    prunable = Prunable.of(tiny_model(family="llama", attention_bias=True, mlp_bias=True))
    text = random_ids(batch=12, length=20)
    made = []
    for place in (dict, OnDisk):
        statistics = gather(prunable, text, place=place)
        assert isinstance(statistics.grams, place)
        ranking = rank("second-order", prunable, statistics)
        repair = Repair(prunable, statistics, ranking, how=how)  # type: ignore[arg-type]
        whole = Projection.of(prunable.layers[1].get_submodule("mlp.down_proj"))
        mlp = prunable.anatomy.at(1, "mlp")
        first, again = repair(mlp, (24,), whole), repair(mlp, (24,), whole)
        assert torch.equal(first.weight, again.weight) and again.bias is not None
        made.append((ranking, dict(statistics.grams), first))
    (ranking, grams, projection), (other_ranking, other_grams, other) = made
    assert ranking == other_ranking and grams.keys() == other_grams.keys()
    assert all(torch.equal(grams[key], other_grams[key]) for key in grams)
    assert torch.equal(projection.weight, other.weight)
    assert projection.bias is not None and other.bias is not None and torch.equal(projection.bias, other.bias)


def test_a_run_with_moments_on_disk_writes_the_same_weights(dense: Path, tmp_path: Path, own_cache: Path) -> None:
    for name in ("memory", "disk"):
        assert main(arguments(dense, tmp_path / name, "--moments", name)) == 0
    memory, disk = (load_file(tmp_path / name / "model.safetensors") for name in ("memory", "disk"))
    assert memory.keys() == disk.keys() and all(torch.equal(memory[key], disk[key]) for key in memory)
    left = {path.relative_to(own_cache).parts[0] for path in own_cache.rglob("*") if path.is_file()}
    assert left <= {"rehearsals"}, "nothing of the moments stays"
