"""Tiny random models of every family, plans for them and a tokenizer: milliseconds, no network.

Nothing about them is degenerate: KV groups of two query heads, ``head_dim`` that is not hidden/heads, biases where
the family has them, norms away from one.
"""

from __future__ import annotations

import copy
import random
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.overrides import TorchFunctionMode
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from multipruner.core import families
from multipruner.core.axes import BLOCK_KINDS
from multipruner.core.blocks import BlockSpec
from multipruner.core.families import anatomy_of, spec_for
from multipruner.core.plan import BlockUnits, PruningPlan, Ranking, Units
from multipruner.core.structure import GONE, Anatomy, Structure
from multipruner.engine.cutting import Projection, silenced

VOCABULARY = 97
ROUNDING = 1e-4
"""Between logits of the same weights: grouped products of experts are rounded by where in memory their operands lie."""
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CLASSES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
STOCK = tuple(CLASSES)
FAMILIES = (*STOCK, "baichuan")
MIXED_WINDOWS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama"},
    "llama-tied": {"family": "llama", "tied": True},
    "llama-biased": {"family": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {"family": "mistral", "sliding_window": None},
    "mistral-sliding": {"family": "mistral", "sliding_window": 3},
    "qwen2": {"family": "qwen2"},
    "qwen2-mixed": {
        "family": "qwen2",
        "layers": 4,
        "use_sliding_window": True,
        "sliding_window": 3,
        "layer_types": MIXED_WINDOWS,
    },
    "qwen3": {"family": "qwen3"},
    "qwen3-tied": {"family": "qwen3", "tied": True},
    "baichuan": {"family": "baichuan"},
}
"""Keyword arguments of :func:`tiny_model` for the contract tests."""
_EXPERTS = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
_LATENT = {"kv_lora_rank": 20, "q_lora_rank": 28, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 16,
           "num_key_value_heads": 4, "without": ("head_dim",)}  # fmt: skip
