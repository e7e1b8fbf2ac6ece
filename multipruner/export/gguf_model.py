"""How a checkpoint is said in GGUF: llama.cpp's architecture for it, sizes per layer, rotary frequencies.

Per-layer sizes are read by ``deci`` (and a few others), not by ``llama`` or ``qwen2``; it computes exactly what a Llama
does, with biases if there are any, so Mistral and Qwen2 fit it as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multipruner.architecture import FAMILIES, ArchitectureSpec
from multipruner.errors import UnknownModelError, UnsupportedModelError
from multipruner.modeling import MODEL_TYPE
from multipruner.structure import LayerSize, Structure

from .gguf_tensors import Shape

PER_LAYER = "deci"
"""llama.cpp's architecture for layers of different sizes."""
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary frequencies that do not depend on the length of the text: factors of the plain ones say them all."""


@dataclass(frozen=True, slots=True)
class GgufFamily:
    """How one model family is said in GGUF.

    Attributes:
        stock: llama.cpp's architecture for the family, with one size for all layers.
        interleaved: whether that architecture rotates pairs of neighbours (``deci`` does), not halves.
        square: whether it wants queries as wide as the hidden state.
        rope_factors: whether it reads factors of the rotary frequencies (``deci`` does).
    """

    stock: str
    interleaved: bool
    square: bool
    rope_factors: bool


GGUF_FAMILIES: dict[str, GgufFamily] = {
    "llama": GgufFamily("llama", interleaved=True, square=False, rope_factors=True),
    "mistral": GgufFamily("llama", interleaved=True, square=False, rope_factors=True),
    "qwen2": GgufFamily("qwen2", interleaved=False, square=True, rope_factors=False),
}
"""The families that can be exported, by ``config.model_type`` of the dense model."""


@dataclass(frozen=True, slots=True)
class GgufModel:
    """A checkpoint's configuration in the terms of a GGUF file.

    Attributes:
        spec: the family's row.
        config: a stock configuration of the family; its sizes are not the layers'.
        sizes: the layers'.
        architecture: what the file tells llama.cpp.
        shape: the dimensions that all tensors share.
        rope_factors: what divides the plain rotary frequencies; empty if they are plain.
        rope_scale: of cosine and sine.
    """

    spec: ArchitectureSpec
    config: Any
    sizes: Structure
    architecture: str
    shape: Shape
    rope_factors: tuple[float, ...]
    rope_scale: float

    @property
    def per_layer(self) -> bool:
        """Whether sizes are written as arrays."""
        return self.architecture == PER_LAYER

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
    sizes = _sizes(record)
    family = GGUF_FAMILIES.get(model_type)
    if family is None or model_type not in FAMILIES:
        raise UnsupportedModelError(_refusal(model_type, "auto_map" not in record))
    heads = record["num_attention_heads"]
    head_dim = record.get("head_dim") or record["hidden_size"] // heads
    for key in ("model_type", "architectures", "auto_map", "per_layer_config", "transformers_version"):
        record.pop(key, None)
    # one head: the sizes count, and no width of the file's own may offend a stock check
    config: Any = CONFIG_MAPPING[model_type](
        **{**record, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": head_dim}
    )
    if config.hidden_act != "silu":
        raise UnsupportedModelError(f"hidden_act {config.hidden_act!r}: llama.cpp's architectures here compute silu")
    factors, scale = _rotary(config, head_dim)
    plain = not factors and scale == 1.0
    uniform = len(set(sizes)) == 1 and sizes[0].has_attention and sizes[0].has_mlp
    fits = not family.square or sizes[0].query_heads * head_dim == config.hidden_size
    stock = uniform and fits and (plain or family.rope_factors)
    shape = Shape(
        config.hidden_size,
        head_dim,
        config.vocab_size,
        bool(config.tie_word_embeddings),
        interleaved=family.interleaved or not stock,
    )
    architecture = family.stock if stock else PER_LAYER
    return GgufModel(FAMILIES[model_type], config, sizes, architecture, shape, factors, scale)


def _sizes(record: Mapping[str, Any]) -> Structure:
    """Sizes per layer: ``per_layer_config`` says what differs from the global ones (its keys may be padded: "02")."""
    table = {int(number): entry for number, entry in (record.get("per_layer_config") or {}).items()}
    layers = []
    for number in range(int(record.get("num_hidden_layers") or 0)):
        own = {**record, **table.get(number, {})}
        skip = own.get("skip") or ()
        heads = 0 if "attention" in skip else own["num_attention_heads"]
        kv_heads = (own.get("num_key_value_heads") or heads) if heads else 0
        layers.append(LayerSize(heads, kv_heads, 0 if "mlp" in skip else own["intermediate_size"]))
    return Structure(tuple(layers))


def _refusal(model_type: str, stock: bool) -> str:
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
    """What divides the plain rotary frequencies (nothing if they are plain), and the scale of cosine and sine.

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
