"""How a checkpoint is said in GGUF: llama.cpp's architecture for it, sizes per layer, rotary frequencies.

Few architectures read sizes per layer. ``deci`` computes exactly what a Llama does, with biases if there are any, so
Mistral and Qwen2 fit it as well; ``openelm`` computes what a Qwen3 with tied embeddings does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multipruner.checkpoint.classes import MODEL_TYPE
from multipruner.checkpoint.config import ROPE_PAIRS, VALUE_DIM, sizes_in
from multipruner.core.errors import UnknownModelError, UnsupportedModelError
from multipruner.core.families import FAMILIES, Family
from multipruner.core.structure import Anatomy, Structure

from .gguf_tensors import Architecture, LayerSizes, Shape, numbers_of

OTHER_HEADS = "fewer value dimensions or RoPE pairs than the dense model's"
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary frequencies that do not depend on the length of the text: factors of the plain ones say them all."""


_DECI = Architecture("deci", per_layer=True, interleaved=True, rope_factors=True, biases=True)
_OPENELM = Architecture("openelm", per_layer=True, fused=True, tied=True, whole=True)
_LLAMA = Architecture("llama", interleaved=True, rope_factors=True, biases=True)
_QWEN2 = Architecture("qwen2", biases=True, square=True)
_QWEN3 = Architecture("qwen3")


@dataclass(frozen=True, slots=True)
class GgufFamily:
    """How one model family is said in GGUF.

    Attributes:
        stock: llama.cpp's architecture for the family, with one size for all layers.
        mixed: one that computes the same and reads sizes per layer.
        head_norms: norms of single query and key heads: path within the attention block, name in the file.
    """

    stock: Architecture
    mixed: Architecture
    head_norms: tuple[tuple[str, str], ...] = ()


GGUF_FAMILIES: dict[str, GgufFamily] = {
    "llama": GgufFamily(_LLAMA, _DECI),
    "mistral": GgufFamily(_LLAMA, _DECI),
    "qwen2": GgufFamily(_QWEN2, _DECI),
    "qwen3": GgufFamily(_QWEN3, _OPENELM, head_norms=(("q_norm", "attn_q_norm"), ("k_norm", "attn_k_norm"))),
}
"""The families that can be exported, by ``config.model_type`` of the dense model."""


@dataclass(frozen=True, slots=True)
class GgufModel:
    """A checkpoint's configuration in the terms of a GGUF file.

    Attributes:
        spec: the family's row.
        config: a stock configuration of the family; its sizes are not the layers'.
        layers: what each layer keeps.
        architecture: what the file tells llama.cpp.
        shape: the dimensions that all tensors share.
        rope_factors: what divides the plain rotary frequencies; empty if they are plain.
        rope_scale: of cosine and sine.
    """

    spec: Family
    config: Any
    layers: tuple[LayerSizes, ...]
    architecture: Architecture
    shape: Shape
    rope_factors: tuple[float, ...]
    rope_scale: float

    @property
    def window(self) -> int | None:
        """The sliding window, if a layer has one that is shorter than the context."""
        types = getattr(self.config, "layer_types", None)
        window = getattr(self.config, "sliding_window", None) if types is None or "sliding_attention" in types else None
        return window if window is not None and window < self.config.max_position_embeddings else None