_SHARED = {**_LATENT, **_EXPERTS, "n_routed_experts": 5, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
_GROUPS = {"n_routed_experts": 12, "n_group": 3, "topk_group": 2, "num_experts_per_tok": 3}
_PATTERN = ["sliding_attention", "full_attention", "sliding_attention"]
_LINEAR = ["linear_attention", "full_attention", "linear_attention"]
_DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 6}
_MAMBA_2 = {"mamba_n_heads": 6, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 4}
_NEMOTRON = {"mamba_num_heads": 6, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 4}
_FALCON = {"ffn_hidden_size": 40, "num_kv_heads": 2, "new_decoder_architecture": True, "without": ("head_dim",)}
MORE: dict[str, dict[str, Any]] = {
    "apertus": {"family": "apertus"},
    "arcee": {"family": "arcee"},
    "ernie4_5": {"family": "ernie4_5"},
    "exaone4": {"family": "exaone4", "layer_types": _PATTERN, "sliding_window": 3},
    "gemma": {"family": "gemma", "tied": True},
    "gemma2": {"family": "gemma2", "tied": True, "sliding_window": 3, "final_logit_softcapping": 2.0},
    "gemma3": {"family": "gemma3_text", "tied": True, "layer_types": _PATTERN, "sliding_window": 3,
               "rope_parameters": {name: {"rope_type": "default", "rope_theta": theta} for name, theta in
                                   (("sliding_attention", 10000.0), ("full_attention", 50000.0))}},
    "glm": {"family": "glm"},
    "glm4": {"family": "glm4"},
    "granite": {"family": "granite", "residual_multiplier": 0.4, "logits_scaling": 3.0, "embedding_multiplier": 2.0},
    "helium": {"family": "helium", "head_dim": 12},
    "hunyuan": {"family": "hunyuan_v1_dense"},
    "ministral": {"family": "ministral", "layer_types": _PATTERN, "sliding_window": 3},
    "nemotron": {"family": "nemotron"},
    "olmo": {"family": "olmo"},
    "olmo2": {"family": "olmo2"},
    "olmo3": {"family": "olmo3", "layer_types": _PATTERN, "sliding_window": 3},
    "seed_oss": {"family": "seed_oss"},
    "smollm3": {"family": "smollm3", "no_rope_layers": [1, 0, 1]},
    "starcoder2": {"family": "starcoder2", "tied": True},
    "cohere": {"family": "cohere", "tied": True, "logit_scale": 0.5},
    "cohere-normed": {"family": "cohere", "use_qk_norm": True},
    "cohere2": {"family": "cohere2", "layer_types": _PATTERN, "sliding_window": 3},
    "falcon-7b": {"family": "falcon", "tied": True, "ffn_hidden_size": 40, "without": ("head_dim",)},
    "falcon-11b": {"family": "falcon", **_FALCON, "num_ln_in_parallel_attn": 1},
    "falcon-40b": {"family": "falcon", **_FALCON, "bias": True},
    "gpt_bigcode": {"family": "gpt_bigcode", "tied": True, "n_inner": 40, "num_key_value_heads": 1},
    "gpt2": {"family": "gpt2", "tied": True, "n_inner": 40},
    "gptj": {"family": "gptj", "n_inner": None, "rotary_dim": 8},
    "bloom": {"family": "bloom", "tied": True, "without": ("head_dim", "intermediate_size")},
    "codegen": {"family": "codegen", "n_inner": 40, "num_attention_heads": 8, "rotary_dim": 4},
    "gpt_neo": {"family": "gpt_neo", "tied": True, "head_dim": None, "window_size": 3,
                "attention_types": [[["global", "local"], 1], [["local"], 1]]},
    "gpt_neox": {"family": "gpt_neox", "head_dim": None, "rotary_pct": 0.5},
    "gpt_neox-serial": {"family": "gpt_neox", "head_dim": None, "rotary_pct": 0.5, "use_parallel_residual": False},
    "granite_swa": {"family": "granite_swa", "residual_multiplier": 0.4, "logits_scaling": 3.0,
                    "layer_types": _PATTERN, "sliding_window": 3},
    "hyperclovax": {"family": "hyperclovax", "residual_multiplier": 0.4, "logits_scaling": 0.5},
    "jais2": {"family": "jais2"},
    "ministral3": {"family": "ministral3", "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 50000.0, "factor": 16.0, "original_max_position_embeddings": 8,
        "llama_4_scaling_beta": 0.1}},
    "nanochat": {"family": "nanochat", "final_logit_softcapping": 2.0},
    "opt": {"family": "opt", "tied": True, "ffn_dim": 40, "head_dim": None},
    "biogpt": {"family": "biogpt", "tied": True, "head_dim": None},
    "xglm": {"family": "xglm", "tied": True, "ffn_dim": 40, "head_dim": None},
    "persimmon": {"family": "persimmon", "head_dim": 12, "partial_rotary_factor": 0.5},
    "vaultgemma": {"family": "vaultgemma", "tied": True, "layer_types": _PATTERN, "sliding_window": 3},
    "phi": {"family": "phi"},
    "phi-normed": {"family": "phi", "head_dim": 12, "qk_layernorm": True},
    "phi3": {"family": "phi3"},
    "stablelm": {"family": "stablelm", "head_dim": 12, "partial_rotary_factor": 0.5, "use_qkv_bias": True},
    "stablelm-parallel": {"family": "stablelm", "head_dim": 12, "partial_rotary_factor": 0.5,
                          "use_parallel_residual": True},
    "deepseek_v2": {"family": "deepseek_v2", **_SHARED, "q_lora_rank": None, "first_k_dense_replace": 1},
    "deepseek_v3": {"family": "deepseek_v3", **_SHARED, "first_k_dense_replace": 1},
    "deepseek_v2-groups": {"family": "deepseek_v2", **_SHARED, **_GROUPS, "first_k_dense_replace": 1,
                           "topk_method": "group_limited_greedy"},
    "deepseek_v3-groups": {"family": "deepseek_v3", **_SHARED, **_GROUPS, "first_k_dense_replace": 1},
    "glm4_moe_lite": {"family": "glm4_moe_lite", **_SHARED},
    "youtu": {"family": "youtu", **_LATENT},
    "youtu-whole": {"family": "youtu", **_LATENT, "q_lora_rank": None},
    "ernie4_5_moe": {"family": "ernie4_5_moe", "moe_intermediate_size": 24, "moe_num_experts": 5, "moe_k": 2,
                     "moe_num_shared_experts": 1, "moe_layer_start_index": 1, "moe_layer_end_index": -1},
    "dots1": {"family": "dots1", **_EXPERTS, "n_routed_experts": 5, "n_shared_experts": 1, "first_k_dense_replace": 1,
              "sliding_window": 3, "max_window_layers": 1},
    "glm4_moe": {"family": "glm4_moe", **_EXPERTS, "n_routed_experts": 5, "first_k_dense_replace": 1},
    "glm4_moe-groups": {"family": "glm4_moe", **_EXPERTS, **_GROUPS, "first_k_dense_replace": 1},
    "solar_open": {"family": "solar_open", **_EXPERTS, "n_routed_experts": 5},
    "solar_open-groups": {"family": "solar_open", **_EXPERTS, **_GROUPS},
    "exaone_moe": {"family": "exaone_moe", **_EXPERTS, "num_experts": 5, "layer_types": _PATTERN, "sliding_window": 3},
    "exaone_moe-groups": {"family": "exaone_moe", **_EXPERTS, **_GROUPS, "num_experts": 12, "sliding_window": 3,
                          "without": ("n_routed_experts",)},
    "mellum": {"family": "mellum", **_EXPERTS, "num_local_experts": 5, "layer_types": _PATTERN, "sliding_window": 3,
               "mlp_layer_types": ["dense", "sparse", "sparse"], "rope_parameters": {
                   kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in _PATTERN}},
    "flex_olmo": {"family": "flex_olmo", "hidden_size": 64, "num_experts": 5, "num_experts_per_tok": 2},
    "gpt_oss": {"family": "gpt_oss", "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 3},
    "granitemoe": {"family": "granitemoe", "num_local_experts": 5, "num_experts_per_tok": 2, "logits_scaling": 3.0,
                   "residual_multiplier": 0.4, "embedding_multiplier": 2.0},
    "granitemoeshared": {"family": "granitemoeshared", "num_local_experts": 5, "num_experts_per_tok": 2,
                         "shared_intermediate_size": 40, "intermediate_size": 24, "logits_scaling": 3.0,
                         "residual_multiplier": 0.4, "embedding_multiplier": 2.0},
    "minimax_m2": {"family": "minimax_m2", "num_local_experts": 5, "num_experts_per_tok": 2},
    "mixtral": {"family": "mixtral", "num_local_experts": 5, "num_experts_per_tok": 2},
    "olmoe": {"family": "olmoe", "hidden_size": 64, "num_experts": 5, "num_experts_per_tok": 2},
    "qwen2_moe": {"family": "qwen2_moe", **_EXPERTS, "num_experts": 5, "shared_expert_intermediate_size": 20},
    "qwen3_moe": {"family": "qwen3_moe", **_EXPERTS, "num_experts": 5, "mlp_only_layers": [1]},
    "bamba": {"family": "bamba", "attn_layer_indices": [1], **_MAMBA_2},
    "granitemoehybrid": {"family": "granitemoehybrid", "shared_intermediate_size": 40, "num_local_experts": 0,
                         "layer_types": _LINEAR, **_MAMBA_2,
                         "logits_scaling": 3.0, "residual_multiplier": 0.4, "embedding_multiplier": 2.0},
    "granitemoehybrid-experts": {"family": "granitemoehybrid", "shared_intermediate_size": 40, "num_local_experts": 5,
                                 "num_experts_per_tok": 2, "intermediate_size": 24, "layer_types": _LINEAR, **_MAMBA_2,
                                 "logits_scaling": 3.0, "residual_multiplier": 0.4, "embedding_multiplier": 2.0},
    "lfm2_moe": {"family": "lfm2_moe", "tied": True, "layer_types": ["conv", "full_attention", "conv"], "head_dim": 12,
                 **_EXPERTS, "num_experts": 5, "num_dense_layers": 1},
    "lfm2": {"family": "lfm2", "tied": True, "layer_types": ["conv", "full_attention", "conv"], "head_dim": 12,
             "intermediate_size": 58, "block_multiple_of": 8},
    "falcon_mamba": {"family": "falcon_mamba", "tied": True, "state_size": 6},
    "mamba": {"family": "mamba", "tied": True, "state_size": 6},
    "mamba2": {"family": "mamba2", "num_heads": 6, "head_dim": 16, "n_groups": 2, "state_size": 6, "chunk_size": 4},
    "nemotron_h": {"family": "nemotron_h", "layers": 6, **_NEMOTRON, "layers_block_type": [
                       "linear_attention", "mlp", "linear_attention", "full_attention", "mlp", "linear_attention"]},
    "nemotron_h-experts": {"family": "nemotron_h", "layers": 6, **_NEMOTRON, **_EXPERTS, "n_routed_experts": 5,
                           "moe_shared_expert_intermediate_size": 20, "layers_block_type": [
                               "linear_attention", "moe", "mlp", "full_attention", "linear_attention", "moe"]},
    "nemotron_h-latent": {"family": "nemotron_h", "layers": 6, **_NEMOTRON, **_EXPERTS, **_GROUPS,
                          "moe_shared_expert_intermediate_size": 20, "moe_latent_size": 28, "layers_block_type": [
                              "linear_attention", "moe", "mlp", "full_attention", "linear_attention", "moe"]},
    "qwen3_5_moe": {"family": "qwen3_5_moe_text", "layer_types": _LINEAR, **_DELTA, **_EXPERTS, "num_experts": 5,
                    "shared_expert_intermediate_size": 20},
    "qwen3_5": {"family": "qwen3_5_text", "layer_types": _LINEAR, **_DELTA},
    "qwen3_next": {"family": "qwen3_next", "layer_types": _LINEAR, **_DELTA, **_EXPERTS, "num_experts": 5,
                   "mlp_only_layers": [1], "shared_expert_intermediate_size": 20},
}  # fmt: skip
"""One of every family that is a row and nothing else, for ``tests/contracts/test_families.py``."""
NO_STATIC = ("gpt_neo",)
"""Of those, whose stock code takes the length of a static cache for that of the context (transformers 5.14)."""
CONTRACT = ["llama-tied", "llama-biased", "mistral-sliding", "qwen2-mixed", "qwen3", "baichuan"]
"""One of every family at least, for tests that take long."""
OWN_CODE = ["baichuan"]
"""Variants whose code travels with the checkpoint; there is no stock class for them."""


