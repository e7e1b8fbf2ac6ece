"""What a checkpoint on disk owes to whoever opens it with plain transformers, for every family that has a row.

A checkpoint is opened by ``AutoModelForCausalLM`` and must generate, train, take adapters, compile and be evaluated
as any other. (That the same holds for a model in memory is in test_generation, of stock checkpoints in test_stock.)
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from multipruner.checkpoint.cut import apply_plan
from multipruner.checkpoint.load import load
from multipruner.checkpoint.save import save
from multipruner.core import families as architecture
from multipruner.core.families import anatomy_of
from multipruner.core.structure import GONE, Anatomy, Size, Structure
from multipruner.eval import run_tasks
from tests.support import tiny

TOLERANCE = 5e-5
VARIANTS = tiny.CONTRACT
variants = pytest.mark.parametrize("variant", VARIANTS)
STEPS = 5


def _cut(dense: Structure, anatomy: Anatomy, *changes: tuple[int, str, Size]) -> Structure:
    """Another size for blocks of some layers and kinds."""
    for layer, kind, size in changes:
        dense = dense.replace(anatomy.at(layer % anatomy.layers, kind), size)
    return dense


def _first_attention_gone(dense: Structure, anatomy: Anatomy) -> Structure:
    return _cut(dense, anatomy, (0, "attention", GONE))


def _last_attention_gone(dense: Structure, anatomy: Anatomy) -> Structure:
    return _cut(dense, anatomy, (-1, "attention", GONE))


def _layer_gone(dense: Structure, anatomy: Anatomy) -> Structure:
    return _cut(dense, anatomy, (1, "attention", GONE), (1, "mlp", GONE), (2, "mlp", (9,)))


def _unequal_kv_heads(dense: Structure, anatomy: Anatomy) -> Structure:
    groups, queries = dense[anatomy.at(1, "attention")]
    return _cut(dense, anatomy, (1, "attention", (groups // 2, queries)))


def _unequal_channels(dense: Structure, anatomy: Anatomy) -> Structure:
    return _cut(dense, anatomy, (0, "mlp", (31,)), (1, "mlp", GONE))


def _everything(dense: Structure, anatomy: Anatomy) -> Structure:
    """All at once; a layer more than the others have is there to be removed."""
    for cut in (_last_attention_gone, _first_attention_gone, _unequal_kv_heads, _unequal_channels):
        dense = cut(dense, anatomy)
    return _cut(dense, anatomy, (-2, "attention", GONE), (-2, "mlp", GONE)) if anatomy.layers > 3 else dense


STRUCTURES = {
    "first attention gone": _first_attention_gone,
    "last attention gone": _last_attention_gone,
    "layer gone": _layer_gone,
    "unequal KV heads": _unequal_kv_heads,
    "unequal channels": _unequal_channels,
    "everything": _everything,
}


def _pruned(variant: str, structure: str) -> tuple[PreTrainedModel, Any]:
    dense = tiny.tiny_model(**{"layers": 4, **tiny.VARIANTS[variant]})
    anatomy = anatomy_of(dense.config)
    plan = tiny.plan_for(dense, STRUCTURES[structure](anatomy.dense, anatomy), seed=2)
    return apply_plan(dense, plan), plan


def _save(folder: Path, variant: str, structure: str = "everything") -> tuple[PreTrainedModel, Path]:
    model, plan = _pruned(variant, structure)
    return model, save(folder, model, tiny.tiny_tokenizer(), plan=plan, report={}, card="")


def _open(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    return model(tiny.random_ids()).logits


def _decode(model: Any, ids: torch.Tensor, mask: torch.Tensor, cache: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens [sequences, steps] and their logits [sequences, steps, vocabulary]."""
    output = model.generate(
        ids, attention_mask=mask, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False,
        cache_implementation=cache, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return output.sequences[:, ids.shape[1] :], torch.stack(output.logits, 1)


def test_every_family_is_here() -> None:
    here = {tiny.VARIANTS[variant]["family"] for variant in VARIANTS}
    assert here | {options["family"] for options in tiny.MORE.values()} == set(architecture.FAMILIES)


@pytest.mark.parametrize("structure", STRUCTURES)
@variants
def test_a_checkpoint_computes_and_decodes_as_the_model_in_memory(variant: str, structure: str, tmp_path: Path) -> None:
    model, folder = _save(tmp_path / "out", variant, structure)
    assert model.config.model_type.startswith("multipruner_"), "layers differ, so no stock class can say it"
    opened = _open(folder)
    assert torch.equal(_logits(opened), _logits(model))
    assert torch.equal(_logits(load(folder, trust_remote_code=True)), _logits(model))
    ids = tiny.random_ids(2, 9)
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[0, :4], mask[0, :4] = 0, 0
    tokens, logits = _decode(opened, padded, mask, "dynamic")
    for row, own in enumerate((ids[:1, 4:], ids[1:])):  # each alone and without padding, by the model in memory
        alone, reference = _decode(model, own, torch.ones_like(own), "dynamic")
        assert (logits[row] - reference[0]).abs().max() < TOLERANCE
        assert torch.equal(tokens[row], alone[0])
    static, static_logits = _decode(opened, padded, mask, "static")
    assert (static_logits - logits).abs().max() < TOLERANCE
    assert torch.equal(static, tokens)


@variants
def test_a_checkpoint_trains_with_gradient_checkpointing(variant: str, tmp_path: Path) -> None:
    model: Any = _open(_save(tmp_path / "out", variant)[1]).train()
    ids, losses = tiny.random_ids(4, 16), []
    if model.supports_gradient_checkpointing:  # the stand-in's own code has none
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    for _ in range(4):
        loss = model(ids, labels=ids).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.1
    model.save_pretrained(tmp_path / "trained")
    assert torch.equal(_logits(load(tmp_path / "trained", trust_remote_code=True)), _logits(model.eval()))


@variants
def test_adapters_of_peft_attach_train_and_merge(variant: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, folder = _save(tmp_path / "out", variant)
    spec, base = architecture.FAMILIES[tiny.VARIANTS[variant]["family"]], _open(folder)
    linear = {name for name, module in base.named_modules() if isinstance(module, (torch.nn.Linear, Conv1D))} - {
        spec.head
    }
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=6, target_modules="all-linear"))
    assert {
        name.partition(".lora_A")[0] for name, _ in adapted.base_model.model.named_parameters() if "lora_A" in name
    } == linear
    assert torch.equal(_logits(adapted), _logits(model)), "new adapters change nothing"
    ids, losses = tiny.random_ids(4, 16), []
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.01)
    for _ in range(4):
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    with_adapter = _logits(adapted.eval())
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(_open(folder), tmp_path / "adapter")
    assert torch.equal(_logits(again), with_adapter), "the adapter alone, put on the checkpoint again"
    merged = adapted.merge_and_unload()
    assert type(merged) is type(base) and not any("lora" in name for name in merged.state_dict())
    assert (_logits(merged) - with_adapter).abs().max() < TOLERANCE
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(_logits(_open(tmp_path / "merged")), _logits(merged))