def read_model(folder: Path) -> GgufModel:
    """Read a folder's configuration; no code in the folder is run.

    Raises:
        UnknownModelError: when the folder holds no checkpoint.
        UnsupportedModelError: when llama.cpp cannot compute this model; it says what works instead.
    """
    from transformers import CONFIG_MAPPING

    path = folder / "config.json"
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnknownModelError(f"{path} cannot be read ({error}); name the folder of a finished run") from error
    model_type = str(record.get("model_type")).removeprefix(MODEL_TYPE)
    family = GGUF_FAMILIES.get(model_type)
    if family is None or model_type not in FAMILIES:
        raise UnsupportedModelError(refusal(model_type, "auto_map" not in record))
    if any({VALUE_DIM, ROPE_PAIRS} & set(entry) for entry in (record.get("per_layer_config") or {}).values()):
        raise UnsupportedModelError(
            f"{folder} has heads of {OTHER_HEADS}, which no architecture of llama.cpp reads by the layer. What works "
            "instead: load the folder with transformers; or prune without --value-dim-step and --rope-pair-step"
        )
    layers, head_dim = (
        sizes_by_layer(*sizes_in(record, FAMILIES[model_type])),
        FAMILIES[model_type].counts(record)["head_dim"],
    )
    for key in ("model_type", "architectures", "auto_map", "per_layer_config", "transformers_version"):
        record.pop(key, None)
    # one head: the sizes count, and no width of the file's own may offend a stock check
    config: Any = CONFIG_MAPPING[model_type](
        **{**record, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": head_dim}
    )
    if config.hidden_act != "silu":
        raise UnsupportedModelError(f"hidden_act {config.hidden_act!r}: llama.cpp's architectures here compute silu")
    factors, scale = _rotary(config, head_dim)
    architecture = architecture_for(model_type, family, config, layers, head_dim, plain=not factors and scale == 1.0)
    tied = bool(config.tie_word_embeddings)
    shape = Shape(config.hidden_size, head_dim, config.vocab_size, tied, architecture, family.head_norms)
    return GgufModel(FAMILIES[model_type], config, layers, architecture, shape, factors, scale)


def sizes_by_layer(
    anatomy: Anatomy, structure: Structure, layers: Sequence[int] | None = None
) -> tuple[LayerSizes, ...]:
    """Return what each layer keeps, by the kinds of its blocks.

    Args:
        anatomy: the blocks.
        structure: their sizes.
        layers: the layers that count; default: all.
    """
    return tuple(
        {anatomy[number].kind: structure[number] for number in anatomy.of_layer(layer)}
        for layer in (range(anatomy.layers) if layers is None else layers)
    )


def architecture_for(
    model_type: str, family: GgufFamily, config: Any, layers: tuple[LayerSizes, ...], head_dim: int, plain: bool
) -> Architecture:
    """Return the family's own architecture where it can say this model, else the one for layers that differ.

    Raises:
        UnsupportedModelError: when neither can; it says why, and what works instead.
    """
    differ = any(sizes != layers[0] for sizes in layers) or not all(layers[0].values())
    biased = getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)
    narrow = numbers_of(FAMILIES[model_type], layers[0])["num_attention_heads"] * head_dim != config.hidden_size

    def faults(row: Architecture) -> list[str]:
        told = {
            "layers that differ": differ and not row.per_layer,
            "output projection besides the embeddings": row.tied and not config.tie_word_embeddings,
            "scaled rotary embeddings": not plain and not row.rope_factors,
            "biases": biased and not row.biases,
            "queries of another width than the hidden state": row.square and narrow,
        }
        return [text for text, there in told.items() if there]

    for row in (family.stock, family.mixed):
        if not faults(row):
            return row
    told = "; ".join(f"{row.name!r} takes no {', no '.join(faults(row))}" for row in (family.stock, family.mixed))
    uniform = "; or prune with --layout uniform" if faults(family.stock) == ["layers that differ"] else ""
    raise UnsupportedModelError(
        f"llama.cpp cannot compute this {model_type} model: {told}. What works instead: load the folder with "
        f"transformers{uniform}"
    )


def refusal(model_type: str, stock: bool) -> str:
    """Return why a family has no such file, and what works instead.

    Args:
        model_type: of the family.
        stock: whether the checkpoint is one that other converters know.
    """
    instead = (
        "this folder is a stock checkpoint: llama.cpp's own convert_hf_to_gguf.py may know the family"
        if stock
        else "load the folder with transformers; or prune to layers that are all alike, which gives a stock "
        "checkpoint, and use llama.cpp's own convert_hf_to_gguf.py"
    )
    return (
        f"llama.cpp has no architecture with per-layer sizes for the family {model_type!r} "
        f"(GGUF export knows {', '.join(GGUF_FAMILIES)}). What works instead: {instead}"
    )


def _rotary(config: Any, head_dim: int) -> tuple[tuple[float, ...], float]:
    """Return what divides the plain rotary frequencies (nothing if they are plain), and the scale of cosine and sine.

    transformers' own functions compute the frequencies, so every type that does not depend on the text's length fits.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind not in _ROPE_TYPES or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModelError(
            f"rotary embeddings {rope} cannot be written; types known here: {', '.join(_ROPE_TYPES)}, on whole heads"
        )
    if kind == "default":
        return (), 1.0
    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, None)
    plain = [rope["rope_theta"] ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    return tuple(p / f for p, f in zip(plain, frequencies.tolist(), strict=True)), float(scale)