@cache
def mixes(family: str) -> bool:
    """Whether layers of a family mix tokens otherwise than by attention, in blocks that stay whole or leave whole."""
    return any(BLOCK_KINDS[block.kind].whole for block in families.FAMILIES[family].blocks)


def code_folder(family: str) -> Path:
    """The code of a family that transformers have not in a folder of its own, as a checkpoint would bring it."""
    folder = Path(tempfile.mkdtemp(prefix="tiny-")) / family
    shutil.copytree(Path(__file__).parent / f"{family}_code", folder, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def _classes(family: str) -> tuple[Any, Any]:
    if family in CLASSES:
        return CLASSES[family]
    if not families.FAMILIES[family].remote_code:
        config = CONFIG_MAPPING[family]
        return config, MODEL_FOR_CAUSAL_LM_MAPPING[config]
    name = f"modeling_{family}.{families.FAMILIES[family].prefix}ForCausalLM"
    model = get_class_from_dynamic_module(name, str(code_folder(family)))
    model.register_for_auto_class("AutoModelForCausalLM")
    model.config_class.register_for_auto_class("AutoConfig")
    return model.config_class, model


def tiny_model(
    family: str,
    *,
    tied: bool = False,
    layers: int = 3,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    without: tuple[str, ...] = (),
    **config: Any,
) -> PreTrainedModel:
    """A random dense model in evaluation mode: 4 query heads of 16 on 2 KV heads, hidden 48, 40 channels, 97 tokens.

    Baichuan's has as many KV heads as query heads and hidden 64. Further ``config`` goes to the configuration, which
    gets none of the keys in ``without``.
    """
    config_class, model_class = _classes(family)
    sizes = {"vocab_size": VOCABULARY} if families.FAMILIES[family].remote_code else SIZES
    config = {**sizes, families.FAMILIES[family].depth: layers, "tie_word_embeddings": tied, **config}
    config = {key: value for key, value in config.items() if key not in without}
    model = model_class(config_class(**copy.deepcopy(config)))  # some configurations change what they are given
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.5 if "embed" in name else 0.2
            parameter.copy_(noise * scale + ("norm" in name))
        for name, buffer in model.named_buffers():
            if name.endswith(("correction_bias", "expert_bias")):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.2)
    return model.to(dtype).eval()


