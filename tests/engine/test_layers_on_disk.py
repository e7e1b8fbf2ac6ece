"""Layers on disk, one at a time in memory, give what all layers in memory give, to the bit, in as few walks as said."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from multipruner.checkpoint.cut import apply_plan
from multipruner.core.structure import Structure
from multipruner.engine.moments import gather
from multipruner.engine.objective import CalibrationObjective, PlainObjective
from multipruner.engine.precision import Held
from multipruner.engine.prunable import Prunable
from multipruner.importance.energies import sensitivities
from multipruner.importance.table import rank
from multipruner.repair.final_norm import GainFit
from multipruner.repair.scoring import Repair
from multipruner.repair.stream import accumulated
from multipruner.storage import layers_on_disk
from multipruner.storage.layers_on_disk import LayersOnDisk
from multipruner.storage.tensors_on_disk import mapped
from tests.support.tiny import MORE, VARIANTS, plan_for, random_ids, random_structure, tiny_model

NAMES = ("llama-biased", "qwen2-mixed", "gemma2", "falcon-40b", "gpt2", "phi")
"""Biases, windows, norms behind blocks and capped logits, blocks side by side, transposed weights."""


def _both(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[Prunable, Prunable, Held]:
    """The same model in memory, and with its layers on disk; computed in float32."""
    model: Any = tiny_model(**{**VARIANTS, **MORE}[name])
    model.to(dtype).save_pretrained(folder)
    first, second = (AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval() for _ in range(2))
    whole, walked = (Prunable.of(model, dtype) for model in (first, second))
    Held(first, dtype, torch.float32)
    held = Held(second, dtype, torch.float32, walked.layers)
    walked.on_disk = held.on_disk
    return whole, walked, held


def _of(prunable: Prunable, loss: Any, structure: Structure) -> Iterator[Tensor]:
    """What a run computes on its way, one thing after another."""
    ids = random_ids(6, 12)
    moments = gather(prunable, ids)
    yield from moments.grams.values()
    ranking = rank("second-order", prunable, moments)
    repair = Repair(prunable, moments, ranking)
    with prunable.in_order(ranking, repair):
        yield torch.tensor(sensitivities(prunable, ids[:3]))
        dense = prunable.dense
        yield torch.tensor([repair.errors(block, [size, dense[block]]) for block, size in enumerate(structure) if size])
        objective = CalibrationObjective(prunable, ids, batch_size=2, loss=loss)
        yield torch.tensor([objective(one) for one in (dense, structure, dense.replace(1, structure[1]))])
        fit = GainFit(prunable, ids.numel())
        outputs = accumulated(prunable, structure, ids, ends=fit.see)
        yield from (outputs[block].weight for block in sorted(outputs))
        gain = fit.solve()
        with prunable.with_outputs(outputs, gain):
            yield torch.tensor(objective(structure))


@pytest.mark.parametrize("name", NAMES)
def test_every_pass_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    whole, walked, _ = _both(name, tmp_path)
    structure = random_structure(whole.anatomy, 3)
    loss = "nll" if whole.cap is not None else "kl"
    with torch.no_grad():
        pairs = zip(_of(whole, loss, structure), _of(walked, loss, structure), strict=True)
        for number, (one, other) in enumerate(pairs):
            assert torch.equal(one, other), number


@pytest.mark.parametrize("name", ["llama-tied", "falcon-7b"])
def test_the_stock_model_runs_and_is_cut_as_ever(name: str, tmp_path: Path) -> None:
    whole, walked, held = _both(name, tmp_path)
    ids, structure = random_ids(), random_structure(whole.anatomy, 5)
    plan = plan_for(whole.model, structure)
    with torch.no_grad():
        assert torch.equal(whole.model(ids).logits, walked.model(ids).logits)
    assert PlainObjective(whole, ids)(structure) == PlainObjective(walked, ids)(structure)
    held.release()
    assert held.on_disk is not None and walked.model.dtype == torch.bfloat16
    assert not held.on_disk.enter(0), "nothing comes in any more"
    cut = apply_plan(walked.model, plan, own=mapped)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    expected, dense = apply_plan(again, plan).state_dict(), walked.model.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in cut.state_dict().items())
    for weight in cut.parameters():
        weight.data.zero_()
    assert all(torch.equal(tensor, dense[key]) for key, tensor in again.state_dict().items()), (
        "it is a model of its own"
    )


def test_passes_are_few_walks_with_one_layer_in_memory(tmp_path: Path) -> None:
    _, walked, held = _both("llama", tmp_path)
    on_disk, ids, most = held.on_disk, random_ids(8, 12), 0
    assert on_disk is not None
    stored = {weight: weight.data_ptr() for weight in walked.layers.parameters()}

    def watched(module: nn.Module, args: Any) -> None:
        nonlocal most
        here = sum(any(stored[w] != w.data_ptr() for w in layer.parameters()) for layer in walked.layers)
        most = max(most, here)

    for layer in walked.layers:
        layer.input_layernorm.register_forward_pre_hook(watched)

    def walks() -> float:
        took, on_disk.read = on_disk.walks, 0
        return took

    moments = gather(walked, ids)
    assert walks() == 1
    ranking = rank("second-order", walked, moments)
    assert walks() == 1
    with walked.in_order(ranking, Repair(walked, moments, ranking)):
        objective = CalibrationObjective(walked, ids, batch_size=2, loss="kl")
        assert walks() == 1
        objective(random_structure(walked.anatomy, 1, drop=0))
        assert walks() == 1
        sensitivities(walked, ids[:3])
        assert 1 < walks() <= 2
        accumulated(walked, random_structure(walked.anatomy, 1, drop=0), ids)
        assert walks() <= 1
    assert most == 1


def test_an_error_leaves_layers_as_they_were(tmp_path: Path) -> None:
    whole, walked, held = _both("llama", tmp_path)
    ranking = rank("magnitude", walked)
    with pytest.raises(RuntimeError, match="stop"), walked.in_order(ranking):
        walked.module(0)
        raise RuntimeError("stop")
    own = walked.module(0).state_dict()
    assert all(torch.equal(tensor, own[key]) for key, tensor in whole.module(0).state_dict().items())
    held.release()
    assert held.on_disk is not None and held.on_disk.read


def test_layers_go_when_others_come(tmp_path: Path) -> None:
    layers = [nn.Linear(3, 3, bias=False) for _ in range(3)]
    stored = [layer.weight.data for layer in layers]
    on_disk = LayersOnDisk(layers, lambda weight: weight.double())
    assert not on_disk.enter(1), "it has not begun"
    on_disk.begin()

    def negate(number: int) -> None:
        layers[number].weight.data.neg_()

    assert [on_disk.enter(number) for number in (1, 1, 2)] == [True, False, True]
    assert [layer.weight.dtype for layer in layers] == [torch.float32, torch.float32, torch.float64]
    with on_disk.arranged(negate), torch.inference_mode():
        layers[0](torch.zeros(1, 3, dtype=torch.float64))
        assert torch.equal(layers[0].weight, -stored[0].double())
        assert not layers[0].weight.is_inference(), "gradients can go through it"
    assert on_disk.read == 3 and layers[0].weight.data_ptr() == stored[0].data_ptr()
    on_disk.end()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64])
def test_a_mapped_tensor_is_a_tensor(dtype: torch.dtype) -> None:
    source = torch.arange(12).view(3, 4).to(dtype)
    other = mapped(source[:, 1:])
    assert torch.equal(other, source[:, 1:]) and other.is_contiguous()
    other[0] = 7
    assert other[0].tolist() == [7, 7, 7] and source[0].tolist() == [0, 1, 2, 3]
    assert mapped(source[:0]).shape == (0, 4)


def test_the_layer_that_comes_next_is_read_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forth and back, its stored weights and no others; what comes in, and when, is the same without."""
    layers = [nn.Linear(3, 3, bias=False) for _ in range(4)]
    owner = {layer.weight.data_ptr(): number for number, layer in enumerate(layers)}
    seen: list[int] = []

    def touched(stored: list[Tensor], unwanted: Event) -> None:
        seen.extend(owner[tensor.data_ptr()] for tensor in stored)

    monkeypatch.setattr(layers_on_disk, "_touch", touched)
    for ahead in (True, False):
        on_disk = LayersOnDisk(layers, lambda weight: weight.double(), ahead)
        on_disk.begin()
        for number in (0, 1, 2, 3, 2, 1, 0):
            assert on_disk.enter(number)
            assert [layer.weight.dtype == torch.float64 for layer in layers] == [n == number for n in range(4)]
            if on_disk._reading is not None:
                on_disk._reading.result()
        on_disk.end()
        assert on_disk.read == 7 and all(layer.weight.data_ptr() in owner for layer in layers)
        assert seen == ([1, 2, 3, 0, 1, 0] if ahead else [])
        seen.clear()
