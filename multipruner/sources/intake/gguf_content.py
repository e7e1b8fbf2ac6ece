"""What a GGUF file holds, and what of it transformers would pass over: parts, tensors, rotary scaling."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multipruner.core.errors import UnsupportedModelError
from multipruner.core.families import FAMILIES
from multipruner.storage.memory import check_memory, free_memory
from multipruner.storage.tensor_headers import check_downloaded

_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
_FACTORS = "rope_freqs.weight"
_PASSED_OVER = re.compile(r"\.rot_embd$|^rope_freqs\.weight$|\.attn_rot_embd\.weight$")
"""Tensors that follow from the metadata, or that are read here."""
_NEEDED = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count",
           "attention.layer_norm_rms_epsilon")  # fmt: skip
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
"""Of every Llama that has such factors; only their ratio to the original context counts."""
_EXACT = 3e-6
"""Relative difference of rotary factors that are the same: some units in the last place of float32."""


@dataclass(frozen=True)
class GgufContent:
    """A GGUF file's tensors, and what its rotary embeddings are.

    Attributes:
        architecture: as the file names it.
        layers: how many decoder layers the metadata say.
        tensors: the names of all tensors.
        rope: ``rope_parameters`` of a configuration; ``None`` where transformers reads them itself.
    """

    architecture: str
    layers: int
    tensors: frozenset[str]
    rope: Mapping[str, Any] | None


def opened(path: Path) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Open a file of a whole language model, of whose tensors nothing is read before somebody asks.

    Returns:
        The reader, the metadata without the tokenizer's, and the tensors by their names.

    Raises:
        UnknownModelError: for a pointer in place of the file.
        UnsupportedModelError: for one part of several, and a file that is damaged.
    """
    import gguf

    check_downloaded(path)
    try:
        reader = gguf.GGUFReader(path)
        facts = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("tokenizer.")}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    except Exception as error:  # of every kind: the reader meets bytes that nobody checked
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnsupportedModelError(f"cannot read {path.name}: {reason}; download it again") from error
    _check_one_part(path, facts)
    architecture = str(facts.get("general.architecture"))
    lost = [f"{architecture}.{key}" for key in _NEEDED if f"{architecture}.{key}" not in facts]
    if lost:
        raise UnsupportedModelError(
            f"{path.name} has no {lost[0]}, so it is no whole language model; take another file"
        )
    _check_layers(path, facts[f"{architecture}.block_count"], tensors)
    return reader, facts, tensors


def read_content(path: Path) -> GgufContent:
    """Read a file's metadata and the names of its tensors; refuse what would be read wrongly.

    Raises:
        UnknownModelError, UnsupportedModelError: see :func:`opened`; also for a file of another family, and rotary
            scaling that no configuration can say exactly.
        MemoryShortError: when the unpacked weights do not fit into memory.
    """
    _, facts, tensors = opened(path)
    architecture = str(facts.get("general.architecture"))
    check_memory(
        f"the weights of {path.name}, unpacked,",
        sum(4 * int(t.n_elements) for t in tensors.values()) // 2,
        free_memory(),
    )
    rope = _rope(path, architecture, facts, tensors)
    return GgufContent(architecture, int(facts[f"{architecture}.block_count"]), frozenset(tensors), rope)


def check_places(name: str, content: GgufContent, places: Iterable[str], missing: Iterable[str]) -> None:
    """Hold a file's tensors against the model's: every tensor has its place, every place its tensor.

    Args:
        name: of the file, for errors.
        content: what it holds.
        places: names of the tensors of the model that was made of it.
        missing: those of them that transformers filled with random numbers.

    Raises:
        UnsupportedModelError: naming the first tensors that were passed over or made up.
    """
    import gguf

    made_up = sorted(missing)
    if made_up:
        raise UnsupportedModelError(
            f"{name} lacks weights: {', '.join(made_up[:3])}; it is no whole model, or a part of one (llama-gguf-split "
            "--merge puts parts together)"
        )
    kinds = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[content.architecture], content.layers)
    known = {table.get_name(place, try_suffixes=(".weight", ".bias")) for place in places}
    left = sorted(tensor for tensor in content.tensors - known if not _PASSED_OVER.search(tensor))
    if left:
        raise UnsupportedModelError(
            f"{name} has {len(left)} tensors that transformers passes over: {', '.join(left[:3])}; the model would "
            "compute something else without them: name the folder or Hub id that the file was made of"
        )