def random_structure(anatomy: Anatomy, seed: int, *, drop: float = 0.25, partial: bool = False) -> Structure:
    """A random structure of a dense model: any width, each block gone with probability ``drop``.

    One block of each kind stays at least. Units within others stay whole, or with ``partial`` in any number. Of experts
    as many stay as a token goes through, or more.
    """
    rng, finer = random.Random(seed), random.Random(f"query heads {seed}")
    sizes = []
    stays = set(anatomy.of_layer(seed % anatomy.layers)) | {anatomy.of_kind(kind)[-1] for kind in anatomy.kinds[2:]}
    for number, place in enumerate(anatomy):
        first, *rest = place.dense
        size = (
            rng.randint(anatomy.least(BLOCK_KINDS[place.kind].names[0]), first),
            *(
                finer.randint(anatomy.least(axis.name), most) if partial else most
                for axis, most in zip(place.axes[1:], rest, strict=True)
            ),
        )
        gone = number not in stays and rng.random() < drop
        sizes.append(GONE if gone else size)
    return Structure(tuple(sizes))


def mixed_structure(anatomy: Anatomy) -> Structure:
    """The first layer has no attention, the last no MLP; of what else these two have, one unit is gone where it can."""
    ends = {0: "attention", anatomy.layers - 1: "mlp"}
    sizes = []
    for place in anatomy:
        first, *rest = place.dense
        less = (max(1, first - 1), *rest)
        sizes.append(GONE if ends.get(place.layer) == place.kind else less if place.layer in ends else place.dense)
    return Structure(tuple(sizes))


