"""What servers read off a folder: vLLM takes sizes by a layer's number, and finds attentions by reading ``forward``.

Here its way of reading is followed, with transformers alone (``vllm/model_executor/models/transformers``, 0.32);
``.ci/vllm`` runs vLLM itself.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from multipruner.checkpoint.cut import apply_plan
from multipruner.checkpoint.save import save
from multipruner.core.families import FAMILIES, anatomy_of
from tests.support import tiny

EVERY = {**tiny.VARIANTS, **tiny.MORE}
for name in ("gemma2", "vaultgemma"):  # vLLM's own attention caps, torch's does not
    EVERY[name] = {**EVERY[name], "attn_logit_softcapping": None}
OTHERS = ("bloom", "codegen", "falcon-7b", "falcon-11b", "falcon-40b", "gpt_bigcode", "gpt_neo", "gptj", "xglm")
"""Their attention does not go through transformers' table of functions, so that vLLM's backend cannot take it over."""
SINKS = ("granite_swa", "gpt_oss")
"""What their attention adds is vLLM's to compute; the function that stands in for it here knows nothing of it."""
UNATTENDING = ("mamba", "mamba2", "falcon_mamba")
"""They have no attention."""
LEFT_OUT = (*tiny.OWN_CODE, *OTHERS, *SINKS, *UNATTENDING)
QUICK = ("llama-tied", "qwen2-mixed", "gemma3")
VARIANTS = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in EVERY if name not in LEFT_OUT
]


def _attentions(model: nn.Module) -> Iterator[Any]:
    """The modules whose ``forward`` looks up an attention function once, and calls what it found once."""
    for module in model.modules():
        tree = ast.parse(textwrap.dedent(inspect.getsource(type(module).forward)))
        assigned = [node for node in ast.walk(tree) if isinstance(node, ast.Assign | ast.AnnAssign) and node.value]
        names = {
            target.id
            for node in assigned
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            if isinstance(target, ast.Name) and ast.unparse(node.value or node).startswith("ALL_ATTENTION_FUNCTIONS")
        }
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
        if sum(getattr(call.func, "id", "") in names for call in calls) == 1:
            yield module


@pytest.mark.parametrize("variant", VARIANTS)
def test_vllm_finds_every_layer_under_its_number(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = {"sliding_window": 64} if EVERY[variant].get("sliding_window") else {}  # there is no mask here
    dense = tiny.tiny_model(**{**EVERY[variant], **wide})
    plan = tiny.plan_for(dense, tiny.mixed_structure(anatomy_of(dense.config)), seed=3)
    pruned = apply_plan(dense, plan)
    save(tmp_path / "run", pruned, None, plan=plan, report={}, card="")
    seen: dict[int, tuple[int, int]] = {}
    widths: dict[int, int] = {}

    def attention(module: Any, query: torch.Tensor, key: torch.Tensor, *rest: Any, **options: Any) -> Any:
        seen[module.layer_idx] = (query.shape[1], key.shape[1])
        widths[module.layer_idx] = query.shape[3]
        return sdpa_attention_forward(module, query, key, *rest, **options)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "vllm", attention)
    config = AutoConfig.from_pretrained(tmp_path / "run", trust_remote_code=True)
    config._attn_implementation = "vllm"
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True).eval()
    opened: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "run", trust_remote_code=True)
    model.load_state_dict(opened.state_dict(), strict=False)
    found = list(_attentions(model))
    had = {place.layer for place in plan.anatomy if place.kind == "attention"}
    attending = [number for number, layer in enumerate(plan.layers) if layer in had]
    assert attending and [module.layer_idx for module in found] == attending
    assert all(module.config._attn_implementation == "vllm" and module.is_causal for module in found)
    with torch.no_grad():
        ids = tiny.random_ids()
        difference = model(ids, use_cache=False).logits - pruned(ids, use_cache=False).logits
    assert difference.abs().max() < 1e-4
    keys = FAMILIES[plan.model_type].heads_keys
    told = {number: tuple(getattr(config.per_layer_config[number], key) for key in keys) for number in attending}
    told.pop(0, None)  # its attention is gone
    assert seen == told
    assert getattr(config, "logit_scale", 1.0) == pytest.approx(FAMILIES[plan.model_type].logit_scale(dense.config))
    if getattr(config, "kv_lora_rank", None) is None:
        said = {number: getattr(config.per_layer_config[number], "head_dim", None) for number in told}
        assert widths == {number: said[number] or config.hidden_size // told[number][0] for number in told}