def _check_one_part(path: Path, facts: Mapping[str, Any]) -> None:
    named = _PART.search(path.name)
    count = int(facts.get("split.count") or (named[2] if named else 1))
    if count > 1:
        number = int(facts["split.no"]) + 1 if "split.no" in facts else int(named[1]) if named else 1
        whole = _PART.sub("", path.name) or path.stem
        raise UnsupportedModelError(
            f"{path.name} is part {number} of {count} of a model; put the parts together with "
            f"`llama-gguf-split --merge FIRST_PART {whole.removesuffix('.gguf')}.gguf`, and name that file"
        )


def _check_layers(path: Path, said: Any, tensors: Iterable[str]) -> None:
    numbers = {int(match[1]) for name in tensors if (match := re.match(r"blk\.(\d{1,9})\.", name))}
    if not isinstance(said, int) or said < 1 or numbers != set(range(min(said, len(numbers) + 1))):
        raise UnsupportedModelError(
            f"{path.name} says {said} layers (block_count) and holds {len(numbers)}; it is damaged, or a part "
            "of a model"
        )


def _rope(path: Path, architecture: str, facts: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the rotary embeddings as a configuration says them, where transformers reads the plain ones only."""
    if architecture not in FAMILIES:  # transformers names it in what it refuses
        return None
    own = {key.removeprefix(f"{architecture}."): value for key, value in facts.items()}
    base = float(own.get("rope.freq_base", 10000.0))
    width = int(own.get("attention.key_length") or own["embedding_length"] // own["attention.head_count"])
    rotated = int(own.get("rope.dimension_count") or width)
    kind, factor = own.get("rope.scaling.type", "none"), float(own.get("rope.scaling.factor", 1.0))
    scaled = kind != "none" and factor != 1.0
    of_length = sorted(name for name in tensors if name.startswith("rope_factors_"))
    rope = None
    if _FACTORS in tensors and not scaled:
        values = [float(value) for value in tensors[_FACTORS].data.reshape(-1)]
        rope = _llama3(values, base, width, int(own.get("context_length") or 0))
    elif kind == "linear" and scaled and _FACTORS not in tensors:
        rope = {"rope_type": "linear", "factor": factor, "rope_theta": base}
    attention = float(own.get("rope.scaling.attn_factor", own.get("rope.scaling.attn_factors", 1.0)))
    if (rope is None and (scaled or _FACTORS in tensors)) or of_length or rotated != width or attention != 1.0:
        what = _FACTORS if _FACTORS in tensors else ", ".join(of_length) or f"rope.scaling.type {kind}"
        raise UnsupportedModelError(
            f"{path.name} has rotary embeddings that cannot be read exactly ({what}, {rotated} of {width} dimensions); "
            "name the folder or Hub id that the file was made of"
        )
    return rope


def _llama3(factors: Sequence[float], base: float, width: int, context: int) -> dict[str, Any] | None:
    """Return the llama3 parameters that give these divisors of the plain frequencies, or ``None`` where none does.

    Args:
        factors: one for every pair of dimensions.
        base: of the rotary frequencies.
        width: of an attention head.
        context: positions that the file allows.
    """
    if len(factors) * 2 != width or not all(math.isfinite(value) and value > 0 for value in factors):
        return None
    factor = round(max(factors), 4)
    lengths = [context / factor, *(2.0**power for power in range(5, 21)), *(1000.0 * n for n in range(1, 65))]
    lengths += _fitted(factors, base, factor)
    for length in dict.fromkeys(round(length) for length in lengths if 1 <= length < 2**31):
        asked = {**_LLAMA3, "factor": factor, "original_max_position_embeddings": length}
        given = _divisors(asked, base, len(factors))
        if all(math.isclose(one, other, rel_tol=_EXACT) for one, other in zip(given, factors, strict=True)):
            return {"rope_type": "llama3", "rope_theta": base, **asked}
    return None


def _fitted(factors: Sequence[float], base: float, factor: float) -> list[float]:
    """Return original contexts by the pairs between plain and divided: there the divisor's inverse is linear in
    them.
    """
    found = []
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    for number, value in enumerate(factors):
        if 1.0 + _EXACT < value < factor * (1 - _EXACT):
            smooth = (1 / value - 1 / factor) / (1 - 1 / factor)
            frequency = base ** (-number / len(factors))
            found.append((low + smooth * (high - low)) * 2 * math.pi / frequency)
    return found


def _divisors(asked: Mapping[str, float], base: float, pairs: int) -> list[float]:
    """Return what llama3's rotary scaling divides the plain frequencies by (transformers'
    ``_compute_llama3_parameters``).
    """
    from types import SimpleNamespace

    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": base, **asked}
    config: Any = SimpleNamespace(rope_parameters=rope, head_dim=2 * pairs, standardize_rope_params=lambda: None)
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, None)
    return [base ** (-number / pairs) / value for number, value in enumerate(frequencies.tolist())]