def random_ranking(anatomy: Anatomy, seed: int) -> Ranking:
    """A random order of the units of every axis of every block."""
    rng, finer = random.Random(seed), random.Random(f"query heads {seed}")

    def shuffled(units: Units) -> Units:
        if units and isinstance(units[0], tuple):
            return tuple(tuple(finer.sample(row, len(row))) for row in units)  # pyright: ignore
        return tuple(rng.sample(units, len(units)))  # pyright: ignore

    whole = Ranking.identity(anatomy)
    return Ranking(tuple(BlockUnits(tuple(map(shuffled, block.axes))) for block in whole.blocks))


def plan_for(model: PreTrainedModel, structure: Structure, seed: int = 0, along: tuple[str, ...] = ()) -> PruningPlan:
    """A plan that keeps randomly ranked parts of a model in a given structure, whose sizes name these axes as well."""
    anatomy = anatomy_of(model.config, along)
    ranking = random_ranking(anatomy, seed)
    model_type = spec_for(model.config).model_type
    return PruningPlan.from_structure(structure, ranking, anatomy, model="tiny", model_type=model_type)


def random_plan(model: PreTrainedModel, seed: int = 0, *, drop: float = 0.25) -> PruningPlan:
    """A random plan for a model: random structure, random parts."""
    return plan_for(model, random_structure(anatomy_of(model.config), seed, drop=drop), seed)