def _check_compiled(variant: str, backend: str, folder: Path) -> None:
    """Forward and backward of the compiled model against the plain one; compiled in one graph."""
    torch.compiler.reset()
    model: Any = _open(_save(folder, variant)[1])
    compiled, ids = torch.compile(model, backend=backend, fullgraph=True), tiny.random_ids()
    gradients = []
    for each in (model, compiled):
        model.zero_grad()
        output = each(ids, labels=ids, use_cache=False)
        output.loss.backward()
        gradients.append((output.logits.detach(), *(p.grad.clone() for p in model.parameters())))
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=TOLERANCE)
    torch.compiler.reset()


def test_a_checkpoint_compiles_forward_and_backward(tmp_path: Path) -> None:
    _check_compiled("llama-tied", "aot_eager", tmp_path / "out")


@pytest.mark.slow
@variants
def test_a_checkpoint_compiles_with_the_default_backend(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("torch's default backend needs a C++ compiler")
    # kernels that were compiled for another instruction set would be taken from the user's cache
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kernels"))
    _check_compiled(variant, "inductor", tmp_path / "out")


@variants
def test_untrusted_code_is_refused_where_nobody_can_be_asked(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the argument forgotten transformers ask on a terminal; without one they have to fail at once."""
    _, folder = _save(tmp_path / "out", variant)
    with Path(os.devnull).open() as nobody:
        monkeypatch.setattr(sys, "stdin", nobody)
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            AutoModelForCausalLM.from_pretrained(folder)


def test_the_command_line_of_lm_eval_judges_a_checkpoint(tmp_path: Path) -> None:
    model, folder = _save(tmp_path / "out", "qwen2-mixed")
    rows = [
        {"q": f"w{a} w{b}", "choices": [f"w{c} w{d}", f"w{e}"], "gold": a % 2}
        for a, b, c, d, e in tiny.random_ids(9, 5).tolist()
    ]
    data, tasks = tmp_path / "rows.jsonl", tmp_path / "tasks"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks.mkdir()
    (tasks / "tiny.yaml").write_text(
        f"task: tiny\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: '{{gold}}'\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    command = [
        sys.executable, "-m", "lm_eval", "--model", "hf",
        "--model_args", f"pretrained={folder},trust_remote_code=True,dtype=float32", "--tasks", "tiny",
        "--include_path", str(tasks), "--device", "cpu", "--batch_size", "4", "--log_samples",
        "--output_path", str(tmp_path / "results"),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-3000:]
    (result,) = (tmp_path / "results").rglob("results_*.json")
    expected = run_tasks(model, tiny.tiny_tokenizer(), ["tiny"], include_path=tasks)["tiny"].metrics["acc"]
    assert json.loads(result.read_text())["results"]["tiny"]["acc,none"] == pytest.approx(expected.value)
    (samples,) = (tmp_path / "results").rglob("samples_tiny_*.jsonl")
    answered = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(answered) == len(rows)
    for sample in answered:
        said = [_log_likelihood(model, sample["doc"]["q"], choice) for choice in sample["doc"]["choices"]]
        assert [float(pair[0]) for pair in sample["filtered_resps"]] == pytest.approx(said, abs=1e-4)


@torch.no_grad()
def _log_likelihood(model: PreTrainedModel, context: str, choice: str) -> float:
    before, after = (tiny.tiny_tokenizer()(text).input_ids for text in (context, choice))
    logits = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1].log_softmax(-1)
    return logits.gather(1, torch.tensor(after)[:, None]).sum().item()