_PARTS = {"codegen": 4}
"""Of families whose heads lie in several parts: a unit is one of each."""


def masked_model(model: PreTrainedModel, plan: PruningPlan) -> PreTrainedModel:
    """The dense model with everything that a plan removes set to zero: the reference for every pruned model."""
    masked = copy.deepcopy(model)
    spec = spec_for(model.config)
    for number, place in enumerate(plan.anatomy):
        block = spec.block(place.kind)
        layer = masked.get_submodule(f"{spec.decoder}.{spec.layers}.{place.layer}")
        if block.routed:
            _mask_experts(layer.get_submodule(block.path), block, plan.blocks[number].axes, place.dense[-1])
            continue
        output = Projection.of(layer.get_submodule(block.within(block.output)), block.transposed)
        parts = _PARTS.get(spec.model_type, 1) if place.kind == "attention" else 1
        part = output.weight.shape[1] // parts
        own = list(_columns(plan, number, part // prod(place.dense[:3])))
        columns = [first * part + column for first in range(parts) for column in own]
        gone = torch.ones(output.weight.shape[1], dtype=torch.bool)
        gone[columns] = False
        with torch.no_grad():
            output.weight[:, gone] = 0
            if not columns and output.bias is not None:
                output.bias.zero_()
    return masked


class _Unchosen(TorchFunctionMode):
    """Within, the logits that a router's own code computes for some experts are minus infinity."""

    def __init__(self, router: torch.nn.Module, gone: list[int]) -> None:
        super().__init__()
        self._router, self._gone = router, gone

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.linear:
            result[..., self._gone] = -torch.inf
        return result


def _mask_experts(module: torch.nn.Module, block: BlockSpec, kept: tuple[Units, ...], each: int) -> None:
    """Have a block of experts choose among those that stay alone, or add nothing where it is gone.

    Where a router chooses among groups of experts, these have so many ``each`` and lie one after the other.
    """
    if not kept:
        module.register_forward_hook(silenced)
        return
    weight, *others = block.tensors
    router: Any = module.get_submodule(weight.path.removesuffix(".weight"))
    grouped = zip(*kept, strict=True) if len(kept) == 2 else [(0, kept[0])]
    left = {group * each + expert for group, own in grouped for expert in own}  # pyright: ignore
    route, gone = router.forward, sorted(set(range(len(router.weight))) - left)
    for path in (tensor.path for tensor in others if tensor.path.endswith(("correction_bias", "expert_bias"))):
        owner: Any = module.get_submodule(path.rpartition(".")[0])
        getattr(owner, path.rpartition(".")[2]).data[..., gone] = -1e9

    def masked(*args: Any) -> Any:
        with _Unchosen(router, gone):
            return route(*args)

    router.forward = masked


def _columns(plan: PruningPlan, block: int, width: int) -> Iterator[int]:
    """The columns of an output projection that stay, written out by hand."""
    place, kept = plan.anatomy[block], plan.blocks[block].axes
    if place.kind == "mlp" or not kept:
        yield from kept[0] if kept else ()  # pyright: ignore
        return
    if place.kind == "mixer":
        yield from range(width)
        return
    wide = width * prod(place.dense[2:3])
    for number, (group, queries) in enumerate(zip(*kept[:2], strict=True)):  # pyright: ignore
        for query in queries:  # pyright: ignore
            head = group * place.dense[1] + query
            values: Any = kept[2][number] if len(kept) > 2 else range(wide)
            yield from (head * wide + value for value in values)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word ``w4`` ... ``w96``, besides ``<pad> <s> </s> <unk>``; pads on the left."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(4, VOCABULARY))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
    )


def random_ids(batch: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Random token ids without special tokens, [batch, length]."""
    return torch.randint(4, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
